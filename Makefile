# `make` lists the targets. Those that need packages make .venv on their first run and reuse it afterwards.
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check --constraint constraints.txt

# Whose blocks the tests convert and the sweep times. They come without their dependencies, so that none of them replaces
# torch or brings a large package that these blocks never use; PEER_NEEDS is what importing them takes.
PEERS := monai segmentation_models_pytorch timm torchvision
PEER_NEEDS := huggingface_hub numpy pillow pyyaml safetensors tqdm

# For `make gpu`, in seconds: the whole run, and a folder for what it leaves.
BUDGET ?= 540
OUT ?= gpu-results

.DEFAULT_GOAL := help
.PHONY: help test test-interp test-plain perf lint gpu clean
.NOTPARALLEL:

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Written last: an interrupted or failed installation starts again.
$(VENV)/installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable '.[dev]' $(PEER_NEEDS)
	$(PIP) --no-deps $(PEERS)
	@touch $@

# Triton decides at import whether it interprets, hence two processes. The second runs even when the first fails.
test: $(VENV)/installed ## Run the tests: the kernels through Triton's interpreter, then everything else.
	@$(MAKE) --keep-going --no-print-directory test-interp test-plain

test-interp: $(VENV)/installed
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest tests/interp -n $(JOBS) $(PYTEST_ARGS)

test-plain: $(VENV)/installed
	OMP_NUM_THREADS=1 $(PY) -m pytest tests --ignore=tests/interp -n $(JOBS) $(PYTEST_ARGS)

perf: $(VENV)/installed ## Quick sweep, traffic, codegen and report for this machine, in perf/results/local.
	$(PY) -m perf all --out perf/results/local

lint: $(VENV)/installed ## Run ruff and mypy.
	$(PY) -m ruff check .
	$(PY) -m mypy

# The tests get two thirds of the budget (SIGINT lets pytest still write its report), the sweep what they leave. Compiling kernels is most of the
# tests' time, so eight workers where pytest-xdist is there.
LIMIT := timeout --signal=INT --kill-after=10
gpu: ## Test and time on this machine's GPU with PYTHON as it is, nothing installed: make gpu BUDGET=540 OUT=dir
	@mkdir -p '$(OUT)'; start=$$(date +%s); \
	workers=$$($(PYTHON) -c 'import xdist; print("-n 8")' 2>/dev/null); \
	$(LIMIT) $$(($(BUDGET) * 2 / 3)) \
	  $(PYTHON) -m pytest tests/gpu -q -m gpu $$workers --junitxml='$(OUT)/tests.xml' $(PYTEST_ARGS); tests=$$?; \
	left=$$(($(BUDGET) - $$(date +%s) + start)); \
	$(LIMIT) $$((left + 30)) $(PYTHON) -m perf sweep --csv '$(OUT)/sweep.csv' --budget $$left; sweep=$$?; \
	printf '%-8s%-8s%s\n' '' '' '' step exit file tests $$tests '$(OUT)/tests.xml' sweep $$sweep '$(OUT)/sweep.csv'; \
	test $$tests -eq 0 && test $$sweep -eq 0

clean: ## Remove the environment, builds and caches.
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

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

# For `make gpu`: seconds for the whole run, a folder for what it leaves, and which steps; tune and models follow where the first two are done.
BUDGET ?= 540
OUT ?= gpu-results
STEPS ?= tests,host,sweep

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

gpu: ## Test and time on this machine's GPU with PYTHON as it is, nothing installed: make gpu BUDGET=540 OUT=dir [STEPS=tests,host,sweep,tune,models]
	@$(PYTHON) -m perf gpu --out '$(OUT)' --budget $(BUDGET) --steps '$(STEPS)'

clean: ## Remove the environment, builds and caches.
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

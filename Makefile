# Every target does what it needs, from nothing. `make demo` and `make test` are the two to know.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
# Where torch's CPU build comes from: pip options. Where pip is told of a local directory of wheels, that one.
TORCH_CPU ?= $(if $(PIP_FIND_LINKS),,--extra-index-url https://download.pytorch.org/whl/cpu)
SEED ?= 0
STAMP := $(shell date +%Y%m%d-%H%M%S)

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -qq
RUN := OMP_NUM_THREADS=1 PATH="$(abspath $(VENV))/bin:$$PATH"
# Many images set this. The hundreds of processes of the tests would then compile torch and SGLang anew, each for itself.
unexport PYTHONDONTWRITEBYTECODE
SOURCES := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

.PHONY: help install browser demo demo-llm check test test-all fuzz soak bench lint clean gpu-check

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.requirements: requirements/cpu.txt
	@"$(PYTHON)" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || \
	  { echo "error: Python 3.11 with venv is needed, $(or $(PYTHON),none) is not it; install python3.11 and python3.11-venv, or run make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@command -v g++ >/dev/null || \
	  { echo "error: no C++ compiler found; install g++ (Debian, Ubuntu: apt-get install g++)" >&2; exit 2; }
	@echo "installing requirements/cpu.txt into $(VENV) (1 to 6 minutes)"
	@"$(PYTHON)" -m venv --clear $(VENV)
	@$(PIP) install --no-deps --no-compile --ignore-requires-python $(TORCH_CPU) -r requirements/cpu.txt
	@touch $@

$(VENV)/.package: $(VENV)/.requirements $(SOURCES)
	@echo "building and installing megatron_egrsd"
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

install: $(VENV)/.package  ## make .venv with everything pinned, and build the extension

demo: install  ## train the tiny Qwen3 with CL-EGRSD on the CPU; make demo SEED=1
	@$(RUN) megatron-egrsd train --config examples/configs/tiny_cpu.yaml --seed $(SEED) --output runs/demo-$(STAMP)

demo-llm: install  ## train a pretrained SmolLM2-135M with CL-EGRSD on the CPU; make demo-llm SEED=1
	@$(RUN) python examples/smollm2/fetch_model.py runs/smollm2/model
	@$(RUN) python examples/smollm2/make_problems.py runs/smollm2
	@$(RUN) bash examples/smollm2/train.sh runs/demo-llm-$(STAMP) --seed $(SEED)

browser: install  ## headless Chromium for the tests of the pages
	@$(RUN) tools/install_browser.sh $(VENV)

check: lint  ## lint and the unit tests that are quick: under two minutes
	@$(RUN) python -m pytest tests/unit -m "not heavy and not slow" -n 2 --dist loadfile

# Two files at a time. First tests of one process and of gloo ranks, those with long ones first; then servers and whole
# runs, files with many tests first. The two kinds do not meet: a server beside two ranks would miss its deadlines.
TWO := -n 2 --dist loadfile
SERVERS := --ignore tests/unit --ignore tests/parallel
test: install browser  ## every test that needs minutes, not more
	@$(RUN) python -m pytest -m "not slow" tests/parallel tests/unit $(TWO) --no-loadscope-reorder || first=$$?; \
	$(RUN) python -m pytest -m "not slow" $(SERVERS) $(TWO) || second=$$?; \
	exit $$(( $${first:-0} | $${second:-0} ))

# Slow whole runs one at a time: two of several ranks and servers each would lose contact on two cores.
test-all: test  ## the slow ones as well, two hours with those
	@$(RUN) python -m pytest -m slow tests/parallel tests/unit $(TWO) --no-loadscope-reorder || first=$$?; \
	$(RUN) python -m pytest -m slow $(SERVERS) || second=$$?; \
	exit $$(( $${first:-0} | $${second:-0} ))

fuzz: install  ## 10^5 hostile inputs to everything that reads, and new examples for every property
	@$(RUN) FUZZ_TOTAL=100000 HYPOTHESIS_PROFILE=others python -m pytest -m hypothesis tests/unit tests/faults --durations=5

soak: install  ## random faults at random moments of short runs, for MINUTES (60), drawn from SEED
	@$(RUN) python -m tests.faults.soak --minutes $(or $(MINUTES),60) --seed $(SEED)

bench: install  ## the benchmarks of kernels and converters
	@$(RUN) python -m benchmarks.vocab_parallel --output docs/measurements/performance
	@$(RUN) python -m benchmarks.divergence
	@$(RUN) python -m benchmarks.convert

lint: install  ## ruff, codespell and mypy
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) codespell
	@$(RUN) mypy

gpu-check:  ## on a CUDA machine: all that only a GPU can tell, in MINUTES (15)
	@tools/gpu/run.sh $(or $(MINUTES),15)

clean:  ## remove .venv, builds and caches; runs/ stays
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find megatron_egrsd \( -name '*.so' -o -name _not_built.txt \) -delete
	find . -name __pycache__ -prune -exec rm -rf {} +

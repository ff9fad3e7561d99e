# These targets work from a fresh clone; `make` alone lists them. The virtual environment is made on first use, and
# updated when pyproject.toml or constraints.txt have changed.
#
#   PYTHON=python3.12         the interpreter for the environment (3.11 or later)
#   TORCH_INDEX=URL           another index to take torch from, such as https://download.pytorch.org/whl/cpu
#   ARGS="-k bucket"          arguments for pytest, or settings for the demo: ARGS="--train.steps 50"

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
FIGURE_RUN = $(BIN)/isthmus run configs/figure.toml --run.outputs outputs/figure --train.micro_batches 2 $(ARGS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo figure test test-slow test-slurm test-docker docs bench check lint types clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.installed-run  ## train a small Llama on four local nodes, joined by emulated 300 Mbit/s links (minutes)
	$(BIN)/isthmus run configs/demo.toml $(ARGS)

figure: $(VENV)/.installed-run  ## make README's figure: a model compressed, uncompressed, and in one datacenter (minutes)
	rm -rf outputs/figure
	$(FIGURE_RUN) --run.name compressed-300mbps
	$(FIGURE_RUN) --run.name uncompressed-300mbps --compress.mode dense
	$(FIGURE_RUN) --run.name centralized-100gbps --compress.mode dense --net.profile datacenter-100gbps
	$(BIN)/isthmus report $(addprefix outputs/figure/,compressed-300mbps uncompressed-300mbps centralized-100gbps) \
		--out docs/figure.png

# Tests run in as many processes as there are cores, but those that measure time run alone. Tests of one file of the
# integration and end-to-end tests stay together: some share a run.
test: $(VENV)/.installed-dev  ## run the default test suite
ifeq ($(ARGS),)
	$(BIN)/pytest -q -n auto tests/unit
	$(BIN)/pytest -q -n auto --dist loadfile -m "not slow and not alone" tests/integration tests/e2e
	$(BIN)/pytest -q -m "alone and not slow" tests/integration tests/e2e
else
	$(BIN)/pytest $(ARGS)
endif

test-slow: $(VENV)/.installed-dev  ## run the tests that take minutes
	$(BIN)/pytest -m slow $(ARGS)

test-slurm: $(VENV)/.installed-dev  ## run deploy/slurm under a real Slurm on this machine (root; slurm-wlm and munge)
	$(BIN)/pytest -m slurm tests/e2e/test_slurm.py $(ARGS)

test-docker: $(VENV)/.installed-dev  ## run the tests in containers, as root on Debian (half an hour at first)
	eval "$$(tests/docker/engine.sh up)" && ISTHMUS_TEST_DOCKER=1 $(BIN)/pytest -q -s tests/docker $(ARGS); \
		status=$$?; tests/docker/engine.sh down; exit $$status

docs: $(VENV)/.installed-dev  ## build the documentation site into build/docs, with warnings as errors
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs

bench: $(VENV)/.installed-dev  ## measure the cost of compression beside that of a training step (minutes)
	$(BIN)/python tests/benchmarks/codec_cost.py --out docs/benchmarks/codec-cost.md $(ARGS)

check: lint types  ## run lint and types

lint: $(VENV)/.installed-dev  ## check for faults, and for the format of ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev  ## check types with mypy, strictly
	$(BIN)/mypy

clean:  ## remove the environment and all caches, but not outputs/
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find netem coordinator node tests -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment that could not be finished is removed; otherwise the next call would take it for a finished one.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Isthmus needs Python 3.11 or later, and $(PYTHON) is not: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; \
		exit 2; }
	@$(PYTHON) -m venv $(VENV) || { \
		rm -rf $(VENV); \
		echo "no virtual environment could be made; on Debian and Ubuntu: apt install python3-venv" >&2; \
		exit 2; }

$(VENV)/.installed-run: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e .
	@touch $@

# The packages for development include those for a run, so this installation serves both.
$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[dev]'
	@touch $(VENV)/.installed-run $@

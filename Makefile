# Development commands. Requires Python 3.10 or newer and make; everything else is installed into $(VENV).
#
#   make demo                   train on real data and draw the learning curves
#   make test                   run all tests with branch coverage; JOBS=4 runs more of them at once
#   make soak KILLS=200         kill runs at random moments and restart them; SEED=7 repeats a soak
#   make soak PROGRAMS=200      kill and resume random programs on 1 to 3 processes; SEED=7 repeats them
#   make soak RANK_KILLS=300    kill one of two processes at random moments, and see the other one end
#   make check                  everything a change must pass: format-check, lint, types, tests, docs
#   make bench                  compare the speed with other frameworks and with hand-written loops; about an hour
#   make bench CASES=A,B ROUNDS=3 FRAMEWORKS=pytorch_accelerated,lightning
#   make bench-gpu              compare the throughput on a GPU with hand-written loops
#   make bench-settings         measure what compiling, channels last and fused optimizers gain
#   make test PYTHON=python3.12 choose the interpreter for a new environment
#   make test TESTS=tests/callbacks PYTEST_ARGS="-x -k early"
#
# Stamp files in the environment record what is installed. Packages are installed again only after pyproject.toml or
# constraints.txt has changed.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
TESTS ?=
JOBS ?= 2
KILLS ?= $(if $(PROGRAMS)$(RANK_KILLS),,200)
PROGRAMS ?=
RANK_KILLS ?=
SEED ?=
PYTEST_ARGS ?=
CASES ?=
ROUNDS ?=
PEER_ROUNDS ?=
FRAMEWORKS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint $(CONSTRAINTS)
BENCH_VENV := benchmarks/.venv
BENCH_INSTALL = $(@D)/bin/python -m pip install --disable-pip-version-check --quiet
BENCH_OPTIONS := $(foreach name,CASES ROUNDS PEER_ROUNDS FRAMEWORKS,$(if $($(name)),$(name)=$($(name))))
# Each file is run by one process, because the tests in it share what they start.
IN_PARALLEL := --numprocesses $(JOBS) --dist loadfile
# ruff also formats the Python blocks in Markdown.
CODE := src tests $(wildcard examples benchmarks) docs README.md

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # two installations into the same environment would interfere
.PRECIOUS: $(BENCH_VENV)/%/.stamp-torch
.PHONY: help demo test soak check format format-check lint types docs build clean distclean \
  bench bench-peers bench-page bench-gpu bench-settings

help:
	@sed -n 's/^#   //p' Makefile
	@echo "also: make format, format-check, lint, types, docs, build, bench-page, bench-peers, clean, distclean"

# --- Environment --------------------------------------------------------------------------------------------------

$(VENV)/.stamp-venv:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: interpreter '$(PYTHON)' not found. Install Python 3.10 or newer, or choose one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: '$(PYTHON)' is $$($(PYTHON) --version 2>&1), but Python 3.10 or newer is required. Choose one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' cannot create virtual environments. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# Editable installs without setup.py need pip 21.3; Python 3.10.0 bundles an older version.
	$(BIN)/python -m pip install --disable-pip-version-check --quiet "pip>=22.3"
	@touch $@

# The larger set of extras includes the smaller one, but each is installed only when a target needs it.
$(VENV)/.stamp-examples: $(VENV)/.stamp-venv pyproject.toml $(CONSTRAINTS)
	@echo "Installing the package and the dependencies of the examples into $(VENV) (PyTorch is large; this can take minutes)"
	$(INSTALL) --editable '.[examples]'
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-venv pyproject.toml $(CONSTRAINTS)
	@echo "Installing the package and the development tools into $(VENV) (PyTorch is large; this can take minutes)"
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.stamp-examples

$(VENV)/.stamp-docs: $(VENV)/.stamp-venv pyproject.toml $(CONSTRAINTS)
	@echo "Installing the package and the documentation tools into $(VENV)"
	$(INSTALL) --editable '.[docs]'
	@touch $@

# The frameworks cannot share one environment; benchmarks/requirements*.txt explain why.
$(BENCH_VENV)/%/.stamp-torch: $(VENV)/.stamp-venv constraints.txt
	@echo "Installing PyTorch into $(BENCH_VENV)/$*"
	$(BIN)/python -m venv $(BENCH_VENV)/$*
	$(BENCH_INSTALL) --constraint constraints.txt torch
	@touch $@

$(BENCH_VENV)/own/.stamp: $(BENCH_VENV)/own/.stamp-torch pyproject.toml
	$(BENCH_INSTALL) --constraint constraints.txt --editable '.[plots]'
	@touch $@

$(BENCH_VENV)/peers/.stamp: $(BENCH_VENV)/peers/.stamp-torch benchmarks/requirements.txt
	$(BENCH_INSTALL) --no-deps --requirement benchmarks/requirements.txt
	@touch $@

$(BENCH_VENV)/%/.stamp: $(BENCH_VENV)/%/.stamp-torch benchmarks/requirements-%.txt
	$(BENCH_INSTALL) --no-deps --requirement benchmarks/requirements-$*.txt
	@touch $@

# --- What to run --------------------------------------------------------------------------------------------------

demo: $(VENV)/.stamp-examples
	$(BIN)/python examples/train_digits.py

# One thread per process: the test models are tiny, and the distributed tests start several processes.
test: $(VENV)/.stamp-dev
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTS) $(if $(TESTS),,$(IN_PARALLEL) --cov --cov-report=term) \
	  $(PYTEST_ARGS)

soak: SOAK = PYTHONPATH=tests/tools OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python tests
soak: $(VENV)/.stamp-dev
	$(if $(KILLS),$(SOAK)/tools/_kills.py --kills $(KILLS) $(if $(SEED),--seed $(SEED)))
	$(if $(PROGRAMS),$(SOAK)/faults/_programs.py --programs $(PROGRAMS) $(if $(SEED),--seed $(SEED)))
	$(if $(RANK_KILLS),$(SOAK)/faults/_rank_kills.py --kills $(RANK_KILLS) $(if $(SEED),--seed $(SEED)))

check: format-check lint types test docs

# With FRAMEWORKS set, missing frameworks are not installed; `make bench-peers` installs them all.
bench: $(BENCH_VENV)/own/.stamp $(if $(FRAMEWORKS),,bench-peers)
	BENCH_OPTIONS="$(strip $(BENCH_OPTIONS))" $(BENCH_VENV)/own/bin/python benchmarks/run.py \
	  $(if $(CASES),--cases "$(CASES)") $(if $(FRAMEWORKS),--frameworks "$(FRAMEWORKS)") \
	  $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(PEER_ROUNDS),--peer-rounds $(PEER_ROUNDS))

# A framework that cannot be installed is reported as such in the table.
bench-peers:
	-$(MAKE) $(BENCH_VENV)/peers/.stamp
	-$(MAKE) $(BENCH_VENV)/older/.stamp
	-$(MAKE) $(BENCH_VENV)/previous/.stamp

bench-page: $(BENCH_VENV)/own/.stamp
	$(BENCH_VENV)/own/bin/python benchmarks/report.py --plot docs/benchmarks.svg > docs/benchmarks.md

bench-gpu: $(BENCH_VENV)/own/.stamp
	$(BENCH_VENV)/own/bin/python benchmarks/gpu.py

bench-settings: $(BENCH_VENV)/own/.stamp
	$(BENCH_VENV)/own/bin/python benchmarks/settings.py

format: $(VENV)/.stamp-dev
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

format-check: $(VENV)/.stamp-dev
	$(BIN)/ruff format --check $(CODE)

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check $(CODE)

types: $(VENV)/.stamp-dev
	$(BIN)/mypy

docs: $(VENV)/.stamp-docs
	$(BIN)/python -m sphinx -b html -E -n -W --keep-going -q docs docs/_build/html
	@echo "docs/_build/html/index.html"

build: $(VENV)/.stamp-dev
	rm -rf dist
	$(BIN)/python -m build

clean:
	rm -rf build dist docs/_build htmlcov .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache benchmarks/results
	find src tests docs $(wildcard examples benchmarks) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(BENCH_VENV) .ci/venv

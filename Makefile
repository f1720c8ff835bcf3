# Every target sets up .venv by itself, and does nothing there when it is up to date: `demo` and `serve` with what serving
# needs and nothing else, all others with the tools of developers too.

VENV := .venv
BIN := $(VENV)/bin
SERVING := $(VENV)/.installed-serving
STAMP := $(VENV)/.installed
SUITES := unit triton-interpreted triton-compiled numerics distributed chaos integration packaging helm

# Interpreters to try, in order; 3.11 first, because constraints.txt is tested with it.
PYTHON ?= python3.11 python3.12 python3.13 python3.14 python3
# `make TORCH=torch==2.11.0 test` (a requirement, or a wheel's path) installs that build instead of the pinned one.
TORCH ?=

# A start is a dozen Python processes with the same modules, and a suite is hundreds: they keep what they compile, whatever the shell says.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo serve docs test test-loaded nightly lint bench proof-7b $(SUITES:%=test-%) FORCE

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/make \1	\2/p' $(MAKEFILE_LIST)

demo: $(SERVING) ## fetch a small model, serve it at TP=2, stream one answer, stop
	$(BIN)/packtrain demo

serve: $(SERVING) ## the same stack, until Ctrl-C
	$(BIN)/packtrain serve

test: $(STAMP) ## every suite, and what ran at the end
	$(BIN)/python -m tests.run $(if $(COVERAGE),--coverage) $(if $(WITHOUT_AVX512),--without-avx512)

$(SUITES:%=test-%): test-%: $(STAMP)
	$(BIN)/python -m tests.run $*

test-loaded: $(STAMP) ## every suite five times, beside a busy process on each core: more than an hour
	$(BIN)/python -m tests.run --loaded 5

nightly: $(STAMP) ## the long cases of the same suites, and load on the served stack: for hours, machine idle
	$(BIN)/python -m tests.run --nightly

docs: $(STAMP) ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# mypy takes longest, so the rest runs beside it. What it knows of the libraries outlives a checkout.
lint: export MYPY_CACHE_DIR ?= $(HOME)/.cache/packtrain/mypy
lint: $(STAMP) ## style, types, import contracts, generated stubs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy & types=$$!; \
	$(BIN)/lint-imports && $(BIN)/python -m protos.generate --check; rest=$$?; \
	wait $$types && exit $$rest

bench: $(STAMP) ## time engine, peers, growth, serving, start and gateway anew, and write docs/performance.md: 20 minutes, machine idle
	$(BIN)/python -m bench.engine
	$(BIN)/python -m bench.growth
	$(BIN)/python -m bench.serving_overhead
	$(BIN)/python -m bench.ready
	$(BIN)/python -m bench.gateway
	$(BIN)/python -m bench.report

proof-7b: $(STAMP) ## serve a synthetic Llama 2 7B of full size at TP=2: 14 GB of disk, 18 GB of memory
	$(BIN)/python -m bench.proof_7b

# The C++ kernels are compiled while packages come: first those that serving runs on this machine, and with the tools of
# developers those of the other instruction sets that it has. A compiler that is missing is told when something is served.
# A usable .venv is kept. Otherwise an interpreter counts only if it runs (a version manager's shim may not) and can make
# environments.
$(SERVING): pyproject.toml constraints.txt $(if $(TORCH),FORCE)
	@usable='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; \
	if ! $(BIN)/python -c "import pip; $$usable" 2>/dev/null; then \
		for python in $(PYTHON); do "$$python" -c "$$usable" 2>/dev/null && break; python=; done; \
		if test -z "$$python"; then \
			echo 'No Python 3.11 or newer with the venv module among: $(PYTHON).' >&2; \
			echo 'Install one (on Debian: python3 and python3-venv), or name it: make PYTHON=/path/to/python' >&2; \
			exit 1; \
		fi; \
		echo "$$python -m venv $(VENV)"; \
		"$$python" -m venv --clear $(VENV); \
	fi
	sed -E '$(if $(TORCH),/^(torch|triton)==/d)' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m model_parallel.native 2>/dev/null & \
	$(BIN)/python -m pip install --editable . $(TORCH) --constraint $(VENV)/constraints.txt; status=$$?; wait; exit $$status
	@touch $@

$(STAMP): $(SERVING)
	$(BIN)/python -m model_parallel.native --machine 2>/dev/null & \
	$(BIN)/python -m pip install --editable '.[dev,clients]' $(TORCH) --constraint $(VENV)/constraints.txt; status=$$?; wait; exit $$status
	@touch $@

# make setup                            .venv with everything; CPU or GPU
# make setup VENV=path                  uses that environment, and keeps its torch if it has one
# make setup TORCH_INDEX=url            takes torch from another index
# make demo [FRESH=1]                   setup, then a whole run on two ranks
# make test, make test-slow             setup, then the tests
# make fuzz [SECONDS=600]               setup, then alters every kind of file that is read
# make docs                             the manual as a site, in build/site
# make test-slow ONLY=search            those in tests/*/search; ONLY=e2e those of whole runs
VENV ?= .venv
PYTHON ?= python3
TORCH_INDEX ?=
ONLY ?=
SECONDS ?= 600

TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions
export TORCH_EXTENSIONS_DIR

BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.lag_megatron.installed
# Evaluations bring half a gigabyte of libraries, which only their tests need.
EVAL := $(VENV)/.lag_megatron.eval
# Constraints of this environment: constraints.txt, with torch's own line replaced where it is kept.
PINS := $(VENV)/.lag_megatron.constraints
RUN := PATH="$(BIN):$$PATH"
PIP := $(RUN) "$(BIN)/python" -m pip --disable-pip-version-check install --quiet
PYTEST := $(RUN) OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest

DOCS := $(VENV)/.lag_megatron.docs
.PHONY: setup demo docs fuzz test test-processes test-ranks test-slow clean
.DELETE_ON_ERROR:

setup: $(STAMP)

$(STAMP): setup.py constraints.txt
	@bash launch/check_host.sh "$$(test -x "$(BIN)/python" && echo "$(BIN)/python" || echo "$(PYTHON)")"
	test -x "$(BIN)/python" || "$(PYTHON)" -m venv "$(VENV)"
	$(RUN) bash launch/pin_torch.sh "$(VENV)" > "$(PINS)"
	$(PIP) setuptools wheel ninja packaging -c "$(PINS)"
	$(if $(TORCH_INDEX),$(PIP) torch --no-deps -c "$(PINS)" --index-url "$(TORCH_INDEX)")
	$(PIP) torch -c "$(PINS)" $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)")
	@if cmp -s constraints.txt "$(PINS)"; then touch "$(VENV)/.lag_megatron.torch"; fi
	$(PIP) deepspeed --no-build-isolation -c "$(PINS)"
	$(PIP) -e ".[dev,plot,data]" --no-build-isolation -c "$(PINS)"
	$(RUN) bash launch/build_ops.sh
	@touch "$@"

$(EVAL): $(STAMP)
	$(PIP) -e ".[eval]" --no-build-isolation -c "$(PINS)"
	@touch "$@"

demo: setup
	$(if $(FRESH),rm -rf runs/demo)
	$(RUN) bash launch/demo.sh

# Tests of one process leave a core idle, which those of several ranks can use; those of the
# launcher are there for balance.
test: setup $(EVAL)
	$(MAKE) --jobs=2 --output-sync=target test-processes test-ranks

test-processes:
	$(PYTEST) -m "not slow and not gpu" --durations=15 tests/static tests/unit tests/docs tests/e2e tests/fuzz

test-ranks:
	$(PYTEST) -m "not slow and not gpu" --durations=15 tests/distributed

test-slow: setup $(EVAL)
	$(PYTEST) -m slow --durations=15 $(if $(ONLY),$(or $(wildcard tests/*/$(ONLY) tests/$(ONLY)),\
	  $(error ONLY=$(ONLY): no folder of this name in tests/ or below)))

fuzz: setup
	$(RUN) OMP_NUM_THREADS=1 "$(BIN)/python" tests/fuzz --seconds $(SECONDS)

$(DOCS): $(STAMP)
	$(PIP) -e ".[docs]" --no-build-isolation -c "$(PINS)"
	@touch "$@"

docs: setup $(DOCS)
	NO_MKDOCS_2_WARNING=1 "$(BIN)/python" -m mkdocs build --strict --quiet
	@echo "$(CURDIR)/build/site/index.html"

clean:
	rm -rf .cache .pytest_cache .hypothesis .mypy_cache .ruff_cache build dist lag_megatron.egg-info
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +

# Five targets; the last four call the first.
#   make setup   .venv with everything in it     (TORCH=cpu: PyTorch's CPU builds, where the default would bring CUDA's)
#   make test    lint, types, all tests
#   make demo    the main job on real text       (DEMO=short: fewer steps)
#   make demo-tools   reasoning in tool use      (DEMO=short: fewer steps, no promises)
#   make bench   measurements, as JSON under bench/

PYTHON ?= python3
TORCH ?= default
BIN := .venv/bin
STAMP := .venv/.installed-$(TORCH)

# deepspeed's ops are neither compiled at installation nor needed later: no compiler is called.
export DS_BUILD_OPS ?= 0

ifeq ($(TORCH),cpu)
TORCH_INDEX := --extra-index-url https://download.pytorch.org/whl/cpu
else ifneq ($(TORCH),default)
$(error TORCH=$(TORCH) is not known: use cpu or default)
endif

.PHONY: setup test demo demo-tools bench
.DELETE_ON_ERROR:

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make setup: $(PYTHON) is older than 3.11: give PYTHON=python3.11 or newer" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check $(TORCH_INDEX) torch -c constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check $(TORCH_INDEX) -e '.[dev]' -c constraints.txt
	@rm -f .venv/.installed-*
	@touch $@

# Tests of limits of time, which are measured best alone.
TIMED = tests/rl/sandbox tests/rl/tools
# Two files at a time, for tests wait a good deal; one thread a process, for more only contend with each other.
test: export OMP_NUM_THREADS = 1
test: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --ignore=tests/test_architecture.py $(TIMED:%=--ignore=%)
	$(BIN)/python -m pytest -q $(TIMED)

demo: setup
	$(BIN)/python launch/demo.py $(if $(filter short,$(DEMO)),--short)

demo-tools: setup
	$(BIN)/python launch/demo_tools.py $(if $(filter short,$(DEMO)),--short)

bench: setup
	$(BIN)/python -m bench

# make demo    build the sample drivers and run their tests on Wine
# make test    all tests but the long ones
# make check   format, lint, types, imports; Rust too
# make soak    the long tests
# make test-trixie  all tests but the long ones on Debian 13 (Wine 10), in a chroot: scripts/trixie
# make fuzz    a million inputs for each parser of what a guest sends: bench/fuzz.json. Some 40 minutes
# make bench   speed and scale, against the floor: a table, and bench/results.json
# make format  put Python and Rust into shape
# make wheel   dist/*.whl and dist/*.tar.gz
# make clean   remove what was made in this checkout
#
# Each sets up what is missing first (scripts/setup). More options for pytest: make test ARGS="-k pool"

SHELL := /bin/bash
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
CARGO_MANIFESTS := $(wildcard drivers/Cargo.toml vm/Cargo.toml)
CHECKED_MANIFESTS := $(CARGO_MANIFESTS) bench/floor/Cargo.toml
ARGS :=

.PHONY: demo test test-trixie check soak fuzz bench format wheel clean setup setup-tests
.NOTPARALLEL:

demo: setup
	@echo "--- hello, a driver of drivers/, built, loaded and unloaded (the first time takes a minute):"
	@$(BIN)/kdriver run --vm wine hello
	@echo; echo "--- leaks, a driver that leaks, and is told so:"
	@! $(BIN)/kdriver run --vm wine leaks --parameter Blocks=3
	@echo; echo "--- and all of them, tested:"
	@$(PYTEST) --kdriver-vm wine tests/drivers -v $(ARGS)

# A worker for each processor. Virtual machines by themselves: they want the processors, one each; their files that
# take longest come first as they are. $(ARGS) may leave no test for one of the two.
test: WORKERS := -n logical --maxprocesses 4 --dist loadfile
test: OR_NONE = $(if $(ARGS),|| [[ $$? == 5 ]])
test: setup-tests
	@scripts/rust test $(CARGO_MANIFESTS)
	@$(PYTEST) --kdriver-vm wine -m "not soak" --ignore tests/vm $(WORKERS) $(ARGS) $(OR_NONE)
	@$(PYTEST) -m "not soak" tests/vm $(WORKERS) --no-loadscope-reorder $(ARGS) $(OR_NONE)

test-trixie: export ARGS := $(ARGS)
test-trixie:
	@scripts/trixie

soak: setup-tests
	@$(PYTEST) --kdriver-vm wine -m soak --timeout 0 $(ARGS)

fuzz: setup
	@$(BIN)/python -m pip install --quiet --group fuzz || echo "no atheris here: changes by chance instead"
	@nice -n 10 $(BIN)/python -m fuzz $(ARGS)

bench: setup-tests
	@$(BIN)/python -m bench $(ARGS)

check: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	scripts/rust check $(CHECKED_MANIFESTS)

format: setup
	$(BIN)/ruff format
	$(BIN)/ruff check --fix
	scripts/rust format $(CHECKED_MANIFESTS)

wheel: setup
	@$(BIN)/python -m build --no-isolation

clean:
	rm -rf .venv dist build drivers/target vm/target bench/floor/target .mypy_cache .pytest_cache .ruff_cache \
	    .hypothesis .import_linter_cache kdriver-artifacts
	find . -name __pycache__ -prune -exec rm -rf {} +

setup:
	@scripts/setup

setup-tests:
	@scripts/setup tests

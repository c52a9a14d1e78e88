# `make demo` and `make test` need only make, and Python >= 3.11 with pip and venv.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

BIN := $(VENV)/bin

# JAX keys what it caches by its own version and flags, so one folder serves every run.
CACHE := $(CURDIR)/.cache
export JAX_COMPILATION_CACHE_DIR ?= $(CACHE)/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES ?= -1
# Each operation would carry the lines of Python that made it: a tenth of all tracing and lowering.
export JAX_TRACEBACK_IN_LOCATIONS_LIMIT ?= 0
export UV_PYTHON_DOWNLOADS := never

show_version := import sys; print("%d.%d.%d" % sys.version_info[:3])
VERSION := $(shell $(PYTHON) -c '$(show_version)' 2>/dev/null)
SOURCES := $(wildcard numpyro_ensemble tests docs/conf.py docs/_ext docs/gallery/*.py examples benchmarks)
# Each worker takes a whole stretch of files, whose tests share compiled programs; one that is done
# takes over some of what others have left.
PYTEST := $(BIN)/pytest -q -n $(JOBS) --dist worksteal
LEAKS := $(shell grep -ls mark.leaks tests/*.py)
CORE := $(shell grep -ls mark.core tests/*.py)
# Sphinx deals out stretches of pages beforehand, so that twice as many keep all cores busy to the end.
PAGES := $(shell expr 2 '*' $(JOBS))
# Tests compile much and compute little: no optimisation, and each program in one piece, since two
# workers keep two cores busy. JAX 0.10 has two ways to make kernels; the older compiles faster, and
# later versions do not know the flag.
emitters := from importlib.metadata import version; \
    print("--xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10."))
FASTER = $(strip $(shell $(BIN)/python -c '$(emitters)') $(XLA_FLAGS))
QUICK = --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true \
    --xla_cpu_parallel_codegen_split_count=1 $(FASTER)

.PHONY: help demo test long foreign bench wheel docs linkcheck format clean
.DEFAULT_GOAL := help

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile
	@echo "PYTHON=... chooses the interpreter ($(PYTHON)), VENV=... the environment's folder ($(VENV))"

# One stamp for each interpreter version and extra: a second call installs nothing again.
ready = $(VENV)/.ready-$(VERSION)-$(1)

$(call ready,%): pyproject.toml
	@if ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "numpyro_ensemble needs Python 3.11 or newer, and '$(PYTHON)' is $(or $(VERSION),not there)." >&2; \
	    echo "Choose another: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
	    exit 1; \
	fi
	@if [ -e "$(VENV)" ] && [ ! -e "$(VENV)/pyvenv.cfg" ]; then \
	    echo "'$(VENV)' is not a virtual environment: remove it, or choose another VENV." >&2; \
	    exit 1; \
	fi
	@if [ "$$("$(BIN)/python" -c 'import pip; $(show_version)' 2>/dev/null)" != "$(VERSION)" ]; then \
	    "$(PYTHON)" -m venv --clear "$(VENV)"; \
	fi
	@echo "Installing numpyro_ensemble[$*] into $(VENV): a minute or two the first time."
	@if uv=$$(command -v uv || command -v "$(BIN)/uv") && "$$uv" --version >/dev/null 2>&1; then \
	    "$$uv" pip install --quiet --python "$(BIN)/python" --editable '.[$*]'; \
	else \
	    "$(BIN)/python" -m pip install -qq --disable-pip-version-check --editable '.[$*]'; \
	fi
	@touch "$@"

# The demo needs less than the tests: an environment made for them will do.
demo: $(or $(wildcard $(call ready,test)),$(call ready,plots)) ## run the quickstart
	$(BIN)/python examples/quickstart.py

test: $(call ready,test) ## check format, lint, types and doctests, and run all tests
	@rm -rf "$(CACHE)/reports"
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	XLA_FLAGS="$(QUICK)" $(PYTEST) -m "not core and not long and not foreign" --junitxml=$(CACHE)/reports/float64.xml
	XLA_FLAGS="$(QUICK)" JAX_ENABLE_X64=0 $(PYTEST) --junitxml=$(CACHE)/reports/float32.xml -m "core and not long and not foreign" --doctest-modules numpyro_ensemble $(CORE)
	XLA_FLAGS="$(QUICK)" JAX_CHECK_TRACER_LEAKS=1 $(PYTEST) --junitxml=$(CACHE)/reports/leaks.xml -m leaks $(LEAKS)
	@$(BIN)/python -c "$$count_tests" $(CACHE)/reports/*.xml

# LONG_TURN=0 to LONG_TURN=23 take one twenty-fourth of the long tests each, and QUICK_TURN=0 to 5 one sixth
# of those that `make test` runs.
long: $(call ready,test) ## run what `make test` leaves out: long tests, the core in float64, processes in float32
	XLA_FLAGS="$(QUICK)" $(PYTEST) -m "(core or long) and not single and not leaks"
	XLA_FLAGS="$(QUICK)" JAX_ENABLE_X64=0 $(PYTEST) -m "long and (core or single)" || [ $$? -eq 5 ] # a part may have none
	XLA_FLAGS="$(QUICK)" JAX_ENABLE_X64=0 $(PYTEST) -m "not core and not long" $(addprefix tests/test_gp_,$(addsuffix .py,calls features paths))

# NumPyro's examples are tested where NUMPYRO_CHECKOUT names a checkout of its tag. Each model goes
# through one guide and one sampler: others for FOREIGN_TURN=1 and 2, all of them in the three turns.
foreign: $(call ready,foreign) ## run models of other packages, and NumPyro's examples, through everything
	XLA_FLAGS="$(QUICK)" $(PYTEST) -m foreign tests/foreign

# The scripts compile for themselves what they time: none of the folders above is used.
bench: $(call ready,bench) ## run the benchmarks in a small setting, or some: BENCH=engine,gp
	$(BIN)/python benchmarks/suite.py $(BENCH)

# The tests see the wheel alone: they run in a folder that has everything but the package's source.
WHEEL := $(CACHE)/wheel
WHEEL_TESTS ?= tests/test_import.py tests/test_primitives.py tests/test_scoring.py tests/test_typing.py -m "not long"
wheel: $(call ready,publish) ## build wheel and sdist, check them, and run WHEEL_TESTS on the installed wheel
	rm -rf dist "$(WHEEL)"
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m venv "$(WHEEL)/.venv"
	"$(WHEEL)/.venv/bin/python" -m pip install -qq --disable-pip-version-check "$$(ls dist/*.whl)[test]"
	cp -r tests examples benchmarks docs README.md CHANGELOG.md Makefile pyproject.toml "$(WHEEL)"
	cd "$(WHEEL)" && .venv/bin/python -c "import numpyro_ensemble as n; assert 'site-packages' in n.__file__, n.__file__"
	cd "$(WHEEL)" && XLA_FLAGS="$(QUICK)" .venv/bin/python -m pytest -q -n $(JOBS) $(WHEEL_TESTS)

define count_tests
import sys
import xml.etree.ElementTree as tree

suites = [suite for path in sys.argv[1:] for suite in tree.parse(path).iter("testsuite")]
count = {k: sum(int(s.get(k)) for s in suites) for k in ("tests", "failures", "errors", "skipped")}
failed = count["failures"] + count["errors"]
print(f"{count['tests'] - failed - count['skipped']} passed, {failed} failed, {count['skipped']} skipped")
endef
export count_tests

SPHINX = IPYTHONDIR=$(CACHE)/ipython XLA_FLAGS="$(FASTER)" $(BIN)/sphinx-build -j $(PAGES) -q -W --keep-going

# What pages printed is kept in .cache/jupyter until their code, the package's code or an installed
# version changes. DOCS_TURN=0 to DOCS_TURN=3 execute one quarter of the pages each.
docs: $(call ready,docs) ## check spelling, and build the documentation, running code that changed, to docs/_build/html
	$(BIN)/codespell
	$(SPHINX) docs docs/_build/html
	$(BIN)/python docs/_ext/links.py docs/_build/html
	@echo "Open docs/_build/html/index.html"

linkcheck: $(call ready,docs) ## check links between pages, and with LINKS=all those to other sites; runs no code
	$(SPHINX) -D nb_execution_mode=off docs docs/_build/links/html
	$(BIN)/python docs/_ext/links.py docs/_build/links/html
	$(if $(filter all,$(LINKS)),$(SPHINX) -b linkcheck -D nb_execution_mode=off docs docs/_build/links/external)

format: $(call ready,test) ## format the code and fix what ruff can
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean: ## remove the environments, caches and built files
	rm -rf .venv .venv-* .cache docs/_build docs/api dist
	find $(SOURCES) -name __pycache__ -prune -exec rm -rf {} +

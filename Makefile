# make demo | make test | make test-all | make test-browser | make lint | make docs | make wheels | make clean. Each makes the environment in .venv when it is not there yet.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEMO   ?= compare-demo
CHROMIUM := /usr/bin/chromium

.PHONY: demo test test-all test-browser lint docs wheels format clean
.DEFAULT_GOAL := test

demo: $(READY)
	$(BIN)/dit-accel compare --out $(DEMO)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not timing and not sweep" -n 2  # a thread for each of the two processes
	$(BIN)/python -m pytest -q -m timing $$(grep -l mark.timing tests/test_*.py)

test-all: $(READY)  # with the full products of cases, in Triton's own interpreter
	PLAIN_INTERPRETER=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not timing" -n 2
	$(BIN)/python -m pytest -q -m timing $$(grep -l mark.timing tests/test_*.py)

test-browser: $(READY)
	@command -v $(CHROMIUM) >/dev/null || { echo "Installing Debian's chromium ..."; apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } \
		|| { echo "$(CHROMIUM) is missing and apt-get could not install it (as root, with Debian's archive): the demo app's browser tests cannot run" >&2; exit 1; }
	$(BIN)/python -m pytest -q tests/browser

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	git ls-files -z | xargs -0 $(BIN)/codespell

docs: $(READY)
	$(BIN)/python docs/tools/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheels: $(READY)
	rm -rf build/lib demo/build
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m build --no-isolation --outdir dist --wheel demo

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt
	@echo "Making the environment in $(VENV) (once; a few minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo/build demo/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

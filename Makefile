# On a fresh machine with Python 3.11 and a network to PyPI: `make demo` and `make test` do everything.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test test-slow lint format bench clean

demo: $(VENV)/.kvist
	$(BIN)/kvist demo

test: $(VENV)/.kvist-test
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

test-slow: $(VENV)/.kvist-test
	$(BIN)/python -m pytest -m slow -n 2 $(ARGS)

lint: $(VENV)/.kvist-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.kvist-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.kvist
	$(BIN)/python bench/store.py
	$(BIN)/python bench/engine.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

# One environment, grown step by step. torch comes first and alone, so that the build the machine offers is taken.
$(VENV)/.kvist: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade "pip>=25.1"
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e ".[all]"
	touch $@

$(VENV)/.kvist-test: $(VENV)/.kvist
	$(PIP) install -c constraints.txt --group test
	touch $@

$(VENV)/.kvist-lint: $(VENV)/.kvist-test
	$(PIP) install -c constraints.txt --group lint
	touch $@

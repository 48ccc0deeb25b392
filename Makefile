# Everything a newcomer needs: `make demo` and `make test` set up their own environment in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: test test-faults lint demo clean

# The built wheel, not the source tree, is what gets installed, tested and shown.
$(VENV)/installed: pyproject.toml nnunetv2_dermomamba.pth $(shell find nnunetv2_dermomamba -type f -not -name '*.pyc')
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip build
	rm -rf dist && $(BIN)/python -m build --wheel --outdir dist . >/dev/null
	$(BIN)/python -m pip install --quiet "$$(ls dist/*.whl)[dev]"
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall dist/*.whl
	touch $@

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -P -m pytest -m "not faults"

test-faults: $(VENV)/installed
	$(BIN)/python -P -m pytest -m faults

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py $(if $(SOURCE),--source "$(SOURCE)")

clean:
	rm -rf $(VENV) build dist demo

# Everything a newcomer needs: `make demo` and `make test` set up their own environment in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: test test-faults lint chromium references slurm demo clean

# The built wheel, not the source tree, is what gets installed, tested and shown.
$(VENV)/installed: pyproject.toml nnunetv2_dermomamba.pth $(shell find nnunetv2_dermomamba -type f -not -name '*.pyc')
	@echo "Installing into $(VENV): PyTorch and what else is needed, a few minutes at the first time ..."
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

# The report is tested in a real browser; where it cannot be installed those tests are skipped and say so.
chromium:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	{ [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq chromium chromium-driver >/dev/null; } || \
	echo "Chromium could not be installed: the report's browser tests will be skipped"

# What our metrics are compared with; likewise.
references: $(VENV)/installed
	@$(BIN)/python -m pip install --quiet ".[references]" || \
	echo "MONAI and the challenge's scorer could not be installed: the comparisons with them will be skipped"

# One thread a worker: PyTorch's own threads on busy cores wait for each other.
# The `pytest` command, unlike `python -m pytest`, leaves the source tree off the path: the installed wheel is tested.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n 2 --dist loadgroup

test: lint chromium references
	$(PYTEST) -m "not faults"

# The script for clusters is tested on a real one; likewise.
slurm:
	@command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null || \
	{ [ "$$(id -u)" = 0 ] && apt-get update -qq && \
	apt-get install -y -qq slurmctld slurmd slurm-client munge >/dev/null; } || \
	echo "Slurm could not be installed: its test will be skipped"

test-faults: $(VENV)/installed slurm
	$(PYTEST) -m faults

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py $(if $(SOURCE),--source "$(SOURCE)")

clean:
	rm -rf $(VENV) build dist demo

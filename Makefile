# Each target works on a fresh clone: it needs Python 3.11 or newer and make, and puts everything else into .venv.
PYTHON ?= python3
BIN := .venv/bin
THREADS ?= 1

.PHONY: demo test lab notebooks clean

demo: .venv/ready
	$(BIN)/python -m diffnb train --data digits --run runs/demo --preset demo

test: .venv/ready
	$(BIN)/python tests/sync.py
	OMP_NUM_THREADS=$(THREADS) $(BIN)/nbdev_test --n_workers 2 --timing --do_print
	$(BIN)/python -m pytest tests -q

lab: .venv/ready
	$(BIN)/jupyter lab nbs/index.ipynb

.venv/ready: requirements.lock settings.ini setup.py
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'diffnb needs Python 3.11 or newer; try: make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

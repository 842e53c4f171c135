# Two commands on a fresh machine: `make train` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RANKS ?= 4
WORKERS ?= 2
ARGS ?=

.PHONY: train test test-slow lint wheel clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade "pip>=25.1"
	$(BIN)/pip install -q -c constraints.txt -e ".[examples,checkpoints]" --group dev
	touch $@

train: $(VENV)/.installed
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) examples/05_train_hybrid.py \
		--out runs/$$(date +%Y%m%d-%H%M%S) $(ARGS)

test: $(VENV)/.installed
	$(BIN)/pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-slow: $(VENV)/.installed
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --slow $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

wheel: $(VENV)/.installed
	$(BIN)/python -m build --no-isolation --wheel --outdir dist

clean:
	rm -rf $(VENV) dist build runs

# Two commands on a fresh machine: `make train` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RANKS ?= 4
WORKERS ?= 2
ARGS ?=

.PHONY: train test test-slow lint docs serve report dist clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade "pip>=25.1"
	$(BIN)/pip install -q -c constraints.txt -e ".[examples]" --group dev
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

$(VENV)/.documents: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt -e ".[docs]"
	touch $@

docs: $(VENV)/.documents
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site

serve: $(VENV)/.documents
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --strict

report: $(VENV)/.installed
	$(BIN)/python -m benchmarks.report
	$(BIN)/python docs/tools/diagrams.py

dist: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt --group release
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

clean:
	rm -rf $(VENV) dist build runs site

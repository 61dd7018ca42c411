# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal
OUT ?= demo
SEED ?= 0

.PHONY: demo test check older env clean

demo: $(VENV)/.ready
	$(BIN)/relook demo --out $(OUT) --seed $(SEED)

test: $(VENV)/.ready
	$(PYTEST)

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST)

# The same tests under an older transformers, that of the GPU machines where relook is measured.
older: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(VENV)/older transformers==5.17.0 huggingface-hub==1.33.0
	PYTHONPATH=$(VENV)/older $(PYTEST)

env: $(VENV)/.ready

# The marker is written last, so an installation that was cut off is done again.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps lmms-eval
	touch $@

clean:
	rm -rf $(VENV)

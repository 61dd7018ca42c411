# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal
OUT ?= demo
SEED ?= 0

.PHONY: demo test check docs oldest newest env clean

demo: $(VENV)/.ready
	$(BIN)/relook demo --out $(OUT) --seed $(SEED)

test: $(VENV)/.ready
	$(PYTEST)

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST)

# The documents as a site, in site/; a broken link or a page without a title in the menu fails.
docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The tests, or TESTS, under the oldest and the newest releases that pyproject.toml allows. Either environment lies over
# the ordinary one and holds what differs from it; torch stays, other builds of which take gigabytes.
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
oldest newest: $(VENV)/.ready
	rm -rf $(VENV)/$@
	$(BIN)/python -m venv $(VENV)/$@
	$(BIN)/python $(PURELIB) > "$$($(VENV)/$@/bin/python $(PURELIB))/ordinary.pth"
	$(BIN)/python .ci/bounds.py $@ > $(VENV)/$@/constraints.txt
	$(VENV)/$@/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --constraint $(VENV)/$@/constraints.txt --editable '.[dev]'
	$(VENV)/$@/bin/python -m pytest -n auto --dist worksteal $(TESTS)

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

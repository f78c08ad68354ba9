PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.made
FOLDERS := $(wildcard regraft frontends passes runtime kernels benchmarks tests)
# mypy reads each folder as a package of its own
TYPED := $(wildcard regraft frontends passes runtime kernels benchmarks)

.PHONY: demo test test-all check bench venv

demo: $(STAMP)
	$(PY) -m regraft demo

test: $(STAMP)
	$(PY) -m pytest -n 2 -q

# the last -m given wins over the one in pyproject.toml
test-all: $(STAMP)
	$(PY) -m pytest -n 2 -q -m "slow or not slow"

check: $(STAMP)
	$(PY) -m ruff format --check $(FOLDERS)
	$(PY) -m ruff check $(FOLDERS)
	$(PY) -m mypy $(TYPED)

bench: $(STAMP)
	$(PY) -m regraft bench decode --json benchmarks/results/decode.json

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

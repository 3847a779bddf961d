# make setup     create .venv and install
# make simulate  run the 80-device default (ARGS="-s rounds=10" passes options)
# make test      the whole test-suite
# make check     lint, format, types
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
QUANT := $(VENV)/.quant
DEV := pytest ruff mypy hatchling

.PHONY: setup simulate test check

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(VENV)/bin/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(VENV)/bin/pip install -q --disable-pip-version-check -c constraints.txt -e ".[embedded,text,onnx,rag]" $(DEV)
	touch $(STAMP)

simulate: setup
	$(VENV)/bin/fedspine simulate $(ARGS)

# PEFT imports bitsandbytes wherever it is installed, which takes every process 2.5 s: so only where it is tested.
$(QUANT): $(STAMP)
	$(VENV)/bin/pip install -q --disable-pip-version-check -c constraints.txt bitsandbytes
	touch $(QUANT)

test: $(QUANT)
	$(VENV)/bin/python -m pytest $(ARGS)

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

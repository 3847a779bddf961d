# make setup     create .venv and install
# make simulate  run the 80-device default (ARGS="-s rounds=10" passes options)
# make test      the whole test-suite
# make check     lint, format, types
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
DEV := pytest ruff mypy hatchling

.PHONY: setup simulate test check

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(VENV)/bin/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(VENV)/bin/pip install -q --disable-pip-version-check -c constraints.txt -e ".[embedded,text,onnx,rag,quant]" $(DEV)
	touch $(STAMP)

simulate: setup
	$(VENV)/bin/fedspine simulate $(ARGS)

test: setup
	$(VENV)/bin/python -m pytest $(ARGS)

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

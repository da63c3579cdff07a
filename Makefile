# Two commands for a fresh machine with Python >= 3.10: `make demo` and `make test`. Both make their own environment.
PYTHON ?= python3
# installed before anything that depends on torch, so that its kind (CPU, CUDA) is decided here
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
# pip 23 does not find a package of ours that stands behind one that depends on it
NEEDED := plugins/blocksparse plugins/sla
PACKAGES := $(NEEDED) $(filter-out $(NEEDED),$(wildcard plugins/*)) examples/third_party_backend
SOURCES := core/pyproject.toml $(addsuffix /pyproject.toml,$(PACKAGES)) Makefile

.PHONY: demo test check build clean

demo: $(VENV)/.ready
	mkdir -p demo
	$(BIN)/attnmux demo --output demo/denoising.png

test: $(VENV)/.ready
	PATH="$(abspath $(BIN)):$$PATH" scripts/test

check: $(VENV)/.ready
	PATH="$(abspath $(BIN)):$$PATH" scripts/check

build: $(VENV)/.ready
	PATH="$(abspath $(BIN)):$$PATH" scripts/build

$(VENV)/.ready: $(SOURCES)
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 10) else 'attnmux needs Python >= 3.10, this is ' + sys.version)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e "core[demo,dev,docs,integrations,test]" $(patsubst %,-e '%[test]',$(PACKAGES))
	touch $@

clean:
	rm -rf $(VENV) dist build demo

# Two commands matter to a newcomer: `make demo` and `make test`. Both set up everything they need.
# The others: check, soak, bench, interop, wheels, setup, schema, constraints, clean.

SHELL := bash
PYTHON ?= python3
VENV := .venv
ifeq ($(OS),Windows_NT)
  BIN := $(VENV)/Scripts
  PYTHON := python
else
  BIN := $(VENV)/bin
endif
PY := $(BIN)/python
STAMP := $(VENV)/.setup
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))
PACKAGES := core $(PLUGINS)
PYTEST := $(PY) -m pytest
# Eclipse's suite, from a checkout beside the project: git clone https://github.com/eclipse/paho.mqtt.testing
PAHO_TESTING ?= ../paho.mqtt.testing

.PHONY: setup demo test check format soak bench interop wheels constraints servers clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(PACKAGES:%=%/pyproject.toml)
	@bash .ci/venv "$(PYTHON)" "$(VENV)"
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt pip
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt --build-constraint constraints.txt \
	  -e "core[fast]" $(PLUGINS:%=-e %) --group dev
	@touch $@

servers: setup
	@bash .ci/servers

demo: setup
	@$(PY) docs/examples/demo/run.py

# On Linux the real servers are there after `servers`, so a test that misses one fails instead of skipping.
test: servers
	$(if $(filter Linux,$(shell uname -s)),TESAIOT_REQUIRE_SERVERS=1) $(PYTEST) -q -n 2 --dist loadfile

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(PY) -m mypy -p tesaiot_connect $(foreach plugin,$(PLUGINS),-p tesaiot_connect_$(notdir $(plugin)))
	$(BIN)/lint-imports
	$(PYTEST) -q tests/test_architecture.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

soak: servers
	TESAIOT_REQUIRE_SERVERS=1 $(PYTEST) -m soak -s tests/soak

bench: servers
	@$(PY) bench/run.py $(BENCH)

interop: setup
	PAHO_TESTING="$(PAHO_TESTING)" $(PYTEST) -m interop -s tests/test_interop.py

wheels: setup
	@for package in $(PACKAGES); do $(PY) -m build --wheel --outdir dist $$package || exit 1; done

constraints: setup
	@{ sed -n '/^#/p' constraints.txt; \
	  { $(PY) -m pip freeze --all --exclude-editable; echo 'colorama==0.4.6'; } | grep -v '^setuptools==' | sort -f -u; \
	} > constraints.new && mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) dist demo-data .work bench/results tests/js/node_modules

# `make demo` and `make test` need Python 3.10 to 3.13 and nothing else: both build .venv first when it is missing.
PYTHON ?= python3
BIN := .venv/bin
DATA ?=
WEIGHTS ?=
DEVICES ?=

.PHONY: env demo test test-slow test-label bundles support docs results clean

env: .venv/ready

.venv/ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[test]"
	touch $@

# Threads that wait must not spin: on a machine that does other work too, training would be many times slower.
demo: env
	OMP_WAIT_POLICY=passive $(BIN)/python -m monai_petl demo --out demo $(if $(DATA),--data "$(DATA)")

# One thread: small tensors gain nothing from more, and lose a great deal on a busy machine. Two processes, a file each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -X warn_default_encoding -m pytest --numprocesses 2 --dist loadfile

test: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow"

# All commands of all model cards, every check of every bundle, several processes, compilers, the demo, learning on real data.
test-slow: env
	$(PYTEST) -m slow --ignore tests/label

# A real MONAI Label server on loopback, in an environment of its own: it needs older versions of some packages.
LABEL := .venv-label

$(LABEL)/ready: tests/label/requirements.txt setup.cfg
	$(PYTHON) -m venv $(LABEL)
	$(LABEL)/bin/python -m pip install --quiet --upgrade pip
	$(LABEL)/bin/python -m pip install --quiet --requirement tests/label/requirements.txt
	$(LABEL)/bin/python -m pip install --quiet --no-deps monailabel==0.8.5 pydicom-seg==0.4.1 --editable .
	touch $@

LABEL_TEST := OMP_NUM_THREADS=1 MONAI_LABEL_PYTHON="$(CURDIR)/$(LABEL)/bin/python" $(BIN)/python -X warn_default_encoding -m pytest tests/label

test-label: env $(LABEL)/ready
	$(LABEL_TEST)

# The configs of all bundles, from one page each and the parts that they share; see CONTRIBUTING.md.
bundles: env
	$(BIN)/python -m monai_petl bundle render bundle_sources bundles

# The table of docs/bundles.md, from what the checks of every bundle and the server's test find.
support: env $(LABEL)/ready
	mkdir -p build
	OMP_NUM_THREADS=1 $(BIN)/python -m monai_petl bundle verify $(wildcard bundles/*) --schema tests/schemas/meta_schema_20240725.json --out build/verify.json
	$(LABEL_TEST) --junitxml build/label.xml
	$(BIN)/python docs/support_table.py build/verify.json build/label.xml

# Every table of docs/results.md, from real data (hours): make results DATA=folder WEIGHTS=dinov2_vits14.safetensors
results: env
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/results.py run all --data "$(DATA)" --weights "$(WEIGHTS)" $(if $(DEVICES),--devices $(DEVICES))

docs: env
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

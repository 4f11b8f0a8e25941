# make setup | demo | test | test-full | container-test | lint | bench | docs; each sets up .venv first, which takes no time once it is done.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.ready
# Python compiles what is imported; pip would compile everything, which takes longer than all else that it does.
INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: setup demo test test-full container-test lint bench docs clean

setup: $(STAMP)

$(STAMP): requirements.txt requirements-scans.txt project/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with: make setup PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "the venv module is needed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(INSTALL) -r requirements.txt -r requirements-scans.txt
	$(INSTALL) -e 'project[test]'
	@touch $@

demo: $(STAMP)
	$(VENV)/bin/cwdm demo demo

PYTEST := $(VENV)/bin/python -m pytest -c project/pyproject.toml --rootdir project
# A process a core, each with one thread.
PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) project/tests --numprocesses 2 --dist worksteal --durations 15 --durations-min 5

test: lint
	$(PARALLEL) -m "not full"

test-full: $(STAMP)
	$(PARALLEL) -m full

# Needs Docker, or root on Debian or Ubuntu to install it.
container-test: $(STAMP)
	$(PYTEST) project/container_tests -ra

lint: $(STAMP)
	cd project && ../$(VENV)/bin/ruff check . && ../$(VENV)/bin/ruff format --check . && ../$(VENV)/bin/mypy cwdm

bench: $(STAMP)
	$(VENV)/bin/python project/benchmarks/step.py

# A static site; open site/index.html through any web server, such as python -m http.server -d site.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) demo site

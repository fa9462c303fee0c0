# make demo | test | test-slow | bench | docs | gallery | lint | clean: each makes what it needs.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two processes, one thread each; what a file shares among its tests is made once.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
INSTALLED := $(VENV)/.installed
PEERS := $(VENV)/.peers
SITE := $(VENV)/.site
BENCH_OUT := docs/benchmarks

.PHONY: demo test test-slow bench docs gallery lint graphviz clean help

help:
	@sed -n 's/^# make /make /p' Makefile

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[cli,examples,dev]'
	touch $@

# Drawing needs the program dot. Without it fxkfac writes the source and says how to render it.
graphviz:
	@command -v dot >/dev/null || { \
	  if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq graphviz >/dev/null; \
	  else \
	    echo "dot is not installed: drawings stay .gv sources. Install graphviz to render them."; \
	  fi; } || echo "graphviz could not be installed: drawings stay .gv sources."

demo: $(INSTALLED) graphviz
	$(BIN)/python examples/quickstart.py

test: $(INSTALLED) graphviz
	$(TESTS) -m "not slow"

test-slow: $(INSTALLED) graphviz
	$(TESTS) -m slow

# Time and memory beside the peers: a table, and the same as JSON, Markdown and a picture.
$(PEERS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[bench]'
	touch $@

bench: $(PEERS)
	PYTHONPATH=tests $(BIN)/python -m benchmarks --out $(BENCH_OUT) $(BENCH)

# The documentation in site/; a warning is an error.
$(SITE): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[docs]'
	touch $@

docs: $(SITE)
	$(BIN)/python docs/make_site.py

# The pictures of the gallery anew, by the examples that make them.
gallery: $(INSTALLED) graphviz
	for example in $$($(BIN)/python docs/gallery.py); do \
	  $(BIN)/python $$example --out docs/pictures || exit 1; done

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

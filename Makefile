# Every target sets up what it needs: Python 3.11 or 3.12 and make are enough. `make PYTHON=/path/to/python ...` to choose one.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo loop test test-alone test-cluster test-nodes lint types docs docs-reference serve mlflow-ui mlflow-import bench-serve bench-anchor bench-build clean

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.bench-ready
DOCS_READY := $(VENV)/.docs-ready
# A module is compiled when it is first imported: most of those installed never are.
INSTALL := pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
PYTEST := env OMP_NUM_THREADS=1 $(BIN)/python -m pytest
ALONE := not gpu and not cluster and not nodes
CLUSTER := cluster and not gpu and not nodes
# Only these files are read for that half.
WITH_CLUSTER = $$(grep -l 'mark\.cluster' tests/test_*.py)
# Two clusters beside each other: a test waits for processes about as long as they compute.
TWO := -n 2 --dist loadfile --no-loadscope-reorder
# Only what failed, and an error where a run ended before it could say what did. Each half of the
# tests notes its own.
AGAIN := --last-failed --last-failed-no-failures none
NOTES := -o cache_dir=.pytest_cache/cluster
CONFIG ?= configs/demo.yaml
PORT ?= 5000
SERVE_PORT ?= 8000
# What the demo compares itself with at its end: SASRec of as many floating-point operations an example.
SASREC := --beside model.encoder=sasrec --beside model.attention.window=null --beside model.truncate_after_layer=null \
	--beside model.d_qk=16 --beside model.d_v=16 --beside model.ffn_dim=72
BESIDE ?= $(if $(filter configs/demo.yaml,$(CONFIG)),$(SASREC))
# The first interpreter that runs and can make an environment: a shim may answer to the name and not run.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& echo $$p && break; done)

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## real logs -> sequences -> training -> registry -> HTTP, in minutes; CONFIG=configs/smoke.yaml is smaller
	$(BIN)/python -m jobs.pipeline --config $(CONFIG) --fresh $(BESIDE)

loop: $(READY)  ## after the demo: what is served and clicked becomes the next champion, in three minutes
	$(BIN)/python -m jobs.pipeline --config $(CONFIG) --loop

test: $(READY)  ## every test that needs no GPU, but for those that lose nodes; what fails is run once more
	@$(MAKE) --no-print-directory test-alone
	@$(MAKE) --no-print-directory test-cluster

test-alone: $(READY)  ## those of them that start neither Ray nor MLflow
	$(PYTEST) -m "$(ALONE)" -n logical --dist loadfile --no-loadscope-reorder || $(PYTEST) -m "$(ALONE)" $(AGAIN)

test-cluster: $(READY)  ## those that start Ray, MLflow or both
	$(PYTEST) -m "$(CLUSTER)" $(NOTES) $(WITH_CLUSTER) $(TWO) || $(PYTEST) -m "$(CLUSTER)" $(NOTES) $(AGAIN)

test-nodes: $(READY)  ## a machine is lost in the middle of a build and of training: minutes, several Ray nodes
	$(PYTEST) -m nodes

lint: $(READY) types  ## ruff, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## basedpyright
	$(BIN)/basedpyright

docs-reference: $(READY)  ## write docs/reference/ from the code: settings, jobs, HTTP, metrics
	$(BIN)/python -m tests.support.reference

serve: $(READY)  ## leave the champion of the last demo answering over HTTP, SERVE_PORT=8000, until Ctrl-C
	$(BIN)/python -m jobs.serve --config $(CONFIG) --set serve.port=$(SERVE_PORT)

mlflow-ui: $(READY)  ## reopen the runs and models of past demos, PORT=5000, until Ctrl-C
	$(BIN)/python -m jobs.mlflow_ui --config $(CONFIG) --port $(PORT)

mlflow-import: $(READY)  ## put the committed figures of benchmarks/runs/ beside them, to be seen by make mlflow-ui
	$(BIN)/python -m jobs.mlflow_import --config $(CONFIG)

bench-anchor: $(BENCH_READY)  ## smoothed rates and LightGBM on the KuaiRand subset: the numbers to beat
	$(BIN)/python -m benchmarks.quality.kuairand_anchor

bench-build: $(BENCH_READY)  ## rows/s of the build beside Polars and map_groups, its memory, and kills: half an hour
	for what in speed memory kills; do $(BIN)/python -m benchmarks.build.at_size $$what; done

bench-serve: $(READY)  ## the server under load: latency, overload, new versions, events while replicas are killed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.serving.under_load

docs: $(DOCS_READY)  ## the documents as a site, in build/site; a broken link fails it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## remove runs/ (models and figures too) and caches; the environment stays
	rm -rf runs build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# A stamp newer than the two files that name the versions: setting up again does nothing.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No usable python3.11 or python3.12 with venv and ensurepip was found (Debian: python3.11-venv)." >&2; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) -V): a few minutes and about 3 GB, once."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m $(INSTALL) -e ".[dev]"
	@touch $@

$(BENCH_READY): $(READY)
	@echo "Adding the benchmarks' packages to $(VENV)."
	@$(BIN)/python -m $(INSTALL) -e ".[dev,bench]"
	@touch $@

$(DOCS_READY): $(READY)
	@echo "Adding the packages of the documents' site to $(VENV)."
	@$(BIN)/python -m $(INSTALL) -e ".[dev,docs]"
	@touch $@

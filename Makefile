# make paper: regenerate every figure from the embedded tiny models;  make test: run the tests.
# Both set themselves up in .venv (Python >= 3.11); nothing is installed anywhere else.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help paper report test test-fast fuzz bench gpu slurm-test lmms-test browser-test testbed-design setup lock clean

help:  ## these lines
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/'

setup: .venv/ready  ## make .venv with what pyproject.toml lists, in the versions of requirements.lock

# torch goes first and alone, so that pip takes whatever build of exactly this release the machine offers:
# CUDA from PyPI on a GPU machine, a CPU build where pip is configured to find one
.venv/ready: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is %d.%d; try make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint requirements.lock torch
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable '.[paper,test]'
	touch $@

paper: .venv/ready  ## regenerate every figure and table (what is up to date is left alone)
	$(BIN)/python -m snakemake --profile profiles/local

report: .venv/ready  ## gather all figures and tables in one page that opens without a network: report.html
	$(BIN)/python -m analysis report

# a file of tests stays in one process, and shares there what it makes
test: .venv/ready  ## run the tests
	$(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile

# what most changes touch: positions, boxes, scoring, statistics, decoding, pruning
FAST := $(wildcard $(addprefix tests/test_,$(addsuffix *.py,positions boxes scoring stats decode pruning)))

test-fast: .venv/ready  ## run the tests of the core, in less than a minute
	$(BIN)/python -m pytest -q $(FAST)

fuzz: .venv/ready  ## throw 100,000 broken inputs at every reader
	$(BIN)/python -m pytest -q -m fuzz
	$(BIN)/python -m tests.fuzz

bench: .venv/ready  ## measure the engine: benchmarks/results.csv
	$(BIN)/python benchmarks/run.py

gpu: .venv/ready  ## measure the engine on a GPU, 7B sizes with random weights, in nine minutes: benchmarks/gpu.csv
	$(BIN)/python benchmarks/gpu.py

testbed-design: .venv/ready  ## train the models of figures 13 and A2 that are not in their rows yet, 90 seconds of one core each
	OMP_NUM_THREADS=1 $(BIN)/python -m analysis.training.testbed_design

slurm-test: .venv/ready  ## prove profiles/slurm on the cluster's Slurm, or as root on one of this machine alone (Debian)
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable '.[slurm]'
	tests/slurm/run.sh

# lmms-eval wants some hundred packages, some in other versions, so that it gets an environment of its own
.venv-lmms/ready: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv-lmms
	.venv-lmms/bin/python -m pip install --quiet --constraint requirements.lock torch
	.venv-lmms/bin/python -m pip install --quiet --editable '.[lmms]' pytest
	touch $@

lmms-test: .venv-lmms/ready  ## prove analysis.lmms inside lmms-eval, in .venv-lmms (3 GB, some minutes)
	.venv-lmms/bin/python -m pytest -q --confcutdir=tests/lmms tests/lmms/check.py

lock: .venv/ready  ## write requirements.lock anew: the exact versions that .venv holds now
	{ grep '^#' requirements.lock; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' | grep -v '^setuptools=='; } > requirements.tmp
	mv requirements.tmp requirements.lock

browser-test: .venv/ready  ## run every notebook in JupyterLab in a real browser; pictures of them in runs/browser/
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable '.[browser]'
	$(BIN)/python -m pytest -q -s -p no:cacheprovider --noconftest tests/browser/proof.py

clean:  ## forget what has been run, so that the next make paper regenerates everything; no rows or figures are removed
	rm -rf .snakemake papermill_runs/smoke figures/smoke

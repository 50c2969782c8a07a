# Everything sets itself up in .venv; python3 (3.11 or newer), make and a package registry are all it takes.
#
#   make train [ARGS="--config.a.b=VALUE ..."] [CONFIG=configs/NAME.py] [WORKDIR=DIR]
#   make test  [ARGS="-k targets"]
#   make test-fast  [ARGS=...]   # a minute and a half on 2 cores, without a network: for everyday use
#   make experiments [JOBS=2]    # the findings in experiments/, with their tables
#   make bench CONFIG=configs/NAME.py [ARGS="--peer=torch --profile"]    # a training step's time, and where it goes
#   make eval       # what the benchmarks of eval.py need
#   make hf         # torch and transformers, the oracles of the weight conversion; without them its tests skip
#   make lint
#   make docs       # the documentation as a site, build/site; warnings are errors
#   make clean

PYTHON ?= python3
VENV ?= .venv
DOCS_VENV ?= .venv-docs
CONFIG ?= configs/quickstart.py
WORKDIR ?= runs/quickstart
ARGS ?=
HF_PINS ?=
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

# A file's tests stay on one worker, so each program is compiled and kept once; a GPU is not taken whole by each worker.
PYTEST_ARGS ?= -q -n 2 --dist loadfile
TEST_ENV := XLA_PYTHON_CLIENT_PREALLOCATE=false MALLOC_ARENA_MAX=2

# Files whose tests compile little: definitions, oracles, configs, data, losses, one kind from training to decoding.
FAST_TESTS := $(addprefix tests/, config data/test_documents.py data/test_packing.py data/test_store.py \
  decoding/test_samplers.py decoding/test_verify.py evaluation/test_pass_at_k.py interop/test_fp8.py kernels/test_permute.py \
  layers/test_linear.py mtp/test_new_kind.py test_arrows.py test_configs.py test_loss_mixture.py \
  test_reference.py test_reference_losses.py test_targets.py tools/test_report.py training/test_flops.py \
  training/test_metrics.py training/test_schedules.py training/test_workdir.py)

.PHONY: train test test-fast experiments bench eval hf lint docs clean

train: $(VENV)/run.stamp
	$(BIN)/python train.py --config=$(CONFIG) --workdir=$(WORKDIR) $(ARGS)

test: $(VENV)/dev.stamp
	$(TEST_ENV) $(BIN)/python -m pytest $(PYTEST_ARGS) $(ARGS)

test-fast: $(VENV)/dev.stamp
	HF_HUB_OFFLINE=1 $(TEST_ENV) $(BIN)/python -m pytest $(PYTEST_ARGS) $(ARGS) $(FAST_TESTS)

experiments: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/runs/experiments/programs
experiments: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = 0.2
experiments: $(VENV)/eval.stamp  # the seeds of a variant share their compiled programs
	for each in experiments/*/run.sh; do PYTHON=$(BIN)/python JOBS=$(JOBS) bash $$each || exit; done

bench: $(VENV)/run.stamp
	$(BIN)/python benchmarks/train_step.py --config=$(CONFIG) $(ARGS)

eval: $(VENV)/eval.stamp

hf: $(VENV)/hf.stamp

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DOCS_VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict $(ARGS)

clean:
	rm -rf .venv .venv-docs .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is newer than its requirements only when everything they name is installed.
$(VENV)/run.stamp: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/eval.stamp: requirements-eval.txt $(VENV)/run.stamp
	$(PIP) -r requirements-eval.txt
	@touch $@

$(VENV)/dev.stamp: requirements-dev.txt requirements-eval.txt requirements-cloud.txt requirements-sentencepiece.txt $(VENV)/run.stamp
	$(PIP) -r requirements-dev.txt
	@touch $@

# mkdocs in an environment of its own: it reads docstrings from the source, and needs none of the other packages.
$(DOCS_VENV)/docs.stamp: requirements-docs.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip --disable-pip-version-check install --quiet -r requirements-docs.txt
	@touch $@

$(VENV)/hf.stamp: requirements-hf.txt $(VENV)/dev.stamp
	$(PIP) $(HF_PINS) -r requirements-hf.txt
	@touch $@

# make reproduce   build every item of config/config.yaml, or: make reproduce ITEMS=own/hh_rlhf DATA_ROOT=../data
#                  FULL=1 runs the grids in full: every condition, setting, control and seed
# make test        run the tests, WORKERS=2 at a time; PYTEST='tests/unit -k losses' chooses
# Both set up .venv by themselves; PYTHON=/path/to/python3 chooses the interpreter.
SHELL := /bin/bash
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

PROFILE ?= workflow/profiles/local
PYTEST ?=
WORKERS ?= 2
options := $(if $(ITEMS),items=$(ITEMS)) $(if $(DATA_ROOT),data_root=$(DATA_ROOT)) $(if $(RESULTS),results=$(RESULTS)) \
	$(if $(FULL),full=true)
config := $(if $(strip $(options)),--config $(options))
results := $(or $(RESULTS),results)

.PHONY: reproduce snakemake test lint
reproduce: .venv/.ready
	@python -m prefopt launch --logs $(results)/logs -- snakemake --workflow-profile $(PROFILE) $(config)
	@echo "done: open $(results)/report.html in a browser; artifacts and manifests are in $(results)/"

# One target of the Snakefile: make snakemake TARGET=mallowspo
snakemake: .venv/.ready
	@python -m prefopt launch --logs $(results)/logs -- snakemake --workflow-profile $(PROFILE) $(config) -- $(TARGET)

test: .venv/.ready
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python -m pytest -n $(WORKERS) --dist loadgroup $(PYTEST)
	@echo "done: every test passed; a skipped one says why above"

lint: .venv/.ready
	@ruff check . && ruff format --check . && snakefmt --check Snakefile workflow/rules && snakemake --lint

.venv/.ready: requirements.lock pyproject.toml envs/bootstrap.txt workflow/setup.sh
	@workflow/setup.sh
	@touch $@

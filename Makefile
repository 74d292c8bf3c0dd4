# make reproduce   build every item of config/config.yaml, or: make reproduce ITEMS=own/hh_rlhf DATA_ROOT=../data
#                  PROFILE=workflow/profiles/slurm runs the jobs on a cluster
#                  FULL=1 runs the grids in full: every condition, setting, control and seed
# make test        run the tests, WORKERS=3 processes at a time (one mostly waits where Slurm is, which comes first); PYTEST=... chooses
# make fast-test   the files of FAST alone: planning, declarations, losses, statistics; nothing that trains or runs jobs
# make gpu-test    the tests that need a CUDA device
# make lint        ruff, mypy, snakefmt and Snakemake's own checks
# Both set up .venv by themselves; PYTHON=/path/to/python3 chooses the interpreter.
SHELL := /bin/bash
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

PROFILE ?= workflow/profiles/local
PYTEST ?=
WORKERS ?= 3

# Values reach the shell through its environment and in quotes: neither make nor the shell reads anything in them.
unexport ITEMS DATA_ROOT RESULTS PROFILE TARGET
export GIVEN_ITEMS := $(value ITEMS)
export GIVEN_DATA_ROOT := $(value DATA_ROOT)
export GIVEN_RESULTS := $(value RESULTS)
export GIVEN_PROFILE := $(value PROFILE)
export GIVEN_TARGET := $(value TARGET)
options := $${GIVEN_ITEMS:+"items=$$GIVEN_ITEMS"} $${GIVEN_DATA_ROOT:+"data_root=$$GIVEN_DATA_ROOT"} \
	$${GIVEN_RESULTS:+"results=$$GIVEN_RESULTS"} $(if $(value FULL),full=true)
config := $(if $(value ITEMS)$(value DATA_ROOT)$(value RESULTS)$(value FULL),--config $(options))
results := $${GIVEN_RESULTS:-results}
launch := python -m prefopt launch --logs="$(results)/logs" -- snakemake --workflow-profile="$$GIVEN_PROFILE" $(config)

# What a profile's executor needs beside the environment: envs/slurm.txt, envs/kubernetes.txt
profile := $(basename $(notdir $(wildcard envs/$(notdir $(value PROFILE)).txt)))
executor := $(profile:%=.venv/.%)

.PHONY: reproduce snakemake test fast-test gpu-test lint
reproduce: .venv/.ready $(executor)
	@$(launch)
	@python -m prefopt publish --pending --out="$(results)/published.json"
	@echo "done: open $(results)/report.html in a browser; artifacts and manifests are in $(results)/"

# One target of the Snakefile: make snakemake TARGET=mallowspo
snakemake: .venv/.ready $(executor)
	@$(launch) -- $${GIVEN_TARGET:+"$$GIVEN_TARGET"}

test: .venv/.ready
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST)
	@echo "done: every test passed; a skipped one says why above"

# Chosen by what they do: no training, no model folder, no workflow run.
FAST := artifacts boundaries bradley_terry comparison config contributor_files costs difficulty dispersion \
	docs_commands ensemble exports grids_check grids_estimates items items_draws judges_declared judges_reading lc_values \
	losses losses_distillation losses_registry mallows pairs plan plan_grids plan_prompts readers startup winrate
fast-test: .venv/.ready
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python -m pytest -n $(WORKERS) --dist loadfile $(FAST:%=tests/unit/test_%.py)

gpu-test: .venv/.ready
	@HF_HUB_OFFLINE=1 python -m pytest -m gpu $(PYTEST)

lint: .venv/.ready
	@ruff check . && ruff format --check . && mypy && snakefmt --check Snakefile workflow/rules && snakemake --lint

.venv/.ready: requirements.lock pyproject.toml envs/bootstrap.txt workflow/setup.sh
	@workflow/setup.sh
	@touch $@

$(executor): .venv/.%: envs/%.txt .venv/.ready
	@VIRTUAL_ENV=$(CURDIR)/.venv uv pip install --quiet --no-deps -r $<
	@touch $@

#!/usr/bin/env bash
# Makes .venv with the pinned packages of requirements.lock; called by the Makefile, safe to run again.
#
# torch is its own step, so that one lock serves CPU and CUDA machines:
#   1. a CPU wheel that this machine's pip already offers (a wheel folder, a mirror of PyTorch's CPU index);
#   2. where no NVIDIA driver is found, PyTorch's CPU index;
#   3. otherwise, or when that index cannot be reached, the build on the default index (CUDA).
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3.11}
TORCH=$(sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
export UV_COMPILE_BYTECODE=1 # without compiled bytecode every job's imports take twice as long
export VIRTUAL_ENV=$PWD/.venv

say() { printf '[setup] %s\n' "$*"; }

command -v "$PYTHON" >/dev/null || {
  say "needs Python 3.11 or later: install it, or name one with PYTHON=/path/to/python3"
  exit 2
}
say "virtual environment .venv ($("$PYTHON" --version))"
"$PYTHON" -m venv --clear .venv
.venv/bin/python -m pip install -qq --disable-pip-version-check "$(grep '^uv==' envs/bootstrap.txt)"

if .venv/bin/python -m pip install --quiet --no-index --no-deps --compile "$TORCH" 2>/dev/null; then
  say "$TORCH from this machine's own wheels"
elif ! command -v nvidia-smi >/dev/null && .venv/bin/uv pip install --quiet --torch-backend=cpu -c requirements.lock "$TORCH" 2>/dev/null; then
  say "$TORCH, CPU build"
else
  say "$TORCH from the default index (CUDA build: several GB)"
  .venv/bin/uv pip install -c requirements.lock "$TORCH"
fi

say "$(grep -c '==' requirements.lock) pinned packages from requirements.lock; this takes about a minute"
.venv/bin/uv pip install --quiet --no-deps -r requirements.lock
say "prefopt, editable"
.venv/bin/uv pip install --quiet --no-deps --editable .
.venv/bin/uv pip check --quiet
say "done: .venv is ready"

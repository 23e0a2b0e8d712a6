#!/usr/bin/env bash
# `python -m llama_lib launch` without activating anything:
#
#   bash scripts/launch.sh --hostfile hosts.txt --nproc_per_node 8 pretrain.py -c 7b -p zero2 -x bf16
#
# Uses the project's .venv unless another environment is active. All words are handed on as they
# are, relative paths mean what they mean where you are, and the exit code is the job's.

set -euo pipefail

# Not `cd`, which a CDPATH would lead astray; links stay, since hosts may know only their names.
ROOT="$(realpath -s "$(dirname "${BASH_SOURCE[0]}")/..")"
readonly ROOT

if [[ -z "${VIRTUAL_ENV-}${CONDA_PREFIX-}" && -x "$ROOT/.venv/bin/python" ]]; then
    export PATH="$ROOT/.venv/bin:$PATH"
fi

readonly NEEDED='import importlib.util as i, sys
sys.exit(not all(map(i.find_spec, ("colossalai", "fabric", "torch"))))'
if ! python -P -c "$NEEDED" 2>/dev/null; then
    found="$(command -v python || echo "no python on PATH")"
    echo "launch.sh: this project's packages are not installed ($found); run 'make install' in" \
        "$ROOT, or deactivate the environment that is active" >&2
    exit 2
fi

# -P: the folder you are in may hold another llama_lib.
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec python -P -m llama_lib launch "$@"

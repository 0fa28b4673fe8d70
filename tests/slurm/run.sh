#!/usr/bin/env bash
# make slurm-test: the proof of profiles/slurm, on the Slurm that is here, or else on one of this machine alone.
set -euo pipefail
cd "$(dirname "$0")/../.."
test=(python -m pytest -q -s -p no:cacheprovider --noconftest tests/slurm/proof.py)
if command -v sinfo >/dev/null; then
    "${test[@]}"
else
    SLURM_TEST="${SLURM_TEST:---slurm-status-command squeue}" tests/slurm/one_node.sh runs/one_node "${test[@]}"
fi

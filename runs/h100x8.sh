#!/usr/bin/env bash
# Eight H100: d20, 1B tokens of Phase B per run, each run on all eight GPUs, a sweep over learning rates and seeds, certificate and report.
# Stopped? The same command continues. `bash runs/h100x8.sh --dry-run --tok-per-s 1000000` prints the plan, with hours at that speed; without
# the flag at the speed that earlier runs here have measured.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${SEEDS:=42,43,44}" "${LRS:=0.05,0.1,0.2,0.5,1}" "${ARMS:=dense,dense-rows,dense-frozen,cl}" "${NPROC:=8}"
PROFILE=h100x8 source runs/prepare.sh
python -m nanochat_cl.sweep --profile h100x8 --name h100x8 --arms "$ARMS" --lrs "$LRS" --seeds "$SEEDS" --nproc "$NPROC" "$@"

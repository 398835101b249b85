#!/usr/bin/env bash
# One A100, H100 or H200: d12, 200M tokens of Phase B per run, a sweep over learning rates and seeds, the certificate and the report.
# Stopped? The same command continues. `bash runs/gpu1.sh --dry-run --tok-per-s 400000` prints the plan, with hours at that speed; without
# the flag at the speed that earlier runs here have measured.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${SEEDS:=42,43,44}" "${LRS:=0.05,0.1,0.2,0.5,1}" "${ARMS:=dense,dense-rows,dense-frozen,cl}"
PROFILE=gpu1 source runs/prepare.sh
python -m nanochat_cl.sweep --profile gpu1 --name gpu1 --arms "$ARMS" --lrs "$LRS" --seeds "$SEEDS" "$@"

#!/usr/bin/env bash
# The whole experiment on a CPU with a sweep: 4 learning rates (more where an optimum lies at the edge), 3 seeds, dense with two controls,
# then the certificate and the report. Hours on 2 cores. Stopped? The same command continues; `bash runs/cpu.sh --dry-run` prints the plan.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${SEEDS:=42,43,44}" "${LRS:=0.1,0.3,1,3}" "${ARMS:=dense,dense-rows,dense-frozen,cl}" "${JOBS:=1}"
PROFILE=cpu source runs/prepare.sh
python -m nanochat_cl.sweep --profile cpu --name cpu --arms "$ARMS" --lrs "$LRS" --seeds "$SEEDS" --jobs "$JOBS" "$@"

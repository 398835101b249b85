#!/usr/bin/env bash
# A demonstration for a laptop: bash runs/runcpu.sh
set -euo pipefail
source "$(dirname "$0")/setup.sh"
: "${WANDB_RUN:=dummy}"

python -m nanochat.dataset -n 8
python -m scripts.tok_train --max-chars=2000000000
python -m scripts.tok_eval
python -m scripts.base_train --depth=6 --head-dim=64 --window-pattern=L --max-seq-len=512 --device-batch-size=32 --total-batch-size=16384 \
    --eval-every=100 --eval-tokens=524288 --core-metric-every=-1 --sample-every=100 --num-iterations=5000 --run="$WANDB_RUN"
python -m scripts.base_eval --device-batch-size=1 --split-tokens=16384 --max-per-task=16

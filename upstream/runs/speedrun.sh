#!/usr/bin/env bash
# GPT-2's CORE score (0.2565) on 8 H100s, with FP8: bash runs/speedrun.sh
set -euo pipefail
EXTRAS="[gpu]" source "$(dirname "$0")/setup.sh"
: "${WANDB_RUN:=dummy}"

python -m nanochat.dataset -n 8                        # what the tokenizer needs, about 2 billion characters
python -m nanochat.dataset -n 170 & DOWNLOAD=$!        # the rest, meanwhile
python -m scripts.tok_train
python -m scripts.tok_eval
wait "$DOWNLOAD"
launch scripts.base_train --depth=24 --target-param-data-ratio=8 --device-batch-size=16 --fp8 --run="$WANDB_RUN"
launch scripts.base_eval --device-batch-size=16

#!/usr/bin/env bash
# Compute-optimal models of depth 12 to 26, into <base>/<series>_miniseries_results/results.csv; it continues: bash runs/miniseries.sh
set -euo pipefail
: "${SERIES_NAME:=$(date +%b%d | tr '[:upper:]' '[:lower:]')}"
: "${WANDB_RUN:=$SERIES_NAME}"
EXTRAS="[gpu]" source "$(dirname "$0")/setup.sh"
RESULTS="$NANOCHAT_BASE_DIR/${SERIES_NAME}_miniseries_results"
mkdir -p "$RESULTS"

if [ -z "$SKIP_SETUP" ]; then
    python -m nanochat.dataset -n 1000
    python -m scripts.tok_train
fi
for DEPTH in ${DEPTHS:-12 14 16 18 20 22 24 26}; do
    ROWS=32                                            # per GPU; a larger model leaves less memory for them
    if [ "$DEPTH" -ge 20 ]; then ROWS=16; fi
    if [ "$DEPTH" -ge 28 ]; then ROWS=8; fi
    series "$RESULTS" "d${DEPTH}_$SERIES_NAME" "$DEPTH" --device-batch-size="$ROWS"
done

#!/usr/bin/env bash
# Which size is best for a budget of training FLOPs? Into <base>/scaling_laws_results_<series>/results.csv: bash runs/scaling_laws.sh
set -euo pipefail
: "${SERIES_NAME:=$(date +%b%d | tr '[:upper:]' '[:lower:]')}"
: "${WANDB_RUN:=$SERIES_NAME}"
EXTRAS="[gpu]" source "$(dirname "$0")/setup.sh"
RESULTS="$NANOCHAT_BASE_DIR/scaling_laws_results_$SERIES_NAME"
mkdir -p "$RESULTS"

for FLOPS in ${BUDGETS:-1e18 2.15e18 4.64e18 1e19}; do
    for DEPTH in ${DEPTHS:-10 12 14 16 18 20}; do
        series "$RESULTS" "d${DEPTH}_$FLOPS" "$DEPTH" --target-flops="$FLOPS" --target-param-data-ratio=-1 --eval-tokens=$((100 * 524288))
    done
done

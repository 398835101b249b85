#!/usr/bin/env bash
# What does each part of Model-CL do? Its ablations under three rules of plasticity, 3 seeds, a short cyclic Phase B; a table in
# runs/results/map.md. A study at one learning rate, no certificate. Stopped? The same command continues; --dry-run prints the plans.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${SEEDS:=42,43,44}" "${TOKENS:=262144}" "${JOBS:=2}" "${OUT:=runs/results/map.md}"
PROFILE=cpu source runs/prepare.sh
study() { python -m nanochat_cl.sweep --profile cpu --explore --lrs 1 --seeds "$SEEDS" --jobs "$JOBS" --schedule cyclic --max-tokens "$TOKENS" "$@"; }
# To a dense model a budget of blocks is no rule, and frozen-shared is dense-frozen.
study --name ablation/all --arms dense,dense-frozen,cl,cl-noiso,cl-flops --recipes lr_schedule=wsd "$@"
study --name ablation/rules --arms cl,cl-noiso,cl-flops --recipes lr_schedule=wsd,plasticity={frozen-shared,budget:0.25} "$@"
study --name ablation/more --arms cl-mlp,cl-full,cl-token --recipes lr_schedule=wsd "$@"
study --name ablation/reach --arms cl-row,cl-ema --recipes lr_schedule=wsd,plasticity=budget:0.25 "$@"
[[ " $* " == *" --dry-run "* ]] || python runs/map.py "$NANOCHAT_BASE_DIR"/evolve/ablation --out "$OUT"

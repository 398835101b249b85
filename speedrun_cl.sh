#!/usr/bin/env bash
# The whole experiment: does Model-CL start lower, overtake, and end above the best the dense model can ever reach?
#
#   bash speedrun_cl.sh                         # detects the machine; on 2 CPU cores about 10 minutes after installation
#   PROFILE=gpu1 SEED=7 bash speedrun_cl.sh     # the profiles are in nanochat_cl/profiles.py
#
# Every stage is skipped when it is complete and continues where it was stopped, so after Ctrl-C run the same command again.
set -euo pipefail
cd "$(dirname "$0")"
: "${SEED:=42}"
: "${NAME:=s$SEED}"
: "${WANDB_RUN:=dummy}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"

# Set-up: .venv with the project in it. Minutes the first time, mostly for torch.
command -v nvidia-smi >/dev/null && EXTRAS="[gpu]"
source runs/setup.sh
: "${PROFILE:=$(python -m nanochat_cl.machine profile)}"
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat_cl/$PROFILE}"
[ "$PROFILE" = h100x8 ] && : "${NPROC:=8}"
: "${NPROC:=1}"
launch() { if [ "$NPROC" -gt 1 ]; then torchrun --standalone --nproc_per_node="$NPROC" -m "$1" -- "${@:2}"; else python -m "$@"; fi; }
if [ "$PROFILE" = cpu ]; then
    : "${NANOCHAT_DTYPE:=$(python -m nanochat_cl.machine dtype)}"
    [ -z "$NANOCHAT_DTYPE" ] || export NANOCHAT_DTYPE
fi
echo "profile $PROFILE, seed $SEED, $NPROC process(es), ${NANOCHAT_DTYPE:-default dtype}, everything goes to $NANOCHAT_BASE_DIR"

# Data: general text for Phase A, the domain of Phase B, and of both the documents that no model will ever train on.
python -m nanochat_cl.corpus --profile "$PROFILE"
python -m nanochat_cl.domain --profile "$PROFILE"
python -m nanochat_cl.tokenizer --profile "$PROFILE"           # upstream's tok_train on the general text

# Phase A: two models from scratch on the same text, in the same order, with the same horizon, batch and decay.
launch nanochat_cl.pretrain --profile "$PROFILE" --arm dense --seed "$SEED"
launch nanochat_cl.pretrain --profile "$PROFILE" --arm cl --seed "$SEED"

# Phase B: the H1 check before the first step, then both models on the same stream, scored at every milestone. Of Model-CL's routed blocks
# the quarter that a batch uses most may learn: by routing alone hardly any is ever idle.
launch nanochat_cl.evolve --profile "$PROFILE" --arms dense,cl --seed "$SEED" --plasticity budget:0.25 --name "$NAME" --run "$WANDB_RUN"

# The certificate and the report.
python -m nanochat_cl.crossover "$NANOCHAT_BASE_DIR/evolve/$NAME"
python -m nanochat_cl.report "$NANOCHAT_BASE_DIR/evolve/$NAME"

# Sourced by cpu.sh, gpu1.sh, h100x8.sh and ablation.sh with PROFILE set: the environment and the data, as in speedrun_cl.sh. What is
# complete is skipped; with --dry-run among the script's arguments nothing is prepared.
: "${EXTRAS=$(command -v nvidia-smi >/dev/null && echo '[gpu]')}"
source runs/setup.sh
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat_cl/$PROFILE}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
if [ "$PROFILE" = cpu ]; then
    : "${NANOCHAT_DTYPE:=$(python -m nanochat_cl.machine dtype)}"
    [ -z "$NANOCHAT_DTYPE" ] || export NANOCHAT_DTYPE
fi
if [[ " $* " != *" --dry-run "* ]]; then
    python -m nanochat_cl.corpus --profile "$PROFILE"
    python -m nanochat_cl.domain --profile "$PROFILE"
    python -m nanochat_cl.tokenizer --profile "$PROFILE"
fi

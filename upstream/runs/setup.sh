# Sourced by the recipes: the environment (SKIP_SETUP=1: the one that is active) and what they share. They stop where the chat stages
# begin, which stay with the original.
export OMP_NUM_THREADS=1 NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
: "${NPROC_PER_NODE:=8}" "${SKIP_SETUP:=}"
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$HERE/.."
[ -n "$SKIP_SETUP" ] || source runs/setup.sh
cd "$HERE"

# launch <module> <flags>: on every GPU
launch() { torchrun --standalone --nproc_per_node="$NPROC_PER_NODE" -m "$1" -- "${@:2}"; }

# value <label> <log>: what base_train printed behind the label, the last time; without thousands separators and units
value() { grep -E "$1" "$2" | tail -n 1 | sed 's/.*: *//; s/[ m].*//; s/,//g'; }

# series <folder> <name> <depth> <flags>: train one model of a series unless its row is in <folder>/results.csv
series() {
    local log="$1/$2.log" results="$1/results.csv"
    [ -e "$results" ] || echo "name,depth,params,matrices,lm_head,iterations,tokens,flops,val_bpb,core,minutes" > "$results"
    if grep -q "^$2," "$results"; then echo "$2 is in $results already"; return; fi
    launch scripts.base_train --depth="$3" --model-tag="$2" --run="${WANDB_RUN}_$2" --sample-every=-1 --save-every=-1 \
        --core-metric-every=999999 --core-metric-max-per-task=-1 "${@:4}" | tee "$log"
    local row="$2,$3" label
    for label in '^total +:' '^transformer_matrices +:' '^lm_head +:' 'umber of iterations.*:' '^Total number of training tokens:' \
                 '^Total training FLOPs estimate:' 'Validation bpb:' 'CORE metric:' '^Total training time:'; do
        row+=",$(value "$label" "$log")"
    done
    echo "$row" >> "$results"
}

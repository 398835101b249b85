#!/usr/bin/env bash
# How fast the base (upstream/), the blocks of Model-CL and the data are on this machine, into runs/results/:
#
#   bash runs/bench.sh base                        # tok/s, step, loader, memory, start-up: d4 on a CPU, d12 and d20 on a GPU
#   bash runs/bench.sh base --against ../nanochat  # and of another nanochat tree, in alternation, with the ratio
#   bash runs/bench.sh blocks                      # MLP and whole model of Model-CL against dense, with the ceiling that FLOPs allow
#   bash runs/bench.sh data                        # text to tokens, batches, memory, resume, near duplicates: 2 minutes
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
command -v nvidia-smi >/dev/null && EXTRAS="[gpu]"
pushd "$root" >/dev/null; source runs/setup.sh; popd >/dev/null  # --against may be relative to where we were called
script=bench.py; [ "${1:-}" != data ] || script=bench_data.py
exec python "$root/runs/$script" "$@"

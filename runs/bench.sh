#!/usr/bin/env bash
# How fast the base (upstream/) and the blocks of Model-CL are on this machine, into runs/results/:
#
#   bash runs/bench.sh base                        # tok/s, step, loader, memory, start-up: d4 on a CPU, d12 and d20 on a GPU
#   bash runs/bench.sh base --against ../nanochat  # and of another nanochat tree, in alternation, with the ratio
#   bash runs/bench.sh blocks                      # MLP and whole model of Model-CL against dense, with the ceiling that FLOPs allow
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
command -v nvidia-smi >/dev/null && EXTRAS="[gpu]"
pushd "$root" >/dev/null; source runs/setup.sh; popd >/dev/null  # --against may be relative to where we were called
exec python "$root/runs/bench.py" "$@"

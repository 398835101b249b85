#!/usr/bin/env bash
# Does a killed run of Phase B end with the records of one that was left alone? 40 SIGKILLs on toy runs, 1 to 15 minutes on 2 CPU cores,
# the table into runs/results/kill_test.md:
#
#   bash runs/kill_test.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
exec python runs/kill_test.py "$@"

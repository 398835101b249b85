#!/usr/bin/env bash
# Set up and run all tests, from a fresh clone on a machine with Python >= 3.10: bash runs/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
EXTRAS="[test]" source runs/setup.sh
python -m pytest -q --durations=15 -n "$(nproc)" --dist loadfile "$@"

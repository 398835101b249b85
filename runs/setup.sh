# Sourced by the other scripts: a virtual environment in .venv with the project installed in place. Seconds when it is there already.
: "${PYTHON:=python3}"
: "${EXTRAS:=}"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed, $PYTHON is $("$PYTHON" -V 2>&1)" >&2; exit 2; }
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
STAMP=".venv/installed-$(cat pyproject.toml - <<<"$EXTRAS" | cksum | cut -d' ' -f1)"
[ -e "$STAMP" ] || { .venv/bin/python -m pip install --quiet -e ".$EXTRAS" && touch "$STAMP"; }
source .venv/bin/activate
# glibc gives temporaries of more than 32 MiB back at once and faults them in again, page by page, at each step on a CPU.
command -v nvidia-smi >/dev/null || export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592

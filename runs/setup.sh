# Sourced by the other scripts: a virtual environment in .venv with the project installed in place. Seconds when it is there already.
: "${PYTHON:=python3}"
: "${EXTRAS:=}"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed, $PYTHON is $("$PYTHON" -V 2>&1)" >&2; exit 2; }
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
STAMP=".venv/installed-$(cat pyproject.toml - <<<"$EXTRAS" | cksum | cut -d' ' -f1)"
[ -e "$STAMP" ] || { .venv/bin/python -m pip install --quiet -e ".$EXTRAS" && touch "$STAMP"; }
source .venv/bin/activate

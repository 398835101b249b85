"""What the README and the shell scripts tell people to type is accepted by the parsers, and the files they name exist."""
import importlib
import re
import shlex
import subprocess

import pytest

from nanochat_cl import sweep
from nanochat_cl.upstream import REPO

VARIABLES = {"$PROFILE": "cpu", "$SEED": "42", "$NAME": "s42", "$WANDB_RUN": "dummy", "$NANOCHAT_BASE_DIR": "/base", "<dir>": "dir", "DIR": "dir"}


def commands(name: str) -> list[tuple[str, list[str]]]:
    """(module, arguments) of every `python -m` or `launch` in a file."""
    found = re.findall(r"(?:python -m|launch) (nanochat_cl\.\w+)([^\n`#]*)", (REPO / name).read_text().replace("\\\n", " "))
    words = lambda text: [VARIABLES.get(w, w) for w in shlex.split(re.sub(r"\$\w+", lambda v: VARIABLES.get(v[0], v[0]), text.split(" | ")[0]))]
    return [(module, words(text)) for module, text in found if module != "nanochat_cl.machine"]


ALL = [(name, *command) for name in ("README.md", "speedrun_cl.sh", "docs/model-cl.md", "docs/scale.md", "upstream/README.md", "runs/prepare.sh")
       for command in commands(name)]
SWEEPS = ("runs/cpu.sh", "runs/gpu1.sh", "runs/h100x8.sh", "runs/ablation.sh")


@pytest.mark.parametrize("script", SWEEPS)
def test_every_script_plans_what_it_says(script, tmp_path, capsys):
    """The commands as the shell expands them, with its set-up and python left out; then their plans."""
    stub = 'source() { :; }; python() { printf "%q " "$@"; echo; }; . "$0"'
    done = subprocess.run(["bash", "-c", stub, script, "--dry-run", "--tok-per-s", "1e5"], cwd=REPO, capture_output=True, text=True, check=True)
    plans = [shlex.split(line)[2:] for line in done.stdout.splitlines() if "nanochat_cl.sweep" in line]
    for argv in plans:
        assert sweep.sweep(sweep.parse(argv), tmp_path) == {} and not list(tmp_path.iterdir())
    said = capsys.readouterr().out
    assert len(plans) == 1 + 3 * ("ablation" in script) == len(re.findall(r"\d+ runs, \d+ to do, .*about [\d.]+ h and evaluation", said)), said


@pytest.mark.parametrize("name, module, argv", ALL, ids=lambda value: value if isinstance(value, str) else " ".join(value) or "-")
def test_every_documented_command_is_accepted(name, module, argv):
    importlib.import_module(module).parse(argv)


def test_the_scripts_cover_every_stage_in_order():
    stages = [module.split(".")[1] for module, _ in commands("speedrun_cl.sh")]
    assert stages == ["corpus", "domain", "tokenizer", "pretrain", "pretrain", "evolve", "crossover", "report"]


def test_linked_files_exist():
    for page in ("README.md", "docs/model-cl.md", "docs/scale.md"):
        links = re.findall(r"\]\((?!http)([^)#]+)\)", (REPO / page).read_text())
        assert [link for link in links if not (REPO / page).parent.joinpath(link).exists()] == []


def test_upstream_imports_nothing_of_ours():
    lines = [line for path in (REPO / "upstream").rglob("*.py") for line in path.read_text().splitlines()]
    assert len(lines) > 1000 and [line for line in lines if re.match(r"\s*(from|import) (nanochat_cl|patches)\b", line)] == []

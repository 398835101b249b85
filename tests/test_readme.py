"""What the README and the shell scripts tell people to type is accepted by the parsers, and the files they name exist."""
import importlib
import re
import shlex

import pytest

from nanochat_cl.upstream import REPO

VARIABLES = {"$PROFILE": "cpu", "$SEED": "42", "$NAME": "s42", "$WANDB_RUN": "dummy", "$NANOCHAT_BASE_DIR": "/base", "<dir>": "dir", "DIR": "dir"}


def commands(name: str) -> list[tuple[str, list[str]]]:
    """(module, arguments) of every `python -m` or `launch` in a file."""
    found = re.findall(r"(?:python -m|launch) (nanochat_cl\.\w+)([^\n`#]*)", (REPO / name).read_text())
    words = lambda text: [VARIABLES.get(w, w) for w in shlex.split(re.sub(r"\$\w+", lambda v: VARIABLES.get(v[0], v[0]), text.split(" | ")[0]))]
    return [(module, words(text)) for module, text in found if module != "nanochat_cl.machine"]


ALL = [(name, *command) for name in ("README.md", "speedrun_cl.sh", "docs/model-cl.md", "upstream/README.md") for command in commands(name)]


@pytest.mark.parametrize("name, module, argv", ALL, ids=lambda value: value if isinstance(value, str) else " ".join(value) or "-")
def test_every_documented_command_is_accepted(name, module, argv):
    importlib.import_module(module).parse(argv)


def test_the_scripts_cover_every_stage_in_order():
    stages = [module.split(".")[1] for module, _ in commands("speedrun_cl.sh")]
    assert stages == ["corpus", "domain", "tokenizer", "pretrain", "pretrain", "evolve", "crossover", "report"]


def test_linked_files_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (REPO / "README.md").read_text())
    assert links and [link for link in links if not (REPO / link).exists()] == []


def test_upstream_imports_nothing_of_ours():
    lines = [line for path in (REPO / "upstream").rglob("*.py") for line in path.read_text().splitlines()]
    assert len(lines) > 1000 and [line for line in lines if re.match(r"\s*(from|import) (nanochat_cl|patches)\b", line)] == []

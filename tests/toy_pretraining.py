"""A base directory that Phase A can be trained in, and commands run the way a user runs them."""
import ast
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_cl import upstream

WORDS = ("the river carries stone and sand to a wide bay where boats wait for the evening tide while people on the bank talk of rain "
         "harvest trade winter roads bread salt horses letters and the price of wool").split()
FLAGS = ["--depth=2", "--aspect-ratio=32", "--head-dim=16", "--max-seq-len=64", "--window-pattern=SL", "--num-iterations=20",
         "--device-batch-size=4", "--total-batch-size=512", "--eval-every=10", "--eval-tokens=1024", "--save-every=10", "--warmup-steps=4",
         "--core-metric-every=-1", "--sample-every=-1", "--embedding-lr=1.6", "--unembedding-lr=0.032", "--matrix-lr=0.16",
         "--scalar-lr=2.0", "--weight-decay=0.1", "--warmdown-ratio=0.5", "--device-type=cpu"]


def write_shards(folder: Path, shards: int = 4, documents: int = 200) -> None:
    folder.mkdir(parents=True)
    for i in range(shards):
        r = random.Random(i)
        texts = [" ".join(r.choice(WORDS) for _ in range(r.randint(10, 90))) for _ in range(documents)]
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{i:05d}.parquet", row_group_size=50)


def environment(base: Path, eager: bool = True, **more: str) -> dict[str, str]:
    return {**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1", **({"TORCHDYNAMO_DISABLE": "1"} if eager else {}), **more}


def command(base: Path, *argv: str, cwd: Path = upstream.REPO, eager: bool = True, **more: str) -> subprocess.CompletedProcess:
    """`python -m argv...` with this base directory; `eager`: without compiling anything."""
    return subprocess.run([sys.executable, "-m", *argv], cwd=cwd, env=environment(base, eager, **more), capture_output=True, text=True)


def torchrun(base: Path, *argv: str, **more: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *argv], cwd=upstream.REPO, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(base, **more))


def make(base: Path) -> Path:
    write_shards(base / "base_data_climbmix")
    done = command(base, "scripts.tok_train", "--vocab-size=320", "--max-chars=200000", cwd=upstream.tree())
    assert done.returncode == 0, done.stderr
    return base


def respell(tree: Path) -> None:
    """Our tree, as somebody else might have written it: classes backwards, copies by from-import, training at import."""
    shutil.copytree(upstream.tree(), tree, ignore=shutil.ignore_patterns("__pycache__"))
    for path in tree.rglob("*.py"):
        body = ast.parse(path.read_text()).body
        classes = [node for node in body if isinstance(node, ast.ClassDef) and not any("Error" in ast.unparse(b) for b in node.bases)]
        if path.stem in ("gpt", "engine"):
            backwards = iter(classes[::-1])
            body = [next(backwards) if node in classes else node for node in body]
            at = 1 if ast.get_docstring(ast.Module(body, [])) else 0
            body.insert(at, ast.parse("from __future__ import annotations").body[0])
            if path.stem == "engine":
                body += ast.parse("from nanochat.gpt import GPT, GPTConfig as Config, MLP\n"
                                  "from nanochat.dataset import list_parquet_files\n"
                                  "from nanochat.common import compute_init as begin").body
        if path.stem == "base_train":
            assert ast.unparse(body[-1].test) == "__name__ == '__main__'"
            body = [*body[:-1], *body[-1].body]
        path.write_text(ast.unparse(ast.Module(body, [])) + "\n")

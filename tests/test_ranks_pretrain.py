"""Several ranks on a CPU do in Phase A what one does."""
import math
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from killed_runs import said, start, wait
from nanochat import optim
from nanochat_cl import pretrain, upstream
from patches import optim_gloo
from tests import toy_pretraining as toy

# Step by step the validation bpb of all ranks is the loss to compare: what base_train prints is one micro-batch's on rank 0.
PRETRAIN = [*(flag for flag in toy.FLAGS if not flag.startswith(("--max-seq", "--total", "--eval", "--save", "--num"))), "--max-seq-len=32",
            "--total-batch-size=256", "--eval-every=1", "--eval-tokens=256", "--save-every=-1", "--num-iterations=16",
            "--device-batch-size=4"]
T, ROWS = 32, 4


@pytest.fixture(scope="module")
def shards(base):
    """Documents of exactly one row: then row groups are micro-batches, and two ranks share a batch whichever way one rank fills it."""
    from nanochat.tokenizer import get_tokenizer
    tokenizer, r = get_tokenizer(), random.Random(0)
    texts = []
    while len(texts) < 600:
        text = " ".join(r.choice(toy.WORDS[:12]) for _ in range(r.randint(6, 14)))
        texts += [text] if len(tokenizer.encode(text)) == T else []
    folder = base / "base_data_climbmix"
    folder.mkdir()
    for i, part in enumerate((texts[:500], texts[500:])):
        pq.write_table(pa.table({"text": part}), folder / f"shard_{i:05d}.parquet", row_group_size=ROWS)
    return folder


def see(shards: Path) -> None:
    """Planted: nanochat found its base directory when the parent of this process imported it."""
    from nanochat import dataset
    dataset.base_dir, dataset.DATA_DIR = str(shards.parent), str(shards)


def curve(text: str) -> list[float]:
    return [float(bpb) for bpb in re.findall(r"Validation bpb: ([\d.]+)", text)]


def forked(base: Path, shards: Path, arm: str, ranks: int) -> list[float]:
    name = f"{arm}_on{ranks}"
    argv = [*PRETRAIN, f"--arm={arm}", f"--model-tag={name}"]
    assert wait(start(name, base, *argv, ranks=ranks, planted=dict.fromkeys(range(ranks), lambda: see(shards)), main=pretrain.main)) == [0] * ranks, said(base, name)
    return curve(said(base, name))


def check(one: list[float], two: list[float]) -> None:
    assert len(one) == len(two) == 17 and one[0] - one[-1] > 0.5, one
    assert two[:11] == pytest.approx(one[:11], abs=1e-4 / math.log(2))  # bits: 1e-4 nats of loss, a token being a byte at least
    assert two[-1] == pytest.approx(one[-1], abs=0.01)


def test_two_ranks_pretrain_model_cl_as_one_does(base, shards):
    check(forked(base, shards, "cl", 1), forked(base, shards, "cl", 2))
    assert len(list((base / "base_checkpoints/cl_on2").glob("optim_*_rank*.pt"))) == 2


def test_torchrun_pretrains_dense_as_one_rank_does_also_on_a_tree_whose_optimizer_waits_for_futures(base, shards, tmp_path):
    shutil.copytree(upstream.tree(), tmp_path / "tree", ignore=shutil.ignore_patterns("__pycache__"))
    optim = tmp_path / "tree" / "nanochat" / "optim.py"
    optim.write_text(optim.read_text().replace("async_op=True)", "async_op=True).get_future()"))
    assert optim.read_text().count("get_future()") == 5
    process = toy.torchrun(base, "--standalone", "--nproc_per_node=2", "-m", "nanochat_cl.pretrain", "--", *PRETRAIN, "--arm=dense", "--model-tag=futures",
                           NANOCHAT_CL_UPSTREAM=str(tmp_path / "tree"))
    out = process.communicate()[0]
    assert process.returncode == 0, out
    check(forked(base, shards, "dense", 1), curve(out))


@pytest.mark.parametrize("imported", [False, True])
def test_futures_of_gloo_in_any_spelling(imported, monkeypatch):
    """A tree that imported the collective by name, and waits for many futures at once."""
    work = SimpleNamespace(waited=0)
    work.wait = lambda: setattr(work, "waited", work.waited + 1)
    collective = lambda *args, **kwargs: work
    monkeypatch.setattr(optim_gloo.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(optim_gloo.dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(optim_gloo.dist, "reduce_scatter_tensor", collective)
    if imported:
        monkeypatch.setattr(optim, "by_name", collective, raising=False)

    def step(self):
        start = optim.by_name if imported else optim_gloo.dist.reduce_scatter_tensor
        torch.futures.collect_all([start("x", async_op=True).get_future() for _ in range(2)]).wait()
    optim_gloo.wrap(step)(None)
    assert work.waited == 2 and optim_gloo.dist.reduce_scatter_tensor is collective and (not imported or optim.by_name is collective)

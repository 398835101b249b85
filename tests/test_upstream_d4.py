"""The model of depth 4, as wide as the CPU profile has it, for 50 steps: the same bits again in another process, from the checkpoint of step 30."""
import os
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat_cl.upstream import tree

STEPS, STOP = 50, 30
FLAGS = ["--device-type=cpu", "--depth=4", "--aspect-ratio=32", "--head-dim=32", "--max-seq-len=32", "--device-batch-size=2", "--total-batch-size=64",
         f"--num-iterations={STEPS}", "--warmup-steps=10", "--eval-every=-1", "--core-metric-every=-1",
         "--sample-every=-1", f"--save-every={STOP}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder with the checkpoints of a whole run, and of one in another process that continues it from step 30."""
    base = tmp_path_factory.mktemp("base")
    (base / "base_data_climbmix").mkdir()
    text = "".join(open(path, encoding="utf-8").read() for path in sorted(tree().rglob("*.py")))  # any text will do
    documents = [text[i:i + 200] for i in range(0, 60_000, 200)]
    for i in range(2):
        pq.write_table(pa.table({"text": documents[i::2]}), base / "base_data_climbmix" / f"shard_{i:05d}.parquet", row_group_size=50)
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": str(tree())}
    checkpoints = base / "base_checkpoints"

    def call(*command: str) -> None:
        result = subprocess.run([sys.executable, "-m", *command], env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    call("scripts.tok_train", "--vocab-size=300")
    call("scripts.base_train", *FLAGS, "--model-tag=whole")
    (checkpoints / "resumed").mkdir()
    for path in (checkpoints / "whole").glob(f"*{STOP:06d}*"):
        shutil.copy(path, checkpoints / "resumed")
    call("scripts.base_train", *FLAGS, "--model-tag=resumed", f"--resume-from-step={STOP}")
    return checkpoints


def leaves(value, name: str = "") -> dict[str, object]:
    if not isinstance(value, (dict, list, tuple)):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for k, v in items for key, leaf in leaves(v, f"{name}/{k}").items()}


@pytest.mark.parametrize("kind, least", [("model_{:06d}.pt", 35), ("optim_{:06d}_rank0.pt", 90)])
def test_every_value_of_the_resumed_run_is_that_of_the_whole_one(runs, kind, least):
    whole, resumed = (leaves(torch.load(runs / tag / kind.format(STEPS), weights_only=True)) for tag in ("whole", "resumed"))
    assert whole.keys() == resumed.keys() and len(whole) >= least
    same = lambda a, b: torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert [name for name in whole if not same(whole[name], resumed[name])] == []

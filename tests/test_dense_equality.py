"""
Model-Dense under the patches is plain nanochat, bit for bit: twenty steps of `scripts.base_train` as upstream ships it, and of
`pretrain --arm dense` at seed 42, each in its own process.
"""
import json
import shutil

import pytest
import torch

from nanochat_cl import upstream
from tests import toy_pretraining as toy

TIMING = {"total_training_time"}          # differs between any two runs
NAMES = {"model_tag"}                     # the two runs have their own folders


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return toy.make(tmp_path_factory.mktemp("base"))


def leaves(value, path=""):
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in leaves(inner, f"{path}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, inner in enumerate(value) for k, v in leaves(inner, f"{path}/{i}").items()}
    return {path: value}


def identical(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        bits = lambda t: t.reshape(-1).view(torch.uint8)  # -0.0 and 0.0 differ, and a NaN equals itself
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
    return type(a) is type(b) and a == b


def assert_same_training(base, eager: bool) -> None:
    tag = "eager" if eager else "compiled"
    plain = toy.command(base, "scripts.base_train", *toy.FLAGS, f"--model-tag=plain-{tag}", cwd=upstream.tree(), eager=eager)
    assert plain.returncode == 0, plain.stderr
    ours = toy.command(base, "nanochat_cl.pretrain", "--arm=dense", "--seed=42", *toy.FLAGS, f"--model-tag=ours-{tag}", eager=eager)
    assert ours.returncode == 0, ours.stderr
    a, b = (base / "base_checkpoints" / f"{whose}-{tag}" for whose in ("plain", "ours"))
    assert {p.name for p in b.iterdir()} - {p.name for p in a.iterdir()} == {"phase_a.json"}

    for name in ("model_000010.pt", "model_000020.pt", "optim_000010_rank0.pt", "optim_000020_rank0.pt"):
        one, other = (leaves(torch.load(folder / name, weights_only=True)) for folder in (a, b))
        assert list(one) == list(other)
        assert sum(isinstance(value, torch.Tensor) for value in one.values()) >= 20
        assert [key for key in one if not identical(one[key], other[key])] == [], name
    start, end = (torch.load(a / f"model_0000{step}.pt", weights_only=True) for step in (10, 20))
    assert all(not torch.equal(start[key], end[key]) for key in start), "a weight that never moves proves nothing"

    for name in ("meta_000010.json", "meta_000020.json"):
        one, other = ((folder / name).read_text() for folder in (a, b))
        unlike = [line for line, line_b in zip(one.splitlines(), other.splitlines(), strict=True) if line != line_b]
        keys = {line.split('"')[1] for line in unlike}
        assert keys <= TIMING | NAMES | {"sha256"}, unlike
        assert "cl" not in json.loads(other)["model_config"]


def test_dense_under_the_patches_is_plain_upstream_bit_for_bit(base):
    """Compiled, as users train; where there is no compiler they train eagerly."""
    assert_same_training(base, eager=not shutil.which("g++"))

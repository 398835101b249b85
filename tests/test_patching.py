"""
nanochat_cl.patching: on, off without a trace, and `verify` on our tree and on one that follows the spec in another spelling.
"""
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

import patches
from nanochat_cl import arms, patching, upstream
from nanochat_cl.command import UserError
from patches import common_seed, dataset_order, settings
from tests import toy_pretraining as toy


@pytest.fixture
def eager(monkeypatch):
    """The optimizer's kernels as they are before compilation, whichever way this process imported them."""
    from nanochat import optim
    for kernel in ("adamw_step_fused", "muon_step_fused"):
        compiled = getattr(optim, kernel)
        monkeypatch.setattr(optim, kernel, getattr(compiled, "_torchdynamo_orig_callable", compiled))


@pytest.fixture
def fake(monkeypatch):
    """Two modules of a tree: `origin` with a function and a class, `copier` that took both by `from origin import ...`."""
    origin, copier = types.ModuleType("nanochat.fake_origin"), types.ModuleType("nanochat.fake_copier")
    exec("def f(x): return x\nclass C:\n    def m(self, x): return x", vars(origin))
    origin.C.__module__ = origin.__name__
    for module in (origin, copier):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    copier.f, copier.C, copier.renamed = origin.f, origin.C, origin.f
    return origin, copier


def patch(name: str, qualname: str, wrap=lambda original: lambda *args: ("new", original(*args)), signature=()) -> patching.Patch:
    return patching.Patch(name, f"nanochat.fake_origin:{qualname}", "because", wrap, signature)


def test_every_patch_file_is_in_the_order_and_states_its_promise():
    files = {path.stem for path in Path(patches.__file__).parent.glob("*.py")} - {"__init__", "settings"}
    assert sorted(patches.ORDER) == sorted(files)
    for name in patches.ORDER:
        header = dict(patching.HEADER.findall(sys.modules.get(f"patches.{name}", __import__(f"patches.{name}", fromlist="x")).__doc__))
        assert list(header) == ["Target", "Why", "Keeps", "Verified"] and all(map(str.strip, header.values())), name


def test_names_copied_by_from_import_follow_on_and_off(fake):
    origin, copier = fake
    f, C, m = origin.f, origin.C, origin.C.m
    with patching.applied([patch("function", "f"), patch("method", "C.m")]):
        assert origin.f(1) == copier.f(1) == copier.renamed(1) == ("new", 1)
        assert copier.C().m(2) == ("new", 2) and copier.C is C
    assert origin.f is copier.f is copier.renamed is f and origin.C.m is m


def test_a_module_imported_while_patched_gets_the_original_back(fake, monkeypatch):
    origin, _ = fake
    f, late = origin.f, types.ModuleType("scripts.fake_late")
    with patching.applied([patch("function", "f")]):
        monkeypatch.setitem(sys.modules, late.__name__, late)
        late.f = origin.f
    assert late.f is f


def test_applying_twice_wraps_once_and_an_inner_block_leaves_the_outer_one_on(fake):
    origin, _ = fake
    one, two = patch("one", "f"), patch("two", "f")
    with patching.applied([one]):
        with patching.applied([one, two]):
            assert origin.f(1) == ("new", ("new", 1))
        assert origin.f(1) == ("new", 1)
    assert origin.f(1) == 1


def test_a_missing_target_is_named_and_nothing_stays_on(fake):
    origin, copier = fake
    f = origin.f
    with pytest.raises(UserError, match="patch two: .* has no nanochat.fake_origin:C.gone"):
        with patching.applied([patch("one", "f"), patch("two", "C.gone")]):
            pytest.fail("went on")
    assert origin.f is copier.f is f


def test_a_wrap_that_raises_leaves_nothing_on(fake):
    origin, _ = fake
    f = origin.f
    with pytest.raises(ZeroDivisionError):
        with patching.applied([patch("one", "f"), patch("two", "C.m", wrap=lambda original: 1 / 0)]):
            pytest.fail("went on")
    assert origin.f is f


def test_another_signature_is_reported(fake):
    assert patching.check(patch("one", "C.m", signature=("self", "x"))) == "ok"
    assert patching.check(patch("one", "C.m", signature=("self", "y"))) == "SIGNATURE IS (self, x)"
    assert patching.check(patch("one", "C.gone")).startswith("MISSING")


def test_a_patch_that_changes_the_last_bit_of_dense_is_found(eager):
    plain = patching.train_dense()
    bad = patching.Patch("bad", "nanochat.gpt:norm", "", lambda norm: lambda x: norm(x) * (1 + 2 ** -22), ("x",))
    with patching.applied([bad]):
        wrong = patching.differing(plain, patching.train_dense(), patching.same_bits)
    assert "loss 2" in wrong and "model transformer.wte.weight" in wrong
    assert patching.differing(plain, patching.train_dense(), patching.same_bits) == []


def test_undo_leaves_no_trace_after_both_arms_trained_in_one_process(eager):
    from nanochat import checkpoint_manager, dataloader, engine, gpt
    assert {checkpoint_manager.GPTConfig, engine.KVCache}  # copies of targets are loaded
    plain = patching.train_dense()
    before = patching.snapshot()
    with patching.applied():
        assert dataloader.list_parquet_files is not before["nanochat.dataloader:list_parquet_files"]
        assert checkpoint_manager.GPTConfig is gpt.GPTConfig is not before["nanochat.gpt:GPTConfig"]
        with settings.using(seed=7, arm=arms.cl(64, 4, 0, "cl")):
            ours = patching.train_dense()  # the same program, whose model is now Model-CL
        assert "cl" in ours["config"] and ours["loss 0"] != plain["loss 0"]
        assert patching.differing(plain, patching.train_dense(), patching.same_bits) == []
    assert patching.differing(before, patching.snapshot(), lambda a, b: a is b) == []
    assert settings.seed == 42 and settings.arm is None


def test_the_seed_patch_is_inert_at_42_and_seeds_with_anything_else():
    def compute_init(device_type="cuda"):
        torch.manual_seed(42)
        return device_type
    patched = common_seed.wrap(compute_init)
    draws = {}
    for seed in (42, 43, 44):
        with settings.using(seed=seed):
            assert patched("cpu") == "cpu"
        draws[seed] = torch.rand(3).tolist()
        assert draws[seed] == torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()
    assert draws[42] != draws[43] != draws[44]


@given(st.sets(st.integers(0, 6542), min_size=2, max_size=30), st.integers(0, 1000), st.data())
def test_another_seed_permutes_the_training_shards_and_nothing_else(numbers, seed, data):
    names = [f"shard_{number:05d}.parquet" for number in sorted(numbers)]
    listed = dataset_order.wrap(lambda folder: [os.path.join(folder, name) for name in names])
    with settings.using(seed=seed):
        order = listed("/a")
        assert order == listed("/a") and sorted(order) == [f"/a/{name}" for name in names] and order[-1] == f"/a/{names[-1]}"
        assert [os.path.basename(path) for path in order] == [os.path.basename(path) for path in listed("/b")]
        assert seed != 42 or order == sorted(order)
        gone = data.draw(st.sampled_from(names[:-1]))  # fewer shards: the others keep their order
        fewer = dataset_order.wrap(lambda folder: [f"{folder}/{name}" for name in names if name != gone])
        assert fewer("/a") == [path for path in order if path != f"/a/{gone}"]


def test_seeds_give_different_orders():
    listed = dataset_order.wrap(lambda: [f"shard_{i:05d}.parquet" for i in range(12)])
    orders = set()
    for seed in range(42, 52):
        with settings.using(seed=seed):
            orders.add(tuple(listed()))
    assert len(orders) == 10


def run(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "nanochat_cl.patching", *argv], cwd=upstream.REPO, capture_output=True, text=True)


def test_verify_passes_on_our_tree_and_list_and_diff_show_every_patch():
    done = run("verify")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[::2] for line in done.stdout.splitlines()[1:1 + len(patches.ORDER)]] == [[name, "ok"] for name in patches.ORDER]
    assert all(re.search(rf"{what} +ok, ", done.stdout) for what in ("no trace after undo", "Model-CL trains and decodes", "dense bit for bit"))

    assert [line.split()[0] for line in run("list").stdout.splitlines()] == list(patches.ORDER)

    hunks = run("diff").stdout.split("\n\n# ")
    assert len(hunks) == len(patches.ORDER)
    for name, hunk in zip(patches.ORDER, hunks):
        lines = hunk.removeprefix("# ").splitlines()
        place, target = next(line for line in lines if line.startswith("--- ")).split()[1:]
        file, number = place.rsplit(":", 1)
        source = (upstream.tree() / file).read_text().splitlines()[int(number) - 1:]
        gone = [line[1:] for line in lines if line.startswith("-") and not line.startswith("--- ")]
        assert lines[0].startswith(f"{name}: ") and gone == source[:len(gone)] and target.split(".")[-1].split(":")[-1] in "\n".join(gone)
        assert "+def wrap(original):" in lines


@pytest.fixture(scope="module")
def other_tree(tmp_path_factory) -> Path:
    tree = tmp_path_factory.mktemp("other") / "nanochat-checkout"
    toy.respell(tree)
    ours, theirs = ((folder / "nanochat" / "gpt.py").read_text() for folder in (upstream.tree(), tree))
    assert (ours.index("class MLP") < ours.index("class GPT(")) and (theirs.index("class MLP") > theirs.index("class GPT("))
    return tree


def test_verify_passes_on_a_tree_in_another_spelling(other_tree):
    done = run("verify", "--upstream", str(other_tree))
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(other_tree) in done.stdout
    assert all(re.search(rf"{what} +ok, ", done.stdout) for what in ("no trace after undo", "Model-CL trains and decodes", "dense bit for bit"))


def test_verify_names_what_another_tree_lacks_and_exits_1(other_tree, tmp_path):
    tree = tmp_path / "renamed"
    shutil.copytree(other_tree, tree)
    optim = tree / "nanochat" / "optim.py"
    assert "_compute_muon" in optim.read_text()
    optim.write_text(optim.read_text().replace("_compute_muon", "_muon_update"))
    dataset = tree / "nanochat" / "dataset.py"
    dataset.write_text(dataset.read_text().replace("warn_on_legacy", "warn"))
    gpt = tree / "nanochat" / "gpt.py"
    gpt.write_text(gpt.read_text().replace("scalar_lr", "scalars_lr").replace("window_pattern", "windows"))
    done = run("verify", "--upstream", str(tree))
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert done.returncode == 1
    assert "MISSING" in rows["optim_blocks"] and "ok" in rows["optim_rows"]
    assert rows["dataset_order"].endswith("IS (data_dir, warn)")
    assert rows["gpt_optimizer"].endswith(", scalars_lr)") and rows["gpt_config"].endswith(", windows)")
    assert "targets are missing" in done.stdout and "Traceback" not in done.stderr


def test_a_tree_that_is_none_is_one_line(tmp_path):
    done = run("verify", "--upstream", str(tmp_path))
    assert done.returncode != 0 and "no nanochat tree" in done.stderr and "Traceback" not in done.stderr

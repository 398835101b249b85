"""nanochat.checkpoint_manager: round trips, the guesses of tag and step, old files, and damage planted in every kind of file."""
import json
import os
import random
import re

import pytest
import torch

from nanochat import checkpoint_manager as cm
from nanochat import files
from nanochat.checkpoint_manager import UnreadableCheckpoint, find_largest_model, find_last_step, load_checkpoint, save_checkpoint
from nanochat.gpt import GPT, GPTConfig
from nanochat_cl.upstream import REPO, tree

MODEL = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}
OPTIM = {"state": {0: {"step": 3, "exp_avg": torch.ones(4)}},
         "param_groups": [{"lr": 0.1, "betas": (0.8, 0.95), "kind": "adamw", "params": [0]}]}
META = {"step": 3, "val_bpb": None, "loop_state": {"min_val_bpb": float("inf"), "time": 0.1 + 0.2},
        "name": "naïve", "tags": [1, {"x": True}]}


@pytest.fixture
def folder(tmp_path):
    """Steps 1, 2 and 3, each complete."""
    for step in (1, 2, 3):
        save_checkpoint(str(tmp_path), step, MODEL, OPTIM, {**META, "step": step})
    return tmp_path


def assert_loads(folder, step: int) -> None:
    model, optimizer, meta = load_checkpoint(str(folder), step, "cpu", load_optimizer=True)
    assert model.keys() == MODEL.keys() and all(torch.equal(model[k], MODEL[k]) and model[k].dtype == MODEL[k].dtype for k in MODEL)
    assert optimizer["param_groups"] == OPTIM["param_groups"] and torch.equal(optimizer["state"][0]["exp_avg"], torch.ones(4))
    assert {k: meta[k] for k in META} == {**META, "step": step}


def test_a_checkpoint_comes_back_as_it_was_under_nanochats_names(folder):
    assert_loads(folder, 2)
    assert sorted(p.name for p in folder.glob("*3*")) == ["meta_000003.json", "model_000003.pt", "optim_000003_rank0.pt"]
    model, optimizer, meta = load_checkpoint(str(folder), 2, "cpu")
    assert optimizer is None and meta == {**META, "step": 2}
    assert list(folder.glob("*.tmp")) == []


def test_other_ranks_write_their_optimizer_only(tmp_path):
    save_checkpoint(str(tmp_path), 7, MODEL, OPTIM, META, rank=3)
    assert os.listdir(tmp_path) == ["optim_000007_rank3.pt"]
    save_checkpoint(str(tmp_path), 7, MODEL, None, META)
    assert sorted(os.listdir(tmp_path)) == ["meta_000007.json", "model_000007.pt", "optim_000007_rank3.pt"]


def test_files_of_another_tree_load(tmp_path):
    torch.save(MODEL, tmp_path / "model_000003.pt")
    torch.save(OPTIM, tmp_path / "optim_000003_rank0.pt")
    (tmp_path / "meta_000003.json").write_text(json.dumps(META, indent=2))
    assert_loads(tmp_path, 3)


def test_what_is_written_is_what_torch_and_json_read(folder):
    assert torch.equal(torch.load(folder / "model_000003.pt", weights_only=True)["a.weight"], MODEL["a.weight"])
    assert json.loads((folder / "meta_000003.json").read_text(encoding="utf-8")) == META


def test_a_save_that_fails_halfway_leaves_the_old_file_and_no_other(folder):
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(str(folder), 3, {"a": MODEL["b"], "f": lambda: None}, OPTIM, {**META, "step": 3})
    assert_loads(folder, 3)
    assert list(folder.glob("*.tmp")) == []


@pytest.mark.parametrize("name", ["model_000003.pt", "meta_000003.json", "optim_000003_rank0.pt"])
def test_a_truncated_file_is_refused_with_its_path_and_the_newest_readable_step(folder, name):
    whole = (folder / name).read_bytes()
    for length in (0, 1, 30, len(whole) // 2, len(whole) - 1):
        (folder / name).write_bytes(whole[:length])
        with pytest.raises(UnreadableCheckpoint, match=f"{folder}/{name} cannot be read .*newest older step that is readable is 2$") as e:
            load_checkpoint(str(folder), 3, "cpu", load_optimizer=True)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["model_000003.pt", "optim_000003_rank0.pt"])
def test_a_flipped_bit_is_refused_or_changes_nothing_that_is_loaded(folder, name):
    whole = (folder / name).read_bytes()
    rng, refused = random.Random(name), 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(damaged)
        try:
            assert_loads(folder, 3)  # zip padding, time stamps
        except UnreadableCheckpoint as e:
            refused += 1
            assert name in str(e) and str(e).endswith("is 2")
    assert refused > 20, f"only {refused} of 150 flips were noticed"


def test_a_bit_flipped_inside_a_tensor_is_refused(folder):
    path = folder / "model_000003.pt"
    data = bytearray(path.read_bytes())
    data[data.index(MODEL["a.weight"].numpy().tobytes()) + 5] ^= 16
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["a.weight"].shape == (3, 4), "torch itself does not notice"
    with pytest.raises(UnreadableCheckpoint, match="checksum"):
        load_checkpoint(str(folder), 3, "cpu")


def test_damaged_older_steps_are_passed_over_and_none_left_is_said(folder):
    for step in (2, 3):
        (folder / f"model_{step:06d}.pt").write_bytes(b"")
    with pytest.raises(UnreadableCheckpoint, match="readable is 1$"):
        load_checkpoint(str(folder), 3, "cpu")
    (folder / "meta_000001.json").write_text("{")
    with pytest.raises(UnreadableCheckpoint, match="no older step is readable$"):
        load_checkpoint(str(folder), 3, "cpu")


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["model_000003.pt", "optim_000003_rank0.pt"])
def test_a_checkpoint_that_would_run_code_is_refused_and_runs_nothing(folder, name):
    trap = folder / "trap"
    torch.save({"a": Planted(str(trap))}, folder / name)
    with pytest.raises(UnreadableCheckpoint, match=name):
        load_checkpoint(str(folder), 3, "cpu", load_optimizer=True)
    assert not trap.exists()


def test_a_missing_step_names_those_that_exist(folder):
    with pytest.raises(FileNotFoundError, match=r"model_000009\.pt; steps with a model there: 1, 2, 3"):
        load_checkpoint(str(folder), 9, "cpu")


# --- which checkpoint -------------------------------------------------------------------------------------------------

def test_the_largest_depth_wins_else_the_latest_and_the_last_step(tmp_path):
    with pytest.raises(FileNotFoundError, match="base_train"):
        find_largest_model(str(tmp_path / "none"))
    for age, tag in enumerate(["other", "d2", "d12_x", "d4"]):
        (tmp_path / tag).mkdir()
        os.utime(tmp_path / tag, (1000 - age, 1000 - age))
    assert find_largest_model(str(tmp_path)) == "d12_x"
    for tag in ("d2", "d12_x", "d4"):
        (tmp_path / tag).rmdir()
    (tmp_path / "older").mkdir()
    os.utime(tmp_path / "older", (10, 10))
    assert find_largest_model(str(tmp_path)) == "other"
    with pytest.raises(FileNotFoundError):
        find_last_step(str(tmp_path / "other"))
    for name in ("model_000010.pt", "model_000009.pt", "model_000011.pt.tmp", "optim_000012_rank0.pt"):
        (tmp_path / "other" / name).touch()
    assert find_last_step(str(tmp_path / "other")) == 10


# --- models -----------------------------------------------------------------------------------------------------------

class Vocabulary:
    def __init__(self, size: int):
        self.size = size

    def get_vocab_size(self) -> int:
        return self.size


@pytest.fixture
def saved_model(tmp_path, monkeypatch):
    """A small model saved as base_checkpoints/d2 step 5 of a base directory; (base, model)."""
    monkeypatch.setattr(cm, "get_base_dir", lambda: str(tmp_path))
    monkeypatch.setattr(cm, "get_tokenizer", lambda: Vocabulary(50))
    torch.manual_seed(3)
    config = GPTConfig(sequence_len=16, vocab_size=50, n_layer=2, n_head=1, n_kv_head=1, n_embd=32, window_pattern="L")
    model = GPT(config)
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    save_checkpoint(str(tmp_path / "base_checkpoints" / "d2"), 5, model.state_dict(), OPTIM,
                    {"step": 5, "model_config": vars(config).copy()})
    return tmp_path, model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12).reshape(1, 12))


def test_a_model_is_rebuilt_from_its_checkpoint(saved_model):
    _, model = saved_model
    for phase in ("train", "eval"):
        again, tokenizer, meta = cm.load_model("base", torch.device("cpu"), phase)
        assert again.training == (phase == "train") and meta["step"] == 5 and tokenizer.get_vocab_size() == 50
        assert torch.equal(logits(again), logits(model))
    with pytest.raises(AssertionError, match="'test'"):
        cm.load_model("base", torch.device("cpu"), "test")
    with pytest.raises(KeyError):
        cm.load_model("mid", torch.device("cpu"), "eval")


def test_compiled_bf16_and_older_files_are_adapted(saved_model):
    base, model = saved_model
    folder = str(base / "base_checkpoints" / "d2")
    state = {f"_orig_mod.{k}": v.bfloat16() if k == "lm_head.weight" else v for k, v in model.state_dict().items() if "lambdas" not in k}
    config = {k: v for k, v in vars(model.config).items() if k != "window_pattern"}
    save_checkpoint(folder, 6, state, None, {"step": 6, "model_config": config})
    again, _, _ = cm.load_model("base", torch.device("cpu"), "eval")
    assert again.config.window_pattern == "L" and again.lm_head.weight.dtype == torch.float32
    assert torch.equal(again.resid_lambdas, torch.ones(2)) and torch.equal(again.x0_lambdas, torch.zeros(2))


def test_another_tokenizer_and_missing_weights_are_refused(saved_model, monkeypatch):
    base, model = saved_model
    monkeypatch.setattr(cm, "get_tokenizer", lambda: Vocabulary(51))
    with pytest.raises(AssertionError, match="51 entries.*trained with 50"):
        cm.load_model("base", torch.device("cpu"), "eval")
    state = {k: v for k, v in model.state_dict().items() if k != "smear_lambda"}
    save_checkpoint(str(base / "base_checkpoints" / "d2"), 6, state, None, {"step": 6, "model_config": vars(model.config).copy()})
    with pytest.raises(RuntimeError, match="smear_lambda"):
        cm.load_model("base", torch.device("cpu"), "eval")


def test_optimizer_states_are_found_by_rank_and_may_be_absent(saved_model):
    base, _ = saved_model
    assert cm.load_optimizer_state("base", "cpu", 0)["state"][0]["step"] == 3
    assert cm.load_optimizer_state("base", "cpu", 1) is None
    path = base / "base_checkpoints" / "d2" / "optim_000005_rank0.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UnreadableCheckpoint, match="optim_000005_rank0"):
        cm.load_optimizer_state("base", "cpu", 0)


def test_a_tag_and_a_step_choose_the_model_in_any_folder_and_only_rank_0_logs(saved_model, monkeypatch, caplog):
    base, model = saved_model
    folder, device = base / "base_checkpoints", torch.device("cpu")
    caplog.set_level("INFO")
    for again, tokenizer, meta in (cm.load_model_from_dir(str(folder), device, "train", model_tag="d2", step=5),
                                   cm.build_model(str(folder / "d2"), 5, device, "train")):
        assert again.training and tokenizer.get_vocab_size() == 50 and meta["step"] == 5
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    assert [r.message for r in caplog.records if "at step 5" in r.message] == [f"Loading model from {folder}/d2 at step 5"]
    monkeypatch.setenv("RANK", "1")
    caplog.clear()
    cm.log0("unheard")
    assert caplog.records == []


# --- files ------------------------------------------------------------------------------------------------------------

def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path, events = tmp_path / "file", []
    path.write_bytes(b"old")
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append((os.fstat(fd).st_size, path.read_bytes())), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("renamed"), replace(*names)))
    with files.replacing(str(path)) as f:
        f.write(b"new content")
    assert events == [(11, b"old"), "renamed"] and path.read_bytes() == b"new content" and os.listdir(tmp_path) == ["file"]
    with pytest.raises(KeyboardInterrupt):
        with files.replacing(str(path)) as f:
            f.write(b"half")
            raise KeyboardInterrupt
    assert path.read_bytes() == b"new content" and os.listdir(tmp_path) == ["file"]


def test_nothing_in_the_tree_writes_a_file_in_another_way():
    if tree() != REPO / "upstream":
        pytest.skip("another tree is in use")
    writing = re.compile(r"""open\([^)]*["'][wax]b?\+?["']|write_text|write_bytes|torch\.save\((?!.*, f\))""")
    lines = [(path.name, line) for path in sorted(tree().rglob("*.py")) for line in path.read_text().splitlines()]
    found = [f"{name}: {line.strip()}" for name, line in lines if writing.search(line)]
    assert found == ['files.py: with open(partial, "wb") as f:']

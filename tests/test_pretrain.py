"""nanochat_cl.pretrain, run the way a user runs it: whole, stopped, continued, and mistaken."""
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat_cl import arms, patching, pretrain, upstream
from nanochat_cl.command import UserError
from nanochat_cl.profiles import PROFILES
from tests import toy_pretraining as toy

LONGER = [flag for flag in toy.FLAGS if not flag.startswith(("--num", "--save", "--eval-every"))] + [
    "--num-iterations=60", "--save-every=20", "--eval-every=-1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return toy.make(tmp_path_factory.mktemp("base"))


def tensors(path: Path) -> dict:
    loaded = torch.load(path, weights_only=True)
    if "state" in loaded:  # an optimizer's
        return {f"{p}/{key}": value for p, state in loaded["state"].items() for key, value in state.items()}
    return loaded


def same_files(a: Path, b: Path, name: str) -> bool:
    one, other = tensors(a / name), tensors(b / name)
    return list(one) == list(other) and all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)


# --- flags ------------------------------------------------------------------------------------------------------------

def test_our_table_of_flags_is_base_trains_own():
    from scripts import base_train
    assert vars(base_train.parse([])) == pretrain.FLAGS


def test_a_flag_given_by_hand_wins_over_the_profile_and_the_rest_keeps_upstreams_default():
    args = pretrain.parse(["--profile", "gpu1", "--arm", "cl", "--seed", "7", "--depth", "9", "--matrix-lr=0.5"])
    assert (args.profile, args.arm, args.seed) == ("gpu1", "cl", 7)
    assert args.flags == {**pretrain.FLAGS, "depth": 9, "matrix_lr": 0.5, "device_batch_size": 32, "core_metric_every": -1,
                          "sample_every": -1, "save_every": 500}


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_has_flags_that_base_train_knows(name):
    from scripts import base_train
    assert vars(base_train.parse(list(PROFILES[name].pretrain))) == pretrain.parse(["--profile", name]).flags


# --- mistakes: one line, before anything is written -------------------------------------------------------------------

def move_to(base: Path, monkeypatch) -> None:
    """Make `base` the base directory of this process, in which nanochat is already imported."""
    from nanochat import dataset
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.setattr(dataset, "base_dir", str(base))
    monkeypatch.setattr(dataset, "DATA_DIR", str(base / "base_data_climbmix"))


@pytest.fixture
def here(base, tmp_path, monkeypatch):
    """A copy of the base directory for this process."""
    shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("base_checkpoints"))
    move_to(tmp_path / "base", monkeypatch)
    return tmp_path / "base"


def refused(argv: list[str]) -> str:
    with pytest.raises(UserError) as e:
        pretrain.pretrain(pretrain.parse([*toy.FLAGS, *argv]))
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("argv, message", [
    (["--arm=sparse"], "no arm 'sparse': expected one of dense, cl"),
    (["--arm=dense-rows"], "pretrain dense"),
    (["--arm=cl", "--target-flops=1e12"], "--target-flops"),
    (["--arm=cl", "--fp8"], "--fp8"),
    (["--arm=cl", "--backend=slice"], "backend slice is for decoding.*expected auto, masked or bmm"),
    (["--arm=cl-slice"], "arm cl-slice: the backend slice is for decoding"),
    (["--total-batch-size=500"], "multiple of rows x context x ranks = 256 tokens"),
    (["--total-batch-size=0"], "multiple of rows x context x ranks = 256 tokens"),
    (["--device-batch-size=0"], "positive"),
    (["--resume-from-step=30"], "no step 30 in "),
    (["--head-dim=31"], "an even --head-dim and a width of 24 at least, got 31"), (["--aspect-ratio=1", "--head-dim=8"], "at least, got 8 and 8; raise"),
    (["--eval-tokens=100"], "--eval-tokens must be at least .* = 256"),
])
def test_a_wrong_flag_or_arm_is_one_line_and_nothing_is_written(here, argv, message, monkeypatch):
    monkeypatch.setitem(arms.ARMS, "cl-slice", arms.Arm("cl-slice", {"backend": "slice"}))
    assert re.search(message, refused(argv))
    assert not (here / "base_checkpoints").exists()


@pytest.mark.parametrize("argv, message", [(["--bogus=1"], "unrecognized arguments: --bogus=1"),
                                           (["--profile=tpu"], "invalid choice: 'tpu'"),
                                           (["--depth=two"], "--depth: invalid int value: 'two'")])
def test_an_unknown_flag_or_value_ends_with_status_2_and_says_which(argv, message, capsys):
    with pytest.raises(SystemExit) as status:
        pretrain.parse(argv)
    assert status.value.code == 2 and message in capsys.readouterr().err


def test_more_ranks_than_row_groups_are_refused(here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert "a row group of text for each of 8 ranks" in refused(["--total-batch-size=2048", "--eval-tokens=2048"])


def test_missing_or_broken_text_and_tokenizer_are_named(here, base):
    data, shard = here / "base_data_climbmix", here / "base_data_climbmix" / "shard_00001.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    assert str(shard) in refused([])
    for path in list(data.iterdir())[1:]:
        path.unlink()
    assert "there are 1 shards" in refused([])
    for i in range(2):
        pq.write_table(pa.table({"body": ["words"]}), data / f"shard_{i:05d}.parquet")
    assert "2 shards, with [0, 0] such row groups" in refused([])
    for path in data.iterdir():
        path.unlink()
    assert "there are 0 shards" in refused([])
    data.rmdir()
    assert "nanochat_cl.corpus" in refused([])
    shutil.copytree(base / data.name, data)
    (data / "corpus.json").write_text('{"files": {"shard_00000.parquet": "0", "shard_00001.parquet": "0"}}')
    assert "disagree about shard_00002.parquet, shard_00003.parquet" in refused([]), "a shard that nothing compared with what is held out"
    for name in ("token_bytes.pt", "tokenizer.pkl"):
        for content in (b"", (here / "tokenizer" / name).read_bytes()[:-7], b"no pickle"):
            (here / "tokenizer" / name).write_bytes(content)
            assert "no usable tokenizer" in refused([])
    shutil.rmtree(here / "tokenizer")
    assert "no usable tokenizer" in refused([]) and "nanochat_cl.tokenizer" in refused([])
    assert not (here / "base_checkpoints").exists()


@pytest.mark.parametrize("depth,steps,batch", [(4, 528, 2**18), (6, 1062, 2**18), (12, 2520, 2**19), (20, 4980, 2**20), (24, 8352, 2**20)])
def test_the_horizon_is_nanochats(depth, steps, batch):
    """Against the reference numbers of upstream's interface, at a vocabulary of 32,768 and 12 tokens per scaling parameter."""
    horizon = lambda *more: pretrain.horizon(pretrain.parse(["--profile", "h100x8", "--depth", str(depth), *more]).flags, 32768)
    assert horizon() == (steps, batch)
    assert horizon("--num-iterations", "7", "--total-batch-size", "4096") == (7, 4096)


def test_checkpoints_of_another_program_are_left_alone(here):
    stranger = here / "base_checkpoints" / "d2_dense_s42" / "model_000001.pt"
    stranger.parent.mkdir(parents=True)
    stranger.write_bytes(b"x")
    assert "did not write" in refused([]) and stranger.read_bytes() == b"x"


def test_a_full_disk_is_known_before_training(here, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 9, 1))
    assert "has 1 free" in refused([]) and str(here) in refused([])


def test_what_nanochat_itself_refuses_is_one_line_too_and_stands_in_nobodys_way(base):
    done = toy.command(base, "nanochat_cl.pretrain", *toy.FLAGS, "--seed=5", "--warmdown-ratio=nan")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    folder = base / "base_checkpoints" / "d2_dense_s5"
    assert not any(folder.glob("*.pt")) and pretrain.begun(folder, {"flags": "others"}) == {"asked": {"flags": "others"}, "resumes": []}


# --- runs -------------------------------------------------------------------------------------------------------------

def stop(base: Path, argv: list[str], when: Path, how: signal.Signals) -> int:
    """Start, send the signal as soon as the file `when` is there, and return the exit status."""
    process = subprocess.Popen([sys.executable, "-m", "nanochat_cl.pretrain", *argv], cwd=upstream.REPO, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env=toy.environment(base))
    while not when.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(how)
    return process.wait()


def test_a_stopped_run_continues_to_the_same_bits_and_says_when_it_is_complete(base, monkeypatch, capsys):
    argv = ["--arm=cl", "--seed=3", *LONGER]
    folder, straight = base / "base_checkpoints" / "d2_cl_s3", base / "base_checkpoints" / "straight"
    assert toy.command(base, "nanochat_cl.pretrain", *argv, "--model-tag=straight").returncode == 0
    assert stop(base, argv, folder / "model_000020.pt", signal.SIGTERM) == 143
    assert (folder / "phase_a_begun.json").exists() and not (folder / "phase_a.json").exists()
    assert stop(base, argv, folder / "model_000040.pt", signal.SIGINT) == 130
    last = toy.command(base, "nanochat_cl.pretrain", *argv)
    assert last.returncode == 0 and "continues from step 40 (resume: exact)" in last.stdout, last.stdout + last.stderr
    for name in ("model_000060.pt", "optim_000060_rank0.pt"):
        assert same_files(folder, straight, name), name

    result, unbroken = (json.loads((place / "phase_a.json").read_text()) for place in (folder, straight))
    from nanochat import gpt
    with patching.applied(), torch.device("meta"):
        model = gpt.GPT(gpt.GPTConfig(**json.loads((folder / "meta_000060.json").read_text())["model_config"]))
    assert (result["arm"], result["seed"], result["step"], result["tokens"]) == ("cl", 3, 60, 60 * 512)
    assert result["params"]["total"] == sum(p.numel() for p in model.parameters()) > result["params"]["active"]
    assert result["flops"] == result["flops_per_token"] * result["tokens"]
    assert result["resumes"] == [{"step": step, "kind": "exact"} for step in (20, 40)] and unbroken["resumes"] == []
    assert result["machine"]["upstream"]["sha256"] == upstream.tree_hash() and result["machine"]["torch"] == torch.__version__
    assert not (folder / "phase_a_begun.json").exists()

    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    move_to(base, monkeypatch)
    pretrain.pretrain(pretrain.parse(argv))
    assert "is complete" in capsys.readouterr().out
    assert "flags.matrix_lr: 0.16 -> 0.2" in refused([*argv, "--matrix-lr=0.2"])
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_both_arms_train_on_a_tree_in_another_spelling_which_trains_at_import(base, tmp_path):
    tree = tmp_path / "checkout"
    toy.respell(tree)
    meta = {}
    for arm in ("dense", "cl"):
        argv = ["nanochat_cl.pretrain", f"--arm={arm}", *toy.FLAGS, f"--model-tag=other-{arm}"]
        done = toy.command(base, *argv, NANOCHAT_CL_UPSTREAM=str(tree))
        assert done.returncode == 0, done.stderr
        meta[arm] = json.loads((base / "base_checkpoints" / f"other-{arm}" / "meta_000020.json").read_text())
        assert json.loads((base / "base_checkpoints" / f"other-{arm}" / "phase_a.json").read_text())["machine"]["upstream"]["path"] == str(tree)
    assert "cl" in meta["cl"]["model_config"] and "cl" not in meta["dense"]["model_config"]
    assert meta["cl"]["total_batch_size"] == meta["dense"]["total_batch_size"]

    # Resume from what a plain nanochat saves about its position in the data: the record says that it is approximate.
    folder = base / "base_checkpoints" / "other-dense"
    begun = {"asked": json.loads((folder / "phase_a.json").read_text())["asked"], "resumes": []}
    for path in [folder / "phase_a.json", *folder.glob("*_000020*")]:
        path.unlink()
    (folder / "phase_a_begun.json").write_text(json.dumps(begun))
    plain = json.loads((folder / "meta_000010.json").read_text())
    plain["dataloader_state_dict"] = {key: plain["dataloader_state_dict"][key] for key in ("pq_idx", "rg_idx", "epoch")}
    plain.pop("sha256", None)
    (folder / "meta_000010.json").write_text(json.dumps(plain))
    done = toy.command(base, "nanochat_cl.pretrain", *toy.FLAGS, "--model-tag=other-dense", NANOCHAT_CL_UPSTREAM=str(tree))
    assert done.returncode == 0 and "step 10 (resume: approximate)" in done.stdout, done.stdout + done.stderr
    assert json.loads((folder / "phase_a.json").read_text())["resumes"] == [{"step": 10, "kind": "approximate"}]


def test_the_last_step_that_is_whole_on_all_ranks_is_found_and_what_a_later_one_lacks_is_said(tmp_path, capsys):
    assert pretrain.last_whole_step(tmp_path, 1) == -1
    for step in (10, 20, 30, 40):
        for name in (f"model_{step:06d}.pt", *(f"optim_{step:06d}_rank{rank}.pt" for rank in range(2))):
            torch.save({"w": torch.arange(100.0)}, tmp_path / name)
        (tmp_path / f"meta_{step:06d}.json").write_text("{}")
    assert pretrain.last_whole_step(tmp_path, 2) == 40
    (tmp_path / "optim_000040_rank1.pt").unlink()
    flipped = tmp_path / "model_000030.pt"
    data = bytearray(flipped.read_bytes())
    data[data.index(torch.tensor(3.0).numpy().tobytes() + torch.tensor(4.0).numpy().tobytes())] ^= 1
    flipped.write_bytes(data)
    (tmp_path / "model_000020.pt").write_bytes((tmp_path / "model_000020.pt").read_bytes()[:-10])
    capsys.readouterr()
    assert pretrain.last_whole_step(tmp_path, 2) == 10
    said = capsys.readouterr().out
    assert all(name in said for name in ("optim_000040_rank1.pt", "model_000030.pt", "model_000020.pt")) and said.count("\n") == 3
    assert pretrain.last_whole_step(tmp_path, 1) == 40

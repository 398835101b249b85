"""What Phase B refuses before it begins, and what stops it on the way: one line with the remedy, and the last state is whole."""
import math
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

import toy_phase_a
from test_evolve import last_state, run
from nanochat_cl import evolve, files, learner, phase_b, runs
from nanochat_cl.command import UserError


def test_two_processes_never_work_in_one_folder(base):
    with runs.locked(base / "evolve/lonely", rank=0), pytest.raises(UserError, match="another process works in .*lonely; wait for it"):
        run(base, "lonely", "--arms", "dense", "--max-tokens", "256")
    assert len(run(base, "lonely", "--arms", "dense", "--max-tokens", "256")) == 2
    with runs.locked(base / "evolve/lonely", rank=1), runs.locked(base / "evolve/lonely", rank=0):
        pass


def test_a_run_does_not_go_on_with_another_text_or_vocabulary(base, monkeypatch):
    usual = ["--arms", "dense", "--max-tokens", "512", "--milestone-tokens", "256"]
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(phase_b.PhaseB, "train", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        run(base, "same", *usual)
    manifest = base / "corpora/toy/corpus.json"
    try:
        files.write_json(manifest, {"order": "seed", "files": {"train.parquet": "0"}})
        with pytest.raises(UserError, match="domain_text: null -> .*another --name"):
            run(base, "same", *usual)
    finally:
        manifest.unlink()
    assert len(run(base, "same", *usual)) == 3


def test_general_text_that_the_domain_was_not_compared_with_is_no_ground_for_a_claim(base, capsys):
    usual, manifest = ["--arms", "dense", "--max-tokens", "256"], base / "corpora/toy/corpus.json"
    try:
        files.write_json(manifest, {"order": "seed", "files": {}, "general_files": {"shard_00000.parquet": "0"}})
        assert run(base, "doubtful", *usual)[0]["phase_a_text"] is None
        assert "warning: Phase A of dense was not made with the general text that toy was compared with" in capsys.readouterr().out
        with pytest.raises(UserError, match="for --confirmatory make it again"):
            run(base, "claim", *usual, "--confirmatory")
    finally:
        manifest.unlink()


def test_another_vocabulary_is_refused(damaged, base):
    files.write_json(damaged / "phase_a.json", {**files.read_json(damaged / "phase_a.json"), "asked": {"tokenizer": "0"}})
    with pytest.raises(UserError, match="Phase A of dense was trained with another tokenizer"):
        run(base, "words", "--arms", "dense", "--from", damaged.name)


BAD = {"an unknown arm": (["--arms", "dense,cll"], "cll.*expected one of dense, cl"),
       "an arm twice": (["--arms", "dense,dense"], "different arms"),
       "a checkpoint for two arms": (["--from", "d2_dense_s42"], "one only with --from"),
       "a cool-down without end": (["--max-tokens", "0", "--repeat", "--lr-schedule", "wsd"], "needs --repeat and --lr-schedule constant"),
       "an end of the data without end": (["--max-tokens", "0"], "needs --repeat"),
       "a batch that does not divide": (["--total-batch-size", "200"], "multiple of rows x context x ranks = 128.*got 200"),
       "fewer tokens than a batch": (["--max-tokens", "255"], "less than one batch"),
       "a guard with other windows": (["--floor-guard", "0.1", "--max-seq-len", "64"], "leave out --max-seq-len"),
       "a negative guard": (["--floor-guard", "-0.1"], "--floor-guard.*got -0.1"),
       "a negative size": (["--milestone-tokens", "-1"], "milestone_tokens -1"),
       "a stream too short": (["--max-tokens", "10000000"], "stream holds .* --repeat"),
       "an unknown schedule": (["--schedule", "random"], "cyclic.*random"),
       "an unknown domain": (["--domain", "nothing"], "nothing.*nanochat_cl.domain"),
       "a missing checkpoint": (["--seed", "7"], r"d2_dense_s7.*python -m nanochat_cl.pretrain --profile cpu --arm dense --seed 7 --depth 2"),
       "an unreadable rule": (["--plasticity", "frozen"], "frozen"),
       "a claim where choices are made": (["--domain", "python", "--confirmatory"], "on python everything is.*another --domain"),
       "adapters with nothing to learn": (["--arms", "dense,dense-lora", "--plasticity", "frozen-shared"], "dense-lora has frozen all but its adapters"),
       "a warm-up without end": (["--warmup-steps", "10"], "warm-up of 10 steps has no end in a run of 10"),
       "a guard midway": (["--floor-guard", "0.1", "--branch-of", "both"], "a branch starts midway: leave it out"),
       "a negative rate": (["--lr-mult", "-1"], "lr-mult")}


@pytest.mark.parametrize("what", BAD)
def test_one_line_refuses(what, base):
    more, said = BAD[what]
    with pytest.raises(UserError, match=said) as error:
        evolve.main([*toy_phase_a.ARGS, "--name", "bad", *more])
    assert "\n" not in str(error.value)
    assert not (base / "evolve/bad").exists(), "something was written"


def test_an_unknown_flag_ends_with_status_2(base, capsys):
    with pytest.raises(SystemExit) as status:
        evolve.parse(["--no-such-flag"])
    assert status.value.code == 2 and "no-such-flag" in capsys.readouterr().err


@pytest.fixture
def damaged(base):
    """A copy of the dense checkpoint to damage."""
    place = base / "base_checkpoints/damaged"
    shutil.copytree(base / "base_checkpoints/d2_dense_s42", place)
    yield place
    shutil.rmtree(place)


def refused(place: Path, said: str) -> None:
    with pytest.raises(UserError, match=said):
        evolve.main([*toy_phase_a.ARGS, "--name", "bad", "--arms", "dense", "--from", place.name])
    assert not (place.parent.parent / "evolve/bad").exists()


def test_float16_is_refused(damaged, monkeypatch):
    from nanochat import common
    monkeypatch.setattr(common, "COMPUTE_DTYPE", torch.float16)
    refused(damaged, "float16.*set NANOCHAT_DTYPE to bfloat16 or float32")


def test_a_broken_phase_a_checkpoint_is_refused_by_name(damaged):
    for path in (damaged / "model_000003.pt", damaged / "optim_000003_rank0.pt"):
        whole = path.read_bytes()
        flipped = whole[:len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1:]  # nanochat's own loader may take it
        for content in (whole[:-2000], b"", b"text", flipped):
            path.write_bytes(content)
            refused(damaged, f"{damaged}.*can't be read")
        path.write_bytes(whole)


def test_an_unfinished_phase_a_is_refused(damaged):
    (damaged / "phase_a.json").rename(damaged / "phase_a_begun.json")
    refused(damaged, "not finished.*nanochat_cl.pretrain")


def test_optimizer_state_of_other_ranks_is_refused_and_can_be_reset(damaged, base):
    shutil.copy(damaged / "optim_000003_rank0.pt", damaged / "optim_000003_rank1.pt")
    refused(damaged, "2 ranks, this run has 1.*--optimizer reset")
    assert len(run(base, "reset", "--arms", "dense", "--from", damaged.name, "--optimizer", "reset", "--max-tokens", "256")) == 2


def test_a_plain_nanochat_checkpoint_needs_no_record_of_ours(damaged, base):
    (damaged / "phase_a.json").unlink()
    records = run(base, "plain", "--arms", "dense", "--from", damaged.name, "--max-tokens", "256")
    assert records[0]["phase_a_tokens"] == 384 and records[0]["phase_a_flops"] == 384 * records[0]["flops_per_token"]


def stopped(base: Path, capsys, name: str, *more: str) -> str:
    """What a run says that a guard stops with status 1."""
    with pytest.raises(SystemExit) as status:
        run(base, name, "--arms", "dense", *more)
    assert status.value.code == 1
    return capsys.readouterr().out.splitlines()[-1]


def test_weights_that_are_not_finite_stop_the_run_before_they_are_scored(damaged, base, capsys):
    weights = torch.load(damaged / "model_000003.pt", weights_only=True)
    weights["lm_head.weight"][3, 3] = float("nan")
    torch.save(weights, damaged / "model_000003.pt")
    said = stopped(base, capsys, "poisoned", "--from", damaged.name)
    assert "step 0 (0 tokens): arm dense, its weights are not finite" in said and str(damaged) in said


def test_a_loss_that_is_not_finite_stops_the_run_with_step_rows_and_last_good_state(base, capsys):
    said = stopped(base, capsys, "nan", "--lr-mult", "1e30")
    assert "step 1 (256 tokens): arm dense, the loss is nan" in said, said
    assert "8 rows from gamma token 256 to gamma token 480" in said or "8 rows from" in said
    assert str(base / "evolve/nan/checkpoints/000000") in said
    assert last_state(base, "nan")["step"] == 0, "the state before the accident is still the last"
    trial = files.read_json(base / "evolve/nan/stopped.json")
    assert (trial["arm"], trial["lr_mult"], trial["seed"], trial["step"], trial["reason"]) == ("dense", 1e30, 42, 1, "the loss is nan"), trial
    assert "lr_mult=1e+30" in trial["recipe"]


def test_an_explosion_is_three_steps_far_above_the_median_and_a_hard_batch_is_none(base):
    arm = learner.Learner.__new__(learner.Learner)

    def after(*losses: float) -> tuple[str, int] | None:
        arm.losses = [3.0 + 0.1 * (i % 3) for i in range(20)] + list(losses)
        return arm.trouble()
    arm.losses = [3.0, 3.5, 6.5, 7.0]
    assert arm.trouble() is None
    arm.losses = [3.0, 6.5, 7.0, 8.0]
    assert "above the usual 3.00" in arm.trouble()[0], "from the first step on"
    arm.losses = [0.1, *[4.0] * 63]
    assert arm.trouble() is None, "one easy batch of long ago"
    assert after() is None and after(9.0) is None and after(9.0, 9.0) is None and after(9.0, 9.0, 3.0) is None and after(5.9, 5.9, 5.9) is None
    assert "exploded to 9.00" in after(9.0, 9.5, 9.0)[0] and after(9.0, 9.5, 9.0)[1] == 3
    assert after(math.inf) == ("the loss is inf", 0) and after(math.nan) == ("the loss is nan", 0)


def test_what_was_saved_within_an_explosion_is_not_called_good(base, capsys, monkeypatch):
    """States after every step; the losses of steps 5, 6 and 7 are bad, so the weights after step 4 are the last good ones."""
    step = learner.Learner.step

    def stepping(self, inputs, targets, rows, number, steps, measured=False):
        step(self, inputs, targets, rows, number, steps, measured)
        self.losses[-1] += 20.0 * (number >= 5)
    monkeypatch.setattr(learner.Learner, "step", stepping)
    monkeypatch.setattr(runs, "KEEP", 9)
    said = stopped(base, capsys, "exploded", "--milestone-tokens", "256")
    assert "step 7 (1,792 tokens): arm dense, the loss exploded" in said and said.split("last good checkpoint: ")[1].startswith(
        str(base / "evolve/exploded/checkpoints/000004")), said


Usage = namedtuple("Usage", "total used free")


def test_a_disk_that_fills_during_the_run_stops_it_before_the_next_state_is_begun(base, monkeypatch):
    train = phase_b.PhaseB.train

    def training(self):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 10**12 if self.state["step"] < 2 else 1000))
        train(self)
    monkeypatch.setattr(phase_b.PhaseB, "train", training)
    with pytest.raises(UserError, match="1,000 free") as error:
        run(base, "filling", "--arms", "dense")
    folder = base / "evolve/filling"
    needed, path = int(re.search(r"needs ([\d,]+) bytes", str(error.value))[1].replace(",", "")), runs.place(folder, 0) / "state_rank0.pt"
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert 0.7 * path.stat().st_size < needed <= path.stat().st_size
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["000000"] and last_state(base, "filling")["step"] == 0
    assert len(files.read_jsonl(folder / "records.jsonl")) == 1


def test_a_disk_without_room_is_an_error_before_training(base, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match="bytes"):
        run(base, "full")
    assert not (base / "evolve/full").exists()

"""A cool-down from a point of a run that goes on: the branch ends as a run that cooled down from the start."""
import json

import pytest

import toy_phase_a
from nanochat_cl import evolve, files, phase_b
from nanochat_cl.command import UserError


def records(base, name: str, *more: str) -> list[dict]:
    evolve.evolve(evolve.parse([*toy_phase_a.ARGS, "--arms", "cl", "--name", name, *more]))
    return toy_phase_a.comparable(base, name)


def test_a_branch_is_the_run_that_cooled_down_from_the_start(base):
    cooled = ["--lr-schedule", "wsd", "--cooldown-frac", "0.5"]
    trunk = records(base, "trunk", "--max-tokens", "2560")  # 10 steps, milestones 4, 8 and 10; states are there at 8 and 10
    with pytest.raises(UserError, match="no state to branch from.*agree up to step 6"):
        records(base, "none", *cooled, "--max-tokens", "2560", "--branch-of", "trunk")
    assert not (base / "evolve/none").exists()
    branch = records(base, "branch", "--lr-schedule", "wsd", "--cooldown-frac", "0.2", "--max-tokens", "2560", "--branch-of", "trunk")
    whole = records(base, "whole", "--lr-schedule", "wsd", "--cooldown-frac", "0.2", "--max-tokens", "2560")
    assert json.dumps(branch) == json.dumps(whole)
    assert [r["domain"] for r in branch[:-1]] == [r["domain"] for r in trunk[:-1]] and branch[-1]["domain"] != trunk[-1]["domain"]
    assert files.read_json(base / "evolve/branch/samples.json") == files.read_json(base / "evolve/whole/samples.json")
    with pytest.raises(UserError, match=r"recipe.lr_mult: 1.0 -> 0.5\); a branch differs in --lr-schedule"):
        records(base, "other", "--lr-mult", "0.5", "--branch-of", "trunk")


def test_a_branch_begins_where_the_rates_still_agreed(base):
    size = ["--max-tokens", "2048", "--milestone-tokens", "256"]
    cooled = ["--lr-schedule", "wsd", "--cooldown-frac", "0.7"]  # rates differ from step 3 on; states are there at 1, 2, 4, 7 and 8
    records(base, "trunk3", *size, "--keep-milestones")
    assert json.dumps(records(base, "branch3", *size, *cooled, "--branch-of", "trunk3")) == json.dumps(records(base, "whole3", *size, *cooled))


def test_a_run_without_end_goes_on_until_it_is_told_to_stop_and_cools_down_in_branches(base, monkeypatch, capsys):
    train = phase_b.PhaseB.train
    for stop in (5, 14):
        def until(self):
            train(self)
            if self.state["step"] == stop:
                raise KeyboardInterrupt
        monkeypatch.setattr(phase_b.PhaseB, "train", until)
        with pytest.raises(KeyboardInterrupt):
            records(base, "endless", "--repeat", "--max-tokens", "0", "--keep-milestones")
    trunk, said = toy_phase_a.comparable(base, "endless"), capsys.readouterr().out
    assert "without end, steps of 256 tokens" in said and "1k tokens |" in said and "left" not in said.split("Ctrl")[0].split("evolve | cl")[1]
    assert [r["step"] for r in trunk] == [0, 4, 8, 12] and not any(r["final"] for r in trunk)
    monkeypatch.setattr(phase_b.PhaseB, "train", train)
    cooled = ["--max-tokens", "3072", "--lr-schedule", "wsd", "--cooldown-frac", "0.3"]  # 12 steps, at full rate up to 8
    branch = records(base, "branch-of-endless", "--repeat", *cooled, "--keep-milestones", "--branch-of", "endless")
    whole = records(base, "whole-repeat", "--repeat", *cooled, "--keep-milestones")
    assert json.dumps(branch) == json.dumps(whole) and [r["domain"] for r in branch[:3]] == [r["domain"] for r in trunk[:3]]

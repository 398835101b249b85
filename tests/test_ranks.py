"""Several ranks on a CPU do in Phase B what one does, and say which of them is lost."""
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

import toy_phase_a
from killed_runs import comparable, kill_at, said, start, wait
from nanochat_cl import phase_b, runs
from nanochat_cl.command import UserError

RESET = "--optimizer", "reset", "--plasticity", "budget:0.3+routers:0.5"  # the toy's Phase A has optimizer state for one rank


def keep_everything(out: Path):
    """Planted in a rank: what it holds after every save goes to `out`. The counters `usage` of the last step are a rank's own until summed."""
    def plant() -> None:
        save = phase_b.PhaseB.save

        def saved(self) -> None:
            save(self)
            torch.save({learner.name: {"weights": dict(learner.model.named_parameters()), "counts": learner.used, "losses": learner.losses,
                                       "buffers": {k: v for k, v in learner.model.named_buffers() if not k.endswith("usage")}} for learner in self.learners},
                       out / f"{self.state['step']}_{runs.ranks()[0]}_{runs.ranks()[1]}.pt")
        phase_b.PhaseB.save = saved
    return plant


def test_so_many_ranks_as_cannot_share_the_routers_are_refused():
    assert [runs.check_ranks(ranks) for ranks in (1, 2, 4, 8)] == [None] * 4
    for ranks in (3, 6, 16):
        with pytest.raises(UserError, match=f"1, 2, 4 or 8 ranks, got {ranks}; use as many"):
            runs.check_ranks(ranks)


@pytest.fixture(scope="module")
def pair(base):
    """What one rank and two hold at the end of the same run, and the records."""
    out = base / "held"
    out.mkdir()
    for ranks in (1, 2):
        assert wait(start(f"on{ranks}", base, *RESET, ranks=ranks, planted=dict.fromkeys(range(ranks), keep_everything(out)))) == [0] * ranks, said(base, f"on{ranks}")
    return [torch.load(out / f"10_{name}.pt") for name in ("0_1", "0_2", "1_2")], [comparable(base, f"on{ranks}") for ranks in (1, 2)]


def leaves(value) -> list:
    if isinstance(value, (dict, list, tuple)):
        return [leaf for part in (value.values() if isinstance(value, dict) else value) for leaf in leaves(part)]
    return [torch.as_tensor(value)]


def test_two_ranks_follow_one(pair):
    (one, two, _), (alone, together) = pair
    for arm in ("dense", "cl"):
        assert len(one[arm]["losses"]) == 10
        torch.testing.assert_close(torch.tensor(two[arm]["losses"]), torch.tensor(one[arm]["losses"]), atol=1e-4, rtol=0)
    for a, b in zip(alone, together, strict=True):
        assert (a["arm"], a["step"], a["tokens"], a["stream_hash"], a["flops"]) == (b["arm"], b["step"], b["tokens"], b["stream_hash"], b["flops"])
        for panel in ("domain", "general"):
            assert b[panel]["test"]["bpb"] == pytest.approx(a[panel]["test"]["bpb"], abs=0.01)
    assert alone[-1]["final"] and abs(alone[-1]["domain"]["test"]["bpb"] - alone[0]["domain"]["test"]["bpb"]) > 0.1, "nothing was learnt"


def test_both_ranks_hold_the_same_weights_and_counts_to_the_bit(pair):
    _, first, second = pair[0]
    mine, theirs = leaves(first), leaves(second)
    assert len(mine) == len(theirs) > 60
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs))


def test_a_run_of_two_ranks_killed_in_a_step_and_in_a_save_ends_with_the_same_records(base, pair):
    for victim, moment, count in ((1, "optimizer step", 13), (0, "rename", 4)):
        status = wait(start("torn", base, *RESET, ranks=2, planted={victim: kill_at(moment, count)}))
        assert status[victim] == -signal.SIGKILL and status[1 - victim] == 1, (status, said(base, "torn"))
    assert wait(start("torn", base, *RESET, ranks=2)) == [0, 0], said(base, "torn")
    assert comparable(base, "torn") == pair[1][1]
    log = said(base, "torn")
    assert re.search(r"stopped, rank 1 of 2 died .* at step 6 \(1,536 tokens\); the batch is 8 rows from .*; last good checkpoint: .*/00000[04];", log), log
    assert "stopped, rank 0 of 2 died" in log and "Traceback" not in log


def hang() -> None:
    """Planted in a rank: it stops in the fifth step, for good."""
    train = phase_b.PhaseB.train
    phase_b.PhaseB.train = lambda self: time.sleep(600) if self.state["step"] == 5 else train(self)


def test_a_rank_that_hangs_is_named_by_the_other(base):
    processes = start("hanging", base, "--arms", "cl", *RESET, ranks=2, planted={1: hang})
    assert wait(processes[:1]) == [1], said(base, "hanging")
    os.kill(processes[1], signal.SIGKILL)  # torchrun's part
    wait(processes[1:])
    line = said(base, "hanging").splitlines()[-1]
    assert line.startswith("stopped, rank 1 of 2 died or did not answer for 8 s: at step 5 (1,280 tokens); the batch is 8 rows from "), line
    assert re.search(rf"last good checkpoint: {base}/evolve/hanging/checkpoints/00000[04];", line), line  # 4 may still be in writing


def fail() -> None:
    """Planted in a rank: its fifth step is a mistake of the program."""
    train = phase_b.PhaseB.train
    phase_b.PhaseB.train = lambda self: torch.ones(2, 3) @ torch.ones(2, 3) if self.state["step"] == 5 else train(self)


def test_the_rank_that_makes_a_mistake_shows_it_and_the_other_names_that_rank(base):
    assert wait(start("failing", base, "--arms", "cl", *RESET, ranks=2, planted={0: fail})) == [70, 1]
    log = said(base, "failing")
    assert log.count("Traceback") == 1 and "shapes cannot be multiplied" in log and log.count("stopped, rank 0 of 2 died") == 1, log


def test_two_ranks_record_the_idle_and_covered_shares_of_one(base):
    rows = []
    for ranks in (1, 2):
        flags = ["--optimizer", "reset", "--arms", "cl", "--max-tokens", "1024"]  # no budget, which would be of the whole batch anyway
        assert wait(start(f"shares{ranks}", base, *flags, ranks=ranks)) == [0] * ranks, said(base, f"shares{ranks}")
        rows.append(comparable(base, f"shares{ranks}")[-1]["blocks"])
    one, two = rows
    for key in ("idle_share", "constant_share", "own_share", "entropy"):
        assert two[key] == pytest.approx(one[key], abs=0.01), key
    assert two["heads"]["idle_share"] == pytest.approx(one["heads"]["idle_share"], abs=0.01)


def test_two_ranks_make_the_newcomers_that_one_makes(base, tmp_path):
    from nanochat.tokenizer import get_tokenizer
    toy_phase_a.checkpoint(base, "cl-flops", get_tokenizer())
    flags = ["--arms", "cl-flops", "--optimizer", "reset", "--release", "3", "--newcomers", "passages", "--max-tokens", "1536"]
    for ranks in (1, 2):
        planted = dict.fromkeys(range(ranks), keep_everything(tmp_path))
        assert wait(start(f"growing{ranks}", base, *flags, ranks=ranks, planted=planted)) == [0] * ranks, said(base, f"growing{ranks}")
    one, two = (torch.load(tmp_path / f"6_0_{ranks}.pt")["cl-flops"]["weights"] for ranks in (1, 2))
    begun = torch.load(base / "base_checkpoints/d2_cl-flops_s42/model_000003.pt")
    routers = [name for name in one if name.endswith("mlp.router")]  # frozen but for the rows of newcomers
    assert routers and not any(torch.equal(one[name], begun[name]) for name in routers)
    for name in routers:
        torch.testing.assert_close(two[name], one[name])

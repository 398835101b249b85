"""A run of Phase B that is killed, stopped or damaged ends with the records of one that was left alone."""
import os
import random
import re
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from killed_runs import comparable, kill_at, said, start, until, wait
from nanochat_cl import files, learner, phase_b, runs

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


@pytest.fixture(scope="module")
def reference(base):
    """Seconds and records of a run that nobody disturbed."""
    started = time.monotonic()
    assert wait(start("reference", base)) == [0], said(base, "reference")
    return time.monotonic() - started, comparable(base, "reference")


def test_a_run_killed_at_random_moments_ends_with_the_same_records(base, reference):
    seconds, expected = reference
    r, killed = random.Random(5), 0
    for _ in range(3):
        seen, processes = len(said(base, "killed")), start("killed", base)
        while len(said(base, "killed")) == seen:
            time.sleep(0.005)
        time.sleep(r.uniform(0, 0.3 * seconds))
        os.kill(processes[0], signal.SIGKILL)
        killed += wait(processes) == [-signal.SIGKILL]
    assert killed >= 2, f"only {killed} kills hit a living process"
    assert wait(start("killed", base)) == [0], said(base, "killed")
    assert comparable(base, "killed") == expected
    assert files.read_json(base / "evolve/killed/config.json")["asked"] == files.read_json(base / "evolve/reference/config.json")["asked"]
    assert files.read_json(base / "evolve/killed/samples.json") == files.read_json(base / "evolve/reference/samples.json")


def test_a_run_killed_in_the_middle_of_a_step_an_evaluation_and_a_save_ends_with_the_same_records(base, reference):
    for moment, count in (("evaluation", 3), ("rename", 4), ("optimizer step", 9), ("rename", 1)):
        assert wait(start("torn", base, planted={0: kill_at(moment, count)})) == [-signal.SIGKILL], (moment, said(base, "torn"))
    assert wait(start("torn", base)) == [0], said(base, "torn")
    assert comparable(base, "torn") == reference[1]


@pytest.mark.parametrize("number, status, moment", [(signal.SIGINT, 130, "20%"), (signal.SIGTERM, 143, "from Phase A")])
def test_a_stopped_run_saves_exits_as_shells_expect_and_continues(base, reference, number, status, moment):
    name = number.name
    processes = start(name, base)
    until(base, name, moment)  # SIGTERM arrives during the first evaluation
    os.kill(processes[0], number)
    assert wait(processes) == [status], said(base, name)
    assert runs.saved_steps(base / "evolve" / name), "nothing was saved"
    assert wait(start(name, base)) == [0]
    assert comparable(base, name) == reference[1]
    assert "from step" in said(base, name)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_while_it_compiles_does_not_wait_for_the_compiler(base, reference, number, status):
    """The second arm's first step: the first arm's weights have moved, and the state of before is the one that stays."""
    def plant() -> None:
        step = learner.Learner.step

        def compiling(self, *args):
            if self.name == "cl":
                os.kill(os.getpid(), number)
                time.sleep(60)
            step(self, *args)
        learner.Learner.step = compiling
    name, begun = f"compiling{status}", time.monotonic()
    assert wait(start(name, base, planted={0: plant})) == [status] and time.monotonic() - begun < 50, said(base, name)
    assert runs.saved_steps(base / "evolve" / name) == [0]
    assert wait(start(name, base)) == [0] and comparable(base, name) == reference[1]


def test_a_damaged_state_is_named_and_the_one_before_it_used(base, reference):
    processes = start("damaged", base)
    until(base, "damaged", "80%")
    os.kill(processes[0], signal.SIGTERM)
    assert wait(processes) == [143]
    folder = base / "evolve" / "damaged"
    before, newest = runs.saved_steps(folder)
    broken = folder / "checkpoints" / f"{newest:06d}" / "state_rank0.pt"
    content = bytearray(broken.read_bytes())
    content[len(content) // 2] ^= 1
    broken.write_bytes(content)
    assert wait(start("damaged", base)) == [0]
    log = said(base, "damaged")
    assert f"{broken} is broken" in log and f"from step {before}" in log, log
    assert comparable(base, "damaged") == reference[1]


def test_a_run_is_not_continued_with_another_configuration(base, reference):
    records = (base / "evolve/reference/records.jsonl").read_bytes()
    assert wait(start("reference", base, "--lr-mult", "0.5", "--repeat")) == [2]
    log = said(base, "reference")
    assert "recipe.lr_mult: 1.0 -> 0.5" in log and "repeat: false -> true" in log and "Traceback" not in log
    assert (base / "evolve/reference/records.jsonl").read_bytes() == records


def test_a_complete_run_is_left_alone(base, reference):
    folder = base / "evolve/reference"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert wait(start("reference", base)) == [0]
    assert "evolve | complete: 8 records" in said(base, "reference")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def at_step(step: int, act: Callable[[phase_b.PhaseB], None]) -> Callable[[], None]:
    """What plants `act` before that step of a run."""
    def plant() -> None:
        train = phase_b.PhaseB.train
        phase_b.PhaseB.train = lambda self: (self.state["step"] == step and act(self), train(self))
    return plant


def test_a_state_that_cannot_be_written_stops_the_run_with_one_line_and_the_one_before_it_is_good(base, reference):
    limit = lambda run: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))  # as a quota: in the middle of the file
    assert wait(start("full", base, planted={0: at_step(2, limit)})) == [2], said(base, "full")
    folder, log = base / "evolve/full", said(base, "full")
    path = runs.place(folder, 4) / "state_rank0.pt"
    assert re.search(rf"error: {path} could not be written \(.*File too large.*\); make room, and the same command continues\n$", log), log
    assert "Traceback" not in log and runs.saved_steps(folder) == [0] and not [*path.parent.iterdir()]
    assert [r["step"] for r in files.read_jsonl(folder / "records.jsonl")] == [0, 0], "records of a state that is not there"
    assert wait(start("full", base)) == [0], said(base, "full")
    assert comparable(base, "full") == reference[1]


def mistake(run) -> None:
    raise RuntimeError("a mistake of the program")


def poison(run) -> None:
    run.learners[0].model.lm_head.weight.data.fill_(float("nan"))


@pytest.mark.parametrize("act, status, line", [(mistake, 70, "RuntimeError: a mistake"), (poison, 1, "the loss is nan; .*checkpoints/000004; try")])
def test_what_stops_a_run_right_after_a_milestone_leaves_the_state_of_that_milestone(base, act, status, line):
    name = act.__name__
    assert wait(start(name, base, "--arms", "dense", planted={0: at_step(4, act)})) == [status], said(base, name)
    assert re.search(line, said(base, name).splitlines()[-1]) and runs.saved_steps(base / "evolve" / name) == [0, 4]
    assert [r["step"] for r in files.read_jsonl(base / "evolve" / name / "records.jsonl")] == [0, 4]


def test_a_batch_that_never_comes_stops_the_run_and_is_named(base, reference):
    def stall(run) -> None:
        phase_b.STALLED_S, run.stream.batch = 2.0, lambda step: time.sleep(600)
    assert wait(start("stalled", base, planted={0: at_step(5, stall)})) == [1], said(base, "stalled")
    line = said(base, "stalled").splitlines()[-1]
    assert re.fullmatch(r"evolve \| stopped at step 5 \(1,280 tokens\): rank 0 waited 2 s for its data; the batch is 8 rows from \w+ token "
                        r"[\d,]+ to \w+ token [\d,]+; last good checkpoint: .*/stalled/checkpoints/00000[04]; see to the disk, .*continues", line), line
    assert wait(start("stalled", base)) == [0], said(base, "stalled")
    assert comparable(base, "stalled") == reference[1]


# --- states alone

def state(step: int) -> dict:
    return {"step": step, "weights": torch.arange(2000.0) + step}


def save(folder: Path, state: dict, *always: int) -> None:
    runs.complete(folder, state["step"], runs.write_part(folder, state["step"], state), always)


def test_any_flipped_byte_of_a_state_is_noticed(tmp_path, capsys):
    save(tmp_path, state(1))
    place, r = runs.place(tmp_path, 1), random.Random(0)
    for path in (place / "state_rank0.pt", place / "complete.json"):
        whole = path.read_bytes()
        for at in r.sample(range(len(whole)), 30):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << r.randrange(8))]) + whole[at + 1:])
            assert runs.load_state(tmp_path, torch.device("cpu")) is None, f"byte {at} of {path.name}"
            assert f"{place}/" in capsys.readouterr().out
        path.write_bytes(whole[:-3])
        assert runs.load_state(tmp_path, torch.device("cpu")) is None
        path.write_bytes(whole)
    assert runs.load_state(tmp_path, torch.device("cpu"))["step"] == 1


def test_two_states_are_kept_and_an_unfinished_one_is_none(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, state(step))
    assert runs.saved_steps(tmp_path) == [2, 3]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["000002", "000003"]
    (runs.place(tmp_path, 3) / "complete.json").unlink()  # as if killed before the manifest was written
    loaded = runs.load_state(tmp_path, torch.device("cpu"))
    assert loaded["step"] == 2 and torch.equal(loaded["weights"], state(2)["weights"])


def test_milestones_are_kept_beside_the_newest_two(tmp_path):
    for step in range(1, 7):
        save(tmp_path, state(step), 1, 3)
    assert runs.saved_steps(tmp_path) == [1, 3, 5, 6]


def test_a_part_without_those_of_the_other_ranks_is_no_state(tmp_path):
    save(tmp_path, state(1))
    runs.write_part(tmp_path, 2, state(2))
    assert runs.load_state(tmp_path, torch.device("cpu"))["step"] == 1
    save(tmp_path, state(2))
    runs.write_part(tmp_path, 2, state(2))  # again, as on SIGTERM after a milestone
    assert runs.load_state(tmp_path, torch.device("cpu"))["step"] == 1


def test_a_state_that_holds_code_is_not_loaded(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)
    save(tmp_path, {"step": 1, "x": Harmful()})
    with pytest.raises(Exception, match="[Ww]eights"):
        runs.load_state(tmp_path, torch.device("cpu"))
    assert not (tmp_path / "harm").exists()

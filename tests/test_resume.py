"""A run of Phase B that is killed, stopped or damaged ends with the records of one that was left alone."""
import os
import random
import signal
import time

import pytest
import torch

from killed_runs import base_directory, comparable, kill_at, said, start, until, wait
from nanochat_cl import files, runs

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    with base_directory(tmp_path_factory.mktemp("base")) as base:
        yield base


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


# --- states alone

def state(step: int) -> dict:
    return {"step": step, "weights": torch.arange(2000.0) + step}


def test_any_flipped_byte_of_a_state_is_noticed(tmp_path, capsys):
    runs.save_state(tmp_path, 1, state(1))
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
        runs.save_state(tmp_path, step, state(step))
    assert runs.saved_steps(tmp_path) == [2, 3]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["000002", "000003"]
    (runs.place(tmp_path, 3) / "complete.json").unlink()  # as if killed before the manifest was written
    loaded = runs.load_state(tmp_path, torch.device("cpu"))
    assert loaded["step"] == 2 and torch.equal(loaded["weights"], state(2)["weights"])


def test_a_state_that_holds_code_is_not_loaded(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)
    runs.save_state(tmp_path, 1, {"step": 1, "x": Harmful()})
    with pytest.raises(Exception, match="[Ww]eights"):
        runs.load_state(tmp_path, torch.device("cpu"))
    assert not (tmp_path / "harm").exists()

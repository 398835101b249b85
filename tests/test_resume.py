"""A run of Phase B that is killed, stopped or damaged ends with the records of one that was left alone."""
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

import toy_phase_a
from nanochat_cl import command, evolve, files, runs

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    place, before = tmp_path_factory.mktemp("base"), os.environ.get("NANOCHAT_BASE_DIR")
    os.environ["NANOCHAT_BASE_DIR"] = str(place)
    torch.compiler.set_stance("force_eager")
    yield toy_phase_a.make(place)
    torch.compiler.set_stance("default")
    os.environ.pop("NANOCHAT_BASE_DIR") if before is None else os.environ.update(NANOCHAT_BASE_DIR=before)


@pytest.fixture(scope="module")
def reference(base):
    """Seconds and records of a run that nobody disturbed."""
    start = time.monotonic()
    assert wait(start_run("reference", base)) == 0, (base / "reference.log").read_text()
    return time.monotonic() - start, comparable(base, "reference")


def start_run(name: str, base: Path, *more: str) -> int:
    """The command in a process of its own; forked, so that it needs no seconds to import torch."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            log = os.open(base / f"{name}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))
            command.run(lambda: evolve.main([*toy_phase_a.ARGS, "--name", name, *more]))
            os._exit(0)
        except SystemExit as e:
            os._exit(e.code if isinstance(e.code, int) else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(70)
    return pid


def wait(pid: int) -> int:
    """Exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def comparable(base: Path, name: str) -> list[dict]:
    """Records without what may differ, which is time, and the run's name."""
    return [{k: v for k, v in r.items() if k not in ("run", "tok_per_s") and not k.endswith("_s")}
            for r in files.read_jsonl(base / "evolve" / name / "records.jsonl")]


def until(base: Path, name: str, text: str) -> None:
    """Wait until the log says so."""
    deadline = time.monotonic() + 60
    while text not in ((base / f"{name}.log").read_text() if (base / f"{name}.log").exists() else ""):
        assert time.monotonic() < deadline, f"{text!r} never came: {(base / f'{name}.log').read_text()}"
        time.sleep(0.01)


def test_a_run_killed_at_random_moments_ends_with_the_same_records(base, reference):
    seconds, expected = reference
    r, killed = random.Random(5), 0
    for _ in range(4):
        pid, log = start_run("killed", base), base / "killed.log"
        seen = log.stat().st_size if log.exists() else 0
        while not log.exists() or log.stat().st_size == seen:
            time.sleep(0.005)
        time.sleep(r.uniform(0, 0.3 * seconds))  # in a step, an evaluation or a save
        os.kill(pid, signal.SIGKILL)
        killed += wait(pid) == -signal.SIGKILL
    assert killed >= 2, f"only {killed} kills hit a living process"
    assert wait(start_run("killed", base)) == 0, log.read_text()
    assert comparable(base, "killed") == expected
    assert files.read_json(base / "evolve/killed/config.json")["asked"] == files.read_json(base / "evolve/reference/config.json")["asked"]
    assert files.read_json(base / "evolve/killed/samples.json") == files.read_json(base / "evolve/reference/samples.json")


@pytest.mark.parametrize("number, status, moment", [(signal.SIGINT, 130, "20%"), (signal.SIGTERM, 143, "from Phase A")])
def test_a_stopped_run_saves_exits_as_shells_expect_and_continues(base, reference, number, status, moment):
    name = number.name
    pid = start_run(name, base)
    until(base, name, moment)  # SIGTERM arrives during the first evaluation
    os.kill(pid, number)
    assert wait(pid) == status, (base / f"{name}.log").read_text()
    assert runs.saved_steps(base / "evolve" / name), "nothing was saved"
    assert wait(start_run(name, base)) == 0
    assert comparable(base, name) == reference[1]
    assert f"from step" in (base / f"{name}.log").read_text()


def test_a_damaged_state_is_named_and_the_one_before_it_used(base, reference):
    pid = start_run("damaged", base)
    until(base, "damaged", "80%")
    os.kill(pid, signal.SIGTERM)
    assert wait(pid) == 143
    folder = base / "evolve" / "damaged"
    before, newest = runs.saved_steps(folder)
    broken = folder / "checkpoints" / f"{newest:06d}" / "state_rank0.pt"
    content = bytearray(broken.read_bytes())
    content[len(content) // 2] ^= 1
    broken.write_bytes(content)
    assert wait(start_run("damaged", base)) == 0
    log = (base / "damaged.log").read_text()
    assert f"{broken} is broken" in log and f"from step {before}" in log, log
    assert comparable(base, "damaged") == reference[1]


def test_a_run_is_not_continued_with_another_configuration(base, reference):
    records = (base / "evolve/reference/records.jsonl").read_bytes()
    assert wait(start_run("reference", base, "--lr-mult", "0.5", "--repeat")) == 2
    log = (base / "reference.log").read_text()
    assert "recipe.lr_mult: 1.0 -> 0.5" in log and "repeat: false -> true" in log and "Traceback" not in log
    assert (base / "evolve/reference/records.jsonl").read_bytes() == records


def test_a_complete_run_is_left_alone(base, reference):
    folder = base / "evolve/reference"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert wait(start_run("reference", base)) == 0
    assert "evolve | complete: 8 records" in (base / "reference.log").read_text()
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

"""Several processes: a stop from outside ends all of them, with the status that says how, and a kill leaves none behind."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat_cl.upstream import REPO

PROGRAM = """
import sys, time
from nanochat_cl import command
from nanochat_cl.parallel import parallel

def slow(number):
    if number == 200:
        open(sys.argv[1], "w").close()
    time.sleep(0.005)
    return number

if __name__ == "__main__":
    assert parallel(slow, range(150), 2) == list(range(150))
    command.run(lambda: parallel(slow, range(4000), 2) and None)
"""


def alive(group):
    """Processes of a group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = path.read_text().rsplit(")", 1)[1].split()[:3]
        except OSError:  # it has ended since
            continue
        found += [path.parent.name] * (int(of) == group and state != "Z")
    return found


@pytest.mark.parametrize("number, to_group, status", [(signal.SIGINT, True, 130), (signal.SIGINT, False, 130), (signal.SIGTERM, False, 143),
                                                     (signal.SIGKILL, False, -9)])
def test_a_stop_while_workers_work_ends_them_and_says_so_in_one_line(tmp_path, number, to_group, status):
    (tmp_path / "program.py").write_text(PROGRAM)
    process = subprocess.Popen([sys.executable, str(tmp_path / "program.py"), str(tmp_path / "begun")], start_new_session=True,
                               cwd=REPO, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "begun").exists() and process.poll() is None:
        time.sleep(0.05)
    assert len(alive(process.pid)) >= 3, "itself and two workers"
    (os.killpg if to_group else os.kill)(process.pid, number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == status and (said.count("\n") == 1 and "the same command continues" in said or status < 0), said
    deadline = time.monotonic() + 30
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(process.pid)

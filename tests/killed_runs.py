"""Runs of Phase B at toy size, on one rank or several, each rank a process that can be killed, also in the middle of a chosen act."""
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch._inductor.compile_fx  # torch.compile imports it: here, once, not in every process that is forked

import toy_phase_a
from toy_phase_a import comparable  # noqa: F401 (for those who import this module)
from nanochat_cl import command, evaluate, evolve, exam, runs

MOMENTS = ("optimizer step", "evaluation", "rename")


def kill_at(moment: str, count: int) -> Callable[[], None]:
    """What makes a process kill itself in its `count`-th act of a kind, when half of it is done."""
    def plant() -> None:
        from nanochat.optim import MuonAdamW
        holder, name = {"optimizer step": (MuonAdamW, "_finish_gathers"),  # slices are updated, not all of them gathered
                        "evaluation": (evaluate, "score"),                 # of one of several panels
                        "rename": (os, "replace")}[moment]                 # the temporary file is written
        original, left = getattr(holder, name), [count]

        def dying(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        setattr(holder, name, dying)
    return plant


def start(name: str, base: Path, *more: str, planted: dict[int, Callable[[], None]] | None = None, ranks: int = 1,
          main: Callable[[list[str]], None] = evolve.main) -> list[int]:
    """
    The command on so many ranks, as torchrun would start it, and the process ids. Forked, so that it needs no seconds to import torch.
    planted: what a rank calls first. main: another command than evolve, with the arguments `more` alone.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(ranks):
        processes.append(os.fork())
        if processes[-1]:
            continue
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            log = os.open(base / f"{name}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))
            runs.RANK_TIMEOUT, runs.RANK_ANSWER, exam.SAMPLE_TOKENS = timedelta(seconds=8), timedelta(seconds=2), 4
            if ranks > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            (planted or {}).get(rank, lambda: None)()
            command.run(lambda: main([*toy_phase_a.ARGS, "--name", name, *more] if main is evolve.main else [*more]))
            os._exit(0)
        except SystemExit as e:
            os._exit(e.code if isinstance(e.code, int) else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(70)
    return processes


def wait(processes: list[int]) -> list[int]:
    """Exit status of each, negative for a signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in processes]


def said(base: Path, name: str) -> str:
    log = base / f"{name}.log"
    return log.read_text() if log.exists() else ""


def until(base: Path, name: str, text: str) -> None:
    """Wait until the log says so."""
    deadline = time.monotonic() + 60
    while text not in said(base, name):
        assert time.monotonic() < deadline, f"{text!r} never came: {said(base, name)}"
        time.sleep(0.01)

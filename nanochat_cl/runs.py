"""
The directory of one Phase B run: what it was asked to do, and states to continue from that are whole or refused.

    <run>/config.json           what was asked (`asked`, compared when the run continues), and what it ran on
    <run>/checkpoints/<step>/   state_rank<r>.pt of every rank, then complete.json with their sha256: without it there is no state
    <run>/records.jsonl         rewritten whole at every milestone, after the state that holds the same records
"""
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nanochat_cl import accounting, files, machine
from nanochat_cl.command import UserError

KEEP = 2  # newest states: one more in case the newest is damaged
RANK_TIMEOUT = timedelta(minutes=10)  # that ranks wait for one that is behind, which may be saving; NCCL's own default, too
RANK_ANSWER = timedelta(seconds=10)   # and then for a sign of life


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """`key: before -> now` for every leaf where two JSON values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [line for key in sorted({*before, *now})
                for line in differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)]
    return [] if before == now else [f"{path}: {json.dumps(before)} -> {json.dumps(now)}"]


def check_same(place: Path, before: Any, asked: Any, way_out: str) -> None:
    """UserError where `place` was begun with another configuration, `before`, than is `asked` for now."""
    if changed := differences(before, json.loads(json.dumps(asked))):
        raise UserError(f"{place} was begun with another configuration ({'; '.join(changed[:8])}); {way_out}")


def check_batch(batch_tokens: int, micro_tokens: int) -> None:
    """UserError where a batch is no whole number of micro-batches."""
    if batch_tokens < 1 or batch_tokens % micro_tokens:
        raise UserError(f"--total-batch-size must be a multiple of rows x context x ranks = {micro_tokens:,} tokens, got {batch_tokens:,}; "
                        f"change it or --device-batch-size")


def check_ranks(world_size: int) -> None:
    """UserError where so many ranks can't share Model-CL's routers."""
    if accounting.ROUTER_ROWS % world_size:
        raise UserError(f"the rows of Model-CL's routers are shared by 1, 2, 4 or {accounting.ROUTER_ROWS} ranks, got {world_size}; use as many")


def ranks() -> tuple[int, int]:
    """(rank, world size) of the process group, (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def over_ranks(value: torch.Tensor, op: str) -> torch.Tensor:
    """The "sum" or "max" of every rank's `value`; `value` itself without a process group."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], _hosts() if value.device.type == "cpu" else None)
    return value


@cache
def _hosts() -> dist.ProcessGroup | None:
    """The group for main memory. Where a rank hangs it raises, which NCCL's doesn't, and `together` explains it."""
    return dist.new_group(backend="gloo", timeout=RANK_TIMEOUT) if dist.get_backend() == "nccl" else None


@contextmanager
def together(where: Callable[[], str]) -> Iterator[None]:
    """
    Where the block fails because a rank died or hangs, the others end with status 1, and the first of them says which rank and `where`
    the run was; torchrun ends the rest. Who hangs in a collective of NCCL is not named: NCCL's own timeout ends that process.
    """
    try:
        yield
    except RuntimeError as e:
        if not dist.is_initialized() or not (isinstance(e, dist.DistError) or "gloo" in str(e)):
            raise
        (rank, world_size), alive = ranks(), []
        with suppress(dist.DistError):  # the store itself is rank 0's, where no agent of torchrun keeps it
            store = dist.distributed_c10d._get_default_store()
            store.set(f"alive/{rank}", "")
            time.sleep(RANK_ANSWER.total_seconds())
            alive = [other for other in range(world_size) if store.check([f"alive/{other}"])]
        if len(alive) == world_size:
            raise
        if rank == (alive or [rank])[0]:
            gone = ", ".join(str(other) for other in range(world_size) if other not in alive) if alive else "0"
            print(f"stopped, rank {gone} of {world_size} died or did not answer for {RANK_TIMEOUT.total_seconds():g} s: at {where()}; "
                  f"the same command continues", file=sys.stderr, flush=True)
        sys.exit(1)


@contextmanager
def locked(folder: Path, rank: int) -> Iterator[None]:
    """Nobody else works in `folder` meanwhile; UserError where somebody does. Rank 0 holds the lock, and loses it however it ends."""
    if rank:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process works in {folder}; wait for it or stop it, or give another name") from None
        except OSError:  # a file system that knows no locks
            pass
        yield
    finally:
        os.close(descriptor)


def write(how: Callable, path: Path, value: Any) -> None:
    """Files that are the run's, not a rank's, are rank 0's."""
    if ranks()[0] == 0:
        how(path, value)


def place(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"{step:06d}"


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete states, ascending."""
    return sorted(int(path.parent.name) for path in (folder / "checkpoints").glob("*/complete.json"))


def write_part(folder: Path, step: int, state: dict) -> tuple[str, str]:
    """Write this rank's part of the state after `step` steps: its name and sha256, for `complete`. No collectives: fit for a thread."""
    path = place(folder, step) / f"state_rank{ranks()[0]}.pt"
    try:
        (path.parent / "complete.json").unlink(missing_ok=True)
        with files.replacing(path) as f:
            torch.save(state, f)
        return path.name, files.sha256(path)
    except (OSError, RuntimeError) as e:
        raise UserError(f"{path} could not be written ({e.__context__ or e}); make room, and the same command continues") from e


def complete(folder: Path, step: int, part: tuple[str, str], always: Collection[int] = ()) -> None:
    """Write the manifest of all ranks' parts: now it is a state. Older ones go, but for those after the steps `always`."""
    rank, world_size = ranks()
    parts = [part] * world_size
    if world_size > 1:
        dist.all_gather_object(parts, part)
    if rank == 0:
        files.write_json(place(folder, step) / "complete.json", dict(parts))
        saved = saved_steps(folder)
        keep = {place(folder, kept) for kept in {*saved[-KEEP:], *(set(saved) & set(always))}}
        for old in set((folder / "checkpoints").iterdir()) - keep:
            (old / "complete.json").unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path, device: torch.device, wanted: Callable[[int], bool] = lambda step: True) -> dict | None:
    """This rank's part of the newest whole state `wanted`; a damaged one is named and the one before it used. None where there is none."""
    chosen = [next((step for step in saved_steps(folder)[::-1] if wanted(step) and _whole(place(folder, step))), None)
              if ranks()[0] == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(chosen)
    if chosen[0] is None:
        return None
    return torch.load(place(folder, chosen[0]) / f"state_rank{ranks()[0]}.pt", map_location=device, weights_only=True)


def _whole(here: Path) -> bool:
    """Whether all files of a state are what was written; says which is not."""
    path = here / "complete.json"
    try:
        for name, digest in files.read_json(path).items():
            if files.sha256(path := here / name) != digest:
                raise ValueError("wrong checksum")
        return True
    except (OSError, ValueError) as e:
        machine.say(f"evolve | {path} is broken ({e}): going back to the state before it")
        return False

"""
Kill toy runs of Phase B (SIGKILL) again and again, let them finish, and compare their records, fields of time aside, with
those of a run that was left alone. Exit status 1 when any differs.

bash runs/kill_test.sh
"""
import argparse
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a forked process would wait for the threads of its parent
REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import nanochat_cl  # noqa: F401  puts the nanochat tree on the import path
import killed_runs
import toy_phase_a
from nanochat_cl import files, machine

RANKS = 1, 2
QUOTA = 5       # kills of each kind and number of ranks
PER_RUN = 5     # kills that a run suffers at most
RESET = "--optimizer", "reset"  # the toy's Phase A has optimizer state for one rank
# A process dies in one of so many first acts of a kind: a step of one arm, the scores of one panel, the renaming of one file.
ACTS = {"inside an optimizer step": ("optimizer step", 14), "inside an evaluation": ("evaluation", 12),
        "between temporary write and rename": ("rename", 7), "at any time, all ranks at once": (None, 0)}


def killed_run(name: str, base: Path, ranks: int, queue: list[str], seconds: float, r: random.Random) -> list[str]:
    """A run until its end: the kills, taken off the `queue`, that it suffered."""
    suffered: list[str] = []
    while True:
        kind = queue[0] if queue and len(suffered) < PER_RUN else None
        moment, acts = ACTS.get(kind, (None, 0))
        planted = {r.randrange(ranks): killed_runs.kill_at(moment, r.randint(1, acts))} if moment else None
        processes = killed_runs.start(name, base, *RESET, ranks=ranks, planted=planted)
        if kind and not moment:
            time.sleep(r.uniform(0.1, 0.9) * seconds)
            for pid in processes:
                os.kill(pid, signal.SIGKILL)
        status = killed_runs.wait(processes)
        if set(status) == {0}:
            return suffered
        if not kind or -signal.SIGKILL not in status:
            raise RuntimeError(f"{name} ends with {status}:\n{killed_runs.said(base, name)}")
        suffered.append(queue.pop(0))


def main() -> None:
    parser = argparse.ArgumentParser(prog="kill_test.sh", description="Kill toy runs of Phase B and compare their records")
    parser.add_argument("--out", type=Path, default=REPO / "runs/results/kill_test.md", help="the table (default: %(default)s)")
    out, r, rows, equal = parser.parse_args().out, random.Random(0), [], True
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as place, toy_phase_a.base_directory(Path(place)) as base:
        for ranks in RANKS:
            start = time.monotonic()
            if any(killed_runs.wait(killed_runs.start(f"alone{ranks}", base, *RESET, ranks=ranks))):
                raise RuntimeError(killed_runs.said(base, f"alone{ranks}"))
            seconds, expected = time.monotonic() - start, killed_runs.comparable(base, f"alone{ranks}")
            queue = r.sample([kind for kind in ACTS for _ in range(QUOTA)], QUOTA * len(ACTS))
            while queue:
                name = f"killed{len(rows)}"
                suffered = killed_run(name, base, ranks, queue, seconds, r)
                same = killed_runs.comparable(base, name) == expected
                rows.append((ranks, Counter(suffered), same))
                equal = equal and same
                print(f"{ranks} rank(s), run {len(rows)}: {len(suffered)} kills, {'equal' if same else 'DIFFERENT'} records", flush=True)
    about = machine.describe()
    table = [f"| run | ranks | {' | '.join(ACTS)} | records |", f"|{'---|' * (3 + len(ACTS))}"]
    table += [f"| {number} | {ranks} | {' | '.join(str(kills[kind]) for kind in ACTS)} | {len(expected)} "
              f"{'equal' if same else 'DIFFERENT'} |" for number, (ranks, kills, same) in enumerate(rows, 1)]
    total = sum((kills for _, kills, _ in rows), Counter())
    table += [f"| all | | {' | '.join(str(total[kind]) for kind in ACTS)} | {'equal' if equal else 'DIFFERENT'} |"]
    files.write_text(out, f"# Kill test\n\n{sum(total.values())} SIGKILLs on toy runs of Phase B (both arms, 10 steps, 4 milestones); a killed run is started "
                          f"again by the same command. Of two ranks\none is killed, the other ends by itself. Records are compared with an uninterrupted "
                          f"run's, all fields but times and memory.\nMade by `bash runs/kill_test.sh` at commit {about['commit']}, torch {about['torch']}, "
                          f"{about['cpu']}.\n\n" + "\n".join(table) + "\n")
    print(f"{sum(total.values())} kills, records {'equal' if equal else 'DIFFERENT'} -> {out}")
    sys.exit(not equal)


if __name__ == "__main__":
    main()

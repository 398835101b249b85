"""
What else could explain the curves: threats to a claim, each checked on the records alone. What a verdict needs of them: nanochat_cl/crossover.py.
"""
# R runs, S seeds, M milestones
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from nanochat_cl.arms import ARMS
from nanochat_cl.curves import Curves, documents
from nanochat_cl.recipes import Recipe, of_dense, read

MIN_SEEDS = 3
MAX_EPOCHS = 4.0                        # of unique tokens: nearly free up to here (Muennighoff et al. 2023)
MIN_IDLE_SHARE, MAX_CONSTANT_SHARE = 0.20, 0.15  # median share of blocks that did not learn; scored tokens under the constant choice
COOLED = 0.2                            # last / highest learning rate of a run that was cooled down
APART = 1.5                             # factor to the next learning rate, on both sides, of an optimum inside its grid
CONTROLS = {"dense-rows", "dense-frozen"}  # what must not belong to Model-CL alone
MATCHED = {"params_total": "total parameters", "phase_a_flops": "FLOPs of Phase A"}  # to 1 %: routers are 0.7 % of a model of width 128
PANELS = {"domain": np.nan, "general": np.nan, "floor": 0.0}  # in which routing must have had a say; a run may have no floor probes
Check = tuple[str, str]                 # pass, fail or not tested, and what was found


def check(passed: Any, text: str, *known: float) -> Check:
    """`known` are the numbers without which nothing can be said."""
    return ("pass" if passed else "fail", text) if np.isfinite(known).all() else ("not tested", "not recorded")


def trial(run: tuple[str, str]) -> tuple[Any, Recipe]:
    """What a run (arm, recipe) tries: a kind of model, with a recipe. Dense arms that do the same are the same, whatever they are called."""
    name, recipe = run[0], read(run[1])
    arm = ARMS.get(name)
    return ((arm.rows, arm.lora) if arm else name, of_dense(recipe)) if name.startswith("dense") else (name, recipe)


def family(run: tuple[str, str]) -> tuple[Any, Recipe]:
    """A trial but for its learning rate."""
    kind, recipe = trial(run)
    return kind, replace(recipe, lr_mult=1.0)


def independent(c: Curves) -> int:
    """Seeds with a Phase A of their own: their scores before Phase B differ from those of every other seed, in all arms."""
    starts = ([documents(c.at[(*run, s)][0], "domain")[:, 0] for s in c.seeds] for run in c.runs)   # nats of each document
    return min(sum(not any(np.allclose(x, y, rtol=1e-3) for y in each[:s]) for s, x in enumerate(each)) for each in starts)


def matched(c: Curves, dense: int, cl: int) -> list[str]:
    """In what the runs `dense` and `cl` are equal, to 1 %."""
    of = lambda key: c.field(key)[[dense, cl], 0, 0]
    return [what for key, what in MATCHED.items() if abs(of(key)[1] / of(key)[0] - 1) <= 0.01]


@dataclass(frozen=True)
class Case:
    """
    What is claimed of curves: run and milestone of the dense limit, the dense run that is best at the `end`, Model-CL's run `cl`, and the
    trials that a guard stopped (`curves.stopped_trials`).
    """
    c: Curves
    limit: tuple[int, int]
    end: int
    cl: int
    gone: Sequence[dict] = ()

    @cached_property
    def every(self) -> list[dict]:
        """All records."""
        return [r for rows in self.c.at.values() for r in rows]

    @cached_property
    def ours(self) -> list[dict]:
        """The records of Model-CL's run, of all seeds."""
        return [r for s in self.c.seeds for r in self.c.at[(*self.c.runs[self.cl], s)]]

    @cached_property
    def lr(self) -> np.ndarray:
        """Learning rate of each run at each milestone, over Phase A's: (R, M)."""
        return self.c.field("lr_mult").mean(1)

    @cached_property
    def rates(self) -> dict[tuple[str, str], float]:
        """Every trial, those that were stopped too, with its highest learning rate."""
        return dict(zip(self.c.runs, self.lr.max(-1).tolist())) | {(lost["arm"], lost["recipe"]): lost["lr_mult"] for lost in self.gone}

    @cached_property
    def dense(self) -> list[tuple[str, str]]:
        return [run for run in self.rates if run[0].startswith("dense")]


# --- the checks ---

def seeds(x: Case) -> Check:
    c, own, orders = x.c, independent(x.c), {x.c.at[(*x.c.runs[x.end], s)][-1]["stream_hash"] for s in x.c.seeds}
    text = f"{own} with a Phase A of their own, of {len(c.seeds)} (at least {MIN_SEEDS})"
    return check(own >= MIN_SEEDS, text + "; all read the stream in one order" * (len(orders) == 1 < len(c.seeds)))


def confirmatory(x: Case) -> Check:
    declared = all(r.get("confirmatory") and r.get("profile") != "cpu" for r in x.every)
    return check(declared, f"{'' if declared else 'not '}declared on a domain, split and seeds never used for choosing")


def isolation(x: Case) -> Check:
    idle = [(r.get("blocks") or {}).get("idle_share", np.nan) for r in x.ours if r["milestone"]] or [np.nan]
    share = float(np.median(idle))
    text = f"median share of blocks that did not learn {share:.0%} (at least {MIN_IDLE_SHARE:.0%})"
    return check(share >= MIN_IDLE_SHARE, text + ": isolation was not exercised" * (share < MIN_IDLE_SHARE), *idle)


def routed(x: Case) -> Check:
    # Facts and questions are not in it: what is asked in one short line is served under the constant choice, whatever the model.
    constant = [r.get("constant_share", {}).get(part, default) for r in x.ours for part, default in PANELS.items()]
    return check(max(constant) <= MAX_CONSTANT_SHARE, f"{max(constant):.1%} of scored tokens under the constant choice (at most "
                 f"{MAX_CONSTANT_SHARE:.0%})", *constant)


def interior(x: Case, *runs: int) -> Check:
    """Whether the best rate of each run lies inside of those that its family has tried."""
    inside, texts, best = [], [], [x.rates[x.c.runs[i]] for i in runs]
    for i, peak in zip(runs, best):
        tried = sorted({lr for run, lr in x.rates.items() if family(run) == family(x.c.runs[i])})
        inside.append(tried[0] * APART <= peak <= tried[-1] / APART)
        texts.append(f"{x.c.names[i]}: learning rate x{peak:g} of {', '.join(f'{lr:g}' for lr in tried)} tried")
    return check(all(inside), "; ".join(texts), *best)


def cooled(x: Case) -> Check:
    last = x.lr[x.limit] / x.lr[x.limit[0]].max(), x.lr[x.cl, -1] / x.lr[x.cl].max()
    return check(max(last) <= COOLED, f"last / highest learning rate: {x.c.names[x.limit[0]]} {last[0]:.2f}, {x.c.names[x.cl]} "
                 f"{last[1]:.2f} (at most {COOLED:g})", *last)


def unique_text(x: Case) -> Check:
    epoch = x.c.field("epoch").max()
    return check(epoch <= MAX_EPOCHS, f"{epoch:.2f} epochs of it (at most {MAX_EPOCHS:g})", epoch)


def equal_trials(x: Case) -> Check:
    dense, others = len({trial(run) for run in x.dense}), len(x.rates) - len(x.dense)
    stopped = len({(lost["arm"], lost["recipe"]) for lost in x.gone})
    text = f"{dense} dense, {others} other (arms x recipes; no more than dense)"
    return check(others <= dense, text + f"; of all, {stopped} stopped by a guard" * (stopped > 0))


def stopped_trials(x: Case) -> Check:
    def better(lost: dict) -> bool:
        """A dense trial that a guard stopped for one seed, and that beat the limit on those for which it ended."""
        ended = {x.c.seeds.index(s): -bpb for s, bpb in lost.get("ended", {}).items() if s in x.c.seeds}
        return bool(ended) and np.mean([*ended.values()]) > x.c.val[x.limit[0], [*ended], x.limit[1]].mean()
    unfair = sorted({f"{lost['arm']}/{lost['recipe']}" for lost in x.gone if lost["arm"].startswith("dense") and better(lost)})
    return check(not unfair, f"{', '.join(unfair) or 'none'} stopped on one seed and ahead of the dense limit on others")


def controls(x: Case) -> Check:
    missing = CONTROLS - {arm for arm, _ in x.dense}
    return check(not missing, f"without {', '.join(sorted(missing))}" if missing else ", ".join(sorted(CONTROLS)))


def same_recipe(x: Case) -> Check:
    mine = of_dense(replace(read(x.c.runs[x.cl][1]), lr_mult=1.0))
    known = mine in {family(run)[1] for run in x.dense}
    return check(known, f"{x.c.names[x.cl]}: {'' if known else 'not '}tried with dense, but for its rate and what routing alone knows")


def matched_sizes(x: Case) -> Check:
    equal = matched(x.c, x.end, x.cl)
    return check(equal, f"{x.c.names[x.end]} and {x.c.names[x.cl]} by {' and '.join(equal) or 'nothing'}")


def same_phase_a(x: Case) -> Check:
    tokens, texts = x.c.field("phase_a_tokens")[:, :, 0].ravel(), {r.get("phase_a_text") for r in x.every}
    text = " or ".join(f"{n:,.0f}" for n in sorted({*tokens})) + " tokens" + f" of {len(texts)} different texts" * (len(texts) > 1)
    return check(len({*tokens}) == len(texts) == 1, text, *tokens, *[np.nan] * (None in texts))


def same_setting(x: Case) -> Check:
    settings = [r.get("setting") for r in x.every]
    differ = sorted({key for one in settings if one for key in one if one[key] != (settings[0] or {}).get(key)})
    return check(not differ, f"runs differ in {', '.join(differ)}" if differ else "data, code and number format of all runs",
                 *[np.nan] * (None in settings))


def finished(x: Case) -> Check:
    return check(all(rows[-1].get("final") for rows in x.c.at.values()), "every run must have reached its last milestone")


CHECKS: dict[str, Callable[[Case], Check]] = {
    "seeds": seeds, "confirmatory data": confirmatory, "exercised isolation": isolation, "routed tokens": routed,
    "interior dense optimum": lambda x: interior(x, *dict.fromkeys((x.limit[0], x.end))),
    "interior optimum of Model-CL": lambda x: interior(x, x.cl),
    "cool-down": cooled, "unique text": unique_text, "equal trials": equal_trials, "stopped trials": stopped_trials, "controls": controls,
    "same recipe": same_recipe, "matched": matched_sizes, "same Phase A": same_phase_a, "same setting": same_setting, "finished runs": finished}


def checks(c: Curves, limit: tuple[int, int], end: int, cl: int, gone: Sequence[dict] = ()) -> dict[str, Check]:
    """Name -> check of a `Case`."""
    case = Case(c, limit, end, cl, gone)
    return {name: look(case) for name, look in CHECKS.items()}

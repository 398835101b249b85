"""
What else could explain the curves: threats to a claim, each checked on the records alone. What a verdict needs of them: nanochat_cl/crossover.py.
"""
# R runs, S seeds, M milestones
from collections.abc import Sequence
from dataclasses import replace
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


def checks(c: Curves, limit: tuple[int, int], end: int, cl: int, gone: Sequence[dict] = ()) -> dict[str, Check]:
    """
    Name -> check. limit: run and milestone of the dense limit; end: the dense run that is best at the end; cl: Model-CL's; gone: trials that
    a guard stopped (`curves.stopped_trials`).
    """
    every, ours = [r for rows in c.at.values() for r in rows], [r for s in c.seeds for r in c.at[(*c.runs[cl], s)]]
    seeds, order = independent(c), {c.at[(*c.runs[end], s)][-1]["stream_hash"] for s in c.seeds}
    declared = all(r.get("confirmatory") and r.get("profile") != "cpu" for r in every)
    idle = [(r.get("blocks") or {}).get("idle_share", np.nan) for r in ours if r["milestone"]] or [np.nan]
    idle_share = float(np.median(idle))
    # Facts and questions are not in it: what is asked in one short line is served under the constant choice, whatever the model.
    constant = [r.get("constant_share", {}).get(part, default) for r in ours for part, default in PANELS.items()]
    lr, epoch, budget = c.field("lr_mult").mean(1), c.field("epoch").max(), c.field("phase_a_tokens")[:, :, 0]
    texts = {r.get("phase_a_text") for r in every}
    settings = [r.get("setting") for r in every]
    differ = sorted({key for one in settings if one for key in one if one[key] != (settings[0] or {}).get(key)})
    peak = lr.max(-1)
    cooled = lr[limit] / peak[limit[0]], lr[cl, -1] / peak[cl]

    rates = {run: float(x) for run, x in zip(c.runs, peak)} | {(lost["arm"], lost["recipe"]): lost["lr_mult"] for lost in gone}
    dense = [run for run in rates if run[0].startswith("dense")]
    trials, others = len({trial(run) for run in dense}), len(rates) - len(dense)
    tried = lambda i: sorted({x for run, x in rates.items() if family(run) == family(c.runs[i])})
    inside = lambda i: tried(i)[0] * APART <= peak[i] <= tried(i)[-1] / APART
    shown = lambda i: f"{c.names[i]}: learning rate x{peak[i]:g} of {', '.join(f'{x:g}' for x in tried(i))} tried"
    equal, optima = matched(c, end, cl), list(dict.fromkeys((limit[0], end)))
    missing = CONTROLS - {name for name, _ in dense}
    known = of_dense(replace(read(c.runs[cl][1]), lr_mult=1.0)) in {family(run)[1] for run in dense}

    def better(lost: dict) -> bool:
        """A dense trial that a guard stopped for one seed, and that beat the limit on those for which it ended."""
        ended = {c.seeds.index(s): -bpb for s, bpb in lost.get("ended", {}).items() if s in c.seeds}
        return bool(ended) and np.mean([*ended.values()]) > c.val[limit[0], [*ended], limit[1]].mean()
    unfair = sorted({f"{lost['arm']}/{lost['recipe']}" for lost in gone if lost["arm"].startswith("dense") and better(lost)})
    return {
        "seeds": check(seeds >= MIN_SEEDS, f"{seeds} with a Phase A of their own, of {len(c.seeds)} (at least {MIN_SEEDS})"
                       + "; all read the stream in one order" * (len(order) == 1 < len(c.seeds))),
        "confirmatory data": check(declared, f"{'' if declared else 'not '}declared on a domain, split and seeds never used for choosing"),
        "exercised isolation": check(idle_share >= MIN_IDLE_SHARE, f"median share of blocks that did not learn {idle_share:.0%} (at least "
                                     f"{MIN_IDLE_SHARE:.0%})" + ": isolation was not exercised" * (idle_share < MIN_IDLE_SHARE), *idle),
        "routed tokens": check(max(constant) <= MAX_CONSTANT_SHARE, f"{max(constant):.1%} of scored tokens under the constant choice (at most "
                               f"{MAX_CONSTANT_SHARE:.0%})", *constant),
        "interior dense optimum": check(all(map(inside, optima)), "; ".join(map(shown, optima)), *peak[optima]),
        "interior optimum of Model-CL": check(inside(cl), shown(cl), peak[cl]),
        "cool-down": check(max(cooled) <= COOLED, f"last / highest learning rate: {c.names[limit[0]]} {cooled[0]:.2f}, {c.names[cl]} "
                           f"{cooled[1]:.2f} (at most {COOLED:g})", *cooled),
        "unique text": check(epoch <= MAX_EPOCHS, f"{epoch:.2f} epochs of it (at most {MAX_EPOCHS:g})", epoch),
        "equal trials": check(others <= trials, f"{trials} dense, {others} other (arms x recipes; no more than dense)"
                              + f"; of all, {len({(g['arm'], g['recipe']) for g in gone})} stopped by a guard" * bool(gone)),
        "stopped trials": check(not unfair, f"{', '.join(unfair) or 'none'} stopped on one seed and ahead of the dense limit on others"),
        "controls": check(not missing, f"without {', '.join(sorted(missing))}" if missing else ", ".join(sorted(CONTROLS))),
        "same recipe": check(known, f"{c.names[cl]}: {'' if known else 'not '}tried with dense, but for its rate and what routing alone knows"),
        "matched": check(equal, f"{c.names[end]} and {c.names[cl]} by {' and '.join(equal) or 'nothing'}"),
        "same Phase A": check(len({*budget.ravel()}) == len(texts) == 1, " or ".join(f"{x:,.0f}" for x in sorted({*budget.ravel()})) + " tokens"
                              + f" of {len(texts)} different texts" * (len(texts) > 1), *budget.ravel(), *[np.nan] * (None in texts)),
        "same setting": check(not differ, f"runs differ in {', '.join(differ)}" if differ else "data, code and number format of all runs",
                              *[np.nan] * (None in settings)),
        "finished runs": check(all(rows[-1].get("final") for rows in c.at.values()), "every run must have reached its last milestone")}

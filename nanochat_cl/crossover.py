"""
The cross-over certificate: does Model-CL overtake the best that Model-Dense reaches? From records.jsonl alone.

    python -m nanochat_cl.crossover RUN_DIR [RUN_DIR ...]      verdict; writes crossover.json to the first directory

With milestone 0 alone it is the check of H1 before Phase B. How often it errs, per number of seeds: runs/results/simulations.md.

score = -(domain bpb) on the test split; d(t) = score of Model-CL - score of the dense curve, paired by seed, data order and document; above
0 Model-CL is better. At each milestone the dense curve is the dense recipe or control that is best on *val* there, measured on *test*; the
dense limit is the best (recipe, milestone) on val at <= 4 epochs, measured on test. All bounds are those of the two-sided 95 % intervals of
nanochat_cl/estimates.py: over seeds, the documents held fixed; with one seed over documents, so that one seed never decides.
"""
# R recipes or runs, S seeds, M milestones, B resamples
import argparse
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from nanochat_cl import files, upstream
from nanochat_cl.command import UserError, run
from nanochat_cl.curves import Curves, documents, forgotten, load, paired, scores, stopped_trials
from nanochat_cl.estimates import Estimate, over_documents, over_seeds, resample
from nanochat_cl.seeds import seed_for
from nanochat_cl.validity import MAX_EPOCHS, MIN_SEEDS, check, checks, independent, matched

SMALLEST_BPB, FLOOR_BPB = 0.005, 0.002  # smallest effect of interest on the domain; how much more of the floor than dense may be lost
SIMULATIONS = "runs/results/simulations.md"
CONSECUTIVE = 3                         # milestones with the lower band above 0
PARTS = {"gap": "initial gap", "crossing": "crossing", "limit": "beyond the dense limit", "floor": "floor kept"}
# What is missing where one of these checks (nanochat_cl/validity.py) did not pass:
CROSSING_NEEDS = {"equal trials", "stopped trials", "controls", "same recipe", "same Phase A", "same setting", "documents",
                  "interior dense optimum"}                             # a fair crossing
LIMIT_NEEDS = {"cool-down", "unique text"}                              # a dense limit, besides
REFUSAL_NEEDS = {"exercised isolation", "routed tokens", "same Phase A", "same setting", "interior optimum of Model-CL", "cool-down",
                 "finished runs", "tokens"}                             # a fair chance for "yes"


def picked(x: np.ndarray, recipe: np.ndarray) -> np.ndarray:
    """Of scores x (..., R, S, M) those of a recipe (..., 1), or of one for each milestone (..., M) -> (..., S, M)."""
    return np.take_along_axis(x, recipe[..., None, None, :], -3)[..., 0, :, :]


def slope(x: np.ndarray) -> np.ndarray:
    """Least-squares slope of x (..., M) over the second half of the run, per length of the run -> (..., 1)."""
    m = x.shape[-1]
    t = np.arange(m // 2, m) - (m // 2 + m - 1) / 2
    return (x[..., m // 2:] @ t / max(t @ t, 1) * max(m - 1, 1))[..., None]


def compare(dense_val, dense_test, dense_general, cl_val, cl_test, cl_general, eligible=True) -> dict[str, np.ndarray]:
    """
    Scores (..., R, S, M) of the dense recipes and of Model-CL's -> d (..., S, M); its trend, beyond, floor and start (general text at
    milestone 0), each (..., S, 1); and the choices, all made on val: dense_at (..., M), cl_at (..., 1) and limit_at (..., 2) = (recipe,
    milestone). eligible (R, M): may serve as the limit.
    """
    val = dense_val.mean(-2)                                                        # (..., R, M)
    dense_at, cl_at = val.argmax(-2), cl_val.mean(-2)[..., -1:].argmax(-2)
    best = np.where(eligible, val, -np.inf).reshape(*val.shape[:-2], -1).argmax(-1)
    limit_at = np.stack(np.divmod(best, val.shape[-1]), -1)
    limit = np.take_along_axis(picked(dense_test, limit_at[..., :1]), limit_at[..., None, 1:], -1)
    cl = picked(cl_test, cl_at)
    ours, theirs = picked(cl_general, cl_at), picked(dense_general, dense_at[..., -1:])
    d = cl - picked(dense_test, dense_at)
    return dict(d=d, trend=slope(d), beyond=cl[..., -1:] - limit, floor=forgotten(ours)[..., -1:] - forgotten(theirs)[..., -1:],
                start=ours[..., :1] - picked(dense_general, dense_at[..., :1])[..., :1],
                dense_at=dense_at, limit_at=limit_at, cl_at=cl_at)


def bracket(score: np.ndarray, lost: np.ndarray, at: float) -> tuple[int, int] | None:
    """Of runs that ended with `score` and `lost` (R,) the two whose straight line has lost the least at the score `at`; None outside of them."""
    i, j = np.nonzero((score[:, None] <= at) & (score > at) & (score - score[:, None] >= SMALLEST_BPB))
    line = lost[i] + (at - score[i]) / (score[j] - score[i]) * (lost[j] - lost[i])
    return (i[line.argmin()], j[line.argmin()]) if len(i) else None


def beyond_line(domain: np.ndarray, lost: np.ndarray, cl: int, line: tuple[int, int]) -> np.ndarray:
    """How much more run `cl` has lost than a straight line between two others has at its domain score; ends (..., R) -> (..., 1)."""
    (x0, x1), (y0, y1) = ([x[..., i] for i in line] for x in (domain, lost))
    return (lost[..., cl] - y0 - (domain[..., cl] - x0) / (x1 - x0) * (y1 - y0))[..., None]


def lasting(mean: np.ndarray) -> np.ndarray:
    """True at each milestone from which mean (..., M) stays above 0 to the end."""
    return np.logical_and.accumulate(mean[..., ::-1] > 0, -1)[..., ::-1]


def criteria(d: Estimate, beyond: Estimate, floor: Estimate, trend: Estimate) -> dict[str, np.ndarray]:
    """The four criteria, each 1 pass, -1 fail, 0 open (...); `ahead`: a crossing but for the start below; `rising`: the gap is closing."""
    three = lambda passed, failed: np.where(passed, 1, np.where(failed, -1, 0))
    sure, stays, last = d.band_low > 0, lasting(d.mean), d.mean[..., -1]
    starts = max(0, sure.shape[-1] - CONSECUTIVE + 1)                               # where as many milestones can begin
    running = np.all([(sure & stays)[..., i:i + starts] for i in range(CONSECUTIVE)], 0)
    ahead = sure[..., -1] & running.any(-1)
    return dict(
        gap=three(d.high[..., 0] < 0, d.low[..., 0] > -SMALLEST_BPB),
        crossing=three(ahead & ~stays[..., 0], d.high[..., -1] < 0),
        limit=three((beyond.low[..., 0] > 0) & (beyond.mean[..., 0] >= SMALLEST_BPB), beyond.high[..., 0] < SMALLEST_BPB),
        floor=three(floor.high[..., 0] <= FLOOR_BPB, floor.low[..., 0] > FLOOR_BPB), ahead=ahead,
        rising=(trend.low[..., 0] > 0) & (last <= SMALLEST_BPB) & (trend.mean[..., 0] + last > 0))     # above after as much again


def barred(missing: set[str]) -> set[str]:
    """The parts that can't hold while these checks have not passed."""
    return {"crossing", "limit"} if missing & CROSSING_NEEDS else {"limit"} if missing & LIMIT_NEEDS else set()


def verdict(parts: dict, seeds: int, failed: Iterable[str] = ()) -> tuple[str, list[str], list[str]]:
    """
    (verdict, parts that hold, what is missing) from the criteria of one run, the number of seeds and the names of checks that did not pass.
    A limit that is none cannot be passed, a dense arm with fewer trials or no best rate cannot be crossed, one not isolated cannot lose, one
    seed proves nothing. Who is ahead, and not short of the limit, needs no better rate.
    """
    missing = set(failed)
    behind = parts["crossing"] < 0 or (parts["crossing"] == 0 and parts["limit"] < 0)   # not where a crossing is there, but barred
    if parts["ahead"] and not behind:
        missing.discard("interior optimum of Model-CL")
    sound = not missing and seeds >= MIN_SEEDS
    still_open = {name for name in PARTS if parts[name] == 0} - ({"crossing"} if parts["ahead"] else set())
    if seeds < MIN_SEEDS or (still_open and not parts["rising"]):
        missing.add("seeds")

    shut = barred(missing)
    state = {name: min(int(parts[name]), 0) if name in shut else int(parts[name]) for name in PARTS}
    if parts["rising"] and state["crossing"] < 1:
        missing.add("tokens")
    holds = [PARTS[name] for name in PARTS if state[name] > 0 and seeds > 1]

    above = parts["ahead"] and state["gap"] < 0 and state["limit"] > 0 and state["floor"] > 0
    if behind:
        word = "NOT SUPPORTED" if seeds >= MIN_SEEDS and not missing & REFUSAL_NEEDS else "INCONCLUSIVE"
    elif above and sound:
        word = "DOMINATES"
    elif state["crossing"] > 0 and seeds > 1:
        word = "SUPPORTED" if sound and len(holds) == len(PARTS) else "PARTLY"
    else:
        word = "INCONCLUSIVE"
    return word, holds, sorted(missing)


def number(e: Estimate, m: int = 0) -> dict[str, float]:
    return dict(estimate=float(e.mean[m]), low=float(e.low[m]), high=float(e.high[m]))


def interval(n: dict) -> str:
    return f"{n['estimate']:+.4f} [{n['low']:+.4f}, {n['high']:+.4f}]".replace("-", "\N{MINUS SIGN}")


def estimated_over_documents(c: Curves, x: dict, cl: int, at: np.ndarray, limit: tuple[int, int], line: tuple | None) -> dict[str, Estimate]:
    """What `assess` found, x, with intervals over resampled documents, the same ones for every run and milestone; means over seeds."""
    rng = np.random.default_rng(seed_for(0, "documents"))

    def drawn(part: str) -> np.ndarray:                                             # (B, R, M)
        nats, size, owner = c.panel(part)
        return scores(nats.mean(1), size, owner, resample(owner, rng))
    domain, general = drawn("domain"), drawn("general")
    d, lost = domain[:, cl] - domain[:, at, np.arange(len(at))], forgotten(general)
    draws = dict(d=d, beyond=domain[:, cl, -1:] - domain[:, limit[0], limit[1], None], floor=lost[:, cl, -1:] - lost[:, at[-1], -1:],
                 start=general[:, cl, :1] - general[:, at[0], :1], trend=slope(d))
    if line:
        draws["equal"] = beyond_line(domain[..., -1], lost[..., -1], cl, line)
    return {name: over_documents(x[name].mean(0), draws[name]) for name in draws}


def assess(records: list[dict], arm: str = "cl", gone: list[dict] = ()) -> dict:
    """The certificate of a set of records, as it is written to crossover.json; `arm` is the one that is Model-CL, `gone` as in `checks`."""
    c = paired(records)
    dense = [i for i, (name, _) in enumerate(c.runs) if name.startswith("dense")]
    mine = [i for i, (name, _) in enumerate(c.runs) if name == arm]
    if not dense or not mine:
        stopped = "".join(f"; a guard stopped {t['arm']}/{t['recipe']} seed {t['seed']}" for t in gone)
        raise UserError(f"a comparison needs a dense arm and {arm}, the records hold {', '.join(c.names)}{stopped}: run evolve with both (or --arm)")
    eligible = c.field("epoch")[dense].max(1) <= MAX_EPOCHS
    x = compare(c.val[dense], c.test[dense], c.general[dense], c.val[mine], c.test[mine], c.general[mine], eligible)
    cl, at = mine[x["cl_at"][0]], np.array(dense)[x["dense_at"]]                    # numbers of runs; at (M,)
    limit = dense[x["limit_at"][0]], int(x["limit_at"][1])
    line = bracket(c.val[dense, :, -1].mean(1), forgotten(c.general_val)[dense, :, -1].mean(1), c.val[cl, :, -1].mean())
    if line:
        line = dense[line[0]], dense[line[1]]
        x["equal"] = beyond_line(c.test[..., -1].T, forgotten(c.general)[..., -1].T, cl, line)

    one, seeds, by_documents = len(c.seeds) == 1, independent(c), estimated_over_documents(c, x, cl, at, limit, line)
    e = by_documents if one else {name: over_seeds(x[name]) for name in by_documents}
    parts, found = criteria(e["d"], e["beyond"], e["floor"], e["trend"]), checks(c, limit, at[-1], cl, gone)
    if parts["ahead"] and not one:
        end, fewest = number(by_documents["d"], -1), np.unique(documents(c.first[0], "domain")[:, 2], return_counts=True)[1].min()
        found["documents"] = check(end["low"] > 0, f"d at the end over documents: {interval(end)}", *[np.nan] * int(fewest < 2))
    failed = {k for k, (state, _) in found.items() if state != "pass" and k != "seeds"}
    word, holds, missing = verdict(parts, seeds, failed)
    state = {p: "barred" if parts[p] > 0 and p in barred(failed) else ("open", "pass", "fail")[int(parts[p])] for p in PARTS}

    d, stays = e["d"], lasting(e["d"].mean)
    k = int(stays.argmax())                                                        # the first milestone above for good, 0 if there is none
    around, crossed = slice(k - 1, k + 1), parts["crossing"] > 0
    ahead = (d.band_low > 0).nonzero()[0]
    end = number(Estimate(d.mean, d.band, d.band), -1)
    numbers = dict(gap=number(d), crossing=end, limit=number(e["beyond"]), floor=number(e["floor"]))
    out = dict(
        verdict=word, holds=holds, missing=missing, arm=arm, cl=c.names[cl], seeds=c.seeds, tokens=c.tokens.tolist(),
        confirmatory=found["confirmatory data"][0] == found["exercised isolation"][0] == "pass",
        over="documents of one seed" if one else f"{len(c.seeds)} seeds",
        parts={p: dict(name=PARTS[p], state=state[p], **numbers[p]) for p in PARTS},
        general_start=dict(dense=-c.general[at[0], :, 0].mean(), cl=-c.general[cl, :, 0].mean(), **number(e["start"])),
        crossing_tokens=float(np.interp(0, d.mean[around], c.tokens[around])) if crossed else None,
        crossing_between=c.tokens[around].tolist() if crossed else None, above_from_start=bool(stays[0]),
        censored_after_tokens=None if crossed or stays[0] else int(c.tokens[-1]),
        mean_above_from=int(c.tokens[k]) if stays.any() else None, ahead_at=c.tokens[ahead].tolist(),
        dense_limit=dict(run=c.names[limit[0]], milestone=limit[1], bpb=float(-c.test[limit[0], :, limit[1]].mean())),
        matched=matched(c, at[-1], cl),
        floor_at_equal_domain=dict(between=[c.names[i] for i in line], **number(e["equal"])) if line else None,
        curves=dict(d=d.mean.tolist(), d_low=d.low.tolist(), d_high=d.high.tolist(), band_low=d.band_low.tolist(),
                    band_high=d.band_high.tolist(), cl_bpb=(-c.test[cl].mean(0)).tolist(), dense_run=[c.names[i] for i in at],
                    dense_bpb=(-c.test[at, :, np.arange(len(at))].mean(1)).tolist()),
        checks={key: dict(state=state, found=text) for key, (state, text) in found.items()})
    return out | dict(sentence=sentence(out))


def sentence(v: dict) -> str:
    """The verdict in one sentence with its numbers."""
    tokens, at = f"{v['tokens'][-1] / 1e6:.2f}M tokens", v["crossing_tokens"]
    what = (f"{v['arm']} is above the dense curve from the first milestone on, so there is nothing to cross" if v["above_from_start"] else
            f"{v['arm']} passes the dense curve at {at / 1e6:.2f}M of {tokens}" if at else
            f"the mean of {v['arm']} is above the dense curve from {v['mean_above_from'] / 1e6:.2f}M of {tokens} on, which the bands don't "
            f"confirm: no crossing" if v["mean_above_from"] else
            f"{v['arm']} was ahead at {v['ahead_at'][-1] / 1e6:.2f}M of {tokens} and fell behind again: no crossing" if v["ahead_at"] else
            f"no crossing observed within {tokens}")
    text = (f"{v['verdict']}: {what}; at the end d = {interval(v['parts']['crossing'])} bpb, against the dense limit "
            f"{interval(v['parts']['limit'])} bpb, general loss beyond dense's {interval(v['parts']['floor'])} bpb"
            + (f", at equal domain score {interval(v['floor_at_equal_domain'])} bpb" if v["floor_at_equal_domain"] else "")
            + f" (95 %, over {v['over']}; d > 0: {v['arm']} is better)")
    text += f"; what holds: {', '.join(v['holds'])}" if v["holds"] else ""
    return text + (f"; still needed: {', '.join(v['missing'])}." if v["missing"] else ".")


def certify(run_dirs: list[str], arm: str = "cl") -> dict:
    """Assess the runs and write crossover.json to the first of them."""
    out = assess(load(run_dirs), arm, stopped_trials(run_dirs))
    paths = [Path(d) / name for d in run_dirs for name in ("records.jsonl", "stopped.json")]
    out["inputs"] = {str(path): files.sha256(path) for path in paths if path.is_file()}
    files.write_json(Path(run_dirs[0]) / "crossover.json", out)
    return out


def power() -> str:
    """The rows of the committed simulations that say how often a true crossing is found, per number of seeds and their spread."""
    rows = r"^(?:## Seed-to-seed.*|\| true state \| how often.*|\| (?:true|late) crossing.*\| SUPPORTED .*)$"
    return "\n".join(re.findall(rows, (upstream.REPO / SIMULATIONS).read_text(), re.MULTILINE))


def parse(argv: list[str] | None = None, module: str = "nanochat_cl.crossover", doc: str = __doc__) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog=f"python -m {module}", description=doc.strip().splitlines()[0])
    p.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="directories with records.jsonl; several are pooled (seeds, recipes)")
    p.add_argument("--arm", default="cl", help="which arm is Model-CL (default: %(default)s)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    v = certify(args.run_dirs, args.arm)
    print("\n".join(f"{part['name']:<32}{part['state']:<12}{interval(part)} bpb" for part in v["parts"].values()))
    print("\n".join(f"{name:<32}{check['state']:<12}{check['found']}" for name, check in v["checks"].items()))
    print(f"power, by simulation, and what it errs by: {SIMULATIONS}\n{power()}")
    other = f" --arm {args.arm}" * (args.arm != "cl")
    print(f"{v['sentence']}\nwrote {Path(args.run_dirs[0]) / 'crossover.json'}; next: python -m nanochat_cl.report {' '.join(args.run_dirs)}{other}")


if __name__ == "__main__":
    run(main)

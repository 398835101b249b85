"""
The cross-over certificate: does Model-CL overtake the best that Model-Dense reaches? From records.jsonl alone.

    python -m nanochat_cl.crossover RUN_DIR [RUN_DIR ...]      verdict; writes crossover.json to the first directory

With milestone 0 alone it is the check of H1 before Phase B. How often it errs, per number of seeds: runs/results/simulations.md.

score = -(domain bpb) on the test split; d(t) = score of Model-CL - score of the dense curve, paired by seed, data order and document; above
0 Model-CL is better. At each milestone the dense curve is the dense recipe or control that is best on *val* there, measured on *test*; the
dense limit is the best (recipe, milestone) on val at <= 4 epochs, measured on test. All bounds are those of two-sided 95 % intervals
(one-sided error 0.025): over seeds by Student's t on paired seed means, the documents held fixed; with one seed by a bootstrap over
documents, which says nothing about another seed, so that one seed never decides.
"""
# R recipes, S seeds, M milestones, B resamples, D documents
import argparse
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from nanochat_cl import files
from nanochat_cl.command import UserError, run
from nanochat_cl.seeds import seed_for

SMALLEST_BPB, FLOOR_BPB = 0.005, 0.002  # smallest effect of interest on the domain; how much more of the floor than dense may be lost
CONSECUTIVE, MIN_SEEDS = 3, 3           # milestones with the lower band above 0; seeds for a claim
MAX_EPOCHS = 4.0                        # of unique tokens: nearly free up to here (Muennighoff et al. 2023)
MIN_IDLE_SHARE, MAX_CONSTANT_SHARE = 0.20, 0.15  # median share of blocks that did not learn; scored tokens under the constant choice
COOLED = 0.2                            # last / highest learning rate of a run that was cooled down
T975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
PARTS = {"gap": "initial gap", "crossing": "crossing", "limit": "beyond the dense limit", "floor": "floor kept"}
LIMIT_NEEDS = {"interior dense optimum", "cool-down", "unique text"}  # without these the dense limit is none


@dataclass(frozen=True)
class Estimate:
    """Mean (..., M) with half-widths of the pointwise and of the simultaneous 95 % interval."""
    mean: np.ndarray
    half: np.ndarray
    band: np.ndarray
    low = property(lambda self: self.mean - self.half)
    high = property(lambda self: self.mean + self.half)
    band_low = property(lambda self: self.mean - self.band)
    band_high = property(lambda self: self.mean + self.band)


def t_quantile(df: int) -> float:
    """Student's t, 97.5 %: a table, then the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5)."""
    g = (1.959964, 2.372271, 2.822499, 2.555850)  # 1.96 and its three correction terms
    return T975[df - 1] if df <= len(T975) else sum(term / df**k for k, term in enumerate(g))


@lru_cache(maxsize=None)
def max_t(seeds: int, milestones: int, correlation: float = 0.0) -> float:
    """95 % quantile of max |t| over milestones, each studentised over its own `seeds` values, with equal correlation between milestones."""
    rng = np.random.default_rng(seed_for(0, f"max-t/{seeds}/{milestones}"))
    peaks = []
    for _ in range(30):
        normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
        x = np.sqrt(correlation) * normal(4000, seeds, 1) + np.sqrt(1 - correlation) * normal(4000, seeds, milestones)
        peaks.append(np.abs(x.mean(1) * np.sqrt(seeds) / x.std(1, ddof=1)).max(1))
    return float(np.quantile(np.concatenate(peaks), 0.95)) if milestones > 1 else t_quantile(seeds - 1)


def over_seeds(x: np.ndarray) -> Estimate:
    """
    Student's t on paired seed values x (..., S, M), S >= 2; simultaneous over M by max-t. The correlation between milestones is estimated,
    then shrunk towards independence, the least favourable case (Sidak 1967): few seeds cannot tell a correlation.
    """
    seeds, milestones = x.shape[-2:]
    mean, sd = x.mean(-2, keepdims=True), x.std(-2, ddof=1, keepdims=True)
    z = np.divide(x - mean, sd, out=np.zeros_like(x), where=sd > 0)
    pairs = (z.sum(-1) ** 2 - (z**2).sum(-1)).sum(-1) / ((seeds - 1) * max(1, milestones * (milestones - 1)))   # mean correlation
    steps, back = np.unique((np.clip(pairs, 0, 1) * max(0.0, 1 - 3 / (seeds - 1)) * 10).astype(int), return_inverse=True)
    critical = np.array([max_t(seeds, milestones, step / 10) for step in steps])[back].reshape(pairs.shape)
    mean, se = mean[..., 0, :], sd[..., 0, :] / np.sqrt(seeds)
    return Estimate(mean, t_quantile(seeds - 1) * se, critical[..., None] * se)


def over_documents(point: np.ndarray, draws: np.ndarray) -> Estimate:
    """Symmetric bootstrap intervals around point (M,) from draws (B, M); simultaneous by the maximum over M."""
    se = draws.std(0, ddof=1)
    t = np.divide(np.abs(draws - point), se, out=np.zeros_like(draws), where=se > 0)
    return Estimate(point, np.quantile(t, 0.95, axis=0) * se, np.quantile(t.max(1), 0.95) * se)


def resample(owner: np.ndarray, rng: np.random.Generator, draws: int = 2000) -> np.ndarray:
    """Weights (B, D): n - 1 of the n documents of each sub-domain with replacement, whose variance is unbiased (Rao and Wu 1988)."""
    weights = np.ones((draws, len(owner)))
    for mine in (owner == j for j in np.unique(owner)):
        if (n := mine.sum()) > 1:
            weights[:, mine] = rng.multinomial(n - 1, np.full(n, 1 / n), size=draws)
    return weights


def scores(nats: np.ndarray, size: np.ndarray, owner: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """-bpb, mean over sub-domains: nats (..., D), bytes (D,), sub-domain of each (D,) -> (...), with weights (B, D) -> (B, ...)."""
    w, total = np.ones((1, len(size))) if weights is None else weights, 0.0
    for mine in (owner == j for j in np.unique(owner)):
        scale = (np.log(2) * w[:, mine] @ size[mine]).reshape(-1, *[1] * (nats.ndim - 1))
        total = total - np.tensordot(w[:, mine], nats[..., mine], axes=(1, -1)) / scale / len(np.unique(owner))
    return total[0] if weights is None else total


def compare(dense_val, dense_test, dense_general, cl_val, cl_test, cl_general, eligible=True) -> dict[str, np.ndarray]:
    """
    Scores (..., R, S, M) of the dense recipes and of Model-CL's -> d (..., S, M); beyond, floor and start (general text at milestone 0),
    each (..., S, 1); and the choices, all made on val: dense_at (..., M), limit_at (..., 2) = (recipe, milestone), cl_at (...).
    eligible (R, M): may serve as the limit.
    """
    val = dense_val.mean(-2)                                                        # (..., R, M)
    dense_at, cl_at = val.argmax(-2), cl_val.mean(-2)[..., -1].argmax(-1)
    flat = np.where(eligible, val, -np.inf).reshape(*val.shape[:-2], -1).argmax(-1)
    limit_at = np.stack(np.divmod(flat, val.shape[-1]), -1)
    pick = lambda x, at: np.take_along_axis(x, at[..., None, None, None], -3)[..., 0, :, :]      # one recipe: (..., S, M)
    cl, curve = pick(cl_test, cl_at), np.take_along_axis(dense_test, dense_at[..., None, None, :], -3)[..., 0, :, :]
    limit = np.take_along_axis(pick(dense_test, limit_at[..., 0]), limit_at[..., 1][..., None, None], -1)
    loss = lambda x, at: pick(x, at)[..., :1] - pick(x, at)[..., -1:]               # general score lost since milestone 0
    return dict(d=cl - curve, beyond=cl[..., -1:] - limit, floor=loss(cl_general, cl_at) - loss(dense_general, dense_at[..., -1]),
                start=pick(cl_general, cl_at)[..., :1] - pick(dense_general, dense_at[..., 0])[..., :1],
                dense_at=dense_at, limit_at=limit_at, cl_at=cl_at)


def slope(x: np.ndarray) -> np.ndarray:
    """Least-squares slope of x (..., M) over the second half of the run, per length of the run -> (..., 1)."""
    m = x.shape[-1]
    t = np.where(np.arange(m) >= m // 2, np.arange(m) - (m // 2 + m - 1) / 2, 0.0)
    return (x @ t / max((t @ t), 1) * max(m - 1, 1))[..., None]


def lasting(mean: np.ndarray) -> np.ndarray:
    """True at each milestone from which mean (..., M) stays above 0 to the end."""
    return np.flip(np.cumprod(np.flip(mean > 0, -1), -1), -1).astype(bool)


def criteria(d: Estimate, beyond: Estimate, floor: Estimate, trend: Estimate) -> dict[str, np.ndarray]:
    """The four criteria, each 1 pass, -1 fail, 0 open (...); `ahead`: a crossing but for the start below; `rising`: the gap is closing."""
    three = lambda passed, failed: np.where(passed, 1, np.where(failed, -1, 0))
    stay, sure, last = lasting(d.mean), d.band_low > 0, d.mean[..., -1]
    count = sure.shape[-1] - CONSECUTIVE + 1
    runs = [(stay & sure)[..., i:i + max(count, 0)] for i in range(CONSECUTIVE)]
    ahead = sure[..., -1] & np.all(runs if count > 0 else np.zeros((1, *sure.shape), bool), 0).any(-1)
    return dict(
        gap=three(d.high[..., 0] < 0, d.low[..., 0] > -SMALLEST_BPB),
        crossing=three(ahead & ~stay[..., 0], d.high[..., -1] < 0),
        limit=three((beyond.low[..., 0] > 0) & (beyond.mean[..., 0] >= SMALLEST_BPB), beyond.high[..., 0] < SMALLEST_BPB),
        floor=three(floor.high[..., 0] <= FLOOR_BPB, floor.low[..., 0] > FLOOR_BPB), ahead=ahead,
        rising=(trend.low[..., 0] > 0) & (last <= SMALLEST_BPB) & (trend.mean[..., 0] + last > 0))     # above after as much again


def verdict(parts: dict, seeds: int, failed: Iterable[str] = ()) -> tuple[str, list[str], list[str]]:
    """
    (verdict, parts that hold, what is missing) from the criteria of one run, the number of seeds and the names of checks that did not pass.
    A limit that is none cannot be passed, an arm with more trials cannot cross, one not isolated cannot lose, one seed proves nothing.
    """
    raw, failed = {name: int(parts[name]) for name in PARTS}, set(failed)
    barred = {"crossing", "limit"} if failed & {"equal trials", "documents"} else {"limit"} if failed & LIMIT_NEEDS else set()
    state = {name: min(value, 0) if name in barred else value for name, value in raw.items()}
    holds = [PARTS[name] for name in PARTS if state[name] > 0 and seeds > 1]
    few, closing = seeds < MIN_SEEDS or (0 in raw.values() and not parts["rising"]), parts["rising"] and state["crossing"] < 1
    missing = sorted(failed | ({"seeds"} if few else set()) | ({"tokens"} if closing else set()))
    sound, word = not failed and seeds >= MIN_SEEDS, "INCONCLUSIVE"
    if seeds > 1 and (state["crossing"] < 0 or (state["crossing"] == 0 and raw["limit"] < 0)):
        word = word if seeds < MIN_SEEDS or {"tokens", "exercised isolation", "finished runs"} & set(missing) else "NOT SUPPORTED"
    elif parts["ahead"] and state["gap"] < 0 and state["limit"] > 0 and sound:
        word = "DOMINATES"
    elif seeds > 1 and state["crossing"] > 0:
        word = "SUPPORTED" if sound and len(holds) == len(PARTS) else "PARTLY"
    return word, holds, missing


def load(run_dirs: list[str | Path]) -> list[dict]:
    """All records of the runs. UserError names the file and line of what cannot be read."""
    records: dict[tuple, dict] = {}
    for path in (Path(d) / "records.jsonl" for d in run_dirs):
        if not path.is_file() or not path.stat().st_size:
            raise UserError(f"{path} holds no record: expected a Phase B run; run nanochat_cl.evolve to its first milestone")
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                r = json.loads(line)
                _ = r["tokens"], r["stream_hash"], r["domain"]["test"]["subdomains"], r["domain"]["val"]["bpb"], r["general"]["test"]
                key = r["arm"], r["recipe"], r["seed"], r["milestone"]
            except (ValueError, KeyError, TypeError) as e:
                what = f"has no field {e}" if isinstance(e, KeyError) else "is not a whole record"
                raise UserError(f"{path} line {number} {what}: the file was cut or edited; run the same evolve command again") from None
            if key in records:
                raise UserError(f"{key[0]}/{key[1]} seed {key[2]} is in two of the runs; name each run once")
            records[key] = r
    return list(records.values())


def documents(r: dict, part: str) -> np.ndarray:
    """(D, 3) nats, bytes and number of the sub-domain of a record's test documents; part is "domain" or "general"."""
    test = r[part]["test"]
    panels = [panel for _, panel in sorted(test["subdomains"].items())] if part == "domain" else [test]
    return np.array([(nats, size, j) for j, panel in enumerate(panels) for nats, size in panel["docs"]], float)


@dataclass(frozen=True)
class Curves:
    """Comparable records as arrays over runs = [(arm, recipe)] (R), seeds that every run has (S) and milestones (M)."""
    runs: list[tuple[str, str]]
    seeds: list[int]
    at: dict[tuple, list[dict]]         # (arm, recipe, seed) -> its records by milestone

    def stack(self, value: Callable) -> np.ndarray:
        """value(record) of every record -> (R, S, M, ...)."""
        return np.array([[[value(r) for r in self.at[(*name, s)]] for s in self.seeds] for name in self.runs], float)

    def field(self, key: str) -> np.ndarray:
        return self.stack(lambda r: np.nan if r.get(key) is None else r[key])

    def panel(self, part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Nats (R, S, M, D), bytes (D,) and sub-domain (D,) of the test documents."""
        return self.stack(lambda r: documents(r, part)[:, 0]), *documents(self.first[0], part)[:, 1:].T

    names = property(lambda self: ["/".join(name) for name in self.runs])
    first = property(lambda self: self.at[(*self.runs[0], self.seeds[0])])                          # the records of one run
    tokens = property(lambda self: np.array([r["tokens"] for r in self.first]))                     # (M,)
    val = cached_property(lambda self: self.stack(lambda r: -r["domain"]["val"]["bpb"]))            # scores (R, S, M)
    test = cached_property(lambda self: scores(*self.panel("domain")))
    general = cached_property(lambda self: scores(*self.panel("general")))


def curves(records: list[dict]) -> Curves:
    """Arrays of the records; UserError where arms differ in milestones, stream or documents. Streams differ by intent where replay does."""
    names = sorted({(r["arm"], r["recipe"]) for r in records}, key=lambda name: (not name[0].startswith("dense"), name))
    at: dict[tuple, list[dict]] = {}
    for r in sorted(records, key=lambda r: r["milestone"]):
        at.setdefault((r["arm"], r["recipe"], r["seed"]), []).append(r)
    seeds = [s for s in sorted({key[2] for key in at}) if all((*name, s) in at for name in names)]
    if not seeds:
        raise UserError(f"no seed was run in every arm and recipe ({', '.join('/'.join(n) for n in names)}); arms are paired by seed")
    c, streams = Curves(names, seeds, at), {}
    for name in names:
        for s in seeds:
            mine, who = at[(*name, s)], f"{'/'.join(name)} seed {s}"
            if [(r["milestone"], r["tokens"]) for r in mine] != [(r["milestone"], r["tokens"]) for r in c.first]:
                raise UserError(f"{who} has {len(mine)} milestones to {mine[-1]['tokens']:,} tokens, {c.names[0]} has {len(c.first)} "
                                f"to {c.tokens[-1]:,}: milestones must agree; finish the run, or give both one --milestone-tokens")
            replay = [part for part in name[1].split(",") if part.startswith("replay=")]
            if [r["stream_hash"] for r in mine] != streams.setdefault((s, *replay), [r["stream_hash"] for r in mine]):
                raise UserError(f"{who} saw another stream than the other runs of this seed (their stream hashes differ): not comparable; "
                                f"run both arms with the same data, schedule and batch")
            for part in ("domain", "general"):
                if any(not np.array_equal(documents(r, part)[:, 1:], documents(c.first[0], part)[:, 1:]) for r in mine):
                    raise UserError(f"{who} was scored on other documents than {c.names[0]}: use one held-out set for all")
    return c


def checks(c: Curves, dense: list[int], limit: int, cl: int) -> dict[str, tuple[str, str]]:
    """Threats to validity: name -> (pass | fail | not tested, what was found); `limit` and `cl` are the chosen runs."""
    pooled, ours = [r for rows in c.at.values() for r in rows], [r for s in c.seeds for r in c.at[(*c.runs[cl], s)]]
    idle = np.median([r["blocks"]["idle_share"] for r in ours if r.get("blocks")] or [np.nan])
    constant = max((x for r in ours for x in r.get("constant_share", {}).values()), default=np.nan)
    lr, epoch, budget = c.field("lr_mult").mean(1), c.field("epoch").max(), c.field("phase_a_tokens")[[limit, cl], 0, 0]
    peak, cooled = lr.max(-1), (lr[:, -1] / lr.max(-1))[[limit, cl]]
    grid = sorted({float(peak[i]) for i in dense if c.runs[i][0] == c.runs[limit][0]})
    fresh, others = all(r.get("confirmatory") and r.get("profile") != "cpu" for r in pooled), len(c.runs) - len(dense)
    found = {                                                                       # what must be known, whether it passes, in words
        "seeds": (1, len(c.seeds) >= MIN_SEEDS, f"{len(c.seeds)} in every run (at least {MIN_SEEDS})"),
        "confirmatory data": (1, fresh, f"{'' if fresh else 'not '}declared on a domain, split and seeds never used for choosing"),
        "exercised isolation": (idle, idle >= MIN_IDLE_SHARE, f"median share of blocks that did not learn {idle:.0%} (at least "
                                f"{MIN_IDLE_SHARE:.0%}){': isolation was not exercised' if idle < MIN_IDLE_SHARE else ''}"),
        "routed tokens": (constant, constant <= MAX_CONSTANT_SHARE,
                          f"{constant:.1%} of scored tokens under the constant choice (at most {MAX_CONSTANT_SHARE:.0%})"),
        "interior dense optimum": (peak[limit], grid[0] < peak[limit] < grid[-1], f"best dense run {c.names[limit]}: learning rate "
                                   f"x{peak[limit]:g} of {', '.join(f'{x:g}' for x in grid)} tried"),
        "cool-down": (cooled, max(cooled) <= COOLED, f"last / highest learning rate: {c.names[limit]} {cooled[0]:.2f}, {c.names[cl]} "
                      f"{cooled[1]:.2f} (at most {COOLED:g})"),
        "unique text": (epoch, epoch <= MAX_EPOCHS, f"{epoch:.2f} epochs of it (at most {MAX_EPOCHS:g})"),
        "equal trials": (1, others <= len(dense), f"{len(dense)} dense, {others} other (arms x recipes; no more than dense)"),
        "same Phase A": (budget, budget[0] == budget[1], f"{budget[0]:,.0f} and {budget[1]:,.0f} tokens"),
        "finished runs": (1, all(rows[-1].get("final") for rows in c.at.values()), "every run must have reached its last milestone")}
    return {name: ("pass" if ok else "fail", text) if np.isfinite(known).all() else ("not tested", "not recorded")
            for name, (known, ok, text) in found.items()}


def number(e: Estimate, m: int = 0, band: bool = False) -> dict[str, float]:
    low, high = (e.band_low, e.band_high) if band else (e.low, e.high)
    return dict(estimate=float(e.mean[m]), low=float(low[m]), high=float(high[m]))


def interval(n: dict) -> str:
    return f"{n['estimate']:+.4f} [{n['low']:+.4f}, {n['high']:+.4f}]".replace("-", "\N{MINUS SIGN}")


def assess(records: list[dict], arm: str = "cl") -> dict:
    """The certificate of a set of records, as it is written to crossover.json; `arm` is the one that is Model-CL."""
    arms = sorted({r["arm"] for r in records})
    if arm not in arms or not any(a.startswith("dense") for a in arms):
        raise UserError(f"a comparison needs a dense arm and {arm}, the records hold {', '.join(arms)}: run evolve with both (or --arm)")
    c = curves(records)
    dense, mine = ([i for i, name in enumerate(c.runs) if ok(name[0])] for ok in (lambda a: a.startswith("dense"), lambda a: a == arm))
    eligible = c.field("epoch")[dense].max(1) <= MAX_EPOCHS
    x = compare(c.val[dense], c.test[dense], c.general[dense], c.val[mine], c.test[mine], c.general[mine], eligible)
    cl, at = mine[x["cl_at"]], np.array(dense)[x["dense_at"]]
    limit, limit_m = dense[x["limit_at"][0]], int(x["limit_at"][1])

    rng, every, one = np.random.default_rng(seed_for(0, "documents")), np.arange(len(c.tokens)), len(c.seeds) == 1

    def resampled(nats: np.ndarray, size: np.ndarray, owner: np.ndarray) -> Callable:
        weights, nats = resample(owner, rng), nats.mean(1)
        return lambda run, milestones: scores(nats[run, milestones], size, owner, weights)      # (B, milestones)

    domain, general = resampled(*c.panel("domain")), resampled(*c.panel("general"))
    lost = lambda run: general(run, [0]) - general(run, [-1])
    draws = dict(d=domain(cl, every) - domain(at, every), beyond=domain(cl, [-1]) - domain(limit, [limit_m]),
                 floor=lost(cl) - lost(at[-1]), start=general(cl, [0]) - general(at[0], [0]))
    x["trend"], draws["trend"] = slope(x["d"]), slope(draws["d"])
    by_documents = {k: over_documents(x[k].mean(0), draws[k]) for k in draws}
    e = by_documents if one else {k: over_seeds(x[k]) for k in draws}
    parts, found = criteria(e["d"], e["beyond"], e["floor"], e["trend"]), checks(c, dense, limit, cl)
    if parts["ahead"] and not one:
        end = number(by_documents["d"], -1)
        found["documents"] = ("pass" if end["low"] > 0 else "fail", f"d at the end over documents: {interval(end)}")
    word, holds, missing = verdict(parts, len(c.seeds), [k for k, (state, _) in found.items() if state != "pass" and k != "seeds"])

    mean, stay = e["d"].mean, lasting(e["d"].mean)
    k = int(stay.argmax())                                                         # the first milestone above for good, 0 if there is none
    numbers = dict(gap=number(e["d"]), crossing=number(e["d"], -1, band=True), limit=number(e["beyond"]), floor=number(e["floor"]))
    drawn = dict(d="mean", d_low="low", d_high="high", band_low="band_low", band_high="band_high")
    out = dict(
        verdict=word, holds=holds, missing=missing, arm=arm, cl=c.names[cl], seeds=c.seeds, tokens=c.tokens.tolist(),
        confirmatory=found["confirmatory data"][0] == found["exercised isolation"][0] == "pass",
        over="documents of one seed" if one else f"{len(c.seeds)} seeds",
        parts={p: dict(name=PARTS[p], state=("open", "pass", "fail")[int(parts[p])], **numbers[p]) for p in PARTS},
        general_start=dict(dense=-c.general[at[0], :, 0].mean(), cl=-c.general[cl, :, 0].mean(), **number(e["start"])),
        crossing_tokens=float(np.interp(0, mean[k - 1:k + 1], c.tokens[k - 1:k + 1])) if k else None,
        crossing_between=c.tokens[k - 1:k + 1].tolist() if k else None, above_from_start=bool(stay[0]),
        censored_after_tokens=None if stay.any() else int(c.tokens[-1]),
        dense_limit=dict(run=c.names[limit], milestone=limit_m, bpb=float(-c.test[limit, :, limit_m].mean())),
        curves={key: getattr(e["d"], attribute).tolist() for key, attribute in drawn.items()} | dict(
            cl_bpb=(-c.test[cl].mean(0)).tolist(), dense_run=[c.names[i] for i in at], dense_bpb=(-c.test[at, :, every].mean(1)).tolist()),
        checks={key: dict(state=state, found=text) for key, (state, text) in found.items()})
    return out | dict(sentence=sentence(out))


def sentence(v: dict) -> str:
    """The verdict in one sentence with its numbers."""
    tokens, at = f"{v['tokens'][-1] / 1e6:.2f}M tokens", v["crossing_tokens"]
    what = (f"{v['arm']} is above the dense curve from the first milestone on, so there is nothing to cross" if v["above_from_start"] else
            f"{v['arm']} passes the dense curve at {at / 1e6:.2f}M of {tokens}" if at else f"no crossing observed within {tokens}")
    text = (f"{v['verdict']}: {what}; at the end d = {interval(v['parts']['crossing'])} bpb, against the dense limit "
            f"{interval(v['parts']['limit'])} bpb, general loss beyond dense's {interval(v['parts']['floor'])} bpb "
            f"(95 %, over {v['over']}; d > 0: {v['arm']} is better)")
    text += f"; what holds: {', '.join(v['holds'])}" if v["holds"] else ""
    return text + (f"; still needed: {', '.join(v['missing'])}." if v["missing"] else ".")


def certify(run_dirs: list[str], arm: str = "cl") -> dict:
    """Assess the runs and write crossover.json to the first of them."""
    out = assess(load(run_dirs), arm)
    paths = [Path(d).resolve() / "records.jsonl" for d in run_dirs]
    out["inputs"] = {f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    files.write_json(Path(run_dirs[0]) / "crossover.json", out)
    return out


def parse(argv: list[str] | None = None, module: str = "nanochat_cl.crossover", doc: str = __doc__) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog=f"python -m {module}", description=doc.strip().splitlines()[0])
    p.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="directories with records.jsonl; several are pooled (seeds, recipes)")
    p.add_argument("--arm", default="cl", help="which arm is Model-CL (default: %(default)s)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    v = certify(args.run_dirs, args.arm)
    print("\n".join(f"{part['name']:<24}{part['state']:<12}{interval(part)} bpb" for part in v["parts"].values()))
    print("\n".join(f"{name:<24}{check['state']:<12}{check['found']}" for name, check in v["checks"].items()))
    print(f"{v['sentence']}\nhow often that errs, and finds what is there, with {len(v['seeds'])} seed(s): runs/results/simulations.md\n"
          f"wrote {Path(args.run_dirs[0]) / 'crossover.json'}; next: python -m nanochat_cl.report {' '.join(args.run_dirs)}")


if __name__ == "__main__":
    run(main)

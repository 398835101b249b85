"""
False positives and power of the certificate (nanochat_cl.crossover) on simulated runs whose truth is known.

    python runs/simulations.py > runs/results/simulations.md      about a minute
"""
# N simulated runs, R recipes, S seeds, M milestones
import argparse
from dataclasses import dataclass

import numpy as np

from nanochat_cl.crossover import FLOOR_BPB, PARTS, compare, criteria, verdict
from nanochat_cl.estimates import over_seeds
from nanochat_cl.seeds import seed_for

VERDICTS = ("SUPPORTED", "PARTLY", "DOMINATES", "NOT SUPPORTED", "INCONCLUSIVE")


@dataclass(frozen=True)
class Family:
    """A true state of the world: advantage of Model-CL on top of a dense curve, number of recipes of both, general loss beyond dense's."""
    name: str
    false: str                          # the part that is not true here; "" where all are: then the rate is power
    advantage: tuple[float, ...]        # at the start, 1/4, 1/2, 3/4 and the end of the run
    recipes: tuple[int, int] = (1, 1)   # of Model-CL, of dense
    dense_falls: float = 0.0            # what the dense curve loses in the last quarter
    floor: float = -0.02


TOUCHES, CROSSES = (-.03, -.015, 0, 0, 0), (-.03, -.01, .01, .02, .02)
FAMILIES = (
    Family("equal", "crossing", (0,) * 5),
    Family("parallel, below", "crossing", (-.03,) * 5),
    Family("ends at d = 0, from below", "crossing", TOUCHES),
    Family("ends exactly at the limit", "limit", (-.03, 0, .01, .02, .03), dense_falls=.03),
    Family("general loss at the margin", "floor", CROSSES, floor=FLOOR_BPB),
    Family("ends at d = 0, best of 8 against best of 8", "crossing", TOUCHES, (8, 8)),
    Family("ends at d = 0, best of 8 against 1 (verdict barred: trials)", "crossing", TOUCHES, (8, 1)),
    Family("true crossing, +0.01 at the end", "", (-.03, -.01, .01, .01, .01)),
    Family("true crossing, +0.02 at the end", "", CROSSES),
    Family("late crossing, in the last quarter", "", (-.03, -.02, -.01, .005, .02)),
    Family("true crossing, +0.02, best of 8 against best of 8", "", CROSSES, (8, 8)))


def simulate(family: Family, sims: int, seeds: int, rng: np.random.Generator, sd: float, milestones: int = 9, memory: float = 0.8) -> dict:
    """
    Arguments of `compare` for `sims` runs. Per recipe and seed the score wanders as AR(1), s.d. `sd` bpb, `memory` from milestone to
    milestone; val and test share it (same weights) and differ by a third of it (other documents).
    """
    t, out = np.linspace(0, 1, milestones), {}
    quarters = lambda values: np.interp(t, np.linspace(0, 1, 5), values)
    cl, dense = (family.recipes[0], quarters(family.advantage), .05 + family.floor), (family.recipes[1], 0, .05)
    for side, (recipes, truth, loss) in dict(cl=cl, dense=dense).items():
        def noise():
            z = rng.standard_normal((sims, recipes, seeds, milestones))
            for m in range(1, milestones):
                z[..., m] = memory * z[..., m - 1] + np.sqrt(1 - memory**2) * z[..., m]
            return sd * z
        level = quarters((-1.6, -1.4, -1.3, -1.2, -1.2 - family.dense_falls)) + truth + noise()
        out |= {f"{side}_val": level + noise() / 3, f"{side}_test": level + noise() / 3, f"{side}_general": noise() - loss * t}
    return out


def rates(family: Family, seeds: int, sd: float, sims: int = 2000) -> dict[str, float]:
    """How often each part passes and each verdict is given, in `sims` simulated runs that pass every check they can."""
    rng = np.random.default_rng(seed_for(0, f"simulate/{family.name}/{seeds}/{sd}"))
    x = compare(**simulate(family, sims, seeds, rng, sd))
    parts = criteria(*(over_seeds(x[name]) for name in ("d", "beyond", "floor", "trend")))
    failed = ["equal trials"] if family.recipes[0] > family.recipes[1] else []
    words = [verdict({k: v[i] for k, v in parts.items()}, seeds, failed)[0] for i in range(sims)]
    return {p: float((parts[p] > 0).mean()) for p in PARTS} | {w: words.count(w) / sims for w in VERDICTS}


def rates_of_growing(family: Family, sd: float, sims: int = 2000, most: int = 10) -> list[float]:
    """How often SUPPORTED has been said by 3, 4, .. `most` seeds, where seeds are added while the certificate asks for them."""
    drawn = simulate(family, sims, most, np.random.default_rng(seed_for(0, f"growing/{family.name}/{sd}")), sd)
    said, goes_on, shares = np.zeros(sims, bool), np.ones(sims, bool), []
    for seeds in range(3, most + 1):
        x = compare(**{name: scores[:, :, :seeds] for name, scores in drawn.items()})
        parts = criteria(*(over_seeds(x[name]) for name in ("d", "beyond", "floor", "trend")))
        for i in np.flatnonzero(goes_on):
            word, _, missing = verdict({k: v[i] for k, v in parts.items()}, seeds)
            said[i], goes_on[i] = word == "SUPPORTED", word != "SUPPORTED" and "seeds" in missing
        shares.append(float(said.mean()))
    return shares


def power_table(sims: int, seed_counts=(2, 3, 4, 5, 6, 8, 10), sds=(0.001, 0.003)) -> str:
    """Markdown: how often a part that is not true passes, and how often SUPPORTED is said, per number of seeds."""
    lines = [f"# False positives and power of the certificate\n\n"
             f"    python runs/simulations.py --sims {sims} > runs/results/simulations.md\n\n"
             f"{sims:,} simulated runs a cell, 9 milestones, AR(1) noise (0.8) between them. Claimed error 2.5 %, accepted 5 %.\n"
             "One seed never decides, two are never enough for SUPPORTED or NOT SUPPORTED.\n"
             "Where a part is false its rate is the false positives, else power."]
    for sd in sds:
        lines += [f"\n## Seed-to-seed s.d. {sd:g} bpb of each arm\n", "|---|---|" + "---:|" * len(seed_counts)]
        lines.insert(-1, "| true state | how often | " + " | ".join(f"{s} seeds" for s in seed_counts) + " |")
        for f in FAMILIES:
            got = [rates(f, s, sd, sims) for s in seed_counts]
            part = f.false or "crossing"
            for key, what in ((part, f"{'false' if f.false else 'true'}: {PARTS[part]}"), ("SUPPORTED", "SUPPORTED")):
                lines.append(f"| {f.name} | {what} | " + " | ".join(f"{g[key]:.1%}" for g in got) + " |")
    lines += ["\n## Seeds added while the certificate asks for them\n\nHow often SUPPORTED has been said by so many seeds, where one part is just not "
              "true. Looks add up: decide on\nthe number of seeds beforehand.\n", "| true state | s.d. | " + " | ".join(f"{s}" for s in range(3, 11)) + " |",
              "|---|---|" + "---:|" * 8]
    for f in (family for family in FAMILIES if family.false == "floor" or "limit" in family.name):
        lines += [f"| {f.name} | {sd:g} | " + " | ".join(f"{x:.1%}" for x in rates_of_growing(f, sd, sims)) + " |" for sd in sds]
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python runs/simulations.py", description=__doc__.strip().splitlines()[0])
    p.add_argument("--sims", type=int, default=2000, help="simulated runs per cell (default: %(default)s)")
    return p.parse_args(argv)


if __name__ == "__main__":
    print(power_table(parse().sims))

"""
The numbers of continual learning. Scores are -bpb: higher is better. A sub-domain's column is j, in the order of the first visits.

R[i, j]: score on j after visit i (T x T).  A[t, j]: score on j at milestone t, the first row is the Phase A model.
b[j]: score of the Phase A model.  a[j]: of a reference model, trained on j alone or on all at once.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

from nanochat_cl import probes

RESAMPLES = 2000  # of `units`, for the interval of selectivity


def after_visits(R: np.ndarray, b: np.ndarray, a: np.ndarray | None = None) -> dict[str, float]:
    """Metrics of the visit matrix, T >= 2, with one more row where the run went on: its end; `intransigence` needs a reference."""
    learned = np.diag(R)
    values = {
        "acc": R[-1].mean(),                                # Lopez-Paz & Ranzato 2017
        "bwt": (R[-1] - learned)[:-1].mean(),               # same: what has changed since the own visit
        "fwt": (np.diag(R, 1) - b[1:]).mean(),              # same: what earlier visits had given just before the own one
        "forgetting": (R[:-1].max(0) - R[-1])[:-1].mean(),  # Chaudhry 2018: best of the *earlier* rows - last row, without the last column
        "learning_accuracy": learned.mean(),                # Riemer 2019: right after the own visit
    }
    if a is not None:
        values["intransigence"] = (a - learned).mean()      # Chaudhry 2018, mean over k: what the reference does better at its learning
    return {name: float(value) for name, value in values.items()}


def over_milestones(A: np.ndarray, ends: list[int]) -> dict[str, float]:
    """Metrics of the curves, two or more sub-domains; ends[j] is the milestone that ends the first visit to j."""
    worst = float(np.mean([A[end:, j].min() for j, end in enumerate(ends[:-1])]))
    return {"average_anytime": float(A.mean(1).mean()),     # Caccia 2022: mean over milestones of ACC(t), over all sub-domains
            "min_acc": worst,                               # De Lange 2023: worst score since the own visit, all but the last
            "wc_acc": float(A[-1, -1] / len(ends) + (1 - 1 / len(ends)) * worst)}  # same: 1/k of the last one's score, the rest worst case


def stability_gap(tokens: np.ndarray, m: np.ndarray) -> tuple[float, float]:
    """Depth m[0] - min m, and tokens until the score is back at m[0] after the first dip: (0, 0) without a dip, infinite if it never is."""
    below = m < m[0]
    back = np.flatnonzero(~below & np.maximum.accumulate(below)) if below.any() else [0]
    return float(m[0] - m.min()), float(tokens[back[0]] - tokens[0]) if len(back) else math.inf


def reached(m: np.ndarray, target: float) -> float:
    """Where the scores m (M,) first come to `target`: an index, between two milestones by linear interpolation; nan if they never do."""
    k = int(np.argmax(m >= target))  # 0 where none does, too
    if m[k] < target:
        return math.nan
    return float(k - (m[k] - target) / (m[k] - m[k - 1])) if k else 0.0


def units(row: dict, group: str, kind: str) -> np.ndarray:
    """(n, 2): bits per byte of the right choice, and whether it was the likeliest, by item; twins, which share their words, are one."""
    items = np.array(row[group][kind]["items"], float)
    return items.reshape(-1, 2, 2).mean(1) if kind in probes.KINDS else items


def forgotten(rows: list[dict], at: float, group: str) -> np.ndarray:
    """Bits per byte of the right choice that `units` of facts or floor have lost from rows[0] to rows[at], interpolated as in `reached`."""
    each = lambda r: np.concatenate([units(r, group, kind)[:, 0] for kind in sorted(rows[0][group])])
    a, b = each(rows[int(at)]), each(rows[math.ceil(at)])
    return a + (at - int(at)) * (b - a) - each(rows[0])


def selectivity(facts: np.ndarray, floor: np.ndarray) -> tuple[float, float, float]:
    """
    Facts lost / floor lost, of what each unit lost, and its 95 % bootstrap interval over units. 0 if no facts were lost; infinite if
    facts were and the floor was not.
    """
    r = np.random.default_rng(0)
    means = [[x.mean(), *(r.choice(x, len(x)).mean() for _ in range(RESAMPLES))] for x in (facts, floor)]
    ratios = [0.0 if facts <= 0 else float(facts / floor) if floor > 0 else math.inf for facts, floor in zip(*means)]
    low, high = map(float, np.quantile(ratios[1:], [0.025, 0.975], method="nearest"))
    return ratios[0], low, high


# --- plasticity

def dormant_share(activity: np.ndarray, tau: float) -> float:
    """Share of units whose activity, mean |h| (units,), is at most `tau` of the layer's average (ReDo)."""
    return float((activity <= tau * activity.mean()).mean())


def effective_rank(sigma: np.ndarray) -> float:
    """exp of the entropy of normalised singular values (Roy & Vetterli); 0 for the zero matrix."""
    p = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-(p * np.log(p)).sum())) if len(p) else 0.0


def stable_rank(sigma: np.ndarray) -> int:
    """The least number of largest singular values that hold 99 % of their sum (Dohare et al. 2024); 0 for the zero matrix."""
    total = np.cumsum(np.sort(sigma)[::-1])
    return int(np.searchsorted(total, 0.99 * total[-1]) + 1) if sigma.any() else 0


@torch.no_grad()
def change(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, float]:
    """{group of weights: |after - before| / |before|} (Frobenius): with one step between them the update/weight ratio."""
    norms: dict[str, tuple[float, float]] = {}  # squares of |after - before| and |before|
    for name, w in after.items():
        group = next((part for part in ("attn", "mlp", "value_embeds", "wte", "lm_head") if part in name), "scalars")
        if w.is_floating_point():
            then, now = before[name].to(w).float(), w.float()
            moved, size = norms.get(group, (0.0, 0.0))
            norms[group] = moved + (now - then).square().sum().item(), size + then.square().sum().item()
    return {group: float(np.sqrt(np.divide(moved, size))) for group, (moved, size) in norms.items()}


@torch.no_grad()
def unmoved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], start: int, stop: int | None = None) -> float:
    """Share of (layer, block) pairs that are what they were, bit for bit, among the blocks `start` to `stop` of each layer."""
    same = {name: (before[name].to(w) == w)[start:stop].flatten(1).all(1) for name, w in after.items()
            if name.endswith(("mlp.c_fc.weight", "mlp.c_proj.weight"))}
    return torch.cat([x & same[name.replace("c_fc", "c_proj")] for name, x in same.items() if "c_fc" in name]).float().mean().item()


@torch.no_grad()
def plasticity(model: torch.nn.Module, x: torch.Tensor) -> dict[str, float]:
    """
    For inputs x (B, T): share of dormant MLP units, for three tau, and of units active on < 1 % of the inputs, means over layers; ranks
    of the residual stream after the last layer; mean |w| of all layers. Of a block-sparse MLP (G, b, n) every unit is looked at as if
    its block were on. Leaves the eval mode on.
    """
    layers, inputs, last = list(model.transformer.h), [], []
    take = lambda mlp, args, named: inputs.append([*args, *named.values()][0].flatten(0, 1).float())
    hooks = [layer.mlp.register_forward_pre_hook(take, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(lambda layer, args, output: last.append(output.flatten(0, 1).double().cpu())))
    model.eval()
    model(x)
    for hook in hooks:
        hook.remove()
    activity, inactive = [], []
    for layer, value in zip(layers, inputs):
        hidden = F.relu(value @ layer.mlp.c_fc.weight.float().flatten(0, -2).T).square()
        activity.append(hidden.mean(0).cpu().numpy())
        inactive.append(((hidden > 0).float().mean(0) < 0.01).float().mean().item())
    sigma = torch.linalg.svdvals(last[0]).numpy()
    weights = [p.float().abs() for layer in layers for p in layer.parameters()]
    return {**{f"dormant_{tau}": float(np.mean([dormant_share(a, tau) for a in activity])) for tau in (0.0, 0.025, 0.1)},
            "inactive": float(np.mean(inactive)), "effective_rank": effective_rank(sigma), "stable_rank": stable_rank(sigma),
            "mean_abs_weight": float(sum(w.sum() for w in weights) / sum(w.numel() for w in weights))}


# --- from the records of records.jsonl

def continual(rows: list[dict], split: str) -> dict[str, float]:
    """
    Every metric of one run, from its records by milestone; empty before two sub-domains were seen. A first visit ends at the last
    milestone before the next new sub-domain shows up in `seen`; where several begin between two milestones they share one. The last one's
    ends where the stream leaves it. What is left of all is seen at the end of the run.
    """
    order = list(dict.fromkeys(s for r in rows for s in r["seen"]))
    if len(order) < 2:
        return {}
    A = np.array([[-r["domain"][split]["subdomains"][s]["bpb"] for s in order] for r in rows])
    begun = [next(t for t, r in enumerate(rows) if s in r["seen"]) for s in order]
    left = next((t for t in range(begun[-1] + 1, len(rows)) if rows[t].get("subdomain") != order[-1]), len(rows))
    ends = [max(begin, after - 1) for begin, after in zip(begun, [*begun[1:], left])]
    depth, width = stability_gap(np.array([r["tokens"] for r in rows]), A.mean(1))
    visits = [*ends, len(rows) - 1] if left < len(rows) else ends  # where the last one was left, the end of the run is one row more
    return {**after_visits(A[visits], A[0]), **over_milestones(A, ends), "gap_depth_bpb": depth, "gap_width_tokens": width}


def light_share(records: list[dict]) -> float:
    """Time of the light tier's evaluations over that of the training before each; 0 before there are any. Records as evolve orders them."""
    pairs = [(a, b) for a, b in zip(records, records[len({r["arm"] for r in records}):]) if b.get("tier") == "light"]
    spent, trained = (sum(b[key] - a[key] for a, b in pairs) for key in ("eval_s", "train_s"))
    return spent / trained if trained else 0.0

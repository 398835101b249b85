"""
The pictures of the report, drawn for print: arms differ by line and marker as well as by colour, every axis has its unit.

crossover, floor, recipes, matrix and blocks take the `Curves` of the records and `shown`, the indices of the compared runs (dense first;
one where there is one arm), and return a figure, or None where nothing was measured; their docstrings are the captions. To be called, and
saved, under `matplotlib.rc_context(LOOK)`.
"""
# R runs (arm, recipe), S seeds, M milestones
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nanochat_cl.curves import Curves, forgotten
from nanochat_cl.validity import MIN_IDLE_SHARE

NAMED = 6  # runs of which each has a name in the legend
INK, RED, GREY = "#1f2933", "#b3361b", "#7b8794"
MINUS = "\N{MINUS SIGN}"
LOOK = {"font.size": 10, "font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY,
        "axes.grid": True, "grid.color": "#e4e7eb", "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "legend.frameon": False, "legend.fontsize": 9, "legend.handlelength": 3, "svg.hashsalt": "nanochat_cl",
        "figure.constrained_layout.use": True}
AXES = {"tokens": ("tokens", 1e6, "Phase B tokens (millions)"), "flops": ("flops", 1, "Phase B training FLOPs"),
        "time": ("train_s", 60, "Phase B training time (minutes)")}  # field of a record, unit, label


def lines(ax: Axes, c: Curves, shown: list[int], x: Sequence, y: Sequence) -> None:
    """One line per run, x (R, M) and y (R, M); the compared ones stand out."""
    crowd = [i for i in range(len(c.runs)) if i not in shown] if len(c.runs) > NAMED else []  # too many to name each
    for i in range(len(c.runs)):
        look = dict(color=GREY, ls=("-.", ":")[i % 2], marker="vD^x+*P"[i % 7], lw=1, ms=4, zorder=2)
        if i in shown:
            k = shown.index(i)
            look = dict(color=(INK, RED)[k], ls=("-", "--")[k], marker="os"[k], lw=1.8, ms=4.5, zorder=3)
        known = np.isfinite(y[i])
        label = c.labels[i] if i in shown or not crowd else f"{len(crowd)} other runs" if i == crowd[0] else None
        ax.plot(np.asarray(x[i])[known], np.asarray(y[i])[known], label=label, **look)


def crossover(c: Curves, shown: list[int], v: dict | None, axis: str = "tokens") -> Figure | None:
    """Score on held-out domain documents, mean over sub-domains and seeds; below, over tokens, Model-CL's advantage on the dense curve."""
    field, unit, text = AXES[axis]
    x = c.field(field).mean(1) / unit                             # (R, M)
    if not np.isfinite(x).all():
        return None
    two = v is not None and axis == "tokens"
    fig = Figure(figsize=(7, 6 if two else 3.7))
    top, *rest = fig.subplots(1 + two, 1, sharex=True, squeeze=False, height_ratios=(3, 2)[:1 + two])[:, 0]
    lines(top, c, shown, x, -c.test.mean(1))
    if v:
        top.axhline(v["dense_limit"]["bpb"], color=INK, ls=(0, (1, 2)), lw=1.2, label=f"dense limit ({c.labels[c.names.index(v['dense_limit']['run'])]})")
    top.set(ylabel="domain bits per byte, test\n(lower is better)")
    top.legend()
    for low in rest:
        t, curve = c.tokens / unit, v["curves"]
        low.axhline(0, color=INK, lw=1)
        low.fill_between(t, curve["band_low"], curve["band_high"], color=RED, alpha=.12, lw=0, label="95 % simultaneous")
        low.fill_between(t, curve["d_low"], curve["d_high"], color=RED, alpha=.25, lw=0, label="95 % pointwise")
        low.plot(t, np.stack([curve["band_low"], curve["band_high"]], 1), color=RED, lw=.6, ls=":")
        low.plot(t, curve["d"], color=RED, ls="--", marker="s", ms=4.5, lw=1.8)
        if v["crossing_tokens"]:
            low.axvline(v["crossing_tokens"] / unit, color=INK, lw=.8, ls="-.", label=f"crossing, {v['crossing_tokens'] / unit:.2f}M")
        low.set(title=f"advantage of {v['arm']}, over {v['over']}", ylabel="d (bits per byte)\n(above 0: better)")
        low.margins(y=.15)
        low.legend(ncols=3)
    (top, *rest)[-1].set_xlabel(text)
    return fig


def probes(c: Curves, group: str, key: str) -> dict[str, np.ndarray]:
    """One number of every probe of a group (R, M), mean over seeds; nan at milestones that do not ask it."""
    names = sorted({p for rows in c.at.values() for r in rows for p in r.get(group) or {}})
    return {p: c.stack(lambda r: ((r.get(group) or {}).get(p) or {}).get(key, np.nan)).mean(1) for p in names}


def centred(c: Curves, group: str) -> dict[str, np.ndarray]:
    """Accuracy of `probes` on a scale where chance is 0 and 1 perfect."""
    chance = probes(c, group, "chance")
    return {p: (accuracy - chance[p]) / (1 - chance[p]) for p, accuracy in probes(c, group, "accuracy").items()}


def recalled(c: Curves, run: int) -> dict[float, float]:
    """Age of a passage in millions of tokens -> bits per byte that are left of it at the last milestone, mean over passages and seeds."""
    windows = [w for s in c.seeds for w in (c.at[(*c.runs[run], s)][-1].get("recall") or {}).get("windows", [])]
    ages = sorted({w["age_tokens"] for w in windows})
    return {age / 1e6: np.mean([w["recall_bpb"] for w in windows if w["age_tokens"] == age]) for age in ages}


def floor(c: Curves, shown: list[int]) -> Figure:
    """
    Held-out general text; the mean of the made-up probes, chance being 0; what is left of passages that the stream has shown, beyond
    the gain on held-out passages of the same sub-domain; right answers to questions of fact, which may be forgotten.
    """
    fig = Figure(figsize=(7, 6))
    (text, nonce), (recall, facts) = fig.subplots(2, 2)
    tokens = [c.tokens / 1e6] * len(c.runs)
    lines(text, c, shown, tokens, forgotten(c.general).mean(1))
    text.set(title="general text", xlabel="tokens (millions)", ylabel="bits per byte lost, test\n(lower is better)")
    fig.legend(*text.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    if asked := [x for x in centred(c, "floor").values() if np.isfinite(x).all()]:  # at every milestone
        lines(nonce, c, shown, tokens, 100 * np.mean(asked, 0))
    nonce.set(title=f"floor: mean of {len(asked)} probes" if asked else "floor probes: not measured", xlabel="tokens (millions)",
              ylabel="centred accuracy (%)\n(0: chance)")
    left = [recalled(c, i) for i in range(len(c.runs))]
    lines(recall, c, shown, [list(ages) for ages in left], [list(ages.values()) for ages in left])
    recall.set(title="recall at the end" if any(left) else "recall: not measured", xlabel="age of the passage (million tokens)",
               ylabel="bits per byte gained\nbeyond held-out text")
    if known := list(probes(c, "facts", "gold_bpb").values()):
        lines(facts, c, shown, tokens, np.mean([x - x[:, :1] for x in known], 0))
    facts.set(title=f"facts, {len(known)} test{'s' * (len(known) > 1)}" if known else "facts: not measured", xlabel="tokens (millions)",
              ylabel="bits per byte of the right\nanswer lost (lower is better)")
    for ax in (text, nonce, recall, facts):
        ax.axhline(0, color=INK, lw=.8)
        ax.locator_params("x", nbins=5)
    return fig


def recipes(c: Curves, shown: list[int]) -> Figure:
    """
    Every run, mean over seeds. Left, what it forgot for what it learned: the compared ones by milestone, the others at the end; stepped,
    the front that no run beats in both. Right, the sweep: best val score of an arm at a learning rate, ringed its optimum.
    """
    fig = Figure(figsize=(7, 3.6))
    pareto, sweep = fig.subplots(1, 2)
    part = [slice(None) if i in shown else slice(-1, None) for i in range(len(c.runs))]
    bpb, lost = ([x[s] for x, s in zip(each.mean(1), part)] for each in (-c.test, forgotten(c.general)))
    lines(pareto, c, shown, bpb, lost)
    points = sorted(zip(np.concatenate(bpb), np.concatenate(lost)))
    front = [p for k, p in enumerate(points) if p[1] < min((q[1] for q in points[:k]), default=np.inf)]
    pareto.invert_xaxis()
    pareto.step(*zip(*front), where="post", color=INK, lw=.8, ls=":", label="front")
    pareto.axhline(0, color=INK, lw=.8)
    pareto.set(title="forgetting for learning", xlabel="domain bits per byte, test",
               ylabel="general bits per byte lost\n(low right is better)")
    fig.legend(*pareto.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    found: dict[str, dict[float, float]] = {}  # arm -> peak learning rate -> score
    for (arm, _), rate, score in zip(c.runs, c.field("lr_mult").mean(1).max(-1), -c.val.mean(1).max(-1)):
        if np.isfinite(rate):
            found.setdefault(arm, {})[rate] = min(score, found.get(arm, {}).get(rate, np.inf))
    for k, (arm, at) in enumerate(found.items()):
        look = ("o-", "s--", "D-.", "^:", "v-")[k % 5]
        color = INK if arm == "dense" else GREY if arm.startswith("dense") else RED
        sweep.plot(*zip(*sorted(at.items())), look, ms=4.5, color=color, label=arm)
        if len(at) > 1:
            sweep.plot(low := min(at, key=at.get), at[low], "o", ms=12, mfc="none", mec=INK)
    ticks = sorted({rate for at in found.values() for rate in at})
    sweep.set(title="learning rates" if len(ticks) > 1 else "learning rates: not swept", xlabel="learning rate (times Phase A's)",
              ylabel="domain bits per byte,\nbest on val", xscale="log" if len(ticks) > 1 and ticks[0] > 0 else "linear")
    sweep.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
    sweep.minorticks_off()
    if found:
        sweep.legend()
    return fig


def matrix(c: Curves, shown: list[int]) -> Figure:
    """Bits per byte gained since Phase A; a red frame marks the sub-domain trained on last; a column that fades downwards is forgetting."""
    names = list(c.first[0]["domain"]["test"]["subdomains"])
    bpb = c.stack(lambda r: [r["domain"]["test"]["subdomains"][name]["bpb"] for name in names]).mean(1)[shown]     # (shown, M, sub-domains)
    gains = bpb[:, :1] - bpb
    fig = Figure(figsize=(7, min(8, 1.9 + .24 * len(c.tokens))))
    axes = fig.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for ax, i, gain in zip(axes, shown, gains):
        image = ax.imshow(gain, aspect="auto", cmap="Greys", vmin=min(0, np.min(gains)), vmax=np.max(gains) * 1.15 + 1e-9)
        for m, j in np.ndindex(gain.shape) if gain.size <= 200 else ():
            ax.text(j, m, f"{gain[m, j]:.2f}", ha="center", va="center", fontsize=7,
                    color="white" if image.norm(gain[m, j]) > .55 else INK)
        for m, r in enumerate(c.at[(*c.runs[i], c.seeds[0])]):
            if r.get("subdomain") in names:
                ax.add_patch(Rectangle((names.index(r["subdomain"]) - .5, m - .5), 1, 1, fill=False, ec=RED, lw=1.4))
        ax.grid(False)
        ax.set_xticks(range(len(names)), [name if len(name) <= 24 else name[:23] + "\N{HORIZONTAL ELLIPSIS}" for name in names],
                      **(dict(rotation=90, fontsize=6) if len(names) > 12 else dict(rotation=45, ha="right", fontsize=8)))
        ax.set_title(c.labels[i])
    step = -(-len(c.tokens) // 12)
    axes[0].set_yticks(range(0, len(c.tokens), step), [f"{t / 1e6:.2f}" for t in c.tokens[::step]])
    axes[0].set_ylabel(AXES["tokens"][2])
    fig.colorbar(image, ax=axes, label="bits per byte gained, test", shrink=.8)
    return fig


def blocks(c: Curves, shown: list[int]) -> Figure | None:
    """
    Use of the routed blocks per layer since the last milestone; shares of blocks that a step leaves as they are, and that have not moved by
    one bit since Phase A.
    """
    rows = [r for r in c.at[(*c.runs[shown[-1]], c.seeds[0])] if r.get("blocks")]
    if not rows:
        return None
    use = np.array(rows[-1]["blocks"]["use"], float)
    fig = Figure(figsize=(7, 2.9))
    left, right = fig.subplots(1, 2, width_ratios=(3, 2))
    image = left.imshow(100 * use, aspect="auto", cmap="Greys", vmin=0)
    left.grid(False)
    left.set(xlabel="routed block", ylabel="layer", title=f"use at the end, seed {c.seeds[0]}")
    left.set_yticks(range(0, len(use), -(-len(use) // 8)))
    fig.colorbar(image, ax=left, label="share of use (%)")
    for key, label, look, color in (("idle_share", "in a step", "s--", RED), ("unmoved", "since Phase A", "o-", INK)):
        at = [(r["tokens"] / 1e6, 100 * r["blocks"][key]) for r in rows if key in r["blocks"]]
        right.plot(*np.reshape(at, (-1, 2)).T, look, color=color, ms=4, label=label)
    right.axhline(100 * MIN_IDLE_SHARE, color=INK, ls=":", lw=1)
    right.set(xlabel="tokens (millions)", ylabel="% (dotted: needed in a step)", title="blocks that did not learn", ylim=(0, 100))
    right.legend()
    return fig

"""Every line, band and cell of the pictures is the number that its legend names."""
import numpy as np
import pytest

import synthetic
from nanochat_cl import crossover, curves, figures


def test_pictures_show_what_they_say():
    rows = synthetic.records(milestones=5)
    c = curves.paired(rows)
    v = crossover.assess(rows)
    top, low = figures.crossover(c, [0, 1], v).axes
    for i, name in enumerate(("dense", "cl")):
        (line,) = [line for line in top.lines if line.get_label() == name]
        np.testing.assert_allclose(line.get_ydata(), -c.test[i, 0])
        np.testing.assert_allclose(line.get_xdata(), c.tokens / 1e6)
    drawn = {band.get_label(): band.get_paths()[0].vertices for band in low.collections}
    for label, key in (("95 % simultaneous", "band"), ("95 % pointwise", "d")):
        ys = drawn[label][:, 1]
        assert (ys.min(), ys.max()) == pytest.approx((min(v["curves"][f"{key}_low"]), max(v["curves"][f"{key}_high"]))), label
    text, nonce, recalled, facts = figures.floor(c, [0, 1]).axes
    named = lambda ax: {line.get_label(): line.get_ydata() for line in ax.lines}
    for i, name in enumerate(("dense", "cl")):
        np.testing.assert_allclose(named(text)[name], c.general[i, 0, 0] - c.general[i, 0])
        at = c.at[(*c.runs[i], 42)]
        asked = [r["facts"]["cloze"]["gold_bpb"] for r in at if "facts" in r]
        np.testing.assert_allclose(named(facts)[name], np.array(asked) - asked[0])
        windows = {w["age_tokens"] / 1e6: w["recall_bpb"] for w in at[-1]["recall"]["windows"]}
        np.testing.assert_allclose(named(recalled)[name], [windows[age] for age in sorted(windows)])
        centred = [np.mean([(r["floor"][p]["accuracy"] - .5) / .5 for p in synthetic.PROBES]) for r in at]
        np.testing.assert_allclose(named(nonce)[name], 100 * np.array(centred))
    pareto = figures.recipes(c, [0, 1]).axes[0]
    for i, name in enumerate(("dense", "cl")):
        np.testing.assert_allclose(named(pareto)[name], c.general[i, 0, 0] - c.general[i, 0])
        (line,) = [line for line in pareto.lines if line.get_label() == name]
        np.testing.assert_allclose(line.get_xdata(), -c.test[i, 0])
    *panels, _ = figures.matrix(c, [0, 1]).axes
    for i, ax in enumerate(panels):
        bpb = np.array([[r["domain"]["test"]["subdomains"][s]["bpb"] for s in synthetic.SUBDOMAINS] for r in c.at[(*c.runs[i], 42)]])
        assert ax.get_title() == c.labels[i]
        np.testing.assert_allclose(ax.images[0].get_array(), bpb[0] - bpb)
    right = figures.blocks(c, [0, 1]).axes[1]
    at = [r for r in c.at["cl", "default", 42] if r["blocks"]]
    np.testing.assert_allclose(named(right)["in a step"], [100 * r["blocks"]["idle_share"] for r in at])
    np.testing.assert_allclose(named(right)["since Phase A"], [100 * r["blocks"]["unmoved"] for r in at if "unmoved" in r["blocks"]])

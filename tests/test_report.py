import json
import re
from html import unescape

import numpy as np
import pytest
from PIL import Image

import synthetic
from nanochat_cl import crossover, curves, figures, metrics, report

CONFIG = dict(run="synthetic", argv=["python", "-m", "nanochat_cl.evolve", "--arms", "dense,cl"], profile="cpu", seed=42, commit="0123abc",
              arms=dict(dense=dict(cl=None, depth=4), cl=dict(cl=dict(blocks=16), depth=4)))
SAMPLES = [dict(arm=arm, when=when, prompt="import numpy", text=f"<script>alert('{arm} {when}')</script>")
           for arm in ("dense", "cl") for when in ("before", "after")]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A one-seed run with everything there; (folder, page)."""
    folder = synthetic.write(tmp_path_factory.mktemp("full") / "run", synthetic.records(), config=CONFIG, samples=SAMPLES)
    report.main([str(folder)])
    return folder, (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Two seeds in two folders, without any optional part and no configuration; (first folder, page)."""
    folders = []
    for seed in (1, 2):
        rows = synthetic.records(seeds=(seed,), milestones=5)
        for r in rows:
            for key in ("blocks", "floor", "facts", "plasticity", "update_ratio", "tier", "recall", "constant_share", "lr_mult", "train_s",
                        "update_s", "data_s", "eval_s", "checkpoint_s", "flops", "subdomain"):
                r.pop(key, None)
        folders.append(synthetic.write(tmp_path_factory.mktemp("bare") / f"run{seed}", rows))
    report.main(list(map(str, folders)))
    assert not (folders[1] / "report.html").exists()
    return folders[0], (folders[0] / "report.html").read_text()


def test_the_verdict_comes_first_with_the_numbers_of_the_certificate(full):
    folder, page = full
    v = json.loads((folder / "crossover.json").read_text())
    text = unescape(re.sub(r"<style>.*?</style>|<svg.*?</svg>|<[^>]*>", " ", page, flags=re.S)).replace("\N{NO-BREAK SPACE}", " ")
    assert text.index(v["verdict"]) < text.index("Before Phase B") < text.index("Threats to validity")
    assert v["sentence"].split(": ", 1)[1] in text
    assert all(crossover.interval(part) in text for part in v["parts"].values())
    assert all(check["found"] in text for check in v["checks"].values())
    assert "exploratory, not confirmatory" in text and "Another seed may differ" in text and "matched by total parameters;" in text


def test_the_page_needs_nothing_from_elsewhere_and_runs_no_code_of_the_models(full, bare):
    for _, page in (full, bare):
        assert not re.search(r"<script|<link|<img|<iframe|\ssrc=|@import|url\((?!#)", page)
        assert not re.search(r'(?<!xmlns=")(?<!xmlns:xlink=")https?://(?!www\.w3\.org|purl\.org|creativecommons\.org)', page)
    assert "&lt;script&gt;alert(&#x27;cl after&#x27;)" in full[1]


def test_ids_are_unique_and_every_reference_finds_its_target(full):
    ids = re.findall(r'\bid="?([\w.-]+)', full[1])
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:url\(#|href="#|for=)([\w.-]+)', full[1]))
    assert used and used <= set(ids), used - set(ids)


def test_the_axis_switches_between_three_figures(full):
    for name in ("tokens", "flops", "time"):
        assert f"<figure class='{name}'>" in full[1] and f"#{name}:checked~.{name}" in full[1]
    assert full[1].count("<svg") == 7


def test_pictures_and_result_are_written(full):
    folder, _ = full
    for name in ("crossover", "floor", "matrix"):
        assert min(Image.open(folder / f"{name}.png").size) > 400
    result = json.loads((folder / "result.json").read_text(), parse_constant=lambda x: pytest.fail(f"{x} is not JSON"))
    assert result["verdict"] == "INCONCLUSIVE" and result["certificate"]["parts"]["gap"]["state"] == "pass"
    assert result["ledger"]["cl/default"]["params_active"] == 840_000 and result["ledger"]["dense/default"]["tokens"] == 1_048_576
    assert result["ledger"]["dense/default"]["overhead_frac"] == pytest.approx(16.8 / 88.8)
    assert result["ledger"]["dense/default"]["light_eval_frac"] == pytest.approx(2 / 9)
    assert all({"bwt", "domain bpb, test"} <= set(run) for run in result["ledger"].values())


def test_it_says_how_the_arms_differ_and_how_to_reproduce_it(full):
    folder, page = full
    assert f"python -m nanochat_cl.evolve --arms dense,cl\npython -m nanochat_cl.report {folder}" in page
    assert "<pre>cl: null -&gt; {&quot;blocks&quot;: 16}</pre>" in page and "0123abc" in page


def test_what_was_not_measured_is_said_not_invented(bare):
    folder, page = bare
    assert page.count("Not measured.") == 6     # two axes, probes, blocks, samples, what differs
    v = json.loads((folder / "crossover.json").read_text())
    untested = {k for k, x in v["checks"].items() if x["state"] == "not tested"}
    assert untested == {"exercised isolation", "routed tokens", "interior dense optimum", "interior optimum of Model-CL", "cool-down"}
    assert not v["confirmatory"] and json.loads((folder / "result.json").read_text())["ledger"]["cl/default"]["train_s"] is None
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.S).replace("nanochat", "")


@pytest.mark.parametrize("names", [["dense"], ["dense", "dense-rows"]])
def test_one_arm_or_dense_ones_alone_have_their_curves_and_costs_and_no_verdict(tmp_path, names):
    rows = synthetic.records({(name, "default"): (1.0, lambda t: 0.0, 0.25) for name in names}, milestones=3)
    folder = synthetic.write(tmp_path / "run", rows, config=CONFIG, samples=SAMPLES)
    result, page = report.report([str(folder)]), (folder / "report.html").read_text()
    assert result["verdict"] is result["certificate"] is None and list(result["ledger"]) == [f"{name}/default" for name in names]
    assert f"{', '.join(names)}: nothing to compare" in page and page.count("<svg") == 6 and "hypothesis" not in page
    assert {p.name for p in folder.iterdir()} == {"records.jsonl", "config.json", "samples.json", "result.json", "report.html",
                                                  "crossover.png", "floor.png", "matrix.png"}


def test_what_is_lost_at_equal_domain_score_is_read_off_the_curves_between_milestones():
    rows = synthetic.records(milestones=5, sd=0.0, gap=lambda t: -0.2)     # cl never comes to dense's end, so its own best is the target
    c = curves.paired(rows)
    dense, cl = report.at_equal_score(c, [0, 1])
    val = c.val[:, 0]
    assert val[1].max() == val[1, -1] and cl[1] == f"{c.tokens[-1] / 1e6:.4f}" and cl[2] == f"{c.general[1, 0, 0] - c.general[1, 0, -1]:.4f}"
    k = next(m for m in range(5) if val[0, m] >= val[1, -1])
    at = k - (val[0, k] - val[1, -1]) / (val[0, k] - val[0, k - 1])
    assert float(dense[1]) == pytest.approx(np.interp(at, range(5), c.tokens) / 1e6, abs=1e-4) and k - 1 < at < k <= 3
    assert float(dense[2]) == pytest.approx(np.interp(at, range(5), c.general[0, 0, 0] - c.general[0, 0]), abs=1e-4)
    # facts were asked at 0, 1, 2, 4: between the two around the target, along the straight line of the scores
    low, high = max(m for m in (0, 1, 2, 4) if m < k), min(m for m in (0, 1, 2, 4) if m >= k)
    share = (val[1, -1] - val[0, low]) / (val[0, high] - val[0, low])
    facts = [r["facts"]["cloze"]["gold_bpb"] for r in c.at["dense", "default", 42] if "facts" in r]
    ends = [facts[[0, 1, 2, 4].index(m)] - facts[0] for m in (low, high)]
    assert float(dense[3]) == pytest.approx(ends[0] + share * (ends[1] - ends[0]), abs=1e-4)
    ratio, low, high = map(float, re.findall(r"[\d.]+", dense[5]))
    assert ratio == pytest.approx(float(dense[3]) / float(dense[4]), abs=0.01) and low < ratio < high
    ends = {("dense", "default"): (1.0, lambda t: 0.0, .2), ("cl", "default"): (1.0, lambda t: 0.02, .2), ("cl", "lr_mult=0.1"): (.1, lambda t: -.3, .1)}
    assert report.at_equal_score(curves.paired(synthetic.records(ends, milestones=5)), [0, 1])[2][1] == "not reached"


def test_the_front_and_the_optimum_of_the_sweep_are_drawn():
    arms = {("dense", f"lr_mult={lr}"): (lr, lambda t, best=best: best * t, lost) for lr, best, lost in ((.1, -.05, .1), (.2, 0.0, .2), (.5, -.03, .3))}
    c = curves.paired(synthetic.records(arms | {("cl", "default"): (1.0, lambda t: -.1, .4)}, milestones=5))
    pareto, sweep = figures.recipes(c, [1, 3]).axes
    *drawn, line, _ = pareto.lines
    x, y = line.get_xdata(), line.get_ydata()
    assert line.get_label() == "front" and list(x) == sorted(x) and list(y) == sorted(y, reverse=True), "who scores worse must forget less"
    points = [point for one in drawn for point in zip(one.get_xdata(), one.get_ydata())]
    assert len(points) == 2 * 5 + 2 and all(any(fx <= bpb and fy <= lost for fx, fy in zip(x, y)) for bpb, lost in points), "nothing is beyond the front"
    assert {*zip(x, y)} <= {*points} and pareto.xaxis_inverted(), "it goes through what is drawn"
    (ring,) = [line for line in sweep.lines if line.get_markersize() > 10]
    assert ring.get_xdata() == [0.2] and ring.get_ydata() == [-c.val[1].max()] and sweep.get_xscale() == "log"
    assert "not swept" in figures.recipes(curves.paired(synthetic.records(milestones=3)), [0, 1]).axes[1].get_title()


def test_probes_have_bpb_first_and_centred_accuracy(full):
    folder, page = full
    last = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()][-1]
    cloze = last["facts"]["cloze"]
    cell = f"{cloze['gold_bpb']:.3f}, {(cloze['accuracy'] - .25) / .75:+.0%}".replace("-", figures.MINUS)
    assert last["arm"] == "cl" and "<td>facts: cloze</td><td>25%</td>" in page and f"<td>{cell}</td></tr>" in page


def test_probes_of_both_arms_and_of_both_ends_are_compared_item_by_item(full):
    folder, page = full
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    at = {(r["arm"], r["milestone"]): np.reshape(r["floor"]["copying"]["items"], (3, 2, 2)).mean(1) for r in rows}     # three pairs of twins
    for (a, b) in ((("cl", 8), ("dense", 8)), (("dense", 8), ("dense", 0)), (("cl", 8), ("cl", 0))):
        d = (at[a] - at[b])[:, 0]
        half = 4.3027 * d.std(ddof=1) / np.sqrt(3)                                                                      # t, two degrees of freedom
        cell = f"{d.mean():+.3f} [{d.mean() - half:+.3f}, {d.mean() + half:+.3f}], +0% [+0%, +0%]".replace("-", figures.MINUS)
        assert f"<td>{cell}</td>" in page, cell
    rows[-1]["floor"]["copying"]["items"].pop()
    rows[-1]["floor"]["order"]["items"], shown = [[1.0, 1]] * 2, [0, 1]
    rows = [r | {"floor": r["floor"] | {"order": {"items": r["floor"]["order"]["items"][:2]}}} for r in rows]
    found = {name: cells for name, *cells in report.paired_probes(curves.paired(rows), shown)}
    assert found["order"] == ["one item"] * 3 and set(found) == {*synthetic.PROBES} - {"copying"}, "other items are not compared"
    assert page.count("floor, paired by item") == 1 and f"<th>cl {figures.MINUS} dense, end" in page


def test_recipes_and_controls_share_one_ledger():
    arms = {("dense", "default"): (1.0, lambda t: 0.0, 0.25), ("cl", "default"): (1.0, lambda t: -0.03 + 0.08 * t, 0.15),
            ("dense", "lr_mult=0.5"): (0.5, lambda t: 0.02 * t, 0.2), ("dense-rows", "default"): (1.0, lambda t: 0.0, 0.2)}
    rows = synthetic.records(arms, seeds=(1, 2, 3), milestones=6, docs=3)
    ledger = report.ledger(curves.paired(rows))
    assert list(ledger) == ["dense/default", "dense/lr_mult=0.5", "dense-rows/default", "cl/default"]
    best = min(list(ledger)[:3], key=lambda name: ledger[name]["domain bpb, val"])
    assert crossover.assess(rows)["dense_limit"]["run"] == best == "dense/lr_mult=0.5"


@pytest.mark.parametrize("x,text", [(561e6, "561,000,000"), (4.1e12, "4.100e+12"), (0.5, "0.5000"), (-1.21, "\N{MINUS SIGN}1.210"),
                                    (None, "not measured")])
def test_counts_are_whole_and_scores_have_four_digits(x, text):
    assert report.quantity(x) == text


def test_pooled_runs_show_samples_and_configuration_of_the_compared_ones_and_every_command(tmp_path):
    both, better = {("dense", "default"): (1.0, lambda t: 0.0, 0.25), ("cl", "default"): (1.0, lambda t: -0.03, 0.2)}, ("dense", "lr_mult=0.5")
    folders = []
    for name, arms, text in (("a", both, "worse"), ("b", {better: (0.5, lambda t: 0.05 * t, 0.2)}, "better")):
        rows = [{**r, "run": name} for r in synthetic.records(arms, milestones=4, docs=3)]
        samples = [dict(arm=arm, when="after", prompt="import numpy", text=f"{arm} of the {text} run") for arm, _ in arms]
        config = dict(run=name, argv=["evolve", "--name", name], arms={arm: dict(made_by=name) for arm, _ in arms})
        folders.append(str(synthetic.write(tmp_path / name, rows, config=config, samples=samples)))
    report.report(folders)
    page = (tmp_path / "a" / "report.html").read_text()
    assert "dense of the better run" in page and "cl of the worse run" in page and "dense of the worse run" not in page
    assert "evolve --name a" in page and "evolve --name b" in page and "configuration of dense/lr_mult=0.5" in page


@pytest.mark.parametrize("who", [0, 1])
def test_a_seed_that_saw_one_sub_domain_takes_no_figure_of_the_others_along(tmp_path, who):
    rows = synthetic.records(seeds=(1, 2), milestones=5)
    for r in rows:
        if r["seed"] == 1 + who:
            r["seen"] = {name: n for name, n in list(r["seen"].items())[:1]} if isinstance(r["seen"], dict) else r["seen"][:1]
    made = report.report([str(synthetic.write(tmp_path / "run", rows))])
    assert "domain bpb, test" in made["ledger"]["cl/default"] and "acc" not in made["ledger"]["cl/default"]


def test_arms_without_dense_have_curves_and_no_verdict_and_the_command_names_the_arm(tmp_path):
    rows = [{**r, "arm": {"dense": "cl-noiso", "cl": "cl-flops"}[r["arm"]]} for r in synthetic.records(milestones=5)]
    made = report.report([str(synthetic.write(tmp_path / "none", rows, config=CONFIG))], "cl-flops")
    assert made["verdict"] is None and "nothing to compare" in made["sentence"]
    rows = [{**r, "arm": {"cl": "cl-flops"}.get(r["arm"], r["arm"])} for r in synthetic.records(milestones=5)]
    folder = synthetic.write(tmp_path / "named", rows, config=CONFIG)
    assert report.report([str(folder)], "cl-flops")["certificate"]["arm"] == "cl-flops"
    assert f"nanochat_cl.report {folder} --arm cl-flops" in (folder / "report.html").read_text()


def test_the_ledger_says_val_and_test_of_what_they_are():
    c = curves.paired(synthetic.records(milestones=5))
    row = report.ledger(c)["cl/default"]
    assert row["domain bpb, val"] == pytest.approx(-c.val[1, 0, -1]) and row["domain bpb, test"] == pytest.approx(-c.test[1, 0, -1])
    at = c.at["cl", "default", 42]
    assert row["bwt"] == metrics.continual(at, "test")["bwt"] != metrics.continual(at, "val")["bwt"]


def test_the_score_that_is_compared_lies_before_a_cool_down():
    rows = synthetic.records(milestones=6, sd=0.0, gap=lambda t: -0.02)
    for r in rows:
        r["lr_mult"] = 0.1 if r["milestone"] == 5 else 1.0
    c = curves.paired(rows)
    target = c.val[:, 0, :5].max(-1).min()
    dense, cl = report.at_equal_score(c, [0, 1])
    for i, row in enumerate((dense, cl)):
        assert float(row[1]) == pytest.approx(np.interp(metrics.reached(c.val[i, 0], target), range(6), c.tokens) / 1e6, abs=1e-4)
    assert float(cl[1]) <= c.tokens[4] / 1e6 + 1e-4


def test_the_start_is_shown_dense_first(tmp_path):
    folder = synthetic.write(tmp_path / "run", synthetic.records(milestones=3))
    v = report.report([str(folder)])["certificate"]
    cells = [re.findall(r"<td>([^<]*)</td>", row) for row in (folder / "report.html").read_text().split("Before Phase B")[1].split("</table>")[0].split("<tr>")]
    found = {row[0]: [float(x.replace(figures.MINUS, "-")) for x in row[1:3]] for row in cells if row}
    assert found["domain"] == pytest.approx([v["curves"]["dense_bpb"][0], v["curves"]["cl_bpb"][0]], abs=1e-4)
    assert found["general text"] == pytest.approx([v["general_start"]["dense"], v["general_start"]["cl"]], abs=1e-4)


@pytest.mark.parametrize("better", ["dense", "dense-rows"])
def test_of_dense_arms_alone_the_best_is_shown(tmp_path, better):
    rows = synthetic.records({(name, "default"): (1.0, lambda t, name=name: 0.05 * t * (name == better), 0.25) for name in ("dense", "dense-rows")}, milestones=3)
    folder = synthetic.write(tmp_path / "run", rows)
    report.report([str(folder)])
    assert f"<h1>{better}/default</h1>" in (folder / "report.html").read_text()

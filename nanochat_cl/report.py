"""
The report of a run: report.html (one file, opens without a network), crossover.png, floor.png, matrix.png and result.json.

    python -m nanochat_cl.report RUN_DIR [RUN_DIR ...]      pools the runs; writes to the first directory

Of one arm, or of dense ones alone, it shows the curves and what they cost: there is nothing to compare, and no verdict.
"""
import argparse
import io
import json
import math
import re
import shlex
from collections.abc import Callable
from html import escape
from pathlib import Path

import matplotlib
import numpy as np

from nanochat_cl import crossover, curves, estimates, figures, files, machine, metrics
from nanochat_cl.command import run
from nanochat_cl.runs import differences

CSS = """
body{margin:0 auto;max-width:52rem;padding:1.5rem 1.1rem 4rem;color:#1f2933;background:#fff;font:16px/1.55 Charter,Georgia,Times,serif}
h1{font-size:1.75rem;line-height:1.2;margin:.2em 0}h2{font-size:1.2rem;margin:2.6em 0 .5em;padding-top:.7em;border-top:1px solid #d9dee3}
p{margin:.5em 0}small,figcaption,.soft{color:#52606d}figcaption{font-size:.9rem}figure{margin:.8rem 0}sub{line-height:0}
.verdict{border-left:5px solid #1f2933;padding:.6rem 1rem;background:#f5f7f8;margin:1.2rem 0}.verdict b{font-size:1.25rem}
.scroll{overflow-x:auto}svg{width:100%;min-width:32rem;height:auto;display:block}.fail{color:#b3361b;font-weight:600}
table{border-collapse:collapse;width:100%;margin:.6rem 0;font:.86rem/1.4 system-ui,Helvetica,Arial,sans-serif}
th,td{padding:.32rem .7rem .32rem 0;text-align:left;vertical-align:top;border-bottom:1px solid #d9dee3;font-variant-numeric:tabular-nums}
thead th{border-bottom-color:#1f2933;overflow-wrap:anywhere;min-width:3.5rem}td:first-child{min-width:6.5rem;white-space:nowrap}
pre{background:#f5f7f8;padding:.7rem .9rem;font-size:.8rem;line-height:1.4;white-space:pre-wrap;overflow-wrap:anywhere;margin:.4rem 0}
.axis label{font:.86rem system-ui,sans-serif;margin-right:1rem;cursor:pointer}.axis figure{display:none}
#tokens:checked~.tokens,#flops:checked~.flops,#time:checked~.time{display:block}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(18rem,1fr));gap:0 1rem}
"""
ABSENT = "<p class=soft>Not measured.</p>"
COSTS = ("params_total", "params_active", "flops_per_token", "phase_a_tokens", "phase_a_flops", "tokens", "unique_tokens", "flops",
         "tok_per_s", "train_s", "update_s", "data_s", "eval_s", "checkpoint_s", *machine.LOAD)
HEAD = {"params_total": "params", "params_active": "active params", "flops_per_token": "FLOPs per token", "phase_a_tokens":
        "tokens, Phase A", "tokens": "Phase B", "train_s": "training, s"}
RULES = {"gap": "starts below: d(0) < 0", "limit": f"ends above the best dense score, by {crossover.SMALLEST_BPB} bpb or more",
         "crossing": f"d > 0 to the end, its band above 0 at {crossover.CONSECUTIVE} milestones running and at the end; "
                     "fails where d(end) by itself is below 0",
         "floor": f"loses at most {crossover.FLOOR_BPB} bpb of general text more than dense"}


def table(head: list[str], rows: list[list]) -> str:
    """All text is escaped; a failed check stands out."""
    cell = lambda x: f"<td{' class=fail' * (x == 'fail')}>{escape(x)}</td>"
    body = "".join(f"<tr>{''.join(cell(str(x)) for x in row)}</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{''.join(f'<th>{escape(h)}' for h in head)}</thead><tbody>{body}</tbody></table></div>"


def figure(draw: Callable, *args, part: str = "") -> str:
    """What a function of nanochat_cl.figures draws, as inline SVG with its docstring as caption; ids are made unique by its name."""
    name, drawn = f"{draw.__name__}{part}", draw(*args)
    if drawn is None:
        return f"<figure class='{part}'>{ABSENT}</figure>"
    drawn.savefig(out := io.StringIO(), format="svg", metadata={"Date": None, "Creator": None})
    image = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", out.getvalue()[out.getvalue().index("<svg"):])
    return f"<figure class='{part}'><div class=scroll>{image}</div><figcaption>{' '.join(draw.__doc__.split())}</figcaption></figure>"


def quantity(x: float | None) -> str:
    """Counts in full (561,000,000); four digits of what is small, or beyond counting."""
    text = "not measured" if x is None else f"{x:,.0f}" if 1000 <= abs(x) < 1e12 else f"{x:#.4g}"
    return text.replace("-", figures.MINUS)


def ledger(c: curves.Curves) -> dict[str, dict]:
    """What every run reached by the last milestone and what it cost, mean over seeds; None where it was not recorded."""
    out = {}
    for i, (arm, recipe) in enumerate(c.runs):
        each = [metrics.continual(c.at[(arm, recipe, s)], "test") for s in c.seeds]
        row = {"domain bpb, val": -c.val[i, :, -1].mean(), "domain bpb, test": -c.test[i, :, -1].mean()}
        row |= {m: np.mean([x[m] for x in each]) for m in each[0] if all(m in x for x in each)}
        row |= {key: c.field(key)[i, :, -1].mean() for key in COSTS}
        row["light_eval_frac"] = metrics.light_share([r for s in c.seeds for r in c.at[(arm, recipe, s)]])
        spent = [row[key] for key in ("train_s", "eval_s", "checkpoint_s")]
        row["overhead_frac"] = sum(spent[1:]) / (sum(spent) or math.nan)
        out[c.names[i]] = {key: float(x) if math.isfinite(x) else None for key, x in row.items()}
    return out


def at_equal_score(c: curves.Curves, shown: list[int]) -> list[list[str]]:
    """
    Rows of what each run had lost, in bpb, when its domain score on val first came to the best one that all the compared runs reach, before
    a cool-down: means over seeds, interpolated between milestones; facts and floor probes between those that asked both. Facts / floor is
    the selectivity.
    """
    lr = c.field("lr_mult")[shown].mean(1)
    steady = (lr >= 0.999 * lr.max(-1, keepdims=True)).all(0)                       # (M,); a schedule that never stands still is taken whole
    rows, target = [], c.val[shown].mean(1)[:, steady if steady.sum() > 2 else ...].max(-1).min()
    for i, name in enumerate(c.labels):
        val, each = c.val[i].mean(0), [c.at[(*c.runs[i], s)] for s in c.seeds]
        asked = [m for m, r in enumerate(each[0]) if r.get("facts")]
        at, between = (metrics.reached(x, target) if len(x) else math.nan for x in (val, val[asked]))
        values = [f"{np.interp(at, range(len(val)), x):.4f}" for x in (c.tokens / 1e6, curves.forgotten(c.general[i]).mean(0))]
        both = [[rows[m] for m in asked] for rows in each]
        facts, probes = ([np.mean([metrics.forgotten(rows, between, group) for rows in both], 0) for group in ("facts", "floor")]
                         if between >= 0 else ([math.nan], [math.nan]))
        chosen = metrics.selectivity(facts, probes) if between >= 0 else ()
        values += [f"{np.mean(facts):.4f}", f"{np.mean(probes):.4f}", "{:.2f} [{:.2f}, {:.2f}]".format(*chosen) if chosen else "nan"]
        rows.append([name, *("not measured" if v == "nan" else v.replace("-", figures.MINUS) for v in values)] if at >= 0 else
                    [name, "not reached", *[""] * 4])
    return rows


def paired_probes(c: curves.Curves, shown: list[int]) -> list[list[str]]:
    """
    Rows of differences in bpb of the right answer, and in accuracy, for every floor probe: means over seeds, paired by item (two twins are
    one), with Student's 95 % interval over items. Below 0 the bpb is better. Another seed may differ by more.
    """
    def cell(kind: str, a: tuple[int, int], b: tuple[int, int]) -> str:
        """Run and milestone `a` minus `b`."""
        x, y = (np.mean([metrics.units(c.at[(*c.runs[i], s)][m], "floor", kind) for s in c.seeds], 0) for i, m in (a, b))
        e = estimates.over_seeds((x - y).T[:, :, None]) if len(x) > 1 else None
        return e and "{:+.3f} [{:+.3f}, {:+.3f}], {:+.0%} [{:+.0%}, {:+.0%}]".format(
            *np.stack([e.mean, e.low, e.high], 1).ravel()).replace("-", figures.MINUS)
    pairs = [((shown[-1], -1), (shown[0], -1))] * (len(shown) > 1) + [((i, -1), (i, 0)) for i in shown]
    asked = [c.at[(*c.runs[i], s)][m].get("floor") or {} for i in shown for s in c.seeds for m in (0, -1)]
    same = [kind for kind in sorted(asked[0]) if len({len(floor[kind]["items"]) if kind in floor else 0 for floor in asked}) == 1]
    return [[kind, *(cell(kind, *pair) or "one item" for pair in pairs)] for kind in same]


def section(title: str, *parts: str) -> str:
    return f"<h2>{title}</h2>" + ("".join(parts) or ABSENT)


def verdict(v: dict, compared: str) -> list[str]:
    """The first sections of the page: the verdict with its parts, the table of what is compared, and the start."""
    arm, general, curve, equal = escape(v["arm"]), v["general_start"], v["curves"], v["floor_at_equal_domain"]
    number = lambda n: crossover.interval(n).replace(" ", "\N{NO-BREAK SPACE}")
    word, rest = v["sentence"].split(": ", 1)
    reached = ("above from the first milestone on" if v["above_from_start"] else f"not within {v['tokens'][-1]:,} tokens (right-censored)"
               if not v["crossing_between"] else "between {:,} and {:,} tokens".format(*v["crossing_between"]))
    caveat = "Another seed may differ by more." if len(v["seeds"]) == 1 else "Student's t on paired seeds; the documents are held fixed."
    at_equal = (f"At equal domain score, on the straight line between the ends of {escape(' and '.join(equal['between']))}, {arm} lost "
                f"{number(equal)} bpb more of general text. ") if equal else ""
    start = [["domain", f"{curve['dense_bpb'][0]:.4f}", f"{curve['cl_bpb'][0]:.4f}", number(v["parts"]["gap"])],
             ["general text", f"{general['dense']:.4f}", f"{general['cl']:.4f}", number(general)]]
    return [
        f"<h1>Does {arm} overtake dense?</h1><p class=soft>{escape(v['cl'])} against {escape(curve['dense_run'][-1])}, matched by "
        f"{' and '.join(v['matched']) or 'neither total parameters nor FLOPs of Phase A'}; "
        f"{'confirmatory' if v['confirmatory'] else 'exploratory, not confirmatory'}.</p>"
        f"<div class=verdict><b>{word}</b><p>{escape(rest)}</p></div>",
        table(["part of the hypothesis", "state", "bpb [95 %]", "rule"],
              [[p["name"], p["state"], number(p), RULES[k]] for k, p in v["parts"].items()]),
        f"<p>Crossing point T<sub>x</sub>: {reached}. d = score of {arm} minus that of the dense curve, at each milestone the dense recipe "
        f"that is best there on val; score = {figures.MINUS}bits per byte on test. The dense limit is {v['dense_limit']['bpb']:.4f} bpb, "
        f"by {escape(v['dense_limit']['run'])}. {at_equal}Intervals over {v['over']}. {caveat}</p>",
        compared,
        section("Before Phase B (H1)", table(["bits per byte, test", curve["dense_run"][0], v["cl"], "advantage [95 %]"], start))]


def page(c: curves.Curves, shown: list[int], result: dict, configs: list[dict], samples: list[dict]) -> str:
    """The HTML of the report; configs of all runs that have one, and samples of the compared ones."""
    v, runs, probes = result["certificate"], result["ledger"], []
    for group in ("floor", "facts", "questions"):
        chance, gold, accuracy = figures.probes(c, group, "chance"), figures.probes(c, group, "gold_bpb"), figures.centred(c, group)
        probes += [[f"{group}: {p}", f"{chance[p][0, 0]:.0%}", *(f"{gold[p][i, m]:.3f}, {a[i, m]:+.0%}".replace("-", figures.MINUS)
                                                                 for i in shown for m in (0, -1))] for p, a in accuracy.items()]
    last = [c.at[(*c.runs[i], c.seeds[0])][-1] for i in shown]
    last = [(r.get("plasticity", {}).get("drift", {}), r.get("update_ratio") or {}) for r in last]
    moved = [[group, *(f"{x[group]:.3%}" if group in x else "" for pair in last for x in pair)] for group in last[-1][0]]
    keys = dict.fromkeys(key for run in runs.values() for key in run)
    costs = [[key, *(quantity(run.get(key)) for run in runs.values())] for key in keys]
    texts = {s["prompt"]: [other for other in samples if other["prompt"] == s["prompt"]] for s in samples}
    compared = [[c.labels[i], *(quantity(runs[c.names[i]][key]) for key in HEAD)] for i in shown]
    commands = [*(config["argv"] for config in configs),
                ["python", "-m", "nanochat_cl.report", *result["runs"], *(["--arm", v["arm"]] if v else [])]]
    mine = [next((config for config in configs if config["run"] == run_of(c, i)), {}) for i in shown]
    differs = differences(*(config.get("arms", {}).get(c.runs[i][0], {}) for config, i in zip(mine, shown))) if v else []
    rest = [[k, json.dumps(x)] for k, x in mine[0].items() if k not in ("arms", "argv")]
    less = [f"{c.labels[shown[-1]]} {figures.MINUS} {c.labels[shown[0]]}, end"] * bool(v)
    less += [f"{c.labels[i]}, end {figures.MINUS} start" for i in shown]
    body = [
        *(verdict(v, table(["compared at the end", *HEAD.values()], compared)) if v else [f"<h1>{escape(c.names[shown[0]])}</h1><p>{result['sentence']}</p>"]),
        section("The curves", "<div class=axis>",
                *(f"<input type=radio name=axis id={k}{' checked' * (k == 'tokens')}> <label for={k}>{k}</label>" for k in figures.AXES),
                *(figure(figures.crossover, c, shown, v, k, part=k) for k in figures.AXES), "</div>"),
        section("Sub-domains", figure(figures.matrix, c, shown)),
        section("Floor, facts and recall", figure(figures.floor, c, shown),
                table(["bpb of the right answer, centred accuracy", "chance",
                       *(f"{c.labels[i]}, {when}" for i in shown for when in ("start", "end"))], probes) if probes else ABSENT,
                *([table(["floor, paired by item: bpb, accuracy [95 %]", *less], paired),
                   f"<p class=soft>{' '.join(paired_probes.__doc__.split())}</p>"] if (paired := paired_probes(c, shown)) else [])),
        section("Learning against forgetting", figure(figures.recipes, c, shown),
                table(["bpb lost at equal domain score", "M tokens", "general text", "facts", "floor probes", "facts / floor [95 %]"],
                      at_equal_score(c, shown)), f"<p class=soft>{' '.join(at_equal_score.__doc__.split())}</p>"),
        section("Weights and blocks", figure(figures.blocks, c, shown),
                table(["|change| / |w|", *(f"{c.labels[i]}, {when}" for i in shown for when in ("since Phase A", "in a step"))], moved)
                if moved else ""),
        section("Scores and cost", table([f"at the last milestone; score = {figures.MINUS}bpb", *c.labels], costs)),
        *([section("Threats to validity", table(["check", "state", "found"], [[k, x["state"], x["found"]] for k, x in v["checks"].items()]),
                   "<p class=soft>Runs on other streams or documents are refused. No check sees other domains, sizes, kinds of text.</p>"),
           section("What differs between the arms", f"<pre>{escape(chr(10).join(differs))}</pre>" if differs else "")] if v else []),
        section("Samples", *(f"<pre><b>{escape(prompt)}</b></pre><div class=two>" + "".join(
            f"<div><small>{escape(s['arm'])}, {s['when']} Phase B</small><pre>{escape(s['text'])}</pre></div>" for s in same) + "</div>"
            for prompt, same in texts.items())),
        section("How to reproduce it", f"<pre>{escape(chr(10).join(map(shlex.join, commands)).strip())}</pre>",
                table([f"configuration of {c.names[shown[0]]}", ""], rest), table(["input", "sha256"], v["inputs"].items()) if v else "")]
    return (f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>"
            f"<title>{result['sentence'].split(':')[0]}: {escape(', '.join(c.names))}</title><style>{CSS}</style><body>{''.join(body)}\n")


def run_of(c: curves.Curves, i: int) -> str:
    """The name of the run that made the records of c.runs[i], with the first seed."""
    return c.at[(*c.runs[i], c.seeds[0])][-1]["run"]


def report(run_dirs: list[str], arm: str = "cl") -> dict:
    """Write every output of the report to the first directory; the content of result.json is returned."""
    records, out = curves.load(run_dirs), Path(run_dirs[0])
    names = {r["arm"] for r in records}
    v = crossover.certify(run_dirs, arm) if arm in names and any(name.startswith("dense") for name in names) else None
    c = curves.paired(records)
    shown = [c.names.index(name) for name in (v["curves"]["dense_run"][-1], v["cl"])] if v else [int(c.val[..., -1].mean(1).argmax())]
    result = dict(verdict=v and v["verdict"], sentence=v["sentence"] if v else f"{', '.join(sorted(names))}: nothing to compare",
                  ledger=ledger(c), certificate=v, runs=[str(d) for d in run_dirs])
    configs, samples = [], []
    for folder in map(Path, run_dirs):
        if (folder / "config.json").is_file():
            configs.append(files.read_json(folder / "config.json"))
            theirs = files.read_json(folder / "samples.json") if (folder / "samples.json").is_file() else []
            compared = {c.runs[i][0] for i in shown if run_of(c, i) == configs[-1]["run"]}
            samples += [text for text in theirs if text["arm"] in compared]
    with matplotlib.rc_context(figures.LOOK):
        pictures = dict(crossover=figures.crossover(c, shown, v), floor=figures.floor(c, shown), matrix=figures.matrix(c, shown))
        for name, picture in pictures.items():
            with files.replacing(out / f"{name}.png") as f:
                picture.savefig(f, format="png", dpi=160)
        files.write_text(out / "report.html", page(c, shown, result, configs, samples))
    files.write_json(out / "result.json", result)
    return result


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    return crossover.parse(argv, "nanochat_cl.report", __doc__)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    print(report(args.run_dirs, args.arm)["sentence"])
    print(f"wrote {Path(args.run_dirs[0]) / 'report.html'} (open it in a browser), three .png and result.json beside it")


if __name__ == "__main__":
    run(main)

"""
A table of Phase B runs: where each arm starts and ends under each recipe, mean and standard deviation over seeds.

python runs/map.py EVOLVE_FOLDER ... [--out runs/results/map.md]      # every complete run below the folders
"""
import argparse
import statistics
from pathlib import Path

from nanochat_cl import files

HEAD = ["arm", "recipe", "seeds", "Phase A val", "domain val, start", "domain val, end", "domain test, start", "domain test, end",
        "general val, start", "general val, end", "general test, start", "general test, end", "idle share"]


def collect(folders: list[str]) -> dict[tuple[str, str], dict[int, list[float | None]]]:
    """(arm, recipe) -> seed -> the numbers of HEAD; a complete run has a record that says final."""
    found: dict[tuple, dict] = {}
    for path in sorted({path for folder in folders for path in Path(folder).rglob("records.jsonl")}):
        records, config = files.read_jsonl(path), files.read_json(path.with_name("config.json"))
        for end in (r for r in records if r["final"]):
            mine = [r for r in records if r["arm"] == end["arm"]]
            idle = [r["blocks"]["idle_share"] for r in mine if r["blocks"]]
            panels = [(panel, split) for panel in ("domain", "general") for split in ("val", "test")]
            bpb = [r[panel][split]["bpb"] for panel, split in panels for r in (mine[0], end)]
            seeds, who = found.setdefault((end["arm"], end["recipe"]), {}), f"{end['arm']} with {end['recipe']}, seed {end['seed']},"
            if end["seed"] in seeds:
                raise SystemExit(f"{who} is there twice: name folders that hold a run once")
            phase_a = config["arms"][end["arm"]]["phase_a"].get("val_bpb")
            seeds[end["seed"]] = [phase_a, *bpb, statistics.median(idle) if idle else None]
    return found


def table(found: dict[tuple[str, str], dict[int, list[float | None]]]) -> str:
    cell = lambda values: "-" if None in values else f"{statistics.mean(values):.4f}" + (
        f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")
    rows = [[*name, str(len(seeds)), *map(cell, zip(*seeds.values()))] for name, seeds in found.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in [HEAD, ["---"] * len(HEAD), *rows])


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    p.add_argument("folders", nargs="+", help="folders of runs, or of many")
    p.add_argument("--out", type=Path, help="write the table there as well")
    args = p.parse_args(argv)
    text = table(collect(args.folders))
    if args.out:
        files.write_text(args.out, "Bits per byte, mean ± standard deviation over seeds; lower is better. Idle share: of the (layer, "
                         "routed block) pairs,\nthose that a step left as they were, median over milestones. Made by `runs/map.py`.\n\n" + text)
    print(text)


if __name__ == "__main__":
    main()

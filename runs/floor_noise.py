"""
What the procedural floor can see: every kind of item on Phase A's checkpoints, for several seeds of items, with its noise.

python runs/floor_noise.py d4_dense_s42 d4_cl_s42     # with NANOCHAT_BASE_DIR as in the run; writes runs/results/floor_noise.md

Twins share their words, so a pair of twins is the unit of chance. Smallest difference: half-width of the 95 % interval of the second model
minus the first on the same items, all seeds pooled; what is smaller, so many items cannot tell from nothing.
"""
import argparse
from pathlib import Path

import numpy as np

from nanochat_cl import files, machine, patching, probes
from nanochat_cl.command import UserError, run

RESULT = Path(__file__).resolve().parent / "results" / "floor_noise.md"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("tags", nargs="+", help="folders in base_checkpoints, two for a paired difference")
    parser.add_argument("--items", type=int, default=192, help="of each kind and seed (default: %(default)s)")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1], help="of items (0,1)")
    parser.add_argument("--out", type=Path, default=RESULT, help="file to write (default: %(default)s)")
    parser.add_argument("--device-type", choices=("", "cuda", "cpu", "mps"), default="", help="cuda, cpu or mps (default: what there is)")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> np.ndarray:
    """(models, seeds, kinds, twins, 2): bpb of the right choice and whether it was the likeliest, mean of each pair of twins."""
    from nanochat import checkpoint_manager, common
    from nanochat.tokenizer import get_token_bytes
    *_, device = common.compute_init(args.device_type or common.autodetect_device_type())
    result, folder = [], Path(common.get_base_dir()) / "base_checkpoints"
    if missing := [tag for tag in args.tags if not any((folder / tag).glob("model_*.pt"))]:
        found = ", ".join(sorted({path.parent.name for path in folder.glob("*/model_*.pt")})) or "none"
        raise UserError(f"no checkpoint {missing[0]} in {folder}, where there are: {found}; set NANOCHAT_BASE_DIR, or run nanochat_cl.pretrain")
    print(f"floor | {args.items} items of each kind, seeds {args.seeds}, for {', '.join(args.tags)} of {folder} -> {args.out}", flush=True)
    for place in (str(folder / tag) for tag in args.tags):
        model, tokenizer, _ = checkpoint_manager.build_model(place, checkpoint_manager.find_last_step(place), device, "eval")
        scored = [probes.score_probes(model, tokenizer, get_token_bytes(), probes.items(args.items, seed), 64) for seed in args.seeds]
        result.append([[np.reshape(found[kind]["items"], (-1, 2, 2)).mean(1) for kind in probes.KINDS] for found in scored])
    return np.array(result)


def table(x: np.ndarray, args: argparse.Namespace) -> str:
    """A row per kind, in Markdown; the last one is the mean of the kinds, which are independent."""
    models, seeds, kinds, twins, _ = x.shape
    both = "" if models == 1 else f" Difference: {args.tags[1]} minus {args.tags[0]}."
    heads = [f"{tag}: bpb (s.e.), accuracy of each seed; of each level" for tag in args.tags] + ["s.d. between seeds: bpb, accuracy"]
    heads += ["difference: bpb, accuracy", "smallest difference: bpb, accuracy"] if models > 1 else []
    rows, pooled = [], x.transpose(0, 2, 1, 3, 4).reshape(models, kinds, -1, 2)                 # twins of all seeds together
    se = pooled.std(2, ddof=1) / np.sqrt(seeds * twins)                                         # (models, kinds, 2)
    by_seed = x.mean(3)                                                                         # (models, seeds, kinds, 2)
    by_level = np.stack([x[:, :, :, level::probes.LEVELS, 1].mean((1, 3)) for level in range(probes.LEVELS)], 2)  # (models, kinds, levels)
    gap = pooled[min(1, models - 1)] - pooled[0]
    least = 1.96 * gap.std(1, ddof=1) / np.sqrt(seeds * twins)                                  # (kinds, 2)
    for k, name in enumerate([*probes.KINDS, "mean of all"]):
        mean = lambda a, axis: a.mean(axis) if name == "mean of all" else np.take(a, k, axis)
        root = lambda a, axis: np.sqrt((a ** 2).mean(axis) / kinds) if name == "mean of all" else np.take(a, k, axis)
        seed, error, sd = mean(by_seed, 2), root(se, 1), mean(by_seed, 2).std(1, ddof=1).mean(0) if seeds > 1 else [np.nan] * 2
        percent = lambda accuracies: " ".join(f"{a:.1%}" for a in accuracies)
        cells = [f"{s[:, 0].mean():.3f} ({e[0]:.3f}), {percent(s[:, 1])}; {percent(l)}" for s, e, l in zip(seed, error, mean(by_level, 1))]
        cells += [f"{sd[0]:.3f}, {sd[1]:.1%}"]
        if models > 1:
            d, w = mean(gap.mean(1), 0), root(least, 0)
            cells += [f"{d[0]:+.3f}, {d[1]:+.1%}", f"{w[0]:.3f}, {w[1]:.1%}"]
        rows.append([name, *cells])
    lines = [["kind", *heads], ["---"] * (1 + len(heads)), *rows]
    return (f"# What the procedural floor can see\n\n{twins} pairs of twins of each kind and seed of items ({', '.join(map(str, args.seeds))}) "
            f"on {', '.join(args.tags)}; chance is 50 %. bpb of the right choice given its context.{both} Smallest difference: half-width of "
            f"its 95 % interval, paired by item, all seeds pooled.\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    machine.prepare(args.device_type)
    with patching.applied():
        text = table(measure(args), args)
    files.write_text(args.out, text)
    print(text + f"wrote {args.out}")


if __name__ == "__main__":
    run(main)

"""
Phase A: upstream's own `scripts.base_train`, run under the patches. All its flags pass through and win over the profile's.

python -m nanochat_cl.pretrain --profile cpu --arm dense --seed 42
torchrun --standalone --nproc_per_node=8 -m nanochat_cl.pretrain -- --profile h100x8 --arm cl --depth 16

Writes <base>/base_checkpoints/d<depth>_<arm>_s<seed>/: upstream's files, phase_a_begun.json while it trains, phase_a.json at the
end. Run again it continues from the last whole checkpoint, or says that there is nothing left to do.
"""
import argparse
import math
import os
import sys
import traceback
from pathlib import Path

from nanochat_cl import accounting, arms, command, files, machine, upstream
from nanochat_cl.command import UserError
from nanochat_cl.profiles import PROFILES

FLAGS = {  # of scripts.base_train, with their defaults there; those of the first line change no weight
    "run": "dummy", "resume_from_step": -1, "model_tag": None, "eval_every": 250, "core_metric_every": 2000,
    "core_metric_max_per_task": 500, "sample_every": 2000, "save_every": -1,
    "device_type": "", "fp8": False, "fp8_recipe": "tensorwise", "depth": 20, "aspect_ratio": 64, "head_dim": 128, "max_seq_len": 2048,
    "window_pattern": "SSSL", "num_iterations": -1, "target_flops": -1.0, "target_param_data_ratio": 12.0, "device_batch_size": 32,
    "total_batch_size": -1, "embedding_lr": 0.3, "unembedding_lr": 0.008, "weight_decay": 0.28, "matrix_lr": 0.02, "scalar_lr": 0.5,
    "warmup_steps": 40, "warmdown_ratio": 0.65, "final_lr_frac": 0.05, "eval_tokens": 80 * 524288}
INDIFFERENT = tuple(FLAGS)[:8]
SIZES = ("depth", "aspect_ratio", "head_dim", "max_seq_len", "device_batch_size")  # we count with them, so the script is told


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """profile, arm, seed, and `flags`: every one of base_train's, from the command line, else the profile, else its own default."""
    parser = argparse.ArgumentParser(prog="nanochat_cl.pretrain", description="Phase A: base_train under the patches", allow_abbrev=False,
                                     usage="%(prog)s [--profile NAME] [--arm NAME] [--seed N] [flags of scripts.base_train]")
    parser.add_argument("--profile", choices=PROFILES, default="cpu", help="sizes of the run (default: %(default)s)")
    parser.add_argument("--arm", default="dense", help="a name of nanochat_cl.arms (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of weights and data order (default: %(default)s)")
    for name, (default, what) in arms.OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default),
                            help=f"of a Model-CL: {what} (default: the arm's, or {default})")
    for name, default in FLAGS.items():
        kind = {"action": "store_true"} if default is False else {"type": type(default) if default is not None else str}
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help="passed on to scripts.base_train", **kind)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args([*PROFILES[parser.parse_args(argv).profile].pretrain, *argv])
    args.flags = {name: getattr(args, name) for name in FLAGS}
    args.options = {name: getattr(args, name) for name in arms.OPTIONS if getattr(args, name) is not None}
    return args


def model_config(flags: dict, vocab_size: int) -> dict:
    """The config that base_train gives a dense model."""
    heads = math.ceil(flags["depth"] * flags["aspect_ratio"] / flags["head_dim"])
    return {"sequence_len": flags["max_seq_len"], "vocab_size": vocab_size, "n_layer": flags["depth"], "n_head": heads, "n_kv_head": heads,
            "n_embd": heads * flags["head_dim"], "window_pattern": flags["window_pattern"]}


def horizon(flags: dict, vocab_size: int) -> tuple[int, int]:
    """Optimizer steps of Phase A, and tokens of each: as the flags say, else by nanochat's scaling laws (Bergsma et al. 2025)."""
    def scaling(depth: int) -> int:
        return accounting.matmul_params(model_config({**flags, "depth": depth}, vocab_size)) - accounting.SMEAR
    size, batch = scaling(flags["depth"]), flags["total_batch_size"]
    if batch == -1:
        batch = 2 ** round(math.log2(2**19 * (size / scaling(12)) ** 0.383))
    if flags["num_iterations"] > 0:
        return flags["num_iterations"], batch
    if flags["target_flops"] > 0:
        return round(flags["target_flops"] / (accounting.flops_per_token(model_config(flags, vocab_size)) * batch)), batch
    return int(flags["target_param_data_ratio"] * size) // batch, batch


def check(args: argparse.Namespace, world_size: int) -> None:
    """Whatever the user can put right, before anything is written; the tokenizer is checked where it is loaded."""
    import pyarrow.parquet
    from nanochat.dataset import list_parquet_files

    from nanochat_cl import runs
    flags = args.flags
    if other := arms.named(args.arm).phase_a:
        raise UserError(f"the arm {args.arm} differs in Phase B only: pretrain {other}, which it starts from")
    if args.arm != "dense" and (flags["fp8"] or flags["target_flops"] > 0):
        raise UserError(f"with --fp8 or --target-flops the arm {args.arm} would not train as dense does: leave them out "
                        f"(--num-iterations sets the horizon of both)")
    if wrong := [f"{name} {flags[name]}" for name in SIZES if flags[name] < 1]:
        raise UserError(f"sizes must be positive, got {', '.join(wrong)}")
    if flags["head_dim"] % 2 or (width := model_config(flags, 0)["n_embd"]) < 24:
        raise UserError(f"expected an even --head-dim and a width of 24 at least, got {flags['head_dim']}"
                        + ("" if flags["head_dim"] % 2 else f" and {width}; raise --depth, --aspect-ratio or --head-dim"))
    if arms.named(args.arm).cl is not None:
        runs.check_ranks(world_size)
    micro_tokens = flags["device_batch_size"] * flags["max_seq_len"] * world_size
    runs.check_batch(micro_tokens if flags["total_batch_size"] == -1 else flags["total_batch_size"], micro_tokens)
    if flags["eval_every"] > 0 and flags["eval_tokens"] < micro_tokens:
        raise UserError(f"--eval-tokens must be at least rows x context x ranks = {micro_tokens:,}, got {flags['eval_tokens']:,}")
    groups, path, remedy = [], "the general corpus", f"make the corpus again: python -m nanochat_cl.corpus --profile {args.profile}"
    try:
        for path in list_parquet_files():
            shard = pyarrow.parquet.read_metadata(path)
            groups.append(shard.num_row_groups if "text" in shard.schema.names else 0)
    except (OSError, pyarrow.ArrowException) as e:
        raise UserError(f"cannot read {path} ({' '.join(str(e).split())}); {remedy}") from e
    if len(groups) < 2 or max(groups[:-1]) < world_size or groups[-1] < world_size:
        raise UserError(f"a training and a validation shard are needed, with a row group of text for each of {world_size} ranks; "
                        f"there are {len(groups)} shards, with {groups} such row groups; {remedy}")


def last_whole_step(folder: Path, world_size: int) -> int:
    """The last step whose files, those of all ranks, are there and undamaged, else -1. What a later one lacks is said."""
    for step in sorted((int(path.stem.split("_")[1]) for path in folder.glob("model_*.pt")), reverse=True):
        try:
            files.read_json(path := folder / f"meta_{step:06d}.json")
            for name in (f"model_{step:06d}", *(f"optim_{step:06d}_rank{rank}" for rank in range(world_size))):
                files.check_zip(path := folder / f"{name}.pt")
            return step
        except (OSError, ValueError) as e:
            machine.say(f"pretrain | step {step} is passed over: {path} is missing or damaged ({e})")
    return -1


def begun(folder: Path, asked: dict) -> dict:
    """What an earlier try, that has saved something, has written about itself; else a new record."""
    from nanochat_cl import runs
    if not any(folder.glob("model_*.pt")):
        return {"asked": asked, "resumes": []}
    for name in ("phase_a.json", "phase_a_begun.json"):
        if (folder / name).is_file():
            record = files.read_json(folder / name)
            runs.check_same(folder, record["asked"], asked, "give its flags, another --model-tag, or delete the folder")
            return record
    raise UserError(f"{folder} holds checkpoints that pretrain did not write; give another --model-tag, or move them away")


def base_train(flags: dict) -> None:
    """Upstream's script, in this process. It complains about flags and files by assertions: those become one line."""
    told = {name: value for name, value in flags.items() if value != FLAGS[name] or name in SIZES}
    try:
        upstream.run_script("scripts.base_train", [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
                                                   for name, value in told.items()])
    except (AssertionError, ValueError) as e:
        place = traceback.extract_tb(e.__traceback__)[-1]
        if isinstance(e, UserError) or not Path(place.filename).is_relative_to(upstream.tree()):
            raise
        raise UserError(f"nanochat refused: {' '.join(str(e).split()) or place.line} ({place.filename}:{place.lineno})") from e


def pretrain(args: argparse.Namespace) -> None:
    from nanochat.common import COMPUTE_DTYPE, autodetect_device_type, get_base_dir
    from nanochat.dataset import DATA_DIR

    from nanochat_cl import corpus, patching, runs, tokenizer
    from patches import settings
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check(args, world_size)
    flags, (vocabulary, token_bytes), who = args.flags, tokenizer.load(args.profile), f"pretrain | {args.arm} s{args.seed}"
    config = model_config(flags, vocabulary.get_vocab_size())
    cl = arms.cl(config["n_embd"], config["n_head"], vocabulary.get_bos_token_id(), args.arm, **args.options)
    if cl is not None and cl["backend"] == "slice":
        raise UserError(f"arm {args.arm}: the backend slice is for decoding, where one choice serves all; expected auto, masked or bmm")
    flags["model_tag"] = flags["model_tag"] or f"d{flags['depth']}_{args.arm}_s{args.seed}"
    folder = Path(get_base_dir()) / "base_checkpoints" / flags["model_tag"]
    record = begun(folder, {
        "arm": args.arm, "seed": args.seed, "cl": cl, "world_size": world_size, "dtype": str(COMPUTE_DTYPE),
        "tokenizer": tokenizer.fingerprint(token_bytes),
        "flags": {name: value for name, value in flags.items() if name not in INDIFFERENT}})
    if (folder / "phase_a.json").is_file():
        machine.say(f"{who} is complete: {folder}")
        return
    made = files.read_json(path) if (path := Path(DATA_DIR) / "corpus.json").is_file() else {}
    if made and (strangers := {path.name for path in Path(DATA_DIR).glob("*.parquet")} ^ set(made["files"])):
        raise UserError(f"{DATA_DIR} and its corpus.json disagree about {', '.join(sorted(strangers)[:4])}: run nanochat_cl.domain again if it "
                        f"was stopped, else move them away, or make the corpus again")
    text = corpus.fingerprint(made)
    if record.setdefault("text", text) != text:
        raise UserError(f"{folder} was begun on other general text than there is now; delete it, or give another --model-tag")
    saves = math.ceil(horizon(flags, config["vocab_size"])[0] / flags["save_every"]) if flags["save_every"] > 0 else 1
    machine.check_disk(folder, 12 * saves * accounting.params({**config, "cl": cl})["total"])  # fp32: a weight and at most two moments

    machine.say(f"{who}, profile {args.profile}: {config['n_layer']} layers of {config['n_embd']} -> {folder}")
    if cl is not None:
        machine.say(f"{who}: {accounting.ledger({**config, 'cl': cl})}")
    if flags["resume_from_step"] == -1:
        flags["resume_from_step"] = last_whole_step(folder, world_size)
    if (last := flags["resume_from_step"]) != -1:
        if not (folder / f"meta_{last:06d}.json").is_file():
            raise UserError(f"no step {last} in {folder}; leave out --resume-from-step to continue from the last one")
        position = files.read_json(folder / f"meta_{last:06d}.json")["dataloader_state_dict"]
        # Only a loader that saves more than these three goes on with the very next batch.
        record["resumes"].append({"step": last, "kind": "exact" if set(position) - {"pq_idx", "rg_idx", "epoch"} else "approximate"})
        machine.say(f"{who} continues from step {last} (resume: {record['resumes'][-1]['kind']})")
    on_cpu = (flags["device_type"] or autodetect_device_type()) == "cpu"
    good = lambda: f"an unsaved step; last good checkpoint: step {last_whole_step(folder, world_size)} of {folder}"
    with (settings.using(seed=args.seed, arm=cl), patching.applied(), machine.fixed_sums(cl is not None and on_cpu), runs.together(good),
          runs.locked(folder, rank)):
        if rank == 0:
            files.write_json(folder / "phase_a_begun.json", record)
        base_train(flags)
    if rank != 0:
        return

    step = max(int(path.stem.split("_")[1]) for path in folder.glob("meta_*.json"))
    meta = files.read_json(folder / f"meta_{step:06d}.json")
    val_bpb, tokens = meta["val_bpb"], step * meta["total_batch_size"]
    if val_bpb is not None and not math.isfinite(val_bpb):
        raise UserError(f"{who} diverged: validation bpb {val_bpb} at step {step}; lower the learning rates and delete {folder}")
    flops_per_token = accounting.flops_per_token(meta["model_config"])
    files.write_json(folder / "phase_a.json", {
        **record, "arm": args.arm, "seed": args.seed, "step": step, "tokens": tokens, "val_bpb": val_bpb,
        "params": accounting.params(meta["model_config"]), "flops_per_token": flops_per_token, "flops": flops_per_token * tokens,
        "seconds": meta["loop_state"]["total_training_time"],  # as upstream counts them: without its first steps, over all resumes
        "machine": machine.describe(), "flags": flags})
    (folder / "phase_a_begun.json").unlink()
    machine.say(f"{who}: {tokens:,} tokens, validation bpb {val_bpb} -> {folder / 'phase_a.json'}; next: the other arm, or evolve")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    machine.prepare(args.flags["device_type"])
    pretrain(args)


if __name__ == "__main__":
    command.run(main)

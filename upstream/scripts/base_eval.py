"""
Evaluate a base model: the CORE metric, bits per byte on both splits, samples.

python -m scripts.base_eval                                        # everything, on the largest base model
torchrun --standalone --nproc_per_node=8 -m scripts.base_eval -- --device-batch-size=16
python -m scripts.base_eval --eval bpb,sample --model-tag d4       # nothing to download

CORE (Li et al. 2024, DataComp-LM, arXiv 2406.11794) is the mean over 22 in-context-learning tasks of the accuracy, centered
so that guessing scores 0 and perfection 1.
"""
import argparse
import csv
import json
import os
import random
import tempfile
import time
import zipfile
from pathlib import Path

import torch
import yaml

from nanochat.checkpoint_manager import load_model
from nanochat.command import UserError, run
from nanochat.common import autodetect_device_type, compute_cleanup, compute_init, download_file_with_lock, get_base_dir, print0
from nanochat.core_eval import evaluate_task
from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit
from nanochat.engine import Engine
from nanochat.files import replacing
from nanochat.loss_eval import evaluate_bpb
from nanochat.tokenizer import get_token_bytes

EVAL_BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
MODES = ("core", "bpb", "sample")
SAMPLE_PROMPTS = [
    "The capital of France is",
    "The chemical symbol of gold is",
    "If today is Monday, the day after tomorrow is",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
]


def place_eval_bundle(file_path: str) -> None:
    """Unpack the downloaded archive; the finished folder appears in the base directory at once, when all of it is on the disk."""
    base_dir = get_base_dir()
    with tempfile.TemporaryDirectory(dir=base_dir) as folder:
        with zipfile.ZipFile(file_path) as archive:
            archive.extractall(folder)
        for file in filter(Path.is_file, Path(folder).rglob("*")):
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        target = os.path.join(base_dir, "eval_bundle")
        try:
            os.replace(os.path.join(folder, "eval_bundle"), target)
        except OSError:
            if not os.path.isdir(target):  # otherwise another rank was faster
                raise
    print0(f"Placed eval_bundle in {base_dir}")


def evaluate_core(model, tokenizer, device: torch.device, max_per_task: int = -1) -> dict:
    """{"results": accuracy per task, "centered_results": the same centered, "core_metric": their mean}."""
    bundle_dir = os.path.join(get_base_dir(), "eval_bundle")
    if not os.path.isdir(bundle_dir):
        archive = download_file_with_lock(EVAL_BUNDLE_URL, "eval_bundle.zip", postprocess_fn=place_eval_bundle)
        if not os.path.isdir(bundle_dir):  # the archive was there already, the folder had been deleted
            place_eval_bundle(archive)
    with open(os.path.join(bundle_dir, "core.yaml"), encoding="utf-8") as f:
        tasks = yaml.safe_load(f)["icl_tasks"]
    with open(os.path.join(bundle_dir, "eval_meta_data.csv"), encoding="utf-8", newline="") as f:
        baseline_percent = {row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(f)}

    results, centered_results = {}, {}
    for task in tasks:
        t0 = time.time()
        label = task["label"]
        task_meta = {"task_type": task["icl_task_type"], "num_fewshot": task["num_fewshot"][0],
                     "continuation_delimiter": task.get("continuation_delimiter", " ")}
        with open(os.path.join(bundle_dir, "eval_data", task["dataset_uri"]), encoding="utf-8") as f:
            data = [json.loads(line) for line in f if line.strip()]
        random.Random(1337).shuffle(data)  # the files are sorted
        if max_per_task > 0:
            data = data[:max_per_task]
        accuracy = evaluate_task(model, tokenizer, data, device, task_meta)
        chance = 0.01 * baseline_percent[label]
        results[label] = accuracy
        centered_results[label] = (accuracy - chance) / (1 - chance)
        print0(f"Evaluating: {label} ({task_meta['num_fewshot']}-shot, {task_meta['task_type']}) | accuracy: {accuracy:.4f} | "
               f"centered: {centered_results[label]:.4f} | time: {time.time() - t0:.2f}s")
    core_metric = sum(centered_results.values()) / len(centered_results)
    return {"results": results, "centered_results": centered_results, "core_metric": core_metric}


def write_core_csv(path: str, core: dict) -> None:
    lines = [f"{'Task':<35}, {'Accuracy':<10}, {'Centered':<10}\n"]
    lines += [f"{label:<35}, {accuracy:<10.6f}, {core['centered_results'][label]:<10.6f}\n" for label, accuracy in core["results"].items()]
    lines += [f"{'CORE':<35}, {'':<10}, {core['core_metric']:<10.6f}\n"]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with replacing(path) as f:
        f.write("".join(lines).encode("utf-8"))


def print_completions(engine: Engine, tokenizer) -> None:
    """The prompts above, each with the 16 most likely tokens."""
    for prompt in SAMPLE_PROMPTS:
        samples, _ = engine.generate_batch(tokenizer(prompt, prepend="<|bos|>"), num_samples=1, max_tokens=16, temperature=0)
        print0(tokenizer.decode(samples[0]))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a base model", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--eval", type=str, default=",".join(MODES), help="comma-separated: core, bpb, sample")
    add("--model-tag", type=str, default=None, help="checkpoint directory (default: the largest model)")
    add("--step", type=int, default=None, help="step (default: the last)")
    add("--max-per-task", type=int, default=-1, help="examples per CORE task, -1 = all")
    add("--device-batch-size", type=int, default=32, help="rows per rank, for bpb")
    add("--split-tokens", type=int, default=40 * 524288, help="tokens per split, for bpb")
    add("--device-type", type=str, default="", help="cuda, cpu or mps; empty = autodetect")
    args = parser.parse_args(argv)
    args.modes = [mode.strip() for mode in args.eval.split(",")]
    unknown = [mode for mode in args.modes if mode not in MODES]
    if unknown:
        parser.error(f"--eval takes any of {', '.join(MODES)}, got {', '.join(unknown)}")
    return args


def evaluate(args: argparse.Namespace) -> None:
    _, rank, _, world_size, device = compute_init(args.device_type or autodetect_device_type())
    model, tokenizer, meta = load_model("base", device, phase="eval", model_tag=args.model_tag, step=args.step)
    T, step = meta["model_config"]["sequence_len"], meta["step"]
    print0(f"Evaluating base model at step {step} on {', '.join(args.modes)}")

    if "sample" in args.modes and rank == 0:
        engine = Engine(model, tokenizer)
        print_completions(engine, tokenizer)
        print0("Unconditioned samples:")
        samples, _ = engine.generate_batch([tokenizer.get_bos_token_id()], num_samples=8, max_tokens=128, temperature=1.0)
        for sample in samples:
            print0("-" * 80)
            print0(tokenizer.decode(sample))

    if "bpb" in args.modes:
        token_bytes = get_token_bytes(device=device)
        batch_tokens = args.device_batch_size * T * world_size
        steps = args.split_tokens // batch_tokens
        if steps == 0:
            raise UserError(f"--split-tokens must fill at least one batch of {batch_tokens:,} tokens, got {args.split_tokens:,}; "
                            f"raise it or lower --device-batch-size")
        for split in ("train", "val"):
            loader = tokenizing_distributed_data_loader_bos_bestfit(tokenizer, args.device_batch_size, T, split, device=device)
            print0(f"{split} bpb: {evaluate_bpb(model, loader, steps, token_bytes):.6f}")

    if "core" in args.modes:
        core = evaluate_core(model, tokenizer, device, max_per_task=args.max_per_task)
        if rank == 0:
            path = os.path.join(get_base_dir(), "base_eval", f"base_model_{step:06d}.csv")
            write_core_csv(path, core)
            print0(f"Results written to {path}")
        print0(f"CORE metric: {core['core_metric']:.4f}")


def main(argv: list[str] | None = None) -> None:
    try:
        evaluate(parse(argv))
    finally:
        compute_cleanup()


if __name__ == "__main__":
    run(main)

"""
Pretrain a base model. One dial, --depth, sets width, horizon, batch size, learning rates and weight decay.

python -m scripts.base_train                                                          # one GPU, gradient accumulation
torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=24 --run=d24
python -m scripts.base_train --depth=4 --head-dim=64 --max-seq-len=512 --device-batch-size=1 --total-batch-size=512 \
    --eval-tokens=512 --core-metric-every=-1 --num-iterations=20                      # a laptop
"""
# Letters of this file: N iterations, it a step counted from 0, B tokens per optimizer step, S scaling parameters,
# D target tokens, W ranks.
import argparse
import gc
import json
import math
import os
import time
from contextlib import contextmanager
from dataclasses import asdict

# Before anything that may touch CUDA: the allocator reads it only once.
os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

import torch
import torch.distributed as dist

from nanochat.checkpoint_manager import load_checkpoint, save_checkpoint
from nanochat.command import UserError, run
from nanochat.common import (COMPUTE_DTYPE, COMPUTE_DTYPE_REASON, DummyWandb, autodetect_device_type, compute_cleanup, compute_init,
                             get_base_dir, get_peak_flops, is_ddp_initialized, print0, print_banner)
from nanochat.dataloader import (exact_state, tokenizing_distributed_data_loader_bos_bestfit,
                                 tokenizing_distributed_data_loader_with_state_bos_bestfit)
from nanochat.engine import Engine
from nanochat.flash_attention import HAS_FA3, USE_FA3
from nanochat.gpt import GPT, GPTConfig, Linear
from nanochat.loss_eval import evaluate_bpb
from nanochat.tokenizer import get_token_bytes, get_tokenizer
from scripts.base_eval import evaluate_core, print_completions

REFERENCE_DEPTH = 12           # the model at which the hyperparameters were tuned ...
REFERENCE_BATCH = 2 ** 19      # ... and its best batch, in tokens
LOSS_EMA_BETA = 0.9
UNTIMED_STEPS = 10             # compilation and warm caches: left out of the average that predicts the time left


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrain a base model", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", type=str, default="dummy", help="wandb run name; dummy disables wandb")
    add("--device-type", type=str, default="", help="cuda, cpu or mps; empty = autodetect")
    add("--fp8", action="store_true", help="FP8 matmuls in the large linear layers (Hopper or newer)")
    add("--fp8-recipe", type=str, default="tensorwise", choices=["rowwise", "tensorwise"], help="only tensorwise is implemented")
    # the model
    add("--depth", type=int, default=20, help="number of layers")
    add("--aspect-ratio", type=int, default=64, help="width = depth x this, rounded up to a multiple of --head-dim")
    add("--head-dim", type=int, default=128, help="width of an attention head")
    add("--max-seq-len", type=int, default=2048, help="context in tokens")
    add("--window-pattern", type=str, default="SSSL", 
        help="attention windows, tiled over the layers: L = the whole context, S = a quarter of it, rounded up to 128s")
    # the horizon: the first of the three that is given decides
    add("--num-iterations", type=int, default=-1, help="optimizer steps")
    add("--target-flops", type=float, default=-1.0, help="steps from a budget of training FLOPs")
    add("--target-param-data-ratio", type=float, default=12, help="steps from tokens per scaling parameter")
    # the optimizer
    add("--device-batch-size", type=int, default=32, help="rows per rank and micro-step: lower it when memory runs out")
    add("--total-batch-size", type=int, default=-1, help="tokens per optimizer step; -1 = from the scaling law")
    add("--embedding-lr", type=float, default=0.3, help="token and value embeddings (AdamW)")
    add("--unembedding-lr", type=float, default=0.008, help="lm_head (AdamW)")
    add("--weight-decay", type=float, default=0.28, help="of the matrices (Muon), at the reference batch and horizon")
    add("--matrix-lr", type=float, default=0.02, help="matrices of the blocks (Muon)")
    add("--scalar-lr", type=float, default=0.5, help="residual scalars (AdamW)")
    add("--warmup-steps", type=int, default=40, help="steps of linear learning rate warm-up")
    add("--warmdown-ratio", type=float, default=0.65, help="share of the run over which the learning rate falls")
    add("--final-lr-frac", type=float, default=0.05, help="where it ends, as a share of the peak")
    add("--resume-from-step", type=int, default=-1, help="continue from this checkpoint; -1 = start afresh")
    # now and then
    add("--eval-every", type=int, default=250, help="steps between validations; <= 0 disables")
    add("--eval-tokens", type=int, default=80 * 524288, help="tokens per validation")
    add("--core-metric-every", type=int, default=2000, help="steps between CORE evaluations; <= 0 disables")
    add("--core-metric-max-per-task", type=int, default=500, help="examples per CORE task")
    add("--sample-every", type=int, default=2000, help="steps between samples; <= 0 disables")
    add("--save-every", type=int, default=-1, help="steps between checkpoints; <= 0 = at the end only")
    add("--model-tag", type=str, default=None, help="name of the checkpoint directory (default: d<depth>)")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Flags that no run could obey raise a UserError before anything is loaded."""
    for flag in ("depth", "aspect_ratio", "head_dim", "device_batch_size"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(args, flag)}")
    if args.max_seq_len < 2:
        raise UserError(f"--max-seq-len must be at least 2, got {args.max_seq_len}")
    if args.total_batch_size != -1 and args.total_batch_size < 1:
        raise UserError(f"--total-batch-size is a number of tokens, or -1 for the scaling law; got {args.total_batch_size}")
    if not args.window_pattern or set(args.window_pattern.upper()) - set("SL"):
        raise UserError(f"--window-pattern is made of the letters S and L, got {args.window_pattern!r}")
    if max(args.num_iterations, args.target_flops, args.target_param_data_ratio) <= 0:
        raise UserError("no horizon: give a positive --num-iterations, --target-flops or --target-param-data-ratio")
    if args.target_param_data_ratio == 0:
        raise UserError("--target-param-data-ratio 0 leaves batch size and weight decay undefined; leave it out, or give -1")
    if not 0 <= args.warmdown_ratio <= 1:
        raise UserError(f"--warmdown-ratio is a share of the run, from 0 to 1; got {args.warmdown_ratio}")
    if args.fp8 and args.fp8_recipe != "tensorwise":
        raise UserError(f"only --fp8-recipe tensorwise is implemented, got {args.fp8_recipe}")


# --- scaling rules and schedules: pure functions ----------------------------------------------------------------------

def build_model_meta(depth: int, args: argparse.Namespace, vocab_size: int) -> GPT:
    """The model of a depth on the meta device: shapes, no memory."""
    heads = math.ceil(depth * args.aspect_ratio / args.head_dim)
    config = GPTConfig(sequence_len=args.max_seq_len, vocab_size=vocab_size, n_layer=depth, n_head=heads, n_kv_head=heads,
                       n_embd=heads * args.head_dim, window_pattern=args.window_pattern)
    with torch.device("meta"):
        return GPT(config)


def scaling_params(model: GPT) -> int:
    """S: the parameters that predict the best horizon most consistently, block matrices and lm_head."""
    counts = model.num_scaling_params()
    return counts["transformer_matrices"] + counts["lm_head"]


def auto_batch_size(target_tokens: float, reference_tokens: float) -> int:
    """B, a power of two, grows as D^0.383 (Bergsma et al. 2025, arXiv 2505.13738)."""
    return 2 ** round(math.log2(REFERENCE_BATCH * (target_tokens / reference_tokens) ** 0.383))


def batch_lr_factor(batch: int) -> float:
    return math.sqrt(batch / REFERENCE_BATCH)


def scaled_weight_decay(weight_decay: float, batch: int, target_tokens: float, reference_tokens: float) -> float:
    """Keeps the time scale of the decay, in units of the run, constant: B / (lr * wd * D), with lr growing as sqrt(B)."""
    return weight_decay * math.sqrt(batch / REFERENCE_BATCH) * (reference_tokens / target_tokens)


def horizon(args: argparse.Namespace, batch: int, flops_per_token: float, target_tokens: int) -> tuple[int, str]:
    """(N, the phrase for the log that says where it comes from)."""
    if args.num_iterations > 0:
        return args.num_iterations, "Using user-provided number of iterations"
    if args.target_flops > 0:
        return round(args.target_flops / (flops_per_token * batch)), "Calculated number of iterations from target FLOPs"
    return target_tokens // batch, "Calculated number of iterations from target data:param ratio"


def lr_multiplier(it: int, num_iterations: int, args: argparse.Namespace) -> float:
    """Linear up, flat, linear down to --final-lr-frac."""
    warmdown = round(args.warmdown_ratio * num_iterations)
    if it < args.warmup_steps:
        return (it + 1) / args.warmup_steps
    if it <= num_iterations - warmdown:
        return 1.0
    left = (num_iterations - it) / warmdown
    return left + (1 - left) * args.final_lr_frac


def muon_momentum(it: int, num_iterations: int, args: argparse.Namespace) -> float:
    """0.85 to 0.97 over the first 400 steps, down to 0.90 over the warmdown; in a short run the first rule wins."""
    warmdown = round(args.warmdown_ratio * num_iterations)
    if it < 400:
        return 0.85 + (it / 400) * 0.12
    if it >= num_iterations - warmdown:
        return 0.97 - 0.07 * (it - (num_iterations - warmdown)) / warmdown
    return 0.97


def muon_weight_decay(it: int, num_iterations: int, weight_decay: float) -> float:
    """Cosine to zero."""
    return weight_decay * 0.5 * (1 + math.cos(math.pi * it / num_iterations))


# --- FP8 --------------------------------------------------------------------------------------------------------------

def fp8_eligible(module: torch.nn.Module, name: str) -> bool:
    """Linears big enough to gain, with both sides in the multiples of 16 that the hardware wants; not the small gates."""
    sides = (module.in_features, module.out_features) if isinstance(module, torch.nn.Linear) else (0, 0)
    return all(side % 16 == 0 for side in sides) and min(sides) >= 128


@contextmanager
def disable_fp8(model: torch.nn.Module):
    """Evaluate in COMPUTE_DTYPE: FP8 layers are swapped for plain ones around the same weights."""
    swapped = []
    for name, module in list(model.named_modules()):
        if "Float8" in type(module).__name__:
            parent_name, _, child = name.rpartition(".")
            plain = Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta", dtype=module.weight.dtype)
            plain.weight, plain.bias = module.weight, module.bias
            swapped.append((model.get_submodule(parent_name), child, module))
            setattr(swapped[-1][0], child, plain)
    try:
        yield
    finally:
        for parent, child, module in swapped:
            setattr(parent, child, module)


@contextmanager
def evaluating(model: torch.nn.Module):
    """In eval mode and without FP8."""
    model.eval()
    with disable_fp8(model):
        yield
    model.train()


# --- training ---------------------------------------------------------------------------------------------------------

def due(step: int, every: int, last_step: bool) -> bool:
    return every > 0 and (last_step or (step > 0 and step % every == 0))


def gather_loader_state(state: dict) -> dict:
    """Rank 0's state with those of the other ranks inside, since rank 0 alone writes the metadata."""
    if not is_ddp_initialized():
        return state
    states = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    return {**states[0], "other_ranks": states[1:]}


def check_resumable(meta: dict, model_config: dict, world_size: int) -> None:
    """The model must be the one of the checkpoint; the ranks must be as many, since each has its share of the optimizer state."""
    ours, theirs = json.loads(json.dumps(model_config)), meta["model_config"]
    if differing := [f"{key} {theirs[key]} there, {ours.get(key)} here" for key in theirs if theirs[key] != ours.get(key)]:
        raise UserError(f"the checkpoint holds another model ({'; '.join(differing)}); give the flags it was trained with")
    saved_by = (meta["dataloader_state_dict"] or {}).get("world_size", world_size)  # another tree does not say
    if saved_by != world_size:
        raise UserError(f"the checkpoint was saved by {saved_by} ranks, this run has {world_size}; continue with {saved_by}")


def train(args: argparse.Namespace) -> None:
    started = time.time()
    print_banner()
    user_config = vars(args).copy()
    check(args)

    # device, logging
    device_type = args.device_type or autodetect_device_type()
    _, ddp_rank, _, ddp_world_size, device = compute_init(device_type)
    if ddp_world_size > 1 and not is_ddp_initialized():  # the original trains on, each rank its own model
        raise UserError(f"without CUDA nothing averages the gradients of {ddp_world_size} ranks; start one process, without torchrun")
    master = ddp_rank == 0
    on_cuda = device_type == "cuda"
    synchronize = torch.cuda.synchronize if on_cuda else lambda: None
    if device_type == "cpu":  # compiled for several threads, an embedding's gradient otherwise depends on which of them comes first
        torch.use_deterministic_algorithms(True, warn_only=True)
    peak_flops = float("inf")
    if on_cuda:
        peak_flops = get_peak_flops(torch.cuda.get_device_name(0))
        print0(f"GPU: {torch.cuda.get_device_name(0)} | Peak FLOPS (BF16): {peak_flops:.2e}")
    print0(f"COMPUTE_DTYPE: {COMPUTE_DTYPE} ({COMPUTE_DTYPE_REASON})")
    wandb_run = DummyWandb()
    if args.run != "dummy" and master:
        import wandb
        wandb_run = wandb.init(project="nanochat", name=args.run, config=user_config)
    if USE_FA3:
        print0("Attention: Flash Attention 3")
    else:
        reason = "it needs COMPUTE_DTYPE bfloat16" if HAS_FA3 else "it is not available here"
        print0(f"WARNING: Attention: PyTorch SDPA instead of Flash Attention 3 ({reason}); slower")
        if args.window_pattern != "L":
            print0(f"WARNING: SDPA has no sliding windows: --window-pattern {args.window_pattern} costs an explicit mask, consider L")

    # tokenizer, model
    tokenizer = get_tokenizer()
    token_bytes = get_token_bytes(device=device)
    vocab_size = tokenizer.get_vocab_size()
    print0(f"Vocab size: {vocab_size:,}")
    model = build_model_meta(args.depth, args, vocab_size)
    model_config = asdict(model.config)
    print0(f"Model config:\n{json.dumps(model_config, indent=2)}")
    model.to_empty(device=device)
    model.init_weights()

    checkpoint_dir = os.path.join(get_base_dir(), "base_checkpoints", args.model_tag or f"d{args.depth}")
    resuming = args.resume_from_step != -1
    optimizer_data, meta = None, None
    if resuming:
        print0(f"Resuming from step {args.resume_from_step} of {checkpoint_dir}")
        model_data, optimizer_data, meta = load_checkpoint(checkpoint_dir, args.resume_from_step, device,
                                                           load_optimizer=True, rank=ddp_rank)
        check_resumable(meta, model_config, ddp_world_size)
        model.load_state_dict(model_data, strict=True, assign=True)
        del model_data

    # Before FP8 replaces the layers that are counted (the original counts afterwards, twelve times too little at depth 24).
    flops_per_token = model.estimate_flops()
    if args.fp8 and not on_cuda:
        print0("WARNING: --fp8 needs CUDA and is ignored")
    elif args.fp8:
        from nanochat.fp8 import Float8LinearConfig, convert_to_float8_training
        convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name(args.fp8_recipe), module_filter_fn=fp8_eligible)
        print0(f"FP8: converted {sum('Float8' in type(m).__name__ for m in model.modules())} linear layers ({args.fp8_recipe})")
    orig_model = model  # the eager one: state dicts, CORE and samples, whose shapes vary
    model = torch.compile(model, dynamic=False)

    # what the size of the model says about the run
    print0("Parameter counts:")
    for key, count in orig_model.num_scaling_params().items():
        print0(f"{key:<24}: {count:,}")
    print0(f"Estimated FLOPs per token: {flops_per_token:e}")
    num_scaling = scaling_params(orig_model)
    target_tokens = int(args.target_param_data_ratio * num_scaling)
    reference_tokens = args.target_param_data_ratio * scaling_params(build_model_meta(REFERENCE_DEPTH, args, vocab_size))
    total_batch_size = args.total_batch_size
    if total_batch_size == -1:
        total_batch_size = auto_batch_size(target_tokens, reference_tokens)
        print0(f"Auto-computed optimal batch size: {total_batch_size:,} tokens")
    lr_factor = batch_lr_factor(total_batch_size)
    if lr_factor != 1:
        print0(f"Scaling LRs by {lr_factor:.4f} for batch size {total_batch_size:,} (reference: {REFERENCE_BATCH:,})")
    weight_decay = scaled_weight_decay(args.weight_decay, total_batch_size, target_tokens, reference_tokens)
    if weight_decay != args.weight_decay:
        print0(f"Scaling weight decay from {args.weight_decay:.6f} to {weight_decay:.6f} for depth {args.depth}")

    optimizer = orig_model.setup_optimizer(
        unembedding_lr=args.unembedding_lr * lr_factor, embedding_lr=args.embedding_lr * lr_factor,
        matrix_lr=args.matrix_lr * lr_factor, weight_decay=weight_decay, scalar_lr=args.scalar_lr * lr_factor)
    if resuming:
        optimizer.load_state_dict(optimizer_data)
        del optimizer_data
    scaler = torch.amp.GradScaler(device_type) if COMPUTE_DTYPE == torch.float16 else None
    if scaler and resuming and "grad_scaler" in meta["loop_state"]:
        scaler.load_state_dict(meta["loop_state"]["grad_scaler"])

    B, T = args.device_batch_size, args.max_seq_len
    num_iterations, origin = horizon(args, total_batch_size, flops_per_token, target_tokens)
    print0(f"{origin}: {num_iterations:,}")
    total_tokens = total_batch_size * num_iterations
    print0(f"Total number of training tokens: {total_tokens:,}")
    print0(f"Tokens : Scaling params ratio: {total_tokens / num_scaling:.2f}")
    print0(f"Total training FLOPs estimate: {flops_per_token * total_tokens:e}")
    micro_tokens = B * T * ddp_world_size
    if total_batch_size % micro_tokens:
        raise UserError(f"the total batch size must be a multiple of rows x context x ranks = {B} x {T} x {ddp_world_size} = "
                        f"{micro_tokens:,} tokens, got {total_batch_size:,}; change --total-batch-size or --device-batch-size")
    if args.eval_every > 0 and args.eval_tokens < micro_tokens:
        raise UserError(f"--eval-tokens must fill at least one batch of {micro_tokens:,} tokens, got {args.eval_tokens:,}; raise it, lower "
                        f"--device-batch-size, or disable validation with --eval-every -1")
    if resuming and meta["step"] > num_iterations:
        raise UserError(f"the checkpoint is at step {meta['step']:,} but the run ends at {num_iterations:,}; "
                        f"raise --num-iterations or resume from an earlier step")
    grad_accum_steps = total_batch_size // micro_tokens
    print0(f"Tokens / micro-batch / rank: {B} x {T} = {B * T:,}")
    print0(f"Tokens / micro-batch: {micro_tokens:,}")
    print0(f"Total batch size {total_batch_size:,} => gradient accumulation steps: {grad_accum_steps}")

    # data; the first batch is fetched here, every later one while the device works on the one before it. A resumed run is the
    # uninterrupted one bit for bit: weights, optimizer and the place in the data are restored, and training draws no random numbers.
    saved = meta["dataloader_state_dict"] if resuming else None
    loader_state = exact_state(saved) or saved  # this rank's own, where the checkpoint holds it
    if resuming:
        how = "with the very next batch" if exact_state(loader_state) else "approximately, behind the last row group read"
        print0(f"The data continue {how}")
    train_loader = tokenizing_distributed_data_loader_with_state_bos_bestfit(
        tokenizer, B, T, split="train", device=device, resume_state_dict=loader_state)
    # `loader_state` belongs to the last batch trained on, and is what a checkpoint keeps: the prefetched batch comes again.
    x, y, next_state = next(train_loader)

    step, val_bpb, loop = (meta["step"], meta["val_bpb"], meta["loop_state"]) if resuming else (0, None, {})
    min_val_bpb = loop.get("min_val_bpb", float("inf"))
    smooth_train_loss = loop.get("smooth_train_loss", 0.0)
    total_training_time = loop.get("total_training_time", 0.0)

    first_step = step
    while True:
        last_step = step == num_iterations
        so_far = {"step": step, "total_training_flops": flops_per_token * total_batch_size * step}

        # now and then: validate, evaluate, sample, save
        if args.eval_every > 0 and (last_step or step % args.eval_every == 0):
            with evaluating(orig_model):
                val_loader = tokenizing_distributed_data_loader_bos_bestfit(tokenizer, B, T, split="val", device=device)
                val_bpb = evaluate_bpb(model, val_loader, args.eval_tokens // micro_tokens, token_bytes)
            print0(f"Step {step:05d} | Validation bpb: {val_bpb:.6f}")
            min_val_bpb = min(min_val_bpb, val_bpb)
            wandb_run.log({**so_far, "total_training_time": total_training_time, "val/bpb": val_bpb})

        if due(step, args.core_metric_every, last_step):
            with evaluating(orig_model):
                core = evaluate_core(orig_model, tokenizer, device, max_per_task=args.core_metric_max_per_task)
            print0(f"Step {step:05d} | CORE metric: {core['core_metric']:.4f}")
            wandb_run.log({**so_far, "core_metric": core["core_metric"], "centered_results": core["centered_results"]})

        if master and due(step, args.sample_every, last_step):
            with evaluating(orig_model):
                print_completions(Engine(orig_model, tokenizer), tokenizer)

        if last_step or (step != args.resume_from_step and due(step, args.save_every, last_step)):
            save_checkpoint(checkpoint_dir, step, orig_model.state_dict(), optimizer.state_dict(), {
                "step": step,
                "val_bpb": val_bpb,
                "model_config": model_config,
                "user_config": user_config,
                "device_batch_size": B,
                "max_seq_len": T,
                "total_batch_size": total_batch_size,
                "dataloader_state_dict": gather_loader_state(loader_state),
                "loop_state": {"min_val_bpb": min_val_bpb, "smooth_train_loss": smooth_train_loss,
                               "total_training_time": total_training_time,
                               **({"grad_scaler": scaler.state_dict()} if scaler else {})},
            }, rank=ddp_rank)

        if last_step:
            break

        # one step
        synchronize()
        if step == first_step:
            print0(f"Start-up to the first step: {time.time() - started:.2f}s")
        t0 = time.time()
        for _ in range(grad_accum_steps):
            loss = model(x, y)
            train_loss = loss.detach()
            loss = loss / grad_accum_steps
            (scaler.scale(loss) if scaler else loss).backward()
            loader_state = next_state
            x, y, next_state = next(train_loader)
        lrm = lr_multiplier(step, num_iterations, args)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lrm
            if group["kind"] == "muon":
                group["momentum"] = muon_momentum(step, num_iterations, args)
                group["weight_decay"] = muon_weight_decay(step, num_iterations, weight_decay)
        if scaler:
            scaler.unscale_(optimizer)
            if is_ddp_initialized():  # all ranks skip the step, or none
                for found_inf in scaler._found_inf_per_device(optimizer).values():
                    dist.all_reduce(found_inf, op=dist.ReduceOp.MAX)
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        train_loss = train_loss.item()
        synchronize()
        dt = time.time() - t0

        # one line
        smooth_train_loss = LOSS_EMA_BETA * smooth_train_loss + (1 - LOSS_EMA_BETA) * train_loss
        loss_to_show = smooth_train_loss / (1 - LOSS_EMA_BETA ** (step + 1))
        tok_per_sec = int(total_batch_size / dt)
        mfu = 100 * flops_per_token * total_batch_size / dt / (peak_flops * ddp_world_size)
        epoch = f"{next_state['epoch']} pq: {next_state['pq_idx']} rg: {next_state['rg_idx']}"
        eta = ""
        if step > UNTIMED_STEPS:
            total_training_time += dt
            eta = f" | eta: {(num_iterations - step - 1) * total_training_time / (step - UNTIMED_STEPS) / 60:.1f}m"
        print0(f"step {step:05d}/{num_iterations:05d} ({100 * step / num_iterations:.2f}%) | loss: {loss_to_show:.6f} | lrm: {lrm:.2f} | "
               f"dt: {dt * 1000:.2f}ms | tok/sec: {tok_per_sec:,} | bf16_mfu: {mfu:.2f} | epoch: {epoch} | "
               f"total time: {total_training_time / 60:.2f}m{eta}")
        if step % 100 == 0:
            wandb_run.log({**so_far, "total_training_time": total_training_time, "train/loss": loss_to_show, "train/lrm": lrm,
                           "train/dt": dt, "train/tok_per_sec": tok_per_sec, "train/mfu": mfu, "train/epoch": epoch})

        # The collector costs about half a second per scan of a settled heap: park what exists, then look rarely.
        step += 1
        if step == first_step + 1:
            gc.collect()
            gc.freeze()
            gc.disable()
        elif step % 5000 == 0:
            gc.collect()

    train_loader.close()
    print0(f"Peak memory usage: {torch.cuda.max_memory_allocated() / 2 ** 20 if on_cuda else 0:.2f}MiB")
    print0(f"Total training time: {total_training_time / 60:.2f}m")
    if val_bpb is not None:
        print0(f"Minimum validation bpb: {min_val_bpb:.6f}")
    wandb_run.finish()


def main(argv: list[str] | None = None) -> None:
    try:
        train(parse(argv))
    finally:
        gc.unfreeze()
        gc.enable()
        compute_cleanup()


if __name__ == "__main__":
    run(main)

"""
What runs/bench.py times, one process per measurement: a model in training, or an MLP in all its variants.
"""
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from nanochat_cl import accounting, arms, machine, upstream

WARM_STEPS = 4    # steps 0 to 3 compile; from then on nothing may
SPLIT_STEPS = 3   # steps at the end in which the device is waited for after each part
CHUNKS = (128, 256, 512, 2048)


@dataclass(frozen=True)
class Case:
    """A model and how it is trained: `rows` x `seq_len` tokens per micro-batch, `micro` of them per step."""
    name: str
    depth: int
    vocab_size: int = 32768
    rows: int = 32
    seq_len: int = 2048
    micro: int = 4
    dtype: str = ""       # NANOCHAT_DTYPE; "": what the tree chooses
    attention: str = ""   # fa3 | sdpa; "": what the tree chooses
    head_dim: int = 128
    pattern: str = ""     # of windows; "": SSSL, but L where a GPU has no FA3, as nanochat advises


def begin(patched: bool) -> tuple[Any, Callable[[], None], str]:
    """(device, function that waits for it, name of the compute dtype)."""
    machine.prepare()
    import torch
    if patched:
        from nanochat_cl import patching
        patching.apply()
    from nanochat import common
    device = common.compute_init("cuda" if torch.cuda.is_available() else "cpu")[-1]
    return device, torch.cuda.synchronize if device.type == "cuda" else lambda: None, str(common.COMPUTE_DTYPE).removeprefix("torch.")


def train_steps(case: Case, arm: str, steps: int, started: float) -> dict[str, Any]:
    """The loop of base_train, timed. arm "": no patch is applied, any tree can be measured. started: when the process was."""
    device, synchronize, dtype = begin(patched=arm != "")
    import torch
    from nanochat import common, dataloader, flash_attention, gpt, tokenizer
    from torch._dynamo.utils import counters
    on_gpu = device.type == "cuda"
    if case.attention == "fa3" and not flash_attention.HAS_FA3:
        return {"unmeasured": "Flash Attention 3 is not available"}
    flash_attention._override_impl = case.attention or None
    flash_attention.USE_FA3 = flash_attention._resolve_use_fa3()
    ready: list[int] = []  # batches that waited each time one was asked for
    if watched := hasattr(dataloader, "SimpleQueue"):  # our tree packs ahead
        class Watched(dataloader.SimpleQueue):
            def get(self, *args, **kwargs):
                ready.append(self.qsize())
                return super().get(*args, **kwargs)
        dataloader.SimpleQueue = Watched

    words, heads = tokenizer.get_tokenizer(), -(-case.depth * 64 // case.head_dim)
    cl = arms.cl(case.head_dim * heads, heads, words.get_bos_token_id(), arm) if arm else None
    config = gpt.GPTConfig(sequence_len=case.seq_len, vocab_size=words.get_vocab_size(), n_layer=case.depth, n_head=heads, n_kv_head=heads,
                           n_embd=case.head_dim * heads,
                           window_pattern=case.pattern or ("L" if on_gpu and not flash_attention.USE_FA3 else "SSSL"),
                           **({"cl": cl} if cl else {}))
    with torch.device("meta"):
        model = gpt.GPT(config)
    model.to_empty(device=device)
    model.init_weights()
    optimizer = model.setup_optimizer(weight_decay=0.1)
    compiled = torch.compile(model, dynamic=False)
    loader = dataloader.tokenizing_distributed_data_loader_with_state_bos_bestfit(
        words, case.rows, case.seq_len, split="train", device=device)
    batch, last_step = next(loader), WARM_STEPS + steps + SPLIT_STEPS

    def step(number: int, split: bool = False) -> Counter:
        """Seconds of the parts, as the host sees them unless `split`, and of the whole."""
        nonlocal batch
        synchronize()
        parts, begun = Counter(), time.perf_counter()
        def mark(part: str) -> None:
            if split:
                synchronize()
            parts[part] += time.perf_counter() - begun - parts.total()
        for _ in range(case.micro):
            loss = compiled(batch[0], batch[1]) / case.micro
            mark("forward")
            loss.backward()
            mark("backward")
            batch = next(loader)
            mark("loader")
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - number / last_step)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        loss.item()
        synchronize()
        mark("optimizer")
        return Counter(parts, step=parts.total())

    startup_s = time.time() - started
    first = [step(number) for number in range(WARM_STEPS)][0]
    ready.clear()
    frames = counters["frames"]["total"]
    timed = [step(number) for number in range(WARM_STEPS, WARM_STEPS + steps)]
    empty = ready.count(0) if watched else None
    split = [step(number, True) for number in range(WARM_STEPS + steps, last_step)]
    seconds, tokens = median(s["step"] for s in timed), case.rows * case.seq_len * case.micro
    loader.close()
    host_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)
    return {"tok_per_s": tokens / seconds, "step_ms": 1000 * seconds,
            **{f"{part}_ms": 1000 * median(s[part] for s in split) for part in ("forward", "backward", "optimizer")},
            "loader_ms": 1000 * mean(s["loader"] for s in timed) / case.micro, "loader_frac": mean(s["loader"] / s["step"] for s in timed),
            "queue_empty": empty, "batches": steps * case.micro,
            "memory_mib": torch.cuda.max_memory_allocated() / 2 ** 20 if on_gpu else host_mib, "startup_s": startup_s,
            "first_step_s": first["step"], "recompiles": counters["frames"]["total"] - frames, "tree": upstream.tree_hash()[:12],
            "flops_per_token": accounting.flops_per_token(config), "rows": case.rows, "micro": case.micro, "seq_len": case.seq_len,
            "vocab_size": config.vocab_size, "pattern": config.window_pattern, "dtype": dtype, "peak_flops": common.get_peak_flops(
                torch.cuda.get_device_name()) if on_gpu else None}


def time_layers(n: int, rows: int, seq_len: int, rounds: int, repeat: int = 3) -> dict[str, Any]:
    """One MLP of width n in all its variants, taking turns in one process: {variant: seconds of each round and FLOPs over dense}."""
    device, synchronize, dtype = begin(patched=True)
    import torch
    from nanochat import gpt, optim
    from nanochat_cl import blocks
    x = torch.randn(rows, seq_len, n, device=device, dtype=getattr(torch, dtype), requires_grad=True)
    grad = torch.randn_like(x)

    def build(cl: dict | None, early: bool = True, alone: bool = False) -> tuple[Callable, Any]:
        """(compiled forward, step of Muon). early: boundaries as routing has them; alone: without shared blocks, see `alone` below."""
        with torch.device("meta"):
            mlp = gpt.MLP(gpt.GPTConfig(n_embd=n, n_head=1, n_kv_head=1, **({"cl": cl} if cl else {})))
        mlp.to_empty(device=device)
        for p in mlp.parameters():
            torch.nn.init.normal_(p, std=0.02)
        weights = [mlp.c_fc.weight, mlp.c_proj.weight]
        group = dict(kind="muon", lr=0.02, momentum=0.95, ns_steps=5, beta2=0.9, weight_decay=0.0)
        muon = optim.MuonAdamW([{**group, "params": [p], **({"isolate": True, "decay": 2.0} if cl else {})} for p in weights])
        if cl:
            starts = accounting.boundaries(seq_len, cl["chunk"]) if early else list(range(0, seq_len, cl["chunk"]))
            gate, choice = torch.rand(rows, len(starts), cl["blocks"] - cl["shared"], device=device).topk(cl["active"])
            if cl["backend"] == "slice":
                choice = choice[:1, :1].expand_as(choice)
            mlp.decision = blocks.Decision(choice, gate.requires_grad_(), tuple(b - a for a, b in zip(starts, [*starts[1:], seq_len])))
        forward = (lambda x: blocks.auto(x, *(p.to(x.dtype) for p in weights), mlp.decision)) if alone else mlp
        return torch.compile(forward, dynamic=False), muon

    def flops(cl: dict | None) -> float:
        """Of the matmuls, as the project counts them: those of a one-layer model less those of one whose MLP is empty."""
        model = dict(n_layer=1, n_embd=n, n_head=1, n_kv_head=1, vocab_size=64)
        count = lambda cl: accounting.matmul_params({**model, "cl": cl})
        return count(cl) - count({"shared": 0, "active": 0, "block": 0, "join": 0, "released": 0})

    layer = lambda C, backend="auto": arms.cl(n, 1, 0, "cl", chunk=C, backend=backend)
    alone = lambda C: {**layer(C), "shared": 0, "active": layer(C)["blocks"] // 4}  # routed blocks only, a quarter of them active
    wanted = {"dense": (None,), **{f"{backend}, C=512": (layer(512, backend),) for backend in ("masked", "bmm", "slice")}}
    wanted |= {f"auto, C={C}": (layer(C),) for C in CHUNKS if C <= seq_len}
    wanted |= {f"routed 1/4 by itself, auto, C={C}": (alone(C), True, True) for C in CHUNKS if C <= seq_len}
    wanted |= {"the same, all chunks of 512": (alone(512), False, True)}
    variants, timings = {name: build(*how) for name, how in wanted.items()}, {name: ([], []) for name in wanted}
    for number in range(rounds + 2):  # two to compile and warm up
        for name, (forward, muon) in variants.items():
            def forward_backward() -> None:
                muon.zero_grad(set_to_none=True)
                x.grad = None
                forward(x).backward(grad)
            for work, times, seconds in ((forward_backward, repeat, timings[name][0]), (muon.step, 1, timings[name][1])):
                synchronize()
                begun = time.perf_counter()
                for _ in range(times):
                    work()
                synchronize()
                seconds.append((time.perf_counter() - begun) / times)
    return {name: {"pass_s": passes[2:], "optimizer_s": steps[2:], "flops": flops(wanted[name][0]) / flops(None)}
            for name, (passes, steps) in timings.items()}

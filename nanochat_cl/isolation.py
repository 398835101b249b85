"""
Whether isolation holds, bit by bit.

    python -m nanochat_cl.isolation audit CKPT_A CKPT_B [--arm cl]     which blocks differ between two checkpoints, and by how much

A checkpoint is a folder of base_checkpoints (its last step counts), or of a Phase B run's checkpoints (<run>/checkpoints/000128, with
--arm). While a run is under way, `evolve --audit` makes every optimizer step an `audited_step`.
"""
import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from nanochat_cl import command
from nanochat_cl.command import UserError


def bits(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # `contiguous` leaves odd strides of dimensions of 1


def watched(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, list[Tensor], Tensor]]:
    """
    All that isolation covers: "blocks" or "rows", weight and optimizer state of a parameter as pieces (N, ...), and which pieces got a
    gradient (N,). A block is one of an MLP or a head; a row is one of a router or of an embedding, for each head if heads share it.
    """
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            state = optimizer.state[group["params"][0] if group.get("isolate") else p]
            if group.get("isolate"):
                moments = [state[k][i] for k in ("momentum_buffer", "second_momentum_buffer") if k in state]
                yield "blocks", [p, *moments], p.grad.flatten(1).any(1)
            elif group.get("rows"):
                cut = lambda x: x.unflatten(-1, (group["rows"], -1)).flatten(0, 1)
                yield "rows", [cut(x) for x in (p, *(state[k] for k in ("exp_avg", "exp_avg_sq") if k in state))], cut(p.grad).any(1)


@torch.no_grad()
def audited_step(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """
    A step on one rank that also counts the idle pieces, {"blocks", "rows"}: RuntimeError unless each, with its moments, has kept every
    bit. A block of an MLP is two pieces (rows of both matrices), a head four (of c_q, c_k, c_v and c_proj) or five (ve_gate).
    """
    before = [(kind, ~learns, [bits(x[~learns]) for x in pieces]) for kind, pieces, learns in watched(optimizer)]
    optimizer.step()
    counts = {"blocks": 0, "rows": 0}
    for (kind, idle, kept), (_, pieces, _) in zip(before, watched(optimizer)):
        if not all(torch.equal(old, bits(x[idle])) for old, x in zip(kept, pieces)):
            raise RuntimeError(f"isolation is broken: {kind} of a parameter {tuple(pieces[0].shape)} moved without a gradient")
        counts[kind] += int(idle.sum())
    return counts


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> Iterator[tuple[str, int, int, str]]:
    """
    For every parameter of two state dicts: name, pieces that are bit for bit the same, pieces, and for blocks and heads, one by one, the
    relative change |b - a| / |a| ("=" where no bit differs, inf from zero). Pieces are blocks, heads or rows.
    """
    for name, old in a.items():
        x, y = (t.flatten(1) if t.ndim > 1 else t[None] for t in (old, b[name]))
        same = (bits(x) == bits(y)).all(1)
        change, size = (y.float() - x.float()).norm(dim=1), x.float().norm(dim=1)
        each = " ".join("=" if still else relative(*c) for still, *c in zip(same.tolist(), change, size)) if old.ndim == 3 else ""
        yield name, int(same.sum()), len(same), each or relative(change.norm(), size.norm())


def relative(change: Tensor, size: Tensor) -> str:
    return f"{change / size if change else 0.0:.2g}"


def load(place: Path, arm: str | None) -> dict[str, Tensor]:
    """The model of a checkpoint; UserError where there is none."""
    files = sorted(place.glob("model_*.pt")) or sorted(place.glob("state_rank0.pt"))
    if not files:
        raise UserError(f"{place}: expected a checkpoint folder with model_<step>.pt or state_rank0.pt in it, found neither")
    data = torch.load(files[-1], map_location="cpu", weights_only=True)
    data.pop("routing_embedding", None)  # a model kept out of Phase B brings Phase A's embeddings along
    if "arms" not in data:
        return data
    if arm not in data["arms"]:
        raise UserError(f"{place} holds the arms {', '.join(data['arms'])}; name one of them by --arm")
    return data["arms"][arm]["model"]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nanochat_cl.isolation", description="Compare two checkpoints block by block")
    parser.add_argument("command", choices=["audit"])
    parser.add_argument("checkpoints", nargs=2, type=Path, metavar="CKPT", help="folder in base_checkpoints, or in a run's checkpoints")
    parser.add_argument("--arm", default="cl", help="of a Phase B state (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    a, b = (load(place, args.arm) for place in args.checkpoints)
    if unlike := [name for name in a if name not in b or a[name].shape != b[name].shape] or [name for name in b if name not in a]:
        raise UserError(f"the checkpoints are of different models: {unlike[0]} is not in both, or not of one shape")
    print(f"{'parameter':<36}{'bit-identical':>16}  relative change (of each block or head: = is none)")
    for name, same, count, change in differing(a, b):
        print(f"{name:<36}{f'{same} of {count}':>16}  {change}")


if __name__ == "__main__":
    command.run(main)

"""
The compared models by name. An arm of your own is one more line in ARMS.
"""
from dataclasses import dataclass, field
from typing import Any

from nanochat_cl.command import UserError

REACHES = ("bos", "row", "ema")
BACKENDS = ("auto", "masked", "bmm")
OPTIONS = {"chunk": 512, "reach": "bos", "backend": "auto", "isolate": True}  # what an arm or a caller may change


@dataclass(frozen=True)
class Arm:
    name: str
    cl: dict[str, Any] | None = field(default=None)  # what differs from Model-CL's defaults; None: a plain dense model
    rows: bool = False                               # embedding rows of absent tokens stand still (`plasticity.mark_rows`)
    description: str = ""


ARMS = {arm.name: arm for arm in (
    Arm("dense", description="plain nanochat"),
    Arm("cl", {}, description="block-sparse MLP, chunk routing, isolated updates"),
    Arm("cl-noiso", {"isolate": False}, description="cl with the masks off: the same block-wise Muon, idle blocks and rows move"),
    Arm("cl-full", {"active": "all"}, description="cl with every block active: what sparsity itself does"),
    Arm("dense-rows", rows=True, description="dense with cl's row masks: what lazy embedding rows do"),
)}


def named(name: str) -> Arm:
    """The arm of that name; UserError when there is none."""
    if name not in ARMS:
        raise UserError(f"no arm {name!r}: expected one of {', '.join(ARMS)}; a new arm is a line in nanochat_cl/arms.py")
    return ARMS[name]


def sizes(n_embd: int, every: bool = False) -> dict[str, int]:
    """
    How the hidden layer (4 n_embd units) is cut: width of a block, blocks, shared ones, active routed ones (`every`: all).
    About an eighth is shared and a quarter routed and active, so 3/8 of the dense MLP works for a token.
    """
    block = min(128, n_embd // 4)
    if n_embd < 24 or 4 * n_embd % block:
        raise UserError(f"Model-CL cuts {4 * n_embd} hidden units into blocks of {block}: expected a width that is a multiple of 4 "
                        f"(of 32 from 512 on) and at least 24, got {n_embd}; change --depth, --aspect-ratio or --head-dim")
    blocks = 4 * n_embd // block
    shared = max(1, round(blocks / 8))
    return {"block": block, "blocks": blocks, "shared": shared, "active": blocks - shared if every else round(blocks / 4)}


def cl(n_embd: int, bos: int, arm: str | Arm, **changed: Any) -> dict[str, Any] | None:
    """
    The `cl` of a model config, plain JSON values; None for a dense arm. bos: id of the token that begins documents.
    changed: chunk, reach, backend, isolate or active (a number, or "all") where the caller wants others than the arm's.
    """
    arm = named(arm) if isinstance(arm, str) else arm
    if arm.cl is None:
        return None
    options = {**OPTIONS, "active": None, **arm.cl, **changed}
    if unknown := set(options) - {*OPTIONS, "active"}:
        raise UserError(f"arm {arm.name}: unknown option {', '.join(sorted(unknown))}; expected {', '.join(OPTIONS)} or active")
    active = options.pop("active")
    resolved = {**sizes(n_embd, every=active == "all"), **options, "bos": bos}
    if active not in (None, "all"):
        resolved["active"] = active
    return check(resolved)


def fit(cl: dict[str, Any], n_embd: int) -> dict[str, Any]:
    """The same arm at another width: nanochat's base_train also builds a d12 model, for its reference numbers."""
    if cl["block"] * cl["blocks"] == 4 * n_embd:
        return check(dict(cl))
    return check({**cl, **sizes(n_embd, every=cl["active"] == cl["blocks"] - cl["shared"])})


def check(cl: dict[str, Any]) -> dict[str, Any]:
    """`cl` itself; UserError when its values don't fit together."""
    routed = cl["blocks"] - cl["shared"]
    if not 1 <= cl["active"] <= routed:
        raise UserError(f"active must be between 1 and the {routed} routed blocks, got {cl['active']}")
    if cl["chunk"] < 1 or cl["reach"] not in REACHES or cl["backend"] not in BACKENDS:
        raise UserError(f"expected a chunk of at least 1 token, a reach of {', '.join(REACHES)} and a backend of {', '.join(BACKENDS)}, "
                        f"got {cl['chunk']}, {cl['reach']} and {cl['backend']}")
    return cl

"""
The compared models by name. An arm of your own is one more line in ARMS.
"""
import math
from dataclasses import dataclass, field
from typing import Any

from nanochat_cl.command import UserError

REACHES = ("bos", "row", "ema", "token")
BACKENDS = ("auto", "masked", "bmm", "slice")
MATCHES = ("params", "flops")
OPTIONS = {  # what an arm, or a flag of pretrain, may change
    "chunk": (512, "tokens between two decisions"),
    "reach": ("bos", "what a decision looks at: since the last `bos`, the `row` so far, an `ema` of it, or the `token` itself (chunk 1)"),
    "backend": ("auto", "how the chosen blocks are computed: auto, masked, bmm or slice"),
    "match": ("params", "what equals the dense model: total `params`, or active `flops` per token"),
    "width_mult": (1.0, "hidden units over the dense model's; other than 1 with match flops only"),
    "reserve": (0.0, "share of the routed blocks that are held back until Phase B"),
}


@dataclass(frozen=True)
class Arm:
    name: str
    cl: dict[str, Any] | None = field(default=None)  # what differs from Model-CL's defaults; None: a plain dense model
    rows: bool = False                               # embedding rows of absent tokens stand still (`plasticity.mark_rows`)
    lora: int = 0                                    # rank of the adapters that learn in the place of the matrices
    recipe: dict[str, Any] = field(default_factory=dict)  # options of its own in Phase B; an lr_mult multiplies the run's
    phase_a: str = ""                                # the arm whose Phase A checkpoint it starts from, where it differs in Phase B only
    description: str = ""

    def __post_init__(self):
        if self.cl is not None and (self.rows or self.lora):
            raise UserError(f"arm {self.name}: rows and lora are for dense arms, Model-CL has row masks of its own")


ARMS = {arm.name: arm for arm in (
    Arm("dense", description="plain nanochat"),
    Arm("cl", {}, description="block-sparse MLP, routed heads, isolated updates; as many parameters as dense"),
    Arm("cl-flops", {"match": "flops", "width_mult": 2.0, "reserve": 0.5},
        description="as many FLOPs as dense in Phase A: twice the width, half in reserve"),
    Arm("cl-token", {"chunk": 1, "reach": "token"}, description="cl with a decision for every token"),
    Arm("cl-mlp", {"heads": False}, description="cl with dense attention"),
    Arm("cl-row", {"reach": "row"}, description="cl routed by all of the row so far, whatever document it is from"),
    Arm("cl-ema", {"reach": "ema"}, description="cl routed by an exponential mean of the row so far"),
    Arm("cl-noiso", {"isolate": False}, description="cl with the masks off: the same block-wise Muon, idle blocks and rows move"),
    Arm("cl-full", {"active": "all"}, description="cl with every block and head active: what sparsity itself does"),
    # Controls: what else makes a dense model forget less, so that it does not belong to Model-CL alone.
    Arm("dense-rows", rows=True, phase_a="dense", description="dense with cl's row masks: what lazy embedding rows do"),
    Arm("dense-frozen", recipe={"plasticity": "frozen-shared"}, phase_a="dense", description="dense with all but its MLPs frozen"),
    Arm("dense-low-lr", recipe={"lr_mult": 0.1}, phase_a="dense", description="dense at a tenth of the learning rate"),
    *(Arm(f"dense-replay-{p}", recipe={"replay": p / 100}, phase_a="dense", description=f"dense, {p} % of each batch general text")
      for p in (1, 5, 25)),
    Arm("dense-lora", lora=16, phase_a="dense", description="dense, frozen, with low-rank adapters"),
)}


def named(name: str) -> Arm:
    """The arm of that name; UserError when there is none."""
    if name not in ARMS:
        raise UserError(f"no arm {name!r}: expected one of {', '.join(ARMS)}; a new arm is a line in nanochat_cl/arms.py")
    return ARMS[name]


def sizes(n_embd: int, n_head: int, match: str = "params", width_mult: float = 1.0, reserve: float = 0.0, heads: bool = True,
          active: str | int | None = None) -> dict[str, int]:
    """
    How the hidden layer is cut. About an eighth of the blocks is shared. Matched by parameters, a quarter is routed and active besides,
    so 3/8 of the dense MLP works for a token; matched by FLOPs, as many are active as the whole dense layer has. Of the reserve a quarter
    will join. A quarter of the heads is shared, half of the others active; of one or two heads all, for there is nothing to choose.
    active: "all", or a number of blocks.
    """
    block = min(128, n_embd // 4)
    if n_embd < 24 or 4 * n_embd % block:
        raise UserError(f"Model-CL cuts {4 * n_embd} hidden units into blocks of {block}: expected a width that is a multiple of 4 "
                        f"(of 32 from 512 on) and at least 24, got {n_embd}; change --depth, --aspect-ratio or --head-dim")
    dense = 4 * n_embd // block
    if match == "params" and width_mult != 1 or not 0 <= reserve < 1 or not 1 <= width_mult <= 7 or dense * width_mult % 1:
        raise UserError(f"expected a width-mult of 1 to 7 (1 for match params) that makes {dense} blocks another whole number of them, and a "
                        f"reserve of 0 to 1, got {width_mult} and {reserve}")
    blocks, shared_heads = round(dense * width_mult), max(1, round(n_head / 4)) if heads and n_head > 2 else n_head
    shared = max(1, round(blocks / 8))
    held = round(reserve * (blocks - shared))
    live, routed_heads = blocks - shared - held, n_head - shared_heads
    wanted = {None: round(blocks / 4) if match == "params" else dense - shared, "all": live}.get(active, active)
    return {"block": block, "blocks": blocks, "shared": shared, "active": wanted, "held": held, "join": math.ceil(held / 4), "released": 0,
            "shared_heads": shared_heads, "active_heads": routed_heads if active == "all" else math.ceil(routed_heads / 2)}


def cl(n_embd: int, n_head: int, bos: int, arm: str | Arm, **changed: Any) -> dict[str, Any] | None:
    """
    The `cl` of a model config, plain JSON values; None for a dense arm. bos: id of the token that begins documents.
    changed: OPTIONS, isolate, heads or active (a number of blocks, or "all") where the caller wants others than the arm's.
    """
    arm = named(arm) if isinstance(arm, str) else arm
    if arm.cl is None:
        return None
    options = {**{name: default for name, (default, _) in OPTIONS.items()}, "isolate": True, "heads": True, "active": None}
    if unknown := {*arm.cl, *changed} - {*options}:
        raise UserError(f"arm {arm.name}: unknown option {', '.join(sorted(unknown))}; expected {', '.join(options)}")
    options |= arm.cl | changed
    if options["match"] not in MATCHES or options["reach"] not in REACHES or options["backend"] not in BACKENDS:
        raise UserError(f"expected match {', '.join(MATCHES)}, reach {', '.join(REACHES)} and backend {', '.join(BACKENDS)}, "
                        f"got {options['match']}, {options['reach']} and {options['backend']}")
    if options["chunk"] < 1 or (options["reach"] == "token") != (options["chunk"] == 1):
        raise UserError(f"expected a chunk of at least 1 token, and of 1 with reach token, got {options['chunk']} with {options['reach']}")
    cut = {name: options.pop(name) for name in ("match", "width_mult", "reserve", "heads", "active")}
    made = {**sizes(n_embd, n_head, **cut), **options, "bos": bos, "n_embd": n_embd, "n_head": n_head}
    live = made["blocks"] - made["shared"] - made["held"]
    if not 1 <= made["active"] <= live:
        raise UserError(f"active must be between 1 and the {live} routed blocks that are not in reserve, got {made['active']}")
    if made["held"] and not made["isolate"]:
        raise UserError("a reserve needs isolated updates: without masks weight decay would move what no token has used")
    return made


def fit(cl: dict[str, Any], n_embd: int, n_head: int) -> dict[str, Any]:
    """`cl` itself; at another width the default cut: nanochat's base_train also builds a d12 model, for its reference numbers."""
    same = (cl["n_embd"], cl["n_head"]) == (n_embd, n_head)
    return dict(cl) if same else {**cl, **sizes(n_embd, n_head), "n_embd": n_embd, "n_head": n_head}

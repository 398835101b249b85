"""
MuonAdamW: Muon for the matrices inside the blocks, AdamW for everything else, sharded over ranks (ZeRO-2 style, no DDP wrapper).

Sources: AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), Muon (Jordan et al. 2024), Polar Express (Amsel et al. 2025, arXiv 2505.16932),
NorMuon (arXiv 2510.05491), cautious weight decay (arXiv 2510.12402).

K matrices of a Muon group, W ranks, `chunk` = ceil(K / W) matrices owned by a rank, r x c one matrix.
"""
import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.common import COMPUTE_DTYPE

# (a, b, c) of each odd quintic a X + b X X'X + c X (X'X)^2, for five iterations, safety 2e-2, cushion 2.
polar_express_coeffs = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
REPLICATED_NUMEL = 1024  # an AdamW parameter smaller than this is all-reduced whole, its state kept on every rank


@torch.compile(dynamic=False, fullgraph=True)
def adamw_step_fused(p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step_t: Tensor, lr_t: Tensor, beta1_t: Tensor,
                     beta2_t: Tensor, eps_t: Tensor, wd_t: Tensor) -> None:
    """
    One AdamW step in place on p, exp_avg and exp_avg_sq (one shape, any float dtype; computed in fp32), as torch.optim.AdamW.
    The scalars are 0-D fp32 CPU tensors, so that a new value doesn't recompile.
    """
    w, g, m, v = p.float(), grad.float(), exp_avg.float(), exp_avg_sq.float()
    w = w * (1 - lr_t * wd_t)
    m = m + (1 - beta1_t) * (g - m)
    v = v + (1 - beta2_t) * (g * g - v)
    denominator = (v / (1 - beta2_t ** step_t)).sqrt() + eps_t
    w = w - lr_t / (1 - beta1_t ** step_t) * (m / denominator)
    p.copy_(w)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)


@torch.compile(dynamic=False, fullgraph=True)
def muon_step_fused(stacked_grads: Tensor, stacked_params: Tensor, momentum_buffer: Tensor, second_momentum_buffer: Tensor,
                    momentum_t: Tensor, lr_t: Tensor, wd_t: Tensor, beta2_t: Tensor, ns_steps: int, red_dim: int) -> None:
    """
    One Muon step in place on a stack (K, r, c) of gradients, parameters and momentum, each matrix on its own.
    second_momentum_buffer: (K, r, 1) with red_dim -1 for tall and square matrices, (K, 1, c) with red_dim -2 for wide ones.
    Raises RuntimeError when that buffer doesn't fit the stack.
    """
    r, c = stacked_params.shape[-2:]
    # Nesterov momentum
    mu = momentum_t.to(stacked_grads.dtype)
    momentum_buffer.lerp_(stacked_grads, 1 - mu)
    stacked_grads.lerp_(momentum_buffer, mu)
    # Orthogonalise: equal row norms first (MuonEq), then the quintic iterations on the smaller Gram matrix
    x = stacked_grads.bfloat16() if COMPUTE_DTYPE is torch.bfloat16 else stacked_grads
    row_norm = x.float().norm(dim=-1, keepdim=True)
    target = row_norm.square().sum(dim=-2, keepdim=True).sqrt() / r ** 0.5
    x = x * (target / row_norm.clamp_min(1e-6)).to(x.dtype)
    x = x / (1.01 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    for a, b, c_ in polar_express_coeffs[:ns_steps]:
        gram = x.mT @ x if r > c else x @ x.mT
        poly = b * gram + c_ * (gram @ gram)
        x = a * x + (x @ poly if r > c else poly @ x)
    g = x.to(stacked_params.dtype)
    # Exact Frobenius norm of an orthogonal matrix (Muon+)
    g = g * (min(r, c) ** 0.5 / g.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-6))
    # Flatten the norms of rows (or columns) by their running second moment, keeping the Frobenius norm (NorMuon)
    d = g.size(red_dim)
    v = g.float().square().mean(dim=red_dim, keepdim=True)
    norm = (v * d).sum(dim=(-2, -1), keepdim=True).sqrt()
    beta2 = beta2_t.to(second_momentum_buffer.dtype)
    second_momentum_buffer.lerp_(v.to(second_momentum_buffer.dtype), 1 - beta2)
    s = second_momentum_buffer.float().clamp_min(1e-10).rsqrt()
    new_norm = (v * d * s.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    g = g * (s * (norm / new_norm.clamp_min(1e-10))).to(g.dtype)
    # Decay only where it doesn't fight the update; zero counts as agreement
    lr, wd = lr_t.to(g.dtype), wd_t.to(g.dtype)
    mask = (g * stacked_params >= 0).to(g.dtype)
    stacked_params.sub_(lr * g + lr * wd * stacked_params * mask)


class MuonAdamW(torch.optim.Optimizer):
    """
    Groups of kind "adamw" (params, lr, betas, eps, weight_decay) and "muon" (params of ONE shape, lr, momentum, ns_steps, beta2,
    weight_decay); other keys are carried along and ignored. Under a process group every rank calls step() with its own gradients:
    they are averaged, each rank updates its share (first-dimension slices for AdamW, whole matrices for Muon) and the results are gathered.

    State: AdamW {"step", "exp_avg", "exp_avg_sq"} per parameter, of the rank's slice; Muon {"momentum_buffer", "second_momentum_buffer"}
    per group under its first parameter, `chunk` matrices of it. So a state dict belongs to a rank and to a world size.
    """

    def __init__(self, param_groups: list[dict]):
        super().__init__(param_groups, defaults={})
        for name in ("adamw_step", "adamw_lr", "adamw_beta1", "adamw_beta2", "adamw_eps", "adamw_wd",
                     "muon_momentum", "muon_lr", "muon_wd", "muon_beta2"):
            setattr(self, f"_{name}_t", torch.tensor(0.0, dtype=torch.float32, device="cpu"))

    @torch.no_grad()
    def step(self) -> None:
        """One update of everything. Raises ValueError on an unknown kind, before anything has moved; every parameter needs a gradient."""
        for group in self.param_groups:
            if group["kind"] not in ("adamw", "muon"):
                raise ValueError(f"unknown optimizer kind {group['kind']!r} in a parameter group; expected 'adamw' or 'muon'")
        initialised = dist.is_available() and dist.is_initialized()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if initialised else (0, 1)
        infos = [self._reduce_adamw(group, world_size) if group["kind"] == "adamw" else self._reduce_muon(group, world_size)
                 for group in self.param_groups]
        gather_list: list[dict] = []
        for group, info in zip(self.param_groups, infos):
            if group["kind"] == "adamw":
                self._compute_adamw(group, info, gather_list, rank, world_size)
            else:
                self._compute_muon(group, info, gather_list, rank)
        self._finish_gathers(gather_list)

    def _reduce_adamw(self, group: dict, world_size: int) -> dict:
        """Start averaging the gradients. {"params": {p: {"work", "grad", "sharded"}}}, grad being this rank's slice where sharded."""
        params = {}
        for p in group["params"]:
            grad, work, sharded = p.grad, None, world_size > 1 and p.numel() >= REPLICATED_NUMEL
            if sharded:
                assert p.shape[0] % world_size == 0, f"first dimension of {tuple(p.shape)} must divide by the world size {world_size}"
                grad = torch.empty_like(p.grad[:p.shape[0] // world_size])
                work = dist.reduce_scatter_tensor(grad, p.grad.contiguous(), op=dist.ReduceOp.AVG, async_op=True)
            elif world_size > 1:
                work = dist.all_reduce(grad, op=dist.ReduceOp.AVG, async_op=True)
            params[p] = {"work": work, "grad": grad, "sharded": sharded}
        return {"params": params}

    def _reduce_muon(self, group: dict, world_size: int) -> dict:
        """Start averaging this rank's chunk: {"chunk_size", "work", "grads" (chunk, r, c), "stacked" (W chunk, r, c)}."""
        grads = [p.grad for p in group["params"]]
        chunk = -(-len(grads) // world_size)
        stacked = torch.stack(grads)
        if world_size == 1:
            return {"chunk_size": chunk, "work": None, "grads": stacked, "stacked": stacked}
        if padding := world_size * chunk - len(grads):
            stacked = torch.cat([stacked, stacked.new_zeros(padding, *stacked.shape[1:])])
        mine = torch.empty_like(stacked[:chunk])
        work = dist.reduce_scatter_tensor(mine, stacked, op=dist.ReduceOp.AVG, async_op=True)
        return {"chunk_size": chunk, "work": work, "grads": mine, "stacked": stacked}

    def _compute_adamw(self, group: dict, info: dict, gather_list: list[dict], rank: int, world_size: int) -> None:
        """Update each parameter (or this rank's slice of it) in place and start gathering the slices."""
        beta1, beta2 = group["betas"]
        self._adamw_lr_t.fill_(group["lr"])
        self._adamw_beta1_t.fill_(beta1)
        self._adamw_beta2_t.fill_(beta2)
        self._adamw_eps_t.fill_(group["eps"])
        self._adamw_wd_t.fill_(group["weight_decay"])
        for p in group["params"]:
            todo = info["params"][p]
            if todo["work"] is not None:
                todo["work"].wait()
            rows = p.shape[0] // world_size if todo["sharded"] else None
            mine = p[rank * rows:(rank + 1) * rows] if todo["sharded"] else p
            state = self.state[p]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(mine)
                state["exp_avg_sq"] = torch.zeros_like(mine)
            state["step"] += 1
            self._adamw_step_t.fill_(state["step"])
            adamw_step_fused(mine, todo["grad"], state["exp_avg"], state["exp_avg_sq"], self._adamw_step_t, self._adamw_lr_t,
                             self._adamw_beta1_t, self._adamw_beta2_t, self._adamw_eps_t, self._adamw_wd_t)
            if todo["sharded"]:
                gather_list.append({"work": dist.all_gather_into_tensor(p, mine, async_op=True), "params": None, "stacked": None})

    def _compute_muon(self, group: dict, info: dict, gather_list: list[dict], rank: int) -> None:
        """Update the matrices this rank owns and start gathering all of them into the gradient buffer, which is free by then."""
        params, chunk = group["params"], info["chunk_size"]
        if info["work"] is not None:
            info["work"].wait()
        p, state = params[0], self.state[params[0]]
        tall = p.shape[-2] >= p.shape[-1]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = p.new_zeros(chunk, *p.shape)
        if "second_momentum_buffer" not in state:
            state["second_momentum_buffer"] = p.new_zeros(chunk, p.shape[-2], 1) if tall else p.new_zeros(chunk, 1, p.shape[-1])
        owned = params[rank * chunk:(rank + 1) * chunk]
        if owned:
            self._muon_momentum_t.fill_(group["momentum"])
            self._muon_lr_t.fill_(group["lr"] * max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5)
            self._muon_wd_t.fill_(group["weight_decay"])
            self._muon_beta2_t.fill_(group["beta2"])
            n = len(owned)
            updated = torch.stack(owned)
            muon_step_fused(info["grads"][:n], updated, state["momentum_buffer"][:n], state["second_momentum_buffer"][:n],
                            self._muon_momentum_t, self._muon_lr_t, self._muon_wd_t, self._muon_beta2_t,
                            group["ns_steps"], -1 if tall else -2)
        if info["work"] is None:
            torch._foreach_copy_(params, list(updated.unbind(0)))
            return
        mine = torch.zeros_like(info["grads"])
        if owned:
            mine[:n].copy_(updated)
        work = dist.all_gather_into_tensor(info["stacked"], mine, async_op=True)
        gather_list.append({"work": work, "params": params, "stacked": info["stacked"]})

    def _finish_gathers(self, gather_list: list[dict]) -> None:
        """Wait for every gather; copy Muon's results from the shared buffer into the parameters."""
        for gather in gather_list:
            gather["work"].wait()
            if gather["params"] is not None:
                torch._foreach_copy_(gather["params"], list(gather["stacked"][:len(gather["params"])].unbind(0)))

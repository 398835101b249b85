"""
Muon block by block, and a block without a gradient stays exactly as it is.

Target:   nanochat.optim:MuonAdamW._compute_muon
Why:      Muon would take a stack of blocks for one odd matrix; and it renormalises stale momentum, so that a block whose gradient is
          zero goes on moving at nearly full speed for hundreds of steps, weight decay besides.
Keeps:    groups without the key `isolate` (every group of a dense model) go to the original untouched. The arithmetic of a step is the
          original kernel's, communication and checkpoint layout are the original's. The mask is read off the reduced gradient, so
          all ranks see the same one.
Verified: tests/test_isolation.py.

K matrices of G blocks (b, n). Keys of a group: `isolate` (bool); `decay`, the dense model's learning rate over ours, which decay follows;
`block_scale` (G floats, optional), factors on the step of each block.
"""
import torch

SIGNATURE = ("self", "group", "info", "gather_list", "rank")


def block_step(kernel, group):
    """`kernel` (nanochat's muon_step_fused) for stacks (K, G, b, n) of one parameter group."""
    def step(grads, params, momentum, second, momentum_t, lr_t, wd_t, beta2_t, ns_steps, red_dim):
        factor = torch.tensor(group.get("block_scale") or [1.0], device=params.device).expand(params.shape[:2])     # (K, G)
        if group["isolate"]:
            factor = factor * grads.flatten(-2).any(-1)
        idle = (factor == 0).nonzero(as_tuple=True)
        slowed = ((factor != 0) & (factor != 1)).nonzero(as_tuple=True)
        idle_before, slowed_before = [t[idle] for t in (params, momentum, second)], params[slowed]

        # All blocks take the step, each as a matrix of its own, ..
        stacks = (t.view(-1, *t.shape[2:]) for t in (grads, params, momentum, second))
        lr = torch.full_like(lr_t, group["lr"])  # upstream's own factor for tall matrices doesn't apply, see gpt_optimizer
        kernel(*stacks, momentum_t, lr, wd_t * group["decay"], beta2_t, ns_steps, -1)
        # .. those with a factor go only so much of it, and the idle ones are put back.
        params[slowed] = slowed_before.lerp(params[slowed], factor[slowed].to(params.dtype)[:, None, None])
        for now, before in zip((params, momentum, second), idle_before):
            now[idle] = before
    return step


def wrap(original):
    def _compute_muon(self, group, info, gather_list, rank):
        if "isolate" not in group:
            return original(self, group, info, gather_list, rank)
        import nanochat.optim as optim
        first = group["params"][0]
        if "second_momentum_buffer" not in self.state[first]:  # upstream's has no place for the blocks
            self.state[first]["second_momentum_buffer"] = first.new_zeros(info["chunk_size"], *first.shape[:2], 1)
        kernel = optim.muon_step_fused
        optim.muon_step_fused = block_step(kernel, group)
        try:
            return original(self, group, info, gather_list, rank)
        finally:
            optim.muon_step_fused = kernel
    return _compute_muon

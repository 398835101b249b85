"""patches/optim_blocks, optim_rows, gpt_optimizer: sizes of steps, and that what got no gradient does not move by one bit."""
import pytest
import torch

from nanochat_cl import patching, routing
from tests.tiny_cl import build, tokens, train


@pytest.fixture(autouse=True, scope="module")
def patched():
    with patching.applied(), torch.compiler.set_stance("force_eager"):
        yield


def give_gradients(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def reference_block_step(p, g, momentum, second, lr, wd, beta2=0.9, mu=0.95):
    """One block (b, n) after the specification of Muon, in float64: the update of the weight, and both new states."""
    from nanochat import optim
    momentum = momentum + (1 - mu) * (g - momentum)
    x = (1 - mu) * g + mu * momentum
    rows = x.norm(dim=1, keepdim=True)
    x = x * (x.norm() / len(x) ** 0.5) / rows
    x = x / (1.01 * x.norm())
    for a, b, c in optim.polar_express_coeffs:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x * len(x) ** 0.5 / x.norm()
    v = x.square().mean(1, keepdim=True)
    second = second + (1 - beta2) * (v - second)
    flat = x / second.sqrt()
    x = flat * x.norm() / flat.norm()
    return p - lr * x - lr * wd * p * (x * p >= 0), momentum, second


@pytest.mark.parametrize("arm", ["cl", "cl-noiso"])
def test_every_block_is_stepped_as_a_matrix_of_its_own(arm):
    model = build(arm)
    optimizer = model.setup_optimizer(matrix_lr=0.03, weight_decay=0.1)
    before = {name: p.detach().double() for name, p in model.named_parameters() if ".mlp.c_" in name}
    momentum = {name: torch.zeros_like(p) for name, p in before.items()}
    second = {name: torch.zeros(*p.shape[:2], 1, dtype=torch.float64) for name, p in before.items()}
    for step in range(3):
        give_gradients(model, seed=step)
        optimizer.step()
        for name, p in before.items():
            grad = dict(model.named_parameters())[name].grad.double()
            lr = 0.03 if "c_fc" in name else 0.015
            for g in range(16):
                p[g], momentum[name][g], second[name][g] = reference_block_step(p[g], grad[g], momentum[name][g], second[name][g], lr, 0.2)
    for name, p in model.named_parameters():
        if name in before:
            torch.testing.assert_close(p.detach().double(), before[name], atol=2e-5, rtol=0)


def test_a_hidden_unit_moves_as_far_as_in_the_dense_model_and_decays_as_much():
    moved = {}
    for arm in ("dense", "cl"):
        model = build(arm)
        optimizer = model.setup_optimizer(matrix_lr=0.01)
        for step in range(20):
            give_gradients(model, seed=step)
            optimizer.step() if step < 19 else None
        before = [(b.mlp.c_fc.weight.clone(), b.mlp.c_proj.weight.clone()) for b in model.transformer.h]
        optimizer.step()
        for layer, block in enumerate(model.transformer.h):
            fc, proj = block.mlp.c_fc.weight - before[layer][0], block.mlp.c_proj.weight - before[layer][1]
            if arm == "dense":
                proj = proj.T
            moved[arm, layer] = fc.reshape(-1, 32).norm(dim=1), proj.reshape(-1, 32).norm(dim=1)   # per hidden unit
    for layer in range(2):
        for dense, ours, factor in zip(moved["dense", layer], moved["cl", layer], (1.0, 0.5)):
            assert len(dense) == len(ours) == 128
            assert abs(dense.mean().item() / 0.01 - factor) < 0.03 * factor, dense.mean()
            for blocks in (ours[:16], ours[16:]):   # the shared blocks, the routed ones
                assert abs(blocks.mean().item() / 0.01 - factor) < 0.03 * factor, blocks.mean()
    decay = {}
    for arm in ("dense", "cl"):
        model = build(arm)
        optimizer = model.setup_optimizer(matrix_lr=0.01, weight_decay=0.1)
        other = build(arm)
        plain = other.setup_optimizer(matrix_lr=0.01)
        for m, o in ((model, optimizer), (other, plain)):
            give_gradients(m)
            o.step()
        for which in ("c_fc", "c_proj"):
            # cautious decay acts where update and weight agree in sign: look at those weights
            start, a, b = (getattr(m.transformer.h[0].mlp, which).weight.detach() for m in (build(arm), model, other))
            shrunk = ((b - a) / start)[(b - a) != 0]
            decay[arm, which] = shrunk.median().item()
    for which, expected in (("c_fc", 2 * 0.01 * 0.1), ("c_proj", 0.01 * 0.1)):
        assert decay["dense", which] == pytest.approx(expected, rel=1e-2) and decay["cl", which] == pytest.approx(expected, rel=1e-2)


def state_of(model, optimizer, layer, block):
    """Weights, moments and router row of one routed block."""
    mlp, row = model.transformer.h[layer].mlp, block + model.transformer.h[layer].mlp.shared
    found = {}
    for name in ("c_fc", "c_proj"):
        state = optimizer.state[getattr(model.transformer.h[0].mlp, name).weight]
        found |= {name: getattr(mlp, name).weight[row], f"{name} momentum": state["momentum_buffer"][layer, row],
                  f"{name} second": state["second_momentum_buffer"][layer, row]}
    adam = optimizer.state[mlp.router]
    return {k: v.detach().clone() for k, v in {**found, "router": mlp.router[block], "router m": adam["exp_avg"][block],
                                               "router v": adam["exp_avg_sq"][block]}.items()}


def ban(model, optimizer, layer, block):
    """From now on nobody chooses that block."""
    with torch.no_grad():
        model.transformer.h[layer].mlp.balance[block] = -1e6


@pytest.mark.parametrize("arm", ["cl", "cl-noiso"])
def test_an_idle_block_does_not_move_by_a_single_bit_in_fifty_steps_with_decay(arm):
    model = build(arm)
    optimizer = model.setup_optimizer(matrix_lr=0.02, weight_decay=0.1)
    train(model, optimizer, 5)                    # momentum of every kind is there
    ban(model, optimizer, 1, 6)
    routing.reset_usage(model)
    before = {b: state_of(model, optimizer, 1, b) for b in range(14)}
    assert all(t.any() for t in before[6].values()), "a block without momentum proves nothing"
    train(model, optimizer, 50, seed=1)
    used = routing.usage(model)[1]
    assert used[6] == 0 and (used > 0).sum() >= 4, used
    after = {b: state_of(model, optimizer, 1, b) for b in range(14)}
    same = {b: [key for key in after[b] if torch.equal(after[b][key], before[b][key])] for b in range(14)}
    if arm == "cl":
        assert len(same[6]) == 9, f"moved: {set(after[6]) - set(same[6])}"
        assert not [b for b in range(14) if (used[b] > 0) and same[b]], same
    else:
        drift = (after[6]["c_fc"] - before[6]["c_fc"]).norm() / before[6]["c_fc"].norm()
        assert not same[6] and drift > 0.3, f"without isolation stale momentum carries a block on: {drift}"


@pytest.mark.parametrize("arm", ["cl", "cl-noiso"])
def test_embedding_rows_of_absent_tokens_stand_still(arm):
    model = build(arm)
    optimizer = model.setup_optimizer()
    train(model, optimizer, 5)
    tables = [model.transformer.wte.weight, *(ve.weight for ve in model.value_embeds.values())]
    states = lambda: [t.detach().clone() for p in tables for t in (p, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"])]
    before = states()
    for step in range(10):
        idx = tokens(4, 33, seed=step) % 40
        model(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
    for now, old in zip(states(), before):
        assert not any(torch.equal(now[v], old[v]) for v in range(1, 40))
        assert all(torch.equal(now[v], old[v]) == (arm == "cl") for v in range(40, 64))


def test_a_block_scale_of_zero_stops_a_block_and_one_of_a_half_halves_its_step():
    moved = {}
    for scale in (None, [0.0, 0.5] + [1.0] * 14):
        model = build()
        optimizer = model.setup_optimizer(weight_decay=0.1)
        group = next(g for g in optimizer.param_groups if g["params"][0] is model.transformer.h[0].mlp.c_fc.weight)
        group["block_scale"] = scale
        start = model.transformer.h[1].mlp.c_fc.weight.detach().clone()
        give_gradients(model)
        optimizer.step()
        moved[scale is None] = model.transformer.h[1].mlp.c_fc.weight.detach() - start
    assert not moved[False][0].any() and torch.equal(moved[False][2:], moved[True][2:])
    torch.testing.assert_close(moved[False][1], 0.5 * moved[True][1], atol=1e-7, rtol=1e-5)


def run_rank(rank, address, out):
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    patching.apply()
    model = build(sizes=dict(n_layer=3))
    optimizer = model.setup_optimizer(weight_decay=0.1)
    for step in range(4):
        rank_gradients(model, step, rank)
        optimizer.step()
    torch.save({name: p.detach() for name, p in model.named_parameters()}, f"{out}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def rank_gradients(model, step, rank):
    """Block 3 serves on no rank after the first step, block 4 on rank 0 only, block 5 on rank 1 only."""
    give_gradients(model, seed=10 * step + rank)
    for block in model.transformer.h:
        for p in (block.mlp.c_fc.weight, block.mlp.c_proj.weight):
            if step:
                p.grad[3] = 0
            p.grad[4 if rank else 5] = 0


def test_two_ranks_step_and_mask_by_the_reduced_gradient(tmp_path):
    torch.multiprocessing.spawn(run_rank, args=(str(tmp_path / "meet"), str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in range(2)]
    model = build(sizes=dict(n_layer=3))
    optimizer = model.setup_optimizer(weight_decay=0.1)
    for step in range(4):
        grads = []
        for rank in range(2):
            rank_gradients(model, step, rank)
            grads.append([p.grad for p in model.parameters()])
        for p, a, b in zip(model.parameters(), *grads):
            p.grad = (a + b) / 2
        optimizer.step()
        if step == 0:
            still = [b.mlp.c_fc.weight[3].clone() for b in model.transformer.h]
    for name, p in model.named_parameters():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], p.detach(), atol=1e-5, rtol=0)
    for layer, kept in enumerate(still):
        assert torch.equal(model.transformer.h[layer].mlp.c_fc.weight[3], kept)
        assert not torch.equal(model.transformer.h[layer].mlp.c_fc.weight[4], kept)

"""nanochat.optim: MuonAdamW against recorded fixtures, torch's AdamW, and itself on two ranks."""
import copy

import pytest
import torch

from nanochat import optim
from nanochat.optim import MuonAdamW


@pytest.fixture(autouse=True)
def eager():
    """The kernels run uncompiled except where a test is about the compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


def wave(shape, a, b, s):
    """s sin(a i + b) + 0.3 s cos(0.013 i^2) over the flat index i: numbers that need no random generator."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (s * torch.sin(a * i + b) + 0.3 * s * torch.cos(0.013 * i * i)).reshape(shape).float()


def muon(params, **over):
    return {"kind": "muon", "params": params, "lr": 0.02, "momentum": 0.95, "ns_steps": 5, "beta2": 0.9, "weight_decay": 0.1, **over}


def adamw(params, **over):
    return {"kind": "adamw", "params": params, "lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.05, **over}


def parameter(*args):
    return torch.nn.Parameter(wave(*args))


# (shape, p0[0, :3], |p0|_F, sum p1, sum momentum, sum second moment, its shape) after three steps, recorded on nanochat's own optimizer
# on CPU in fp32 (specification 26.3).
MUON_FIXTURES = [
    ((8, 6), (0.1295466, 0.4565088, 0.6243179), 2.6847128, 1.9649488, 0.00548556, 0.5420002, (2, 8, 1)),
    ((6, 8), (0.1282533, 0.4585442, 0.6140354), 2.6655289, 1.9740304, 0.00548556, 0.5420001, (2, 1, 8)),
    ((6, 6), (0.1357842, 0.4554129, 0.6244215), 2.3684863, 0.7642921, 0.00543983, 0.5420001, (2, 6, 1)),
]


@pytest.mark.parametrize("shape, row, norm, total, momentum, second, second_shape", MUON_FIXTURES)
def test_three_muon_steps_give_the_recorded_numbers(shape, row, norm, total, momentum, second, second_shape):
    params = [parameter(shape, 0.7, k, 0.5) for k in range(2)]
    optimizer = MuonAdamW([muon(params)])
    for s in range(3):
        for k, p in enumerate(params):
            p.grad = wave(shape, 1.1, 10 * s + k, 0.01)
        optimizer.step()
    state = optimizer.state[params[0]]
    assert list(optimizer.state) == [params[0]], "the group's state belongs under its first parameter only"
    torch.testing.assert_close(params[0][0, :3].detach(), torch.tensor(row), atol=2e-6, rtol=0)
    assert params[0].norm().item() == pytest.approx(norm, abs=2e-6)
    assert params[1].sum().item() == pytest.approx(total, abs=5e-6)
    assert state["momentum_buffer"].shape == (2, *shape) and state["momentum_buffer"].sum().item() == pytest.approx(momentum, abs=1e-7)
    assert state["second_momentum_buffer"].shape == second_shape
    assert state["second_momentum_buffer"].sum().item() == pytest.approx(second, abs=1e-6)


def test_three_adamw_steps_give_the_recorded_numbers():
    p = parameter((5, 4), 0.7, 0, 0.5)
    optimizer = MuonAdamW([adamw([p])])
    for s in range(3):
        p.grad = wave((5, 4), 1.1, s, 0.01)
        optimizer.step()
    state = optimizer.state[p]
    torch.testing.assert_close(p[0].detach(), torch.tensor([-0.1377999, 0.1806761, 0.4365512, 0.6142470]), atol=2e-6, rtol=0)
    assert p.sum().item() == pytest.approx(-0.0078888, abs=2e-6)
    assert state["step"] == 3 and isinstance(state["step"], int)
    assert state["exp_avg"].sum().item() == pytest.approx(0.01123357, abs=1e-7)
    assert state["exp_avg_sq"].sum().item() == pytest.approx(0.000162711, abs=1e-8)


def test_adamw_is_torch_adamw():
    mine, theirs = parameter((9, 5), 0.3, 1, 0.7), parameter((9, 5), 0.3, 1, 0.7)
    ours = MuonAdamW([adamw([mine], lr=0.03, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.2)])
    reference = torch.optim.AdamW([theirs], lr=0.03, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.2)
    for s in range(20):
        mine.grad = wave((9, 5), 1.3, s, 0.5)
        theirs.grad = mine.grad.clone()
        ours.step()
        reference.step()
    torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=2e-6)


def test_adam_moments_take_the_dtype_of_their_parameter():
    p = torch.nn.Parameter(wave((8, 4), 0.7, 0, 0.5).bfloat16())
    p.grad = wave((8, 4), 1.1, 0, 0.1).bfloat16()
    optimizer = MuonAdamW([adamw([p])])
    optimizer.step()
    assert {optimizer.state[p][k].dtype for k in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}
    assert p.dtype == torch.bfloat16 and torch.isfinite(p).all()


def small_model():
    """An embedding, a scalar row, three tall and two wide matrices, and the groups of them."""
    params = [parameter((8, 4), 0.7, 0, 0.5), parameter((3,), 0.4, 1, 0.5),
              *(parameter((8, 6), 0.7, 2 + k, 0.5) for k in range(3)), *(parameter((6, 8), 0.7, 5 + k, 0.5) for k in range(2))]
    return params, MuonAdamW([adamw(params[:1]), adamw(params[1:2], weight_decay=0.0), muon(params[2:5]), muon(params[5:], lr=0.01)])


def train(params, optimizer, steps):
    for s in steps:
        for k, p in enumerate(params):
            p.grad = wave(p.shape, 1.1, 10 * s + k, 0.01)
        optimizer.step()


def test_the_same_steps_give_the_same_bits():
    (a, first), (b, second) = small_model(), small_model()
    train(a, first, range(5))
    train(b, second, range(5))
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_a_state_dict_continues_to_the_same_bits():
    a, whole = small_model()
    train(a, whole, range(6))
    b, before = small_model()
    train(b, before, range(3))
    state = copy.deepcopy(before.state_dict())
    c, after = small_model()
    for x, y in zip(c, b):
        x.data.copy_(y.data)
    after.load_state_dict(state)
    train(c, after, range(3, 6))
    assert all(torch.equal(x, y) for x, y in zip(a, c))
    assert sorted(state["state"]) == [0, 1, 2, 5], "Muon state under each group's first parameter, AdamW's under every parameter"


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (32, 32)])
def test_the_first_update_is_orthogonal_up_to_rounding_and_of_known_size(shape):
    generator = torch.Generator().manual_seed(1)
    p = torch.nn.Parameter(torch.randn(shape, generator=generator))
    before = p.detach().clone()
    p.grad = torch.randn(shape, generator=generator)
    MuonAdamW([muon([p], weight_decay=0.0)]).step()
    update = before - p.detach()
    values = torch.linalg.svdvals(update)
    # Five Polar Express iterations and the row scaling leave a band around one; a raw Gaussian square has a ratio in the hundreds.
    assert values.max() / values.min() < 3, values
    expected = 0.02 * max(1, shape[0] / shape[1]) ** 0.5 * min(shape) ** 0.5
    assert update.norm().item() == pytest.approx(expected, rel=1e-4)


def test_a_zero_gradient_still_decays_by_lr_times_weight_decay():
    p = parameter((8, 6), 0.7, 0, 0.5)
    before = p.detach().clone()
    p.grad = torch.zeros(8, 6)
    MuonAdamW([muon([p])]).step()
    torch.testing.assert_close(p.detach(), before * (1 - 0.02 * (8 / 6) ** 0.5 * 0.1), atol=1e-7, rtol=1e-6)


def test_a_row_with_stale_momentum_moves_at_full_speed_and_one_without_not_at_all():
    p = torch.nn.Parameter(torch.zeros(16, 16))
    optimizer = MuonAdamW([muon([p], weight_decay=0.0)])
    generator = torch.Generator().manual_seed(2)
    for step in range(40):
        p.grad = torch.randn(16, 16, generator=generator)
        p.grad[0] = 0.0           # never had a gradient
        if step > 0:
            p.grad[1] = 0.0       # had one, once
        before = p.detach().clone()
        optimizer.step()
    moved = (p.detach() - before).norm(dim=1)
    assert moved[0] == 0
    assert moved[1] > 0.3 * moved[2:].mean(), moved


def test_the_callers_gradients_stay_as_they_were():
    params, optimizer = small_model()
    train(params, optimizer, [0])
    for k, p in enumerate(params):
        assert torch.equal(p.grad, wave(p.shape, 1.1, k, 0.01))


def test_keys_it_does_not_know_are_carried_and_change_nothing():
    a, plain = small_model()
    b, marked = small_model()
    marked.param_groups[0]["rows"] = True
    marked.param_groups[2]["isolate"] = torch.ones(2)
    train(a, plain, range(2))
    train(b, marked, range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert marked.state_dict()["param_groups"][0]["rows"] is True


def test_an_unknown_kind_is_refused_before_anything_moves():
    params, optimizer = small_model()
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[-1]["kind"] = "sgd"
    with pytest.raises(ValueError, match="sgd"):
        train(params, optimizer, [0])
    assert all(torch.equal(x, y) for x, y in zip(before, params))


def test_a_missing_gradient_a_vector_and_a_stack_in_a_muon_group_raise():
    with pytest.raises(TypeError):
        MuonAdamW([muon([parameter((4, 4), 0.7, 0, 0.5)])]).step()
    for shape, error in [((4,), IndexError), ((2, 4, 4), RuntimeError)]:
        p = parameter(shape, 0.7, 0, 0.5)
        p.grad = torch.ones(shape)
        with pytest.raises(error):
            MuonAdamW([muon([p])]).step()


def test_the_kernels_are_looked_up_when_they_are_called(monkeypatch):
    calls = []
    params, optimizer = small_model()
    monkeypatch.setattr(optim, "adamw_step_fused", lambda *args: calls.append(("adamw", len(args))))
    monkeypatch.setattr(optim, "muon_step_fused", lambda *args: calls.append(("muon", len(args), args[-2:])))
    train(params, optimizer, [0])
    assert calls == [("adamw", 10)] * 2 + [("muon", 10, (5, -1)), ("muon", 10, (5, -2))]


def test_state_made_beforehand_is_kept():
    p = parameter((8, 6), 0.7, 0, 0.5)
    optimizer = MuonAdamW([muon([p])])
    mine = torch.full((1, 8, 1), 0.5)
    optimizer.state[p]["second_momentum_buffer"] = mine
    train([p], optimizer, [0])
    assert optimizer.state[p]["second_momentum_buffer"] is mine and optimizer.state[p]["momentum_buffer"].shape == (1, 8, 6)


# --- two ranks ---

def sharded_model():
    """AdamW above and below the replication limit; three tall and one wide matrix: neither count divides by two."""
    params = [parameter((64, 32), 0.7, 0, 0.5), parameter((6, 5), 0.4, 1, 0.5),
              *(parameter((8, 6), 0.7, 2 + k, 0.5) for k in range(3)), parameter((6, 8), 0.7, 5, 0.5)]
    return params, MuonAdamW([adamw(params[:1]), adamw(params[1:2]), muon(params[2:5]), muon(params[5:])])


def rank_gradient(p, k, step, rank):
    return wave(p.shape, 1.1 + 0.3 * rank, 10 * step + k, 0.01)


def run_rank(rank, address, out):
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    params, optimizer = sharded_model()
    for step in range(3):
        for k, p in enumerate(params):
            p.grad = rank_gradient(p, k, step, rank)
        optimizer.step()
    torch.save({"params": [p.detach() for p in params], "state": optimizer.state_dict()["state"]}, f"{out}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_equal_one_rank_on_the_averaged_gradient(tmp_path):
    torch.multiprocessing.spawn(run_rank, args=(str(tmp_path / "meet"), str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in range(2)]
    params, optimizer = sharded_model()
    for step in range(3):
        for k, p in enumerate(params):
            p.grad = (rank_gradient(p, k, step, 0) + rank_gradient(p, k, step, 1)) / 2
        optimizer.step()
    for k, p in enumerate(params):
        assert torch.equal(ranks[0]["params"][k], ranks[1]["params"][k]), f"parameter {k} differs between the ranks"
        torch.testing.assert_close(ranks[0]["params"][k], p.detach(), atol=2e-6, rtol=0)
    whole = optimizer.state_dict()["state"]
    assert [r["state"][0]["exp_avg"].shape for r in ranks] == [(32, 32)] * 2, "large AdamW state is sharded by rows"
    torch.testing.assert_close(torch.cat([r["state"][0]["exp_avg"] for r in ranks]), whole[0]["exp_avg"], atol=1e-8, rtol=0)
    assert [r["state"][1]["exp_avg"].shape for r in ranks] == [(6, 5)] * 2, "small AdamW state is replicated"
    momentum = torch.cat([r["state"][2]["momentum_buffer"] for r in ranks])
    assert momentum.shape == (4, 8, 6) and not momentum[3].any(), "the padding matrix stays zero"
    torch.testing.assert_close(momentum[:3], whole[2]["momentum_buffer"], atol=1e-8, rtol=0)
    assert not ranks[1]["state"][5]["momentum_buffer"].any(), "the second rank owns nothing of the last group and takes part all the same"


def test_a_large_first_dimension_that_does_not_divide_is_refused():
    p = parameter((33, 40), 0.7, 0, 0.5)
    p.grad = torch.ones(33, 40)
    with pytest.raises(AssertionError, match="33"):
        MuonAdamW([adamw([p])])._reduce_adamw(adamw([p]), world_size=2)


# --- compiled ---------------------------------------------------------------------------------------------------------

def test_the_compiled_kernels_agree_with_the_eager_ones_and_new_scalars_do_not_recompile():
    torch._dynamo.reset()  # what other tests compiled here counts towards torch's limit
    results = []
    for stance in ("default", "force_eager"):
        torch.manual_seed(0)
        params = [parameter((5, 4), 0.7, 0, 0.5), parameter((8, 6), 0.7, 1, 0.5)]
        optimizer = MuonAdamW([adamw(params[:1]), muon(params[1:])])
        for step in range(4):
            for group in optimizer.param_groups:
                group["lr"], group["weight_decay"] = 0.01 + 0.01 * step, 0.1 - 0.02 * step
            for k, p in enumerate(params):
                p.grad = wave(p.shape, 1.1, 10 * step + k, 0.01)
            with torch.compiler.set_stance("fail_on_recompile" if stance == "default" and step > 0 else stance):
                optimizer.step()
        results.append(params)
    for compiled, eager in zip(*results):
        torch.testing.assert_close(compiled, eager, atol=2e-6, rtol=0)

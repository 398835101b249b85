"""Attention by heads: against a loop over single queries, against the dense model's weights and steps, and idle heads bit for bit."""
import math

import pytest
import torch

from nanochat_cl import patching, routing
from tests.tiny_cl import SIZES, build, tokens, train

D = SIZES["n_embd"] // SIZES["n_head"]
GQA = dict(n_kv_head=2)


@pytest.fixture(autouse=True, scope="module")
def patched():
    with patching.applied(), torch.compiler.set_stance("force_eager"):
        yield


def norm(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def rotated(x, t):
    """One head (D,) at position t: channel j and j + D/2 turned by minus t * 100000^(-2j/D)."""
    angle = t * 100000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    a, b = x[:D // 2], x[D // 2:]
    return torch.cat([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()])


def slow_attention(attention, x, ve, window, gates):
    """x (T, n), ve (T, K*D) or None, gates (T, H): the specification's section 4.2 for one row, query by query, in float64."""
    H, K, T = attention.n_head, attention.n_kv_head, len(x)
    c_q, c_k, c_v, c_proj = (getattr(attention, name).weight.detach().double() for name in ("c_q", "c_k", "c_v", "c_proj"))
    keys, values, out = {}, {}, torch.zeros(T, x.shape[1], dtype=torch.float64)
    for t in range(T):
        for k in range(K):
            keys[t, k] = 1.2 * norm(rotated(c_k[k] @ x[t], t))
            values[t, k] = c_v[k] @ x[t]
            if ve is not None:
                gate = 3 * torch.sigmoid(attention.ve_gate.weight.detach().double()[k, 0] @ x[t, :12])
                values[t, k] = values[t, k] + gate * ve[t, k * D:(k + 1) * D]
        for h in range(H):
            query, k, seen = 1.2 * norm(rotated(c_q[h] @ x[t], t)), h // (H // K), range(max(0, t - window), t + 1)
            weight = torch.softmax(torch.stack([query @ keys[s, k] / math.sqrt(D) for s in seen]), 0)
            out[t] += gates[t, h] * (sum(w * values[s, k] for w, s in zip(weight, seen)) @ c_proj[h])
    return out


@pytest.mark.parametrize("sizes", [{}, GQA])
def test_attention_is_the_specifications_with_the_output_of_each_head_times_its_gate(sizes):
    model, T = build(sizes=sizes), 21
    generator = torch.Generator().manual_seed(4)
    attention, x = model.transformer.h[1].attn, torch.randn(2, T, 32, generator=generator)
    ve = torch.randn(2, T, attention.n_kv_head * D, generator=generator)
    choice = torch.rand(2, 3, 3, generator=generator).topk(2).indices
    gate = 0.5 + torch.rand(2, 3, 2, generator=generator)
    attention.c_proj.decision = routing.Decision(choice, gate, (4, 7, 10))
    cos_sin = model.cos[:, :T], model.sin[:, :T]
    for given, window in ((ve, (64, 0)), (ve, (5, 0)), (None, (64, 0))):
        found = attention(x, given, cos_sin, window, None)
        for row in range(2):
            gates = torch.zeros(T, 4, dtype=torch.float64)
            gates[:, 0] = 1.0  # the shared head
            for t in range(T):
                chunk = 0 if t < 4 else 1 if t < 11 else 2
                gates[t, 1 + choice[row, chunk]] = gate[row, chunk].double()
            expected = slow_attention(attention, x[row].double(), given[row].double() if given is not None else None, window[0], gates)
            torch.testing.assert_close(found[row].double(), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("sizes", [{}, GQA])
def test_initial_weights_are_the_dense_models_head_for_head_and_so_is_the_random_state(sizes):
    models, states = {}, {}
    for arm in ("cl", "dense"):
        models[arm], states[arm] = build(arm, lively=False, seed=5, sizes=sizes), torch.get_rng_state()
    assert torch.equal(states["cl"], states["dense"])
    for ours, dense in zip(models["cl"].transformer.h, models["dense"].transformer.h):
        for name, heads in (("c_q", 4), ("c_k", ours.attn.n_kv_head), ("c_v", ours.attn.n_kv_head)):
            weight = getattr(ours.attn, name).weight
            assert weight.shape == (heads, D, 32)
            for h in range(heads):
                assert torch.equal(weight[h], getattr(dense.attn, name).weight[h * D:(h + 1) * D]), f"{name} of head {h}"
        assert ours.attn.c_proj.weight.shape == (4, D, 32) and not ours.attn.c_proj.weight.any()
        if dense.attn.ve_gate is not None:
            assert torch.equal(ours.attn.ve_gate.weight[:, 0], dense.attn.ve_gate.weight)
    for key, ve in models["dense"].value_embeds.items():
        assert torch.equal(models["cl"].value_embeds[key].weight, ve.weight)


def test_a_model_with_every_head_open_is_the_dense_model_function_for_function():
    """Weights copied head by head (c_proj turned over), gates set to 1: the logits are the dense model's."""
    ours, dense, idx = build("cl-full"), build("dense"), tokens(2, 40)
    with torch.no_grad():
        for a, b in zip(ours.transformer.h, dense.transformer.h):
            for name in ("c_q", "c_k", "c_v"):
                getattr(b.attn, name).weight.copy_(getattr(a.attn, name).weight.flatten(0, 1))
            b.attn.c_proj.weight.copy_(a.attn.c_proj.weight.flatten(0, 1).T)
            b.mlp.c_fc.weight.copy_(a.mlp.c_fc.weight.flatten(0, 1))
            b.mlp.c_proj.weight.copy_(a.mlp.c_proj.weight.flatten(0, 1).T)
            for part in (a.mlp, a.attn.c_proj):
                part.router.zero_()  # 2 sigmoid(0) = 1
        dense.lm_head.weight.copy_(ours.lm_head.weight)
        torch.testing.assert_close(ours.eval()(idx), dense.eval()(idx), atol=1e-5, rtol=1e-5)


def pieces_of(model, optimizer, head):
    """All that belongs to a routed head of layer 1, and its optimizer state: name -> tensor. Without GQA, as H = K here."""
    attention, h, i = model.transformer.h[1].attn, head + 1, 1
    ve, adam = model.value_embeds["1"].weight, optimizer.state
    columns = slice(h * D, (h + 1) * D)
    found = {"ve": ve[:, columns], "router": attention.c_proj.router[head]}
    for key, part, at in (("ve", ve, (slice(None), columns)), ("router", attention.c_proj.router, head)):
        found |= {f"{key} {moment}": adam[part][moment][at] for moment in ("exp_avg", "exp_avg_sq") if part in adam}
    for name in ("c_q", "c_k", "c_v", "c_proj", "ve_gate"):
        weight = getattr(attention, name).weight
        found[name] = weight[h]
        for group in optimizer.param_groups:
            for j, p in enumerate(group["params"]):
                if p is weight and (state := adam.get(group["params"][0])):
                    found |= {f"{name} {key}": state[key][j, h] for key in ("momentum_buffer", "second_momentum_buffer")}
    return {name: t.detach().clone() for name, t in found.items()}


def ban(model, head):
    """From now on nobody chooses that head of layer 1."""
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.balance[head] = -1e6


def test_the_gradient_of_a_head_that_nobody_chose_is_exactly_zero_everywhere_it_owns():
    model, idx = build(), tokens(4, 49)
    ban(model, 2)
    model(idx[:, :-1], idx[:, 1:]).backward()
    attention, ve = model.transformer.h[1].attn, model.value_embeds["1"].weight.grad
    for name in ("c_q", "c_k", "c_v", "c_proj", "ve_gate"):
        grad = getattr(attention, name).weight.grad
        assert not grad[3].any() and all(grad[h].any() for h in range(3)), name
    assert not ve[:, 3 * D:].any() and all(ve[:, h * D:(h + 1) * D].any() for h in range(3))
    router = attention.c_proj.router.grad
    assert not router[2].any() and router[:2].any(1).all() and not router[3:].any(), "a row beyond the heads is padding"


@pytest.mark.parametrize("arm", ["cl", "cl-noiso"])
def test_a_head_that_nobody_chose_keeps_every_bit_in_thirty_steps_with_decay(arm):
    model = build(arm)
    optimizer = model.setup_optimizer(matrix_lr=0.02, weight_decay=0.1)
    train(model, optimizer, 8)
    ban(model, 2)
    routing.reset_usage(model)
    before = {head: pieces_of(model, optimizer, head) for head in range(3)}
    assert len(before[2]) == 2 * 3 + 5 * 3 and all(t.any() for t in before[2].values()), "a head without momentum proves nothing"
    train(model, optimizer, 30, seed=1)
    used = routing.usage(model)[1][1]
    assert used[2] == 0 and (used[:2] > 0).all(), used
    same = {head: {key for key, now in pieces_of(model, optimizer, head).items() if torch.equal(now, before[head][key])} for head in range(3)}
    assert not same[0] and not same[1], same
    assert same[2] == (set(before[2]) if arm == "cl" else set()), f"not as they were: {set(before[2]) - same[2]}"


def test_a_key_head_that_several_heads_use_is_idle_only_when_all_of_them_are():
    """Four heads, two key/value heads: heads 2 and 3 (routed ones 1 and 2) share the second."""
    model = build(sizes=GQA)
    with torch.no_grad():
        for layer in model.transformer.h:
            layer.attn.c_proj.active = 1  # one of three routed heads, so that two may idle at once
    optimizer = model.setup_optimizer(matrix_lr=0.02, weight_decay=0.1)
    train(model, optimizer, 8)
    ban(model, 1)
    attention, ve = model.transformer.h[1].attn, model.value_embeds["1"].weight
    for banned_too, key_idle in (([], False), ([2], True)):
        for head in banned_too:
            ban(model, head)
        before = {name: getattr(attention, name).weight.detach().clone() for name in ("c_q", "c_k", "c_v", "c_proj", "ve_gate")}
        columns = ve.detach().clone()
        train(model, optimizer, 12, seed=2 + len(banned_too))
        moved = {name: (getattr(attention, name).weight != old).flatten(1).any(1).tolist() for name, old in before.items()}
        assert moved["c_q"] == moved["c_proj"] == [True, True, False, not key_idle], moved
        assert all(moved[name] == [True, not key_idle] for name in ("c_k", "c_v", "ve_gate")), moved
        assert [(ve != columns)[:, part].any().item() for part in (slice(0, D), slice(D, 2 * D))] == [True, not key_idle]


def per_dimension(update, name, arm):
    """Norms of the update (n or K*D) of each head dimension; of each head for ve_gate."""
    if name == "c_proj" and arm == "dense":
        update = update.T
    return update.reshape(-1, update.shape[-1]).norm(dim=1)


@pytest.mark.parametrize("sizes", [{}, GQA])
def test_a_head_dimension_moves_as_far_as_in_the_dense_model(sizes):
    moved = {}
    for arm in ("dense", "cl"):
        model = build(arm, sizes=sizes)
        optimizer = model.setup_optimizer(matrix_lr=0.01)
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            before = {(i, name): getattr(layer.attn, name).weight.detach().clone() for i, layer in enumerate(model.transformer.h)
                      for name in ("c_q", "c_k", "c_v", "c_proj", "ve_gate") if getattr(layer.attn, name) is not None}
            optimizer.step()
        for (i, name), old in before.items():
            moved[arm, i, name] = per_dimension(getattr(model.transformer.h[i].attn, name).weight.detach() - old, name, arm) / 0.01
    compared = [key[1:] for key in moved if key[0] == "cl"]
    assert len(compared) == 4 + 5
    for key in compared:
        dense, ours = moved["dense", *key], moved["cl", *key]
        assert len(dense) == len(ours), key
        assert abs(dense.mean() - 1) < 0.05 and abs(ours.mean() - 1) < 0.05, (key, dense.mean(), ours.mean())
        assert (ours - 1).abs().max() < 0.5, f"{key}: no head apart from the others: {ours}"


def test_decay_of_a_head_is_the_dense_models():
    shrunk = {}
    for arm in ("dense", "cl"):
        models = [build(arm) for _ in range(3)]
        for model, decay in zip(models[1:], (0.1, 0.0)):
            optimizer = model.setup_optimizer(matrix_lr=0.01, weight_decay=decay)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
            optimizer.step()
        for name in ("c_q", "c_proj", "ve_gate"):
            start, decayed, plain = (getattr(m.transformer.h[1].attn, name).weight.detach() for m in models)
            shrunk[arm, name] = ((plain - decayed) / start)[plain != decayed].median().item()
    for name in ("c_q", "c_proj", "ve_gate"):
        assert shrunk["cl", name] == pytest.approx(0.01 * 0.1, rel=1e-2) and shrunk["dense", name] == pytest.approx(0.01 * 0.1, rel=1e-2), shrunk


def test_grouped_heads_are_decoded_as_they_are_trained():
    from nanochat import engine
    model, idx = build(sizes=GQA, chunk=16).eval(), tokens(2, 50, bos_every=21)
    kv_cache = engine.KVCache(batch_size=2, num_heads=2, seq_len=60, head_dim=D, num_layers=2, device=torch.device("cpu"), dtype=torch.float32)
    with torch.inference_mode():
        pieces = [model(part, kv_cache=kv_cache) for part in idx.split([19, 1, 13, *[1] * 17], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(idx), atol=1e-4, rtol=0)


def test_an_arm_without_routed_heads_and_a_model_of_one_head_keep_upstreams_attention():
    from nanochat import gpt
    models = [build("cl-mlp"), build(sizes=dict(n_head=1, n_kv_head=1))]
    dense = build("dense").transformer.h[0].attn
    for model in models:
        assert len(routing.parts(model)) == len(routing.usage(model)) == 1
        for layer in model.transformer.h:
            assert type(layer.attn) is type(dense)
            assert all(isinstance(part, gpt.Linear) for part in (layer.attn.c_q, layer.attn.c_k, layer.attn.c_v, layer.attn.c_proj))
    groups = [g for g in models[0].setup_optimizer().param_groups if any(p is models[0].transformer.h[0].attn.c_q.weight for p in g["params"])]
    assert len(groups) == 1 and "isolate" not in groups[0], "stepped as upstream does"
    assert not [m for m in build().modules() if isinstance(m, torch.nn.Linear) and m.weight.ndim > 2]


def test_gates_take_gradients_from_the_head_they_open():
    """The router learns by the gate alone: twice the gate of a head is twice its output."""
    model, x = build(), torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1))
    part = model.transformer.h[0].attn.c_proj
    gate = torch.tensor([[[0.7, 1.3]]], requires_grad=True)
    part.decision = routing.Decision(torch.tensor([[[2, 0]]]), gate, (6,))
    out = part(x)
    heads = x.unflatten(-1, (4, D))
    expected = torch.einsum("btd,dn->btn", heads[:, :, 0], part.weight[0]) + 0.7 * torch.einsum("btd,dn->btn", heads[:, :, 3], part.weight[3]) \
        + 1.3 * torch.einsum("btd,dn->btn", heads[:, :, 1], part.weight[1])
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    out.sum().backward()
    assert gate.grad[0, 0, 0].item() == pytest.approx((heads[:, :, 3] @ part.weight[3]).sum().item(), rel=1e-4)
    assert gate.grad.all() and not part.weight.grad[2].any()

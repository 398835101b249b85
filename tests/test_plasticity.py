"""nanochat_cl.plasticity: rules of which weights may learn, as text, as pure functions, and as what the optimizer does with them."""
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat_cl import patching, plasticity, routing
from nanochat_cl.command import UserError
from nanochat_cl.plasticity import Rule
from tests.tiny_cl import build, tokens, train


@pytest.fixture(autouse=True, scope="module")
def patched():
    with patching.applied(), torch.compiler.set_stance("force_eager"):
        yield


ALL = dict.fromkeys(plasticity.SHARED, 0.0)


@pytest.mark.parametrize("text, rule", [
    ("all", Rule()), ("frozen-shared", Rule(ALL)), ("frozen-shared:0.1", Rule(dict.fromkeys(ALL, 0.1))), ("budget:0.25", Rule(budget=0.25)),
    ("budget:0.5+frozen-shared:0.2", Rule(dict.fromkeys(ALL, 0.2), 0.5)), ("frozen-shared+budget:1", Rule(ALL, 1.0)),
    ("attention", Rule({"attention": 0.0})), ("blocks:0.5+embeddings+head:1", Rule({"blocks": 0.5, "embeddings": 0.0, "head": 1.0})),
    ("scalars:0.1+budget:0.5+attention:0.2", Rule({"scalars": 0.1, "attention": 0.2}, 0.5)),
    ("routers:0.5+frozen-shared", Rule(ALL, routers=0.5)), ("routers", Rule())])
def test_a_rule_is_read_from_its_name(text, rule):
    assert plasticity.parse(text) == rule


@pytest.mark.parametrize("text", ["", "none", "budget", "budget:0", "budget:1.5", "budget:x", "budget:nan", "frozen-shared:-1", "frozen-shared:",
                                  "all+budget:0.5", "budget:0.5+budget:0.2", "all:1", "frozen", "heads", "attention:2", "attention:nan", "head:",
                                  "attention:0.1+attention:0.1", "frozen-shared:0.1+head:1", "blocks+frozen-shared", "attention+",
                                  "routers:2", "routers:1+routers:1"])
def test_anything_else_is_refused_with_what_was_expected(text):
    with pytest.raises(UserError, match="expected all, or budget:p.*frozen-shared.*attention") as error:
        plasticity.parse(text)
    assert "\n" not in str(error.value)


@given(st.integers(1, 4), st.integers(2, 20), st.floats(0.05, 1.0), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_budget_lets_the_blocks_learn_that_a_plain_sort_finds(layers, routed, budget, seed):
    generator = torch.Generator().manual_seed(seed)
    used = torch.randint(0, 50, (layers, routed), generator=generator).float() * torch.randint(0, 2, (layers, routed), generator=generator)
    general = torch.randint(1, 1000, (layers, routed), generator=generator).float()
    mask = plasticity.busiest(used, general, budget)
    for layer in range(layers):
        scores = {r: used[layer, r].item() * math.log((general[layer].sum().item() + routed) / (general[layer, r].item() + 1)) for r in range(routed)}
        served = [r for r in sorted(scores, key=scores.get, reverse=True) if used[layer, r] > 0]
        count = math.ceil(budget * routed) if budget < 1 else routed
        chosen = mask[layer].nonzero().flatten().tolist()
        if budget < 1:
            assert len(chosen) == min(count, len(served))
            assert sum(scores[r] for r in chosen) == pytest.approx(sum(scores[r] for r in served[:count]), rel=1e-4)


def test_a_block_that_this_text_prefers_is_taken_before_one_that_all_text_uses():
    used, general = torch.tensor([[100.0, 80.0, 0.0, 1.0]]), torch.tensor([[900.0, 20.0, 40.0, 40.0]])
    assert plasticity.busiest(used, general, 0.25).tolist() == [[False, True, False, False]]


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_under_a_budget_exactly_the_others_stand_still():
    model = build()
    optimizer = model.setup_optimizer(weight_decay=0.1)
    train(model, optimizer, 5)
    routing.freeze(model, optimizer)
    hold = plasticity.begin("budget:0.25", model, optimizer)
    general = routing.usage(model)
    for step in range(3):
        routing.reset_usage(model)
        idx = tokens(8, 49, seed=50 + step)
        model(idx[:, :-1], idx[:, 1:]).backward()
        used = routing.usage(model)
        learns, heads = (plasticity.busiest(now, before, 0.25) for now, before in zip(used, general, strict=True))
        assert (learns.sum(1) == 4).all() and (used[0] > 0).sum() > learns.sum() and (heads.sum(1) == 1).all() and (used[1] > 0).sum() > heads.sum()
        hold(used)
        before = bits(model)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        now = dict(model.named_parameters())
        for layer in range(2):
            pieces = lambda name: (now[f"transformer.h.{layer}.{name}.weight"] != before[f"transformer.h.{layer}.{name}.weight"]).flatten(1).any(1)
            for which in ("mlp.c_fc", "mlp.c_proj"):
                assert pieces(which)[:2].all() and torch.equal(pieces(which)[2:], learns[layer]), (layer, which)
            for which in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", *(["attn.ve_gate"] if layer else [])):
                assert pieces(which)[0] and torch.equal(pieces(which)[1:], heads[layer]), (layer, which)
        columns = (now["value_embeds.1.weight"] != before["value_embeds.1.weight"]).unflatten(-1, (4, -1)).any(-1).any(0)
        assert columns[0] and torch.equal(columns[1:], heads[1])


@pytest.mark.parametrize("sizes", [{}, dict(n_kv_head=2)])
def test_hold_zeroes_exactly_what_belongs_to_held_blocks_and_heads(sizes):
    model = build(sizes=sizes)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.transformer.h[1].mlp.c_fc.weight.grad[5, 0, 0] = float("inf")  # times 0 would be nan
    learns = [torch.zeros(2, 14, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool)]
    learns[0][0, [0, 7]], learns[0][1, 13] = True, True
    learns[1][0, 0], learns[1][1, 1] = True, True  # heads 1 and 2, besides head 0, which is shared
    plasticity.hold(model, learns)
    kv, expected = model.config.n_kv_head, {}
    for layer, (blocks, heads) in enumerate([({0, 7}, {0, 1}), ({13}, {0, 2})]):
        keys = {h * kv // 4 for h in heads}
        expected |= {f"transformer.h.{layer}.mlp.{m}.weight": {0, 1, *(b + 2 for b in blocks)} for m in ("c_fc", "c_proj")}
        expected |= {f"transformer.h.{layer}.attn.{m}.weight": heads for m in ("c_q", "c_proj")}
        expected |= {f"transformer.h.{layer}.attn.{m}.weight": keys for m in ("c_k", "c_v", "ve_gate")}
        expected |= {f"transformer.h.{layer}.mlp.router": {*blocks, 14, 15}, f"transformer.h.{layer}.attn.c_proj.router": {*(h - 1 for h in heads if h), *range(3, 8)}}
    for name, p in model.named_parameters():
        if name in expected:
            assert set(p.grad.flatten(1).any(1).nonzero().flatten().tolist()) == expected[name], name
            assert p.grad.flatten(1).eq(1).all(1).sum() == len(expected[name]), name
        elif name.startswith("value_embeds"):
            assert set(p.grad.unflatten(-1, (kv, -1)).any(-1).any(0).nonzero().flatten().tolist()) == keys
        else:
            assert (p.grad == 1).all(), name


PART_OF = {"lm_head": "head", "transformer.wte": "embeddings", "value_embeds": "embeddings", "resid_lambdas": "scalars", "x0_lambdas": "scalars",
           "smear": "scalars", "backout": "scalars"}


def expected_factor(name, piece, arm, factors, sizes):
    """By the words of the documentation: what of piece `piece` (a block or head) of that parameter is slowed by."""
    if name.endswith(("router", "balance")):
        return 1.0
    if ".mlp." in name:
        return factors.get("blocks", 1.0) if arm != "dense" and piece < 2 else 1.0  # two shared blocks
    if ".attn." in name:
        shared = arm in ("dense", "cl-mlp") or piece == 0  # one shared head; of two key/value heads its own
        return factors.get("attention", 1.0) if shared else 1.0
    return factors.get(next(part for start, part in PART_OF.items() if name.startswith(start)), 1.0)


def steps_under(rule, arm, sizes):
    """Every parameter's first step, from the same weights and gradients."""
    model = build(arm, sizes=sizes)
    optimizer = model.setup_optimizer()
    plasticity.begin(rule, model, optimizer)
    before = bits(model)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
    optimizer.step()
    assert all(g["lr"] == g["initial_lr"] for g in optimizer.param_groups)
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}, optimizer


@pytest.mark.parametrize("arm, sizes", [("dense", {}), ("cl", {}), ("cl", dict(n_kv_head=2)), ("cl-mlp", {})])
@pytest.mark.parametrize("rule", [*(f"{part}:0.25" for part in plasticity.SHARED), *plasticity.SHARED, "frozen-shared:0.25", "frozen-shared",
                                  "blocks:0.5+attention:0.125+head"])
def test_each_factor_slows_exactly_its_part(rule, arm, sizes):
    factors = plasticity.parse(rule).shared
    (plain, _), (slowed, optimizer) = steps_under("all", arm, sizes), steps_under(rule, arm, sizes)
    changed = set()
    for name, step in plain.items():
        pieces = zip(slowed[name], step) if step.ndim == 3 else [(slowed[name], step)]
        for piece, (slow, full) in enumerate(pieces):
            factor = expected_factor(name, piece, arm, factors, sizes)
            if factor == 1:
                assert torch.equal(slow, full), f"{name} {piece} is slowed by {rule}"
            elif factor == 0:
                assert not slow.any(), f"{name} {piece} moves under {rule}"
            else:
                torch.testing.assert_close(slow, factor * full, atol=1e-6, rtol=1e-2, msg=lambda said: f"{name} {piece} under {rule}: {said}")
            changed |= {name} if factor != 1 else set()
    assert changed or (arm == "dense" and rule.startswith("blocks") and "+" not in rule), f"{rule} touches nothing of {arm}"
    kept = [group.get("block_scale") for group in optimizer.param_groups]
    optimizer.load_state_dict(optimizer.state_dict())
    assert [group.get("block_scale") for group in optimizer.param_groups] == kept, "the rule travels with the optimizer's state"


@pytest.mark.parametrize("arm", ["cl", "dense"])
def test_frozen_shared_moves_routed_blocks_and_heads_or_dense_mlps_only(arm):
    model = build(arm)
    optimizer = model.setup_optimizer(weight_decay=0.1)
    train(model, optimizer, 3)
    routing.freeze(model, optimizer)
    plasticity.begin("frozen-shared", model, optimizer)
    before = bits(model)
    train(model, optimizer, 3, seed=1)
    for name, m in ((name, p.detach() != before[name]) for name, p in model.named_parameters()):
        if ".mlp.c_" in name:
            assert m.flatten(1).any(1)[2:].any() and (arm == "dense" or not m[:2].any()), name
        elif arm == "cl" and m.ndim == 3:
            assert m.flatten(1).any(1)[1:].any() and not m[0].any(), name
        else:
            assert not m.any(), name


def test_a_dense_model_has_no_blocks_to_budget_and_can_have_row_masks():
    model = build("dense")
    optimizer = model.setup_optimizer()
    with pytest.raises(UserError, match="dense model has none"):
        plasticity.begin("budget:0.5", model, optimizer)
    plasticity.mark_rows(model, optimizer)
    train(model, optimizer, 3)
    before = bits(model)
    idx = tokens(4, 33) % 40
    model(idx[:, :-1], idx[:, 1:]).backward()
    optimizer.step()
    for name in ("transformer.wte.weight", "value_embeds.1.weight"):
        moved = (dict(model.named_parameters())[name] != before[name]).any(1)
        assert moved.nonzero().flatten().tolist() == idx[:, :-1].unique().tolist()


def test_statistics_of_use():
    assert plasticity.entropy(torch.ones(3, 8)) == pytest.approx(1) and plasticity.entropy(torch.eye(8)[:3]) == pytest.approx(0)
    assert plasticity.entropy(torch.tensor([[1.0, 1.0, 0.0, 0.0]])) == pytest.approx(0.5)
    assert plasticity.entropy(torch.tensor([[5.0], [7.0]])) == 1, "one head to choose from is no skew, and no nan in a record"
    a = torch.tensor([[3, 1, 2], [4, 5, 6]])
    assert plasticity.agreement(a, a.flip(1)) == 1 and plasticity.agreement(a, torch.tensor([[1, 7, 8], [4, 5, 0]])) == 0.5

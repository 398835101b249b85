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


@pytest.mark.parametrize("text, rule", [
    ("all", Rule()), ("frozen-shared", Rule(shared=0.0)), ("frozen-shared:0.1", Rule(shared=0.1)), ("budget:0.25", Rule(budget=0.25)),
    ("budget:0.5+frozen-shared:0.2", Rule(0.2, 0.5)), ("frozen-shared+budget:1", Rule(0.0, 1.0))])
def test_a_rule_is_read_from_its_name(text, rule):
    assert plasticity.parse(text) == rule


@pytest.mark.parametrize("text", ["", "none", "budget", "budget:0", "budget:1.5", "budget:x", "budget:nan", "frozen-shared:-1", "frozen-shared:",
                                  "all+budget:0.5", "budget:0.5+budget:0.2", "all:1", "frozen"])
def test_anything_else_is_refused_with_what_was_expected(text):
    with pytest.raises(UserError, match="expected all, frozen-shared"):
        plasticity.parse(text)


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
        learns = plasticity.busiest(used, general, 0.25)
        assert (learns.sum(1) == 4).all() and (used > 0).sum() > learns.sum()
        hold(used)
        before = bits(model)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        for layer in range(2):
            for which in ("c_fc", "c_proj"):
                name = f"transformer.h.{layer}.mlp.{which}.weight"
                moved = (dict(model.named_parameters())[name] != before[name]).flatten(1).any(1)
                assert moved[:2].all() and torch.equal(moved[2:], learns[layer]), (name, moved)


@pytest.mark.parametrize("arm", ["cl", "dense"])
def test_frozen_shared_moves_routed_blocks_or_dense_mlps_only(arm):
    model = build(arm)
    optimizer = model.setup_optimizer(weight_decay=0.1)
    train(model, optimizer, 3)
    routing.freeze(model, optimizer)
    plasticity.begin("frozen-shared", model, optimizer)
    before = bits(model)
    train(model, optimizer, 3, seed=1)
    moved = {name: p.detach() != before[name] for name, p in model.named_parameters()}
    for name, m in moved.items():
        if ".mlp.c_" in name:
            assert m.flatten(1).any(1)[2:].any() and (arm == "dense" or not m[:2].any()), name
        else:
            assert not m.any(), name


def test_a_factor_slows_by_that_factor():
    model, steps = build(), {}
    for rule in ("all", "frozen-shared:0.25"):
        model = build()
        optimizer = model.setup_optimizer()
        plasticity.begin(rule, model, optimizer)
        before = bits(model)
        train(model, optimizer, 1)
        steps[rule] = {name: p.detach() - before[name] for name, p in model.named_parameters()}
        assert all(g["lr"] == g["initial_lr"] for g in optimizer.param_groups)
    for name, step in steps["all"].items():
        slow = steps["frozen-shared:0.25"][name]
        if ".mlp.c_" in name:
            torch.testing.assert_close(slow[:2], 0.25 * step[:2], atol=1e-6, rtol=1e-3)
            assert torch.equal(slow[2:], step[2:])
        elif ".mlp." not in name:
            torch.testing.assert_close(slow, 0.25 * step, atol=1e-6, rtol=1e-3)
    optimizer.load_state_dict(optimizer.state_dict())
    assert any(g.get("block_scale") == [0.25] * 2 + [1.0] * 14 for g in optimizer.param_groups), "the rule travels with the optimizer's state"


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
    assert plasticity.idle_share(torch.tensor([[True, False], [False, False]])) == 0.75
    assert plasticity.entropy(torch.ones(3, 8)) == pytest.approx(1) and plasticity.entropy(torch.eye(8)[:3]) == pytest.approx(0)
    assert plasticity.entropy(torch.tensor([[1.0, 1.0, 0.0, 0.0]])) == pytest.approx(0.5)
    a = torch.tensor([[3, 1, 2], [4, 5, 6]])
    assert plasticity.agreement(a, a.flip(1)) == 1 and plasticity.agreement(a, torch.tensor([[1, 7, 8], [4, 5, 0]])) == 0.5

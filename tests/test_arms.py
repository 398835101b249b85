"""nanochat_cl.arms: what each name makes, that all of them train, and what is refused."""
import json
import math

import pytest
import torch

from nanochat_cl import arms, lora, patching, plasticity, pretrain
from nanochat_cl.command import UserError
from tests.tiny_cl import BOS, SIZES, build, train


@pytest.fixture(autouse=True, scope="module")
def patched():
    with patching.applied(), torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("name", arms.ARMS)
def test_every_arm_builds_and_takes_two_steps(name):
    arm = arms.ARMS[name]
    assert arm.name == name and arm.description and (not arm.phase_a or arms.ARMS[arm.phase_a].phase_a == "")
    model = build(name)
    optimizer = model.setup_optimizer(weight_decay=0.1)
    if arm.rows:
        plasticity.mark_rows(model, optimizer)
    if "plasticity" in arm.recipe:
        plasticity.begin(arm.recipe["plasticity"], model, optimizer)
    if arm.lora:
        optimizer = lora.adapt(model, arm.lora, seed=0)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    losses = train(model, optimizer, 2)
    assert all(0 < loss < 20 for loss in losses)
    moved = [key for key, p in model.named_parameters() if not torch.equal(p, before[key])]
    assert any(".mlp.c_fc" in key for key in moved) and all(torch.isfinite(p).all() for p in model.parameters())
    assert (arm.cl is None) == (not hasattr(model.config, "cl"))


def test_what_an_arm_asks_for_is_what_its_config_says():
    made = {name: arms.cl(1280, 10, 7, name) for name, arm in arms.ARMS.items() if arm.cl is not None}
    usual = dict(block=128, blocks=40, shared=5, active=10, held=0, join=0, released=0, shared_heads=2, active_heads=4, chunk=512, reach="bos",
                 backend="auto", isolate=True, bos=7, n_embd=1280, n_head=10)
    assert made["cl"] == usual and json.loads(json.dumps(made)) == made
    assert made["cl-flops"] == {**usual, "blocks": 80, "shared": 10, "active": 30, "held": 35, "join": 9}
    assert made["cl-token"] == {**usual, "chunk": 1, "reach": "token"} and made["cl-noiso"] == {**usual, "isolate": False}
    assert made["cl-mlp"] == {**usual, "shared_heads": 10, "active_heads": 0}
    assert made["cl-full"] == {**usual, "active": 35, "active_heads": 8}
    assert arms.cl(1280, 10, 7, "dense") is None


@pytest.mark.parametrize("n_embd", [24, 28, 32, 96, 128, 256, 384, 512, 768, 1280, 1536, 2048])
@pytest.mark.parametrize("options", [{}, {"match": "flops", "width_mult": 2.0, "reserve": 0.5}, {"reserve": 0.25}, {"match": "flops"}])
def test_blocks_add_up_to_the_hidden_layer_at_every_width(n_embd, options):
    for n_head in {1, 2, 3, n_embd // 64 or 1, n_embd // 128 or 1}:
        cl = arms.cl(n_embd, n_head, BOS, "cl", **options)
        assert cl["blocks"] * cl["block"] == 4 * n_embd * options.get("width_mult", 1.0)
        assert 1 <= cl["shared"] and 1 <= cl["active"] <= cl["blocks"] - cl["shared"] - cl["held"] and 0 <= cl["join"] <= cl["held"]
        assert 1 <= cl["shared_heads"] <= n_head and 0 <= cl["active_heads"] <= n_head - cl["shared_heads"]
        assert (cl["active_heads"] == 0) == (n_head == cl["shared_heads"])
        if options.get("match") == "flops":
            assert (cl["shared"] + cl["active"]) * cl["block"] == 4 * n_embd, "as many units work as the dense layer has"


@pytest.mark.parametrize("made, said", [
    (lambda: arms.cl(20, 2, 0, "cl"), "multiple of 4.*got 20"), (lambda: arms.cl(130, 2, 0, "cl"), "multiple"), (lambda: arms.cl(1000, 2, 0, "cl"), "multiple"),
    (lambda: arms.cl(128, 2, 0, "sparse"), "no arm 'sparse'.*dense"), (lambda: arms.cl(128, 2, 0, "cl", chunks=5), "unknown option chunks; expected .*chunk"),
    (lambda: arms.cl(128, 2, 0, arms.Arm("mine", {"widthmult": 2})), "arm mine: unknown option widthmult"),
    (lambda: arms.cl(128, 2, 0, "cl", active=15), "active.*14.*got 15"), (lambda: arms.cl(128, 2, 0, "cl", active=0), "active.*got 0"),
    (lambda: arms.cl(128, 2, 0, "cl", match="flop"), "expected match params, flops.*got flop"),
    (lambda: arms.cl(128, 2, 0, "cl", reach="far"), "reach bos, row, ema, token.*far"),
    (lambda: arms.cl(128, 2, 0, "cl", backend="triton"), "backend auto, masked, bmm, slice.*triton"),
    (lambda: arms.cl(128, 2, 0, "cl", chunk=0), "chunk of at least 1"), (lambda: arms.cl(128, 2, 0, "cl", chunk=1), "of 1 with reach token.*got 1 with bos"),
    (lambda: arms.cl(128, 2, 0, "cl-token", chunk=16), "got 16 with token"), (lambda: arms.cl(128, 2, 0, "cl", reach="token"), "got 512 with token"),
    (lambda: arms.cl(128, 2, 0, "cl", width_mult=2.0), "width-mult of 1 to 7 .1 for match params.*got 2.0"),
    *((lambda mult=mult: arms.cl(128, 2, 0, "cl-flops", width_mult=mult), f"makes 16 blocks another whole number of them.*got {mult}")
      for mult in (0.5, 1.02, 8.0, math.inf, math.nan)),
    (lambda: arms.Arm("mine", {}, lora=4), "arm mine: rows and lora are for dense arms"), (lambda: arms.cl(128, 2, 0, "cl", reserve=1.0), "reserve of 0 to 1"),
    (lambda: arms.cl(128, 2, 0, "cl", reserve=-0.1), "reserve"), (lambda: arms.cl(128, 2, 0, "cl", reserve=0.95), "not in reserve"),
    (lambda: arms.cl(128, 2, 0, "cl-flops", width_mult=1.0, reserve=0.5), "not in reserve"),
    (lambda: arms.cl(128, 2, 0, "cl-noiso", reserve=0.5), "reserve needs isolated updates")])
def test_what_cannot_be_made_is_refused_in_one_line(made, said):
    with pytest.raises(UserError, match=said) as error:
        made()
    assert "\n" not in str(error.value)


def test_an_arm_of_ones_own_is_one_more_line(monkeypatch):
    monkeypatch.setitem(arms.ARMS, "cl-long", arms.Arm("cl-long", {"chunk": 32, "reach": "ema", "heads": False}))
    model = build("cl-long")
    assert model.config.cl == {**arms.cl(32, 4, BOS, "cl-mlp"), "chunk": 32, "reach": "ema"}
    train(model, model.setup_optimizer(), 1)


def test_flags_of_pretrain_win_over_the_arm_and_what_is_not_given_is_the_arms():
    args = pretrain.parse(["--arm", "cl-flops", "--width-mult", "3", "--chunk", "64"])
    assert args.options == {"width_mult": 3.0, "chunk": 64} and args.arm == "cl-flops"
    cl = arms.cl(128, 4, BOS, args.arm, **args.options)
    assert (cl["blocks"], cl["chunk"], cl["held"]) == (48, 64, 21) and cl["reach"] == "bos"
    assert pretrain.parse(["--arm", "cl"]).options == {}
    assert arms.cl(128, 4, BOS, "cl", **pretrain.parse(["--arm", "cl", "--match", "flops"]).options)["active"] == 14


def test_a_config_keeps_its_cut_at_its_own_width_and_takes_the_default_one_at_another():
    cl = arms.cl(32, 4, BOS, "cl-flops")
    assert arms.fit(cl, 32, 4) == cl and arms.fit(cl, 32, 4) is not cl
    other = arms.fit(cl, 768, 6)
    assert other["n_embd"] == 768 and other["blocks"] * other["block"] == 4 * 768 and {key: other[key] for key in ("chunk", "reach", "bos")} == \
        {key: cl[key] for key in ("chunk", "reach", "bos")}
    assert SIZES["n_embd"] == 32


def test_controls_have_the_options_that_their_names_say():
    assert {name: arm.recipe for name, arm in arms.ARMS.items() if arm.recipe} == {
        "dense-frozen": {"plasticity": "frozen-shared"}, "dense-low-lr": {"lr_mult": 0.1},
        "dense-replay-1": {"replay": 0.01}, "dense-replay-5": {"replay": 0.05}, "dense-replay-25": {"replay": 0.25}}

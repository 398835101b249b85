"""Model-CL as nanochat sees it: config, initial weights, compiled training beside a dense model, checkpoints."""
import dataclasses
import json

import pytest
import torch

from nanochat_cl import arms, machine, patching, routing
from patches import settings
from tests.tiny_cl import BOS, SIZES, build, tokens, train


@pytest.fixture(autouse=True, scope="module")
def patched():
    with patching.applied():
        yield


def test_a_config_without_cl_is_the_original_and_one_with_it_travels_through_metadata():
    from nanochat import gpt
    plain = gpt.GPTConfig(**SIZES)
    assert type(plain).__qualname__ == "GPTConfig" and dataclasses.asdict(plain) == SIZES
    cl = arms.cl(32, 4, BOS, "cl", chunk=32)
    config = gpt.GPTConfig(**SIZES, cl=cl)
    restored = gpt.GPTConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert restored == config and restored.cl == cl and isinstance(config, type(plain))


@pytest.mark.parametrize("arm", ["cl-full", "cl-flops", "cl-mlp"])
def test_the_arm_of_the_settings_holds_for_configs_that_name_none_and_is_cut_anew_at_another_width(arm):
    from nanochat import gpt
    mine = arms.cl(32, 4, BOS, arm)
    with settings.using(arm=mine):
        assert gpt.GPTConfig(**SIZES).cl == mine
        reference = gpt.GPTConfig(n_embd=768)  # base_train builds a d12 model for its numbers: Model-CL, by the default cut
        assert reference.cl == {**mine, **arms.cl(768, 6, BOS, "cl"), **{key: mine[key] for key in ("chunk", "reach", "isolate", "backend")}}
        with torch.device("meta"):
            counts = gpt.GPT(reference).num_scaling_params()
        assert gpt.GPTConfig(**SIZES, cl=arms.cl(32, 4, BOS, "cl")).cl == arms.cl(32, 4, BOS, "cl")
    with torch.device("meta"):
        assert counts == gpt.GPT(gpt.GPTConfig(n_embd=768)).num_scaling_params()
    assert not hasattr(gpt.GPTConfig(**SIZES), "cl")


def test_both_arms_of_a_seed_start_from_the_same_weights_and_leave_the_same_random_state():
    ours, state = build(lively=False, seed=7), torch.get_rng_state()
    dense, dense_state = build("dense", lively=False, seed=7), torch.get_rng_state()
    assert torch.equal(state, dense_state)
    theirs = dict(dense.named_parameters())
    for name, p in ours.named_parameters():
        if name in theirs:
            expected = theirs[name].T if name.endswith("c_proj.weight") else theirs[name]
            assert torch.equal(p.detach().reshape(expected.shape), expected.detach()), name
    for mine, others in zip(routing.parts(ours), routing.parts(build(lively=False, seed=8)), strict=True):
        routers = torch.stack([part.router.detach() for part in mine])
        assert 0.018 < routers.std() < 0.022 and not torch.equal(routers[0], routers[1])
        assert not torch.equal(routers, torch.stack([part.router.detach() for part in others]))
        assert not any(t.any() for part in mine for t in (part.balance, part.usage))
    assert not ours.token_count.any()


def test_every_parameter_is_in_one_group_and_the_first_six_are_nanochats():
    ours, dense = build(), build("dense")
    mine, theirs = ours.setup_optimizer(weight_decay=0.1), dense.setup_optimizer(weight_decay=0.1)
    names = lambda model, group: [name for p in group["params"] for name, q in model.named_parameters() if q is p]
    grouped = [name for group in mine.param_groups for name in names(ours, group)]
    assert sorted(grouped) == sorted(name for name, _ in ours.named_parameters())
    for group, expected in zip(mine.param_groups[:6], theirs.param_groups[:6]):
        assert names(ours, group) == names(dense, expected)
        assert {k: v for k, v in group.items() if k not in ("params", "rows")} == {k: v for k, v in expected.items() if k != "params"}
    assert [g.get("rows") for g in mine.param_groups[:3]] == [None, 1, 4], "a value embedding's row is shared by four heads"
    muon = lambda model, optimizer: sorted(name for g in optimizer.param_groups if g["kind"] == "muon" for name in names(model, g))
    assert muon(ours, mine) == muon(dense, theirs) and all("isolate" in g for g in mine.param_groups if g["kind"] == "muon")
    assert all(g["lr"] == g["initial_lr"] for g in mine.param_groups)
    mlp = build("cl-mlp")
    attention = [names(mlp, g) for g in mlp.setup_optimizer().param_groups if g["kind"] == "muon" and "isolate" not in g]
    assert attention == [names(dense, g) for g in theirs.param_groups if g["kind"] == "muon" and ".mlp." not in names(dense, g)[0]]


def test_dense_and_sparse_models_step_compiled_in_one_process_and_learn():
    """Compiled kernels for both optimizers; the sparse model is one graph (fullgraph) and its loss the eager one."""
    machine.prepare()

    def quick(optimizer):
        """With one iteration of Muon's orthogonalisation: each more is two kernels to compile for every shape."""
        for group in optimizer.param_groups:
            if group["kind"] == "muon":
                group["ns_steps"] = 1
        return optimizer
    for arm in ("dense", "cl"):
        model = build(arm, lively=False, sizes=dict(n_layer=1))
        optimizer = quick(model.setup_optimizer(weight_decay=0.1))
        with torch.compiler.set_stance("force_eager"):
            eager = build(arm, lively=False, sizes=dict(n_layer=1))
            expected = train(eager, quick(eager.setup_optimizer(weight_decay=0.1)), 8)
        losses = train(torch.compile(model, dynamic=False, fullgraph=True) if arm == "cl" else model, optimizer, 30)
        assert losses[0] == pytest.approx(4.16, abs=0.05) and losses[-1] < losses[0] - 1, losses
        assert losses[:2] == pytest.approx(expected[:2], abs=1e-4) and losses[:8] == pytest.approx(expected, abs=5e-3)  # rounding grows
    blocks, heads = routing.usage(model)
    assert (blocks.sum(1) == 30 * 4 * 32 * 4).all() and (heads.sum(1) == 30 * 4 * 32 * 2).all() and model.token_count.sum() > 1000


def test_a_checkpoint_of_base_train_is_built_again_by_nanochats_own_loader(tmp_path, monkeypatch):
    from nanochat import checkpoint_manager

    class Tokenizer:
        get_vocab_size = staticmethod(lambda: SIZES["vocab_size"])
    monkeypatch.setattr(checkpoint_manager, "get_tokenizer", Tokenizer)
    with torch.compiler.set_stance("force_eager"):
        model = build(chunk=16)
        optimizer = model.setup_optimizer(weight_decay=0.1)
        train(model, optimizer, 3)
        meta = {"model_config": dataclasses.asdict(model.config)}
        checkpoint_manager.save_checkpoint(str(tmp_path), 3, model.state_dict(), optimizer.state_dict(), meta)
        loaded, _, _ = checkpoint_manager.build_model(str(tmp_path), 3, torch.device("cpu"), "eval")
        idx = tokens(2, 50)
        assert torch.equal(loaded(idx), model.eval()(idx))
        assert all(torch.equal(a, b) and a.any() for a, b in zip(routing.usage(loaded), routing.usage(model), strict=True))
        # the optimizer's state goes on as well
        data, optimizer_data, _ = checkpoint_manager.load_checkpoint(str(tmp_path), 3, torch.device("cpu"), load_optimizer=True)
        loaded.train()
        other = loaded.setup_optimizer(weight_decay=0.1)
        other.load_state_dict(optimizer_data)
        assert train(loaded, other, 3, seed=2) == train(model.train(), optimizer, 3, seed=2)
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))


def test_a_dense_checkpoint_does_not_load_into_a_sparse_model_by_accident():
    with pytest.raises(RuntimeError, match="mlp"):
        build().load_state_dict(build("dense").state_dict(), strict=True)


def test_routers_learn_at_a_tenth_of_the_output_heads_rate():
    with patching.applied():
        groups = build().setup_optimizer(unembedding_lr=0.008).param_groups
        rates = [(g["params"][0].ndim, g["initial_lr"] / groups[0]["initial_lr"], g["lr"]) for g in groups if g.get("routing")]
        assert [r for n, r, _ in rates if n == 2] == pytest.approx([0.1] * (len(rates) - 1)) and rates[-1][2] == 0.01

"""nanochat_cl.growth: a reserve that Phase A never touches, and a release that changes no function, displaces nobody, and learns."""
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import toy_phase_a
from killed_runs import comparable
from nanochat_cl import evolve, files, growth, patching, phase_b, routing, runs
from nanochat_cl.command import UserError
from nanochat_cl.learner import Learner
from tests.tiny_cl import SIZES, build, tokens, train

HELD, OLD, ACTIVE, JOIN = 14, 14, 12, 4  # of cl-flops at width 32: 32 blocks, 4 shared


@pytest.fixture(autouse=True, scope="module")
def patched():
    with patching.applied(), torch.compiler.set_stance("force_eager"):
        yield


def phase_a(arm="cl-flops", steps=8, **changed):
    """A model that has learned with a reserve, and its optimizer, with decay."""
    model = build(arm, lively=False, **changed)
    optimizer = model.setup_optimizer(matrix_lr=0.02, weight_decay=0.1)
    train(model, optimizer, steps)
    return model, optimizer


def reserve(model, optimizer):
    """All that belongs to the reserve of each layer, moments and counters included."""
    found = {}
    for i, layer in enumerate(model.transformer.h):
        mlp, state = layer.mlp, optimizer.state
        for name, module in (("c_fc", mlp.c_fc), ("c_proj", mlp.c_proj)):
            found[i, name] = module.weight[-HELD:]
            if stacked := state.get(getattr(model.transformer.h[0].mlp, name).weight):
                found |= {(i, name, key): stacked[key][i, -HELD:] for key in ("momentum_buffer", "second_momentum_buffer")}
        for name, p in (("router", mlp.router), ("balance", mlp.balance)):
            found[i, name] = p[OLD:OLD + HELD]
            found |= {(i, name, key): state[p][key][OLD:OLD + HELD] for key in ("exp_avg", "exp_avg_sq") if p in state}
        found[i, "usage"] = mlp.usage[-HELD:]
    return {key: t.detach().clone() for key, t in found.items()}


def test_what_a_rule_has_released_by_a_milestone():
    assert [growth.released("all", 14, m) for m in (0, 1, 9)] == [14, 14, 14] and [growth.released("none", 14, m) for m in (0, 9)] == [0, 0]
    assert [growth.released("5", 14, m) for m in range(5)] == [5, 10, 14, 14, 14] and growth.released("all", 0, 0) == growth.released("5", 0, 3) == 0
    for rule in ("", "0", "some", "-1", "1.5", "²"):
        with pytest.raises(UserError, match="--release must be all, none or a number.*got") as error:
            growth.released(rule, 14, 0)
        assert "\n" not in str(error.value)


def test_rows_of_newcomers():
    generator = torch.Generator().manual_seed(1)
    drawn, features = torch.randn(3, 32, generator=generator), F.rms_norm(torch.randn(7, 32, generator=generator), (32,))
    assert torch.equal(growth.rows("random", drawn, features), drawn) and torch.equal(growth.rows("passages", drawn, features[:0]), drawn)
    made = growth.rows("passages", drawn, features)
    torch.testing.assert_close(F.normalize(made), F.normalize(features[[0, 3, 6]]))
    scores = features @ made.T
    assert scores[[0, 3, 6]].argmax(0).tolist() == [0, 1, 2] and scores.argmax(0).tolist() == [0, 3, 6], "each is chosen by what is like its own"
    random = features @ (torch.randn(20_000, 32, generator=generator) * routing.ROUTER_STD).T
    assert scores.max().item() == pytest.approx(3 * random.std().item(), rel=0.02), "three standard deviations of a random router's scores"
    assert growth.rows("passages", drawn[:1], features).shape == (1, 32) and growth.rows("passages", drawn, features[:1]).shape == (3, 32)


@pytest.mark.parametrize("arm, changed", [("cl-flops", {}), ("cl", {"reserve": 0.5})])
def test_in_phase_a_the_reserve_serves_nobody_and_keeps_every_bit_with_decay(arm, changed):
    model = build(arm, lively=False, **changed)
    held = model.config.cl["held"]
    optimizer, idx = model.setup_optimizer(matrix_lr=0.02, weight_decay=0.1), tokens(4, 64)
    first = [{key: getattr(layer.mlp, key).weight[-held:].clone() for key in ("c_fc", "c_proj")} for layer in model.transformer.h]
    routers = [layer.mlp.router[:layer.mlp.routed][-held:].clone() for layer in model.transformer.h]
    losses = train(model, optimizer, 25)
    assert losses[-1] < losses[0] - 0.3
    assert routing.choices(model, idx)[0].max() < model.transformer.h[0].mlp.routed - held
    for layer, weights, router in zip(model.transformer.h, first, routers):
        mlp = layer.mlp
        assert torch.equal(mlp.router[:mlp.routed][-held:], router) and not mlp.balance[-held:].any() and not mlp.usage[-held:].any()
        assert (mlp.usage[:-held] > 0).all()
        for key, old in weights.items():
            weight = getattr(mlp, key).weight
            assert torch.equal(weight[-held:], old) and (weight[:-held] != 0).flatten(1).any(1).all()
    for key in ("c_fc", "c_proj"):
        state = optimizer.state[getattr(model.transformer.h[0].mlp, key).weight]
        assert not any(state[moment][:, -held:].any() for moment in ("momentum_buffer", "second_momentum_buffer"))


@pytest.mark.parametrize("release", ["all", "3"])
@pytest.mark.parametrize("newcomers", growth.NEWCOMERS)
def test_a_release_changes_no_logit_and_displaces_nobody(release, newcomers):
    model, optimizer = phase_a()
    routing.freeze(model, optimizer)
    model.eval()
    idx, coming = tokens(3, 64, seed=9, bos_every=29), tokens(4, 64, seed=10)
    with torch.no_grad():
        before, chosen = model(idx), routing.choices(model, idx)[0]
        for milestone in range(3):
            growth.grow(model, release, newcomers, milestone, coming)
            count = HELD if release == "all" else 3 * (milestone + 1)
            assert model.config.cl["released"] == count and (now := routing.choices(model, idx)[0]).shape[-1] == ACTIVE + min(count, JOIN)
            assert torch.equal(now[..., :ACTIVE], chosen), "an old block lost its place"
            assert (now[..., ACTIVE:] >= OLD).all() and (now[..., ACTIVE:] < OLD + count).all()
            torch.testing.assert_close(model(idx), before, atol=1e-5, rtol=1e-5)


def test_a_reserve_that_is_not_released_or_was_before_and_a_model_without_one_stay_as_they_are():
    model, _ = phase_a(steps=2)
    routing.release(model, HELD)
    growth.grow(model, "3", "random", 0, tokens(2, 64))
    assert model.config.cl["released"] == HELD, "what works already was taken back"
    routing.release(model, 0)
    state = {key: t.clone() for key, t in model.state_dict().items()}
    growth.grow(model, "none", "passages", 3, tokens(2, 64))
    assert model.config.cl["released"] == 0 and all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    for arm in ("cl", "dense"):
        other = build(arm)
        state = {key: t.clone() for key, t in other.state_dict().items()}
        growth.grow(other, "all", "passages", 0, tokens(2, 64))
        assert all(torch.equal(t, state[key]) for key, t in other.state_dict().items())


@pytest.mark.parametrize("newcomers", growth.NEWCOMERS)
def test_newcomers_are_chosen_and_learn_while_the_rest_of_the_reserve_keeps_every_bit(newcomers):
    model, optimizer = phase_a()
    routing.freeze(model, optimizer)
    before = reserve(model, optimizer)
    growth.grow(model, "5", newcomers, 0, tokens(4, 64, seed=77))
    routing.reset_usage(model)
    losses = train(model, optimizer, 12, seed=5)
    assert losses[-1] < losses[0] and all(torch.isfinite(torch.tensor(losses)))
    after = reserve(model, optimizer)
    for i in range(SIZES["n_layer"]):
        used = after[i, "usage"]
        assert (used[:5] > 0).sum() >= JOIN and not used[5:].any(), used
        for which in ("c_fc", "c_proj"):
            moved = (after[i, which] != before[i, which]).flatten(1).any(1)
            assert torch.equal(moved, used > 0), (which, moved, used)
            assert all(torch.equal(after[i, which, key][5:], before[i, which, key][5:]) for key in ("momentum_buffer", "second_momentum_buffer"))
        assert after[i, "c_proj"][:5].flatten(1).any(1).sum() >= JOIN, "they write to the output now"
        same = (after[i, "router"] == before[i, "router"]).all(1)
        assert same[5:].all() and (same[:5].all() if newcomers == "random" else not same[:5].any())


def test_a_reserve_that_is_held_back_is_no_idle_block():
    """A block counts as idle when it may work and did not learn; by hand from the gradients, before a release and after."""
    model, optimizer = phase_a()
    routing.freeze(model, optimizer)
    learner = SimpleNamespace(model=model, phase_a=SimpleNamespace(config={"cl": model.config.cl}))
    for released, working in ((0, OLD), (5, OLD + 5)):
        growth.grow(model, str(released) if released else "none", "random", 0, tokens(4, 64, seed=77))
        model.zero_grad()
        model(*2 * [tokens(1, 8)]).backward()
        learned = [layer.mlp.c_fc.weight.grad[layer.mlp.shared:].flatten(1).any(1) for layer in model.transformer.h]
        assert all(not grad[working:].any() for grad in learned)
        assert Learner._idle_shares(learner)[0] == pytest.approx(1 - torch.stack([grad[:working] for grad in learned]).float().mean().item())


def test_of_passages_made_newcomers_each_layer_serves_its_own():
    model, optimizer = phase_a()
    routing.freeze(model, optimizer)
    model.eval()
    coming = tokens(4, 64, seed=21)
    features = routing.passages(model, coming)
    assert len(features) == 4 * 2 and features.square().mean(1).sub(1).abs().max() < 1e-3  # chunks at 16 and 32; the first has no token before it
    growth.grow(model, "all", "passages", 0, coming)
    picked = torch.linspace(0, len(features) - 1, HELD).round().long()
    for layer, mlp in enumerate(block.mlp for block in model.transformer.h):
        torch.testing.assert_close(mlp.router[OLD:OLD + HELD], features[picked] * (3 * routing.ROUTER_STD / 32 ** 0.5))
        served = routing.choices(model, coming)[0][layer][:, 1:].flatten(0, 1)  # (rows x chunks, k)
        assert all(((picked == passage).nonzero().flatten() + OLD).tolist()[0] in served[passage].tolist() for passage in range(len(features)))


def test_a_grown_model_decodes_as_it_computes():
    from nanochat import engine
    model, optimizer = phase_a(chunk=16)
    routing.freeze(model, optimizer)
    growth.grow(model, "all", "random", 0, tokens(2, 64))
    train(model, optimizer, 4, seed=3)
    model.eval()
    idx = tokens(2, 50, bos_every=21)
    kv_cache = engine.KVCache(batch_size=2, num_heads=4, seq_len=60, head_dim=8, num_layers=2, device=torch.device("cpu"), dtype=torch.float32)
    with torch.inference_mode():
        pieces = [model(part, kv_cache=kv_cache) for part in idx.split([33, *[1] * 17], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(idx), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    place, before = tmp_path_factory.mktemp("base"), os.environ.get("NANOCHAT_BASE_DIR")
    os.environ["NANOCHAT_BASE_DIR"] = str(place)
    yield toy_phase_a.make(place, names=("cl-flops",))
    os.environ.pop("NANOCHAT_BASE_DIR") if before is None else os.environ.update(NANOCHAT_BASE_DIR=before)


def run(name, *more):
    evolve.evolve(evolve.parse([*toy_phase_a.ARGS, "--arms", "cl-flops", "--name", name, "--probe-items", "1", "--eval-docs", "1", *more]))


@pytest.mark.parametrize("flag, value, said", [("--release", "half", "--release must be all, none or a number.*'half'"), ("--release", "0", "got '0'"),
                                               ("--newcomers", "clever", "--newcomers must be random or passages, got 'clever'")])
def test_unreadable_rules_are_refused_before_anything_is_written(base, flag, value, said):
    with pytest.raises(UserError, match=said) as error:
        run("bad", flag, value)
    assert "\n" not in str(error.value) and not (base / "evolve/bad").exists()


def test_a_run_that_was_stopped_continues_with_what_was_released(base, monkeypatch):
    """Milestones at steps 0, 4, 8 and 10: three blocks at each. Stopped at step 6, it ends with the records and weights of one left alone."""
    more = ("--release", "3", "--newcomers", "passages", "--weight-decay", "0.1")
    run("whole", *more)
    train_, stop_at = phase_b.PhaseB.train, [6]

    def train_once(self):
        if self.state["step"] in stop_at:
            stop_at.clear()
            raise KeyboardInterrupt
        train_(self)
    monkeypatch.setattr(phase_b.PhaseB, "train", train_once)
    with pytest.raises(KeyboardInterrupt):
        run("halves", *more)
    saved = runs.load_state(base / "evolve/halves", torch.device("cpu"))
    assert saved["step"] == 6 and saved["arms"]["cl-flops"]["released"] == 6
    run("halves", *more)
    records = files.read_jsonl(base / "evolve/whole/records.jsonl")
    assert [r["blocks"] and r["blocks"]["released"] for r in records] == [None, 3, 6, 9], "what the steps before a record had"
    assert [r["flops_per_token"] - records[0]["flops_per_token"] for r in records] == [6 * 2 * 2 * 16 * 64 * join for join in (0, 3, 4, 4)]
    assert comparable(base, "halves") == comparable(base, "whole")
    whole, halves = (runs.load_state(base / "evolve" / name, torch.device("cpu"))["arms"]["cl-flops"] for name in ("whole", "halves"))
    assert whole["released"] == halves["released"] == 9
    assert all(torch.equal(t, halves["model"][key]) for key, t in whole["model"].items())


def test_a_release_at_once_is_seen_in_the_records_and_the_scores_of_the_start_are_phase_as(base):
    for rule in ("all", "none"):
        run(rule, "--release", rule, "--max-tokens", "1024")
    at_once, never = (files.read_jsonl(base / f"evolve/{rule}/records.jsonl") for rule in ("all", "none"))
    assert [r["blocks"] and r["blocks"]["released"] for r in at_once] == [None, HELD] and never[-1]["blocks"]["released"] == 0
    assert at_once[0]["domain"] == never[0]["domain"] and at_once[-1]["domain"] != never[-1]["domain"]
    use = torch.tensor(at_once[-1]["blocks"]["use"])
    assert (use[:, OLD:].sum(1) - JOIN / (ACTIVE + JOIN)).abs().max() < 1e-6 and not torch.tensor(never[-1]["blocks"]["use"])[:, OLD:].any()


def test_newcomers_are_made_of_the_features_that_route(monkeypatch):
    with patching.applied(), torch.compiler.set_stance("force_eager"):
        model, idx, pooled, choose = build("cl-flops"), tokens(3, 64, seed=4), [], routing.choose
        model(idx, idx)  # counts tokens
        routing.freeze(model, model.setup_optimizer())
        monkeypatch.setattr(routing, "choose", lambda parts, features, lengths: pooled.append(features) or choose(parts, features, lengths))
        routing.choices(model, idx)
        torch.testing.assert_close(routing.passages(model, idx), pooled[0][:, 1:].flatten(0, 1))


def test_a_later_release_leaves_the_routers_of_those_that_work_already():
    from nanochat_cl import growth
    with patching.applied(), torch.compiler.set_stance("force_eager"):
        model = build("cl-flops", lively=False)
        routing.freeze(model, model.setup_optimizer())
        rows = []
        for milestone in (0, 1):
            growth.grow(model, "3", "passages", milestone, tokens(4, 64, seed=milestone))
            rows.append([part.router.detach().clone() for part in routing.parts(model)[0]])
        for first, second in zip(*rows):
            assert torch.equal(first[14:17], second[14:17]) and not (first[17:20] == second[17:20]).all(1).any() and torch.equal(first[20:], second[20:])

"""nanochat_cl.routing: what a decision may depend on, and that training, prefill and cached decoding make the same one."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat_cl import patching, routing
from nanochat_cl.accounting import boundaries
from tests.tiny_cl import BOS, SIZES, build, tokens


@pytest.fixture(autouse=True, scope="module")
def patched():
    with patching.applied(), torch.compiler.set_stance("force_eager"):
        yield


def cache(rows, seq_len=64, layers=SIZES["n_layer"]):
    from nanochat import engine
    return engine.KVCache(batch_size=rows, num_heads=SIZES["n_kv_head"], seq_len=seq_len, head_dim=SIZES["n_embd"] // SIZES["n_head"], num_layers=layers,
                          device=torch.device("cpu"), dtype=torch.float32)


def by_kind(model, idx, kv_cache=None, learning=False):
    """For blocks, then heads: (L, B, T, k) choice and gate of every token; a cache is advanced as attention would."""
    state = routing.decide(model, idx, kv_cache, learning)
    if kv_cache is not None:
        kv_cache.routing = state
        kv_cache.advance(idx.shape[1])
    kinds = []
    for kind in routing.parts(model):
        found = [part.decision for part in kind]
        lengths = torch.tensor(found[0].lengths)
        assert lengths.sum() == idx.shape[1]
        kinds.append(tuple(torch.stack([part.repeat_interleave(lengths, dim=1) for part in parts])
                           for parts in (tuple(d.choice for d in found), tuple(d.gate.detach() for d in found))))
    return kinds


def per_token(model, idx, kv_cache=None):
    """The same of the blocks alone."""
    return by_kind(model, idx, kv_cache)[0]


REACHES = [("bos", 32), ("row", 32), ("ema", 32), ("token", 1)]


@pytest.mark.parametrize("end, chunk, starts", [
    (2048, 512, [0, 16, 32, 64, 128, 256, 512, 1024, 1536]), (512, 512, [0, 16, 32, 64, 128, 256]), (10, 512, [0]), (16, 512, [0]),
    (17, 512, [0, 16]), (100, 48, [0, 16, 32, 48, 96]), (40, 16, [0, 16, 32]), (9, 4, [0, 4, 8]),
])
def test_boundaries_double_and_are_then_regular(end, chunk, starts):
    assert boundaries(end, chunk) == starts


@pytest.mark.parametrize("reach, chunk", REACHES)
def test_a_chunk_is_routed_by_the_tokens_that_are_in_reach(reach, chunk):
    model, idx = build(reach=reach, chunk=chunk), tokens(3, 64, seed=3)
    idx[1, 5], idx[1, 31], idx[2, 40] = BOS, BOS, BOS
    model.token_count.copy_(torch.bincount(idx.flatten(), minlength=64))
    model.eval()
    kinds = by_kind(model, idx)
    wte = model.transformer.wte.weight.detach().double()
    common = sum(wte[t] / wte[t].square().mean().sqrt() for t in idx.flatten().tolist()) / idx.numel()  # of all that was seen in training
    for row in range(3):
        for start in (0, 16, 32, 40) if reach == "token" else (0, 16, 32):
            total, reached, count = torch.zeros(32, dtype=torch.float64), 0, 0.0
            for t in [start] if reach == "token" else range(start - 1, -1, -1):
                token = idx[row, t].item()
                if token == BOS and reach == "bos":
                    break
                if token != BOS:
                    weight = 0.5 ** ((start - 1 - t) / 16) if reach == "ema" else 1.0
                    total, reached = total + weight * wte[token] / wte[token].square().mean().sqrt(), reached + 1
                    count = count + weight
            feature = total / count if reached else wte[BOS] / wte[BOS].square().mean().sqrt()
            feature = feature - common
            feature = feature / feature.square().mean().sqrt()
            at = start if reach == "token" else min(start + 7, 63)
            for layer, block in enumerate(model.transformer.h):
                for part, routed, active, (choice, gate) in zip((block.mlp, block.attn.c_proj), (14, 3), (4, 2), kinds):
                    score, chosen = part.router.detach().double()[:routed] @ feature, choice[layer, row, at]
                    assert len(chosen) == active and score[chosen].min() > score.topk(active).values[-1] - 0.02, (reach, row, start)  # embeddings are rounded
                    torch.testing.assert_close(gate[layer, row, at].double(), 2 * torch.sigmoid(score[chosen]), atol=0.03, rtol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reach, chunk", REACHES)
def test_changing_a_token_changes_no_earlier_logit(reach, chunk, training):
    """In training, where a loss has a gradient, the loss of no earlier token."""
    model, idx = build(reach=reach, chunk=chunk).train(training), tokens(2, 64, bos_every=23)
    model.token_count.copy_(torch.arange(64))
    counted, call = model.token_count.clone(), model
    if training:
        targets = tokens(2, 64, seed=1)
        call = lambda idx: model(idx, targets, loss_reduction="none").view(2, 64)
    before = call(idx).detach()
    assert torch.equal(model.token_count, counted) != training
    for t in (1, 15, 16, 31, 32, 47, 63):
        changed = idx.clone()
        changed[:, t] = changed[:, t] % 63 + 1
        model.token_count.copy_(counted)  # training counts its batches
        after = call(changed).detach()
        assert torch.equal(after[:, :t], before[:, :t]), f"token {t} changed an earlier logit"
        assert not torch.equal(after[:, t], before[:, t])


@given(st.sampled_from(REACHES), st.lists(st.integers(1, 20), min_size=1, max_size=9), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_any_way_of_cutting_a_text_into_cached_calls_chooses_the_same_blocks_and_heads(how, calls, seed):
    model, idx = build(reach=how[0], chunk=how[1], seed=seed), tokens(2, sum(calls), seed=seed, bos_every=1 + seed % 37)
    expected = by_kind(model.eval(), idx)
    assert [choice.shape[-1] for choice, _ in expected] == [4, 2]
    kv_cache = cache(2, seq_len=200)
    pieces = [by_kind(model, part, kv_cache) for part in idx.split(calls, dim=1)]
    for kind, (choice, gate) in enumerate(expected):
        assert torch.equal(torch.cat([p[kind][0] for p in pieces], dim=2), choice)
        torch.testing.assert_close(torch.cat([p[kind][1] for p in pieces], dim=2), gate, atol=1e-6, rtol=0)
    trained = by_kind(model, idx, learning=True)  # counts the batch afterwards only
    assert all(torch.equal(a[0], b[0]) for a, b in zip(trained, expected)), "training chooses other blocks than evaluation"


@pytest.mark.parametrize("reach, chunk", [("bos", 16), ("row", 16), ("ema", 16), ("token", 1)])
def test_prefill_and_decoding_give_the_logits_of_one_forward_and_a_reset_cache_begins_anew(reach, chunk):
    model, idx = build(reach=reach, chunk=chunk, sizes=dict(n_layer=3)).eval(), tokens(1, 60, bos_every=25)
    with torch.inference_mode():
        full = model(idx)
        first, many = cache(1, seq_len=30, layers=3), cache(3, layers=3)
        for attempt in range(2):
            pieces = [model(part, kv_cache=first) for part in idx[:, :30].split([30] if attempt else [17, 1, 12], dim=1)]  # at once, or in chunks
            torch.testing.assert_close(torch.cat(pieces, dim=1), full[:, :30], atol=1e-4, rtol=0)
            many.prefill(first)
            assert [tuple(choice.shape) for choice, _ in many.routing.chosen] == [(3, 3, 4), (3, 3, 2)], "of every layer and row"
            for t in range(30, 60):
                column = model(idx[:, t:t + 1].expand(3, 1), kv_cache=many)
                torch.testing.assert_close(column, full[:, t:t + 1].expand(3, -1, -1), atol=1e-4, rtol=0)
            first.reset()
            many.reset()


def test_a_call_that_the_cache_has_no_room_for_leaves_it_as_it_was():
    model, idx = build(chunk=16, sizes=dict(n_layer=3)).eval(), tokens(1, 60)
    with torch.inference_mode():
        kv_cache = cache(1, seq_len=30, layers=3)
        model(idx[:, :20], kv_cache=kv_cache)
        with pytest.raises((AssertionError, ValueError)):
            model(idx[:, 20:], kv_cache=kv_cache)
        assert kv_cache.get_pos() == 20
        torch.testing.assert_close(model(idx[:, 20:30], kv_cache=kv_cache), model(idx[:, :30])[:, 20:], atol=1e-4, rtol=0)


def test_rows_that_were_prefilled_from_one_may_part():
    """Each of three rows goes on with a text of its own: it is routed, and scored, as if it had been alone."""
    model, prompt, own = build(chunk=16, sizes=dict(n_layer=3)).eval(), tokens(1, 20), tokens(3, 30, seed=4)
    own[1, 5] = BOS
    with torch.inference_mode():
        first, many = cache(1, seq_len=20, layers=3), cache(3, layers=3)
        model(prompt, kv_cache=first)
        many.prefill(first)
        found = torch.cat([model(own[:, t:t + 1], kv_cache=many) for t in range(30)], dim=1)
        for row in range(3):
            alone = model(torch.cat([prompt, own[row:row + 1]], dim=1))[:, 20:]
            torch.testing.assert_close(found[row:row + 1], alone, atol=1e-4, rtol=0)


def test_nanochats_engine_decodes_what_plain_generation_does():
    from nanochat import engine
    model = build(chunk=16, sizes=dict(n_layer=3)).eval()

    class Words:
        encode_special = staticmethod(lambda text: 1000)
        get_bos_token_id = staticmethod(lambda: BOS)
        decode = staticmethod(str)
    prompt = tokens(1, 21)[0].tolist()
    plain = list(model.generate(prompt, max_tokens=30, temperature=0.0))
    column = [c for c, _ in engine.Engine(model, Words()).generate(prompt, num_samples=2, max_tokens=30, temperature=0.0)]
    until = plain.index(BOS) if BOS in plain else 30
    assert [c[0] for c in column][:until] == [c[1] for c in column][:until] == plain[:until] and until > 5


def test_decoding_pools_the_whole_table_only_where_a_chunk_starts(monkeypatch):
    model, kv_cache, at, common = build(chunk=16).eval(), cache(1), [], routing.common
    monkeypatch.setattr(routing, "common", lambda *args: at.append(kv_cache.get_pos()) or common(*args))
    with torch.inference_mode():
        for part in tokens(1, 50).split([20, *[1] * 30], dim=1):
            model(part, kv_cache=kv_cache)
    assert at == [0, 32, 48]


def test_use_is_counted_where_a_loss_has_a_gradient_whatever_mode_the_model_is_in():
    model, idx = build(chunk=32).train(), tokens(3, 50)
    model(idx)
    with torch.no_grad():
        model(idx, idx)
    assert not any(used.any() for used in routing.usage(model)) and not model.token_count.any()
    kinds = by_kind(model, idx)
    model.eval()(idx, idx)
    for used, (choice, _), routed, active in zip(routing.usage(model), kinds, (14, 3), (4, 2), strict=True):
        expected = torch.stack([torch.bincount(c.flatten(), minlength=routed) for c in choice]).float()
        assert torch.equal(used, expected) and expected.sum() == 2 * 3 * 50 * active
    routing.reset_usage(model)
    assert not any(used.any() for used in routing.usage(model))


def test_the_gradient_of_the_balance_is_the_excess_use_whatever_the_loss():
    model = build()
    total = [torch.zeros(2, 14), torch.zeros(2, 3)]
    for seed in (1, 2):
        idx = tokens(3, 50, seed=seed)
        routing.reset_usage(model)
        (1e-3 * model(idx[:, :-1], idx[:, 1:])).backward()
        for sum_, used, share in zip(total, routing.usage(model), (4 / 14, 2 / 3)):
            sum_ += used / (3 * 49) - share
    for kind, expected in zip(routing.parts(model), total, strict=True):
        torch.testing.assert_close(torch.stack([part.balance.grad for part in kind]), expected)


def test_what_all_text_has_in_common_is_taken_off_and_every_block_comes_into_use(monkeypatch):
    """A component that all embeddings share, as training makes one: without centring and balance most blocks are never chosen."""
    def spread(rate):
        model = build(lively=False)
        with torch.no_grad():
            model.transformer.wte.weight += 3 * torch.randn(32, generator=torch.Generator().manual_seed(3))
        optimizer = model.setup_optimizer(embedding_lr=0.0)
        optimizer.param_groups[-1]["lr"] = rate
        for step in range(60):
            if step == 40:
                routing.reset_usage(model)
            idx = tokens(8, 33, seed=step)
            idx[:, 1:] = idx[:, 1:] % 7 + 1 + 7 * torch.arange(8)[:, None]  # eight kinds of text
            model(idx[:, :-1], idx[:, 1:]).backward()
            optimizer.step()
            model.zero_grad(set_to_none=True)
        return routing.usage(model)[0]
    ours, centred = spread(0.01), spread(0.0)
    monkeypatch.setattr(routing, "common", lambda token_count, table: torch.zeros(()))
    neither = spread(0.0)
    assert (neither == 0).float().mean() > 0.3, neither
    assert (centred > 0).all() and (ours > 0).all() and ours.std() < 0.8 * centred.std(), (centred, ours)


def test_frozen_routing_chooses_the_same_blocks_after_training():
    model, idx = build(), tokens(4, 64, seed=9)
    optimizer = model.setup_optimizer(weight_decay=0.1)
    before = routing.choices(model, idx)[0]
    routing.freeze(model, optimizer)
    kept = {name: p.clone() for name, p in model.named_parameters() if name.endswith(("router", "balance"))}
    for step in range(5):
        x = tokens(4, 64, seed=step)
        model(x[:, :-1], x[:, 1:]).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
    assert torch.equal(routing.choices(model, idx)[0], before)
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters() if name in kept)
    model.routing_embedding = None
    assert not torch.equal(routing.choices(model, idx)[0], before), "the embeddings themselves did move"
    assert "routing_embedding" not in model.state_dict()


def test_routers_learn_where_they_may_and_idle_rows_stand_still():
    model = build()
    optimizer = model.setup_optimizer(weight_decay=0.1)
    lrs = [group["initial_lr"] for group in optimizer.param_groups if group.get("routing")]
    routing.freeze(model, optimizer, 0.5)
    assert [group["initial_lr"] for group in optimizer.param_groups if group.get("routing")] == [0.5 * lr for lr in lrs[:-1]] + [0.0]
    parts = [part for kind in routing.parts(model) for part in kind]
    before = [(part.router.detach().clone(), part.balance.detach().clone()) for part in parts]
    routing.reset_usage(model)
    x = tokens(1, 20, seed=3)  # two chunks: of so few some block is idle
    model.train()(x[:, :-1], x[:, 1:]).backward()
    optimizer.step()
    moved = [(part.router != router)[:part.routed].any(1) for part, (router, _) in zip(parts, before)]
    assert all(torch.equal(m, part.usage > 0) for m, part in zip(moved, parts)) and not torch.cat(moved).all() and torch.cat(moved).any()
    assert all(torch.equal(part.balance, balance) for part, (_, balance) in zip(parts, before))


def test_looking_at_choices_changes_nothing():
    model, idx = build().train(), tokens(2, 40)
    found = routing.choices(model, idx)[0]
    assert found.shape == (2, 2, 3, 4) and model.training and not any(used.any() for used in routing.usage(model))
    assert all(part.decision is None for kind in routing.parts(model) for part in kind)


def test_with_a_decision_for_every_token_only_bos_is_under_the_constant_choice():
    idx = tokens(2, 40, bos_every=13)
    constant, own = routing.coverage(idx, dict(bos=BOS, reach="token", chunk=1))
    assert torch.equal(constant, idx == BOS) and torch.equal(own, idx != BOS)


@pytest.mark.parametrize("reach", ["bos", "row"])
def test_coverage_says_who_was_routed_by_what(reach):
    idx, cl = tokens(1, 64), dict(bos=BOS, reach=reach, chunk=32)
    idx[0, 20], idx[0, 31] = BOS, BOS   # documents at 0-19, 20-30, 31-63
    constant, own = routing.coverage(idx, cl)
    expected_constant = [t < 16 or (reach == "bos" and 32 <= t < 64) for t in range(64)]
    # chunk 16-31 was routed by the document before BOS at 20; chunk 32-63 follows BOS at 31
    expected_own = [16 <= t < 20 for t in range(64)]
    assert constant[0].tolist() == expected_constant and own[0].tolist() == expected_own


def test_a_cache_that_lost_its_state_is_not_decoded_from():
    model, kv_cache = build().eval(), cache(1)
    with torch.inference_mode():
        model(tokens(1, 20), kv_cache=kv_cache)
        kv_cache.routing = None
        with pytest.raises(RuntimeError, match="routing state"):
            model(tokens(1, 1), kv_cache=kv_cache)


def test_token_counts_fade_with_every_batch():
    with patching.applied():
        model, seen = build(), [tokens(2, 30, seed=seed) for seed in (1, 2)]
        for idx in seen:
            model(idx, idx)
        first, second = (torch.bincount(idx.flatten(), minlength=64).float() for idx in seen)
        assert torch.equal(model.token_count, first * routing.MEMORY + second)


def test_the_balance_chooses_and_is_not_in_the_gates():
    from test_routing import by_kind
    with patching.applied():
        model, idx = build().eval(), tokens(2, 64)
        before = by_kind(model, idx)
        with torch.no_grad():
            for kind in routing.parts(model):
                for part in kind:
                    part.balance.fill_(0.3)  # alike for all: the same are chosen
        for (choice, gate), (choice_now, gate_now) in zip(before, by_kind(model, idx), strict=True):
            assert torch.equal(choice.sort(-1).values, choice_now.sort(-1).values)
            torch.testing.assert_close(gate.sum(-1), gate_now.sum(-1))


def test_with_a_reserve_too_the_excess_of_some_is_the_lack_of_others():
    with patching.applied():
        model, idx = build("cl-flops"), tokens(3, 50)
        model(idx, idx).backward()
        for part in routing.parts(model)[0]:
            assert part.balance.grad.sum().abs() < 1e-4 and part.balance.grad[:14].any() and not part.balance.grad[14:].any()

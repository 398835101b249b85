"""patches/optim_blocks, optim_rows, gpt_optimizer, nanochat_cl.isolation: sizes of steps, and that what got no gradient does not move by one bit."""
import os
import shutil

import pytest
import torch

import toy_phase_a
from nanochat_cl import evolve, files, isolation, patching, plasticity, routing
from nanochat_cl.command import UserError
from patches import optim_blocks, optim_rows
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
    used = routing.usage(model)[0][1]
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
    rows = {}
    for step in range(4):
        rank_gradients(model, step, rank)
        optimizer.step()
        rows[step] = [t.detach().clone() for group in optimizer.param_groups if group.get("rows") for p in group["params"] if len(p) > 8
                      for t in (p, *(optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq")))]
    torch.save(rows, f"{out}/rows{rank}.pt")
    torch.save({name: p.detach() for name, p in model.named_parameters()}, f"{out}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def rank_gradients(model, step, rank):
    """Block 3 serves on no rank after the first step, block 4 on rank 0 only, block 5 on rank 1 only; rows of tables and routers alike."""
    give_gradients(model, seed=10 * step + rank)
    for block in model.transformer.h:
        for p in (block.mlp.c_fc.weight, block.mlp.c_proj.weight):
            if step:
                p.grad[3] = 0
            p.grad[4 if rank else 5] = 0
    tables = [model.transformer.wte.weight, *(ve.weight for ve in model.value_embeds.values())]
    for p in (*tables, *(block.mlp.router for block in model.transformer.h)):  # a table of 64 rows is cut in two, each rank steps a half; a router of 16 is stepped whole by both
        for half in (0, len(p) // 2):
            if step:
                p.grad[half + 3] = 0
            p.grad[half + (4 if rank else 5)] = 0


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
    for rank in range(2):
        rows, shapes = torch.load(tmp_path / f"rows{rank}.pt"), []
        for first, last in zip(rows[0], rows[3], strict=True):
            shapes.append(len(first))
            same = (first == last).all(1).nonzero().flatten().tolist()
            assert same == ([3] if len(first) == 32 else [3, 3 + len(first) // 2]), (same, first.shape)
        assert {64, 32, 16} == set(shapes), "weights whole, moments of tables cut in two, routers whole"


def idle_pieces(model):
    """Blocks and heads, counted per matrix, and rows (of a value embedding per head) whose gradient is zero: by the names of the parameters."""
    found = {"blocks": 0, "rows": 0}
    for name, p in model.named_parameters():
        if p.ndim == 3:
            found["blocks"] += sum(not piece.any() for piece in p.grad)
        elif name.endswith("router") or name.startswith("transformer.wte"):
            found["rows"] += sum(not row.any() for row in p.grad)
        elif name.startswith("value_embeds"):
            found["rows"] += sum(not part.any() for row in p.grad for part in row.chunk(model.config.n_kv_head))
    return found


def test_an_audited_step_counts_the_idle_pieces_of_blocks_heads_and_rows_and_steps_as_any_other():
    models = [build() for _ in range(2)]
    optimizers = [m.setup_optimizer(weight_decay=0.1) for m in models]
    learns = [torch.rand(2, 14, generator=torch.Generator().manual_seed(1)) < 0.5, torch.tensor([[True, False, False], [False, True, False]])]
    for step in range(3):
        idx = tokens(3, 41, seed=step)
        for model in models:
            model(idx[:, :-1], idx[:, 1:]).backward()
            plasticity.hold(model, learns)
        expected = idle_pieces(models[0])
        assert expected["blocks"] >= 2 * (~learns[0]).sum() + 4 * (~learns[1]).sum()
        assert isolation.audited_step(optimizers[0]) == expected
        optimizers[1].step()
        for model in models:
            model.zero_grad(set_to_none=True)
        assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models)))


@pytest.mark.parametrize("part", ["c_q", "c_v", "ve", "router", "moment"])
def test_an_audit_sees_a_single_bit_of_what_should_have_stood_still(part, monkeypatch):
    model = build()
    optimizer = model.setup_optimizer(weight_decay=0.1)
    train(model, optimizer, 2)
    idx = tokens(3, 41)
    model(idx[:, :-1], idx[:, 1:]).backward()
    plasticity.hold(model, [torch.zeros(2, 14, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool)])
    attention, step = model.transformer.h[1].attn, type(optimizer).step
    piece = {"c_q": attention.c_q.weight[2], "c_v": attention.c_v.weight[1], "ve": model.value_embeds["1"].weight[5, 24:], "router": attention.c_proj.router[0],
             "moment": optimizer.state[model.transformer.h[0].mlp.c_fc.weight]["second_momentum_buffer"][1, 9]}[part]

    def careless(self):
        step(self)
        piece.view(-1)[0] = torch.nextafter(piece.view(-1)[0], torch.tensor(9.0))
    monkeypatch.setattr(type(optimizer), "step", careless)
    with pytest.raises(RuntimeError, match="isolation is broken: " + ("rows" if part in ("ve", "router") else "blocks")):
        isolation.audited_step(optimizer)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    place, before = tmp_path_factory.mktemp("base"), os.environ.get("NANOCHAT_BASE_DIR")
    os.environ["NANOCHAT_BASE_DIR"] = str(place)
    yield toy_phase_a.make(place)
    os.environ.pop("NANOCHAT_BASE_DIR") if before is None else os.environ.update(NANOCHAT_BASE_DIR=before)


def phase_b(name, *more):
    evolve.evolve(evolve.parse([*toy_phase_a.ARGS, "--arms", "dense,cl", "--name", name, "--audit", "--plasticity", "budget:0.3", "--weight-decay", "0.1",
                                "--max-tokens", "1024", "--probe-items", "1", "--eval-docs", "1", *more]))


def test_in_a_real_phase_b_every_idle_block_and_row_keeps_every_bit(base, monkeypatch):
    """Counted and compared a second time here, by the names of the parameters."""
    audited, counts, of_mlps = isolation.audited_step, [], []

    def checked(optimizer):
        mine = [p for group in optimizer.param_groups for p in group["params"] if p.ndim == 3]
        idle = [~p.grad.flatten(1).any(1) for p in mine]
        rows = [(p, ~p.grad.any(1)) for group in optimizer.param_groups if group.get("rows") == 1 for p in group["params"]]
        kept = [(p, mask, p[mask].clone()) for p, mask in [*zip(mine, idle), *rows]]
        found = audited(optimizer)
        assert all(torch.equal(p[mask], old) for p, mask, old in kept)
        if mine:  # of the dense arm nothing is isolated
            assert found["blocks"] == sum(int(mask.sum()) for mask in idle) and found["rows"] >= sum(int(mask.sum()) for _, mask in rows)
        counts.append(found["blocks"])
        of_mlps.append(sum(int(mask.sum()) for mask in idle if len(mask) == 16))
        return found
    monkeypatch.setattr(isolation, "audited_step", checked)
    phase_b("audited")
    records = files.read_jsonl(base / "evolve/audited/records.jsonl")
    last = records[-1]
    assert last["arm"] == "cl" and last["step"] == 4 and len(counts) == 8
    # at least 14 - ceil(0.3 * 14) routed blocks, two matrices, two layers, four steps
    assert last["blocks"]["audited"]["blocks"] == sum(counts) >= 9 * 2 * 2 * 4 and last["blocks"]["audited"]["rows"] > 0
    assert last["blocks"]["idle_share"] == pytest.approx(sum(of_mlps) / (4 * 2 * 2 * 14), abs=0.02)


@pytest.mark.parametrize("what", ["blocks", "rows"])
def test_a_step_that_ignores_the_mask_stops_the_run(base, monkeypatch, what):
    step = optim_blocks.block_step
    if what == "blocks":
        monkeypatch.setattr(optim_blocks, "block_step", lambda kernel, group: step(kernel, {**group, "isolate": False}))
    else:
        monkeypatch.setattr(optim_rows, "row_step", lambda kernel, pieces: kernel)
    with pytest.raises(RuntimeError, match=f"isolation is broken: {what}"):
        phase_b(f"broken_{what}", "--arms", "cl")


def test_an_audit_on_several_ranks_is_refused(base, monkeypatch):
    from nanochat_cl import learner, recipes, runs
    monkeypatch.setattr(runs, "ranks", lambda: (0, 2))
    with pytest.raises(UserError, match="--audit.*expected one rank, got 2"):
        learner.Learner(learner.find("cl", "d2_cl_s42", ""), recipes.Recipe(optimizer="reset"), 256, torch.device("cpu"), 42, audit=True)


def audit(capsys, *argv):
    """{parameter: (pieces that are the same, pieces, what is printed of each)} of the command."""
    capsys.readouterr()
    isolation.main(["audit", *map(str, argv)])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "parameter" and "bit-identical" in head
    found = {}
    for line in lines:
        name, same, _, count, *change = line.split()
        found[name] = int(same), int(count), change
    return found


def test_the_audit_of_two_checkpoints_prints_the_block_that_differs_and_by_how_much(base, capsys):
    a, b = base / "base_checkpoints/d2_cl_s42", base / "base_checkpoints/planted"
    shutil.copytree(a, b)
    weights = torch.load(b / "model_000003.pt", weights_only=True)
    weights["transformer.h.1.mlp.c_fc.weight"][5] *= 1.25
    weights["transformer.h.0.attn.c_q.weight"][1, 3, 2] += 1e-3
    weights["transformer.wte.weight"][[7, 9]] *= -1
    weights["transformer.h.0.mlp.c_proj.weight"][3] *= -0.0  # equal to nothing, bit for bit, if it was not zero
    torch.save(weights, b / "model_000003.pt")
    zero, one = {"x": torch.zeros(2, 3, 4), "y": torch.zeros(5)}, {"x": torch.zeros(2, 3, 4), "y": torch.ones(5)}
    zero["x"][1] = -0.0
    assert [(name, change) for name, *_, change in isolation.differing(zero, one)] == [("x", "= 0"), ("y", "inf")]
    found = audit(capsys, a, b)
    differing = {name for name, (same, count, _) in found.items() if same < count}
    assert differing == {"transformer.h.1.mlp.c_fc.weight", "transformer.h.0.attn.c_q.weight", "transformer.wte.weight", "transformer.h.0.mlp.c_proj.weight"}
    same, count, change = found["transformer.h.1.mlp.c_fc.weight"]
    assert (same, count) == (15, 16) and change == ["="] * 5 + ["0.25"] + ["="] * 10
    assert found["transformer.h.0.attn.c_q.weight"][:2] == (3, 4) and found["transformer.h.0.attn.c_q.weight"][2][0] == "="
    assert found["transformer.h.0.mlp.c_proj.weight"][2][3] == "1", "set to zero: changed by all it had"
    rows = len(weights["transformer.wte.weight"])
    assert found["transformer.wte.weight"][:2] == (rows - 2, rows)
    assert all(same == count and set(change) <= {"=", "0"} for name, (same, count, change) in found.items() if name not in differing)


def test_the_audit_compares_phase_a_with_what_phase_b_made_of_it(base, capsys):
    phase_b("after", "--plasticity", "frozen-shared+budget:0.3")
    for arm in ("cl", "dense"):
        found = audit(capsys, base / f"base_checkpoints/d2_{arm}_s42", base / "evolve/after/checkpoints/000004", "--arm", arm)
        start = torch.load(base / f"base_checkpoints/d2_{arm}_s42/model_000003.pt", weights_only=True)
        assert set(found) == set(start)
        for name, (same, count, change) in found.items():
            if ".mlp.c_" not in name and "usage" not in name:
                assert same == count or arm == "cl" and ".attn." in name and start[name].ndim == 3 and change[0] == "=", name
    assert found["transformer.h.1.mlp.c_fc.weight"][0] < found["transformer.h.1.mlp.c_fc.weight"][1], "the MLP of dense learned"


def test_what_cannot_be_audited_is_one_line(base, tmp_path):
    a = base / "base_checkpoints/d2_cl_s42"
    state = tmp_path / "000004"
    state.mkdir()
    torch.save({"arms": {"dense": {"model": {}}}}, state / "state_rank0.pt")
    for other, said in ((tmp_path, "expected a checkpoint folder"), (base / "base_checkpoints/d2_dense_s42", "different models: .* is not in both"),
                        (state, "holds the arms dense; name one of them by --arm")):
        with pytest.raises(UserError, match=said) as error:
            isolation.main(["audit", str(a), str(other)])
        assert "\n" not in str(error.value)

"""Phase B on a toy base directory: what is trained, what is recorded, what is kept."""
import math
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import toy_phase_a
from nanochat_cl import accounting, evolve, files, isolation, patching, phase_b, routing, runs
from nanochat_cl.command import UserError
from nanochat_cl.stream import Stream
from nanochat_cl.upstream import REPO


def run(base: Path, name: str, *more: str) -> list[dict]:
    evolve.evolve(evolve.parse([*toy_phase_a.ARGS, "--name", name, *more]))
    return files.read_jsonl(base / "evolve" / name / "records.jsonl")


def last_state(base: Path, name: str) -> dict:
    return runs.load_state(base / "evolve" / name, torch.device("cpu"))


def last_config(base: Path, arm: str) -> dict:
    return files.read_json(base / f"base_checkpoints/d2_{arm}_s42/meta_000003.json")["model_config"]["cl"]


@pytest.fixture(scope="module")
def both(base):
    return run(base, "both")


def test_milestones_are_snapped_to_the_next_whole_step_and_hold_both_ends():
    def all_of(steps: int, batch_tokens: int, milestone_tokens: int) -> list[int]:
        marks = phase_b.Milestones(steps, batch_tokens, milestone_tokens)
        found = [marks.at(number) for number in range(marks.last + 1)]
        assert [marks.number(step) for step in range(steps + 1)] == [found.index(s) if s in found else None for s in range(steps + 1)]
        assert max(marks.windows()) == marks.last and len(marks.windows()) == min(16, -(-marks.last // -(-marks.last // 16)))
        return found
    assert all_of(10, 256, 1000) == [0, 4, 8, 10]
    assert all_of(128, 8192, 131072) == list(range(0, 129, 16))
    assert all_of(3, 100, 10) == [0, 1, 2, 3]
    assert all_of(3, 100, 1000) == [0, 3]
    assert all_of(400, 8192, 8192 * 10) == list(range(0, 401, 10))
    endless = phase_b.Milestones(phase_b.ENDLESS, 256, 1000)
    assert [endless.at(number) for number in endless.windows()[:4]] == [4, 8, 16, 32] and len(endless.windows()) == 16
    assert endless.number(4) == 1 and endless.number(5) is None and endless.full(2**20) and not endless.full(3)


def test_every_arm_has_a_record_at_every_milestone_and_its_figures_agree(both):
    assert [(r["arm"], r["step"]) for r in both] == [(arm, step) for step in (0, 4, 8, 10) for arm in ("dense", "cl")]
    for r in both:
        assert r["tokens"] == 256 * r["step"] == r["unique_tokens"] and r["final"] == (r["step"] == 10)
        assert set(r["constant_share"]) == ({"domain", "general", "floor"} if r["arm"] == "cl" else set())
        assert r["flops"] == r["tokens"] * r["flops_per_token"] and r["phase_a_flops"] == r["phase_a_tokens"] * r["flops_per_token"]
        for split in ("val", "test"):
            domain, general = r["domain"][split], r["general"][split]
            for entry in (*domain["subdomains"].values(), general):
                nats, size = map(sum, zip(*entry["docs"]))
                assert entry["bpb"] == pytest.approx(nats / math.log(2) / size)
            assert domain["bpb"] == pytest.approx(sum(s["bpb"] for s in domain["subdomains"].values()) / 3)
            assert sorted(domain["subdomains"]) == ["alpha", "beta", "gamma"] and len(general["docs"]) == 6
        assert (r["train_loss"] is None, r["subdomain"] is None, r["recall"]["mean"] is None) == (r["step"] == 0,) * 3
        assert (r["blocks"] is None) == (r["arm"] == "dense" or r["step"] == 0)
        assert (r["recipe"], r["lr_mult"], r["seed"], r["confirmatory"], r["schedule"]) == ("total_batch_size=256", 1.0, 42, False, "cyclic")
    dense, cl = both[-2], both[-1]
    assert dense["domain"]["val"]["bpb"] < both[0]["domain"]["val"]["bpb"] - 0.1, "nothing was learned"
    assert dense["stream_hash"] == cl["stream_hash"] != both[0]["stream_hash"] and len({r["stream_hash"] for r in both}) == 4
    assert cl["params_active"] < cl["params_total"] and cl["flops_per_token"] < dense["flops_per_token"]
    assert cl["blocks"]["agreement"] == cl["blocks"]["heads"]["agreement"] == 1.0 and 0 < cl["blocks"]["idle_share"] < 1, "the routers are frozen, and some blocks idle"
    assert all(sum(layer) == pytest.approx(1) for layer in cl["blocks"]["use"])


def test_the_first_record_is_phase_a_as_nanochat_itself_loads_it(base, both, tokenizer):
    from nanochat import checkpoint_manager
    for arm in ("dense", "cl"):
        with patching.applied():
            model, _, _ = checkpoint_manager.build_model(str(base / "base_checkpoints" / f"d2_{arm}_s42"), 3, torch.device("cpu"), "eval")
            import pyarrow.parquet as pq
            rows = pq.read_table(base / "corpora/toy/val.parquet").to_pylist()
            texts = {r["text"]: r["subdomain"] for r in rows}
            nats = {}
            for text, name in texts.items():
                row = torch.tensor([tokenizer.encode(text, prepend=tokenizer.get_bos_token_id())[:toy_phase_a.T + 1]])
                with torch.no_grad():
                    nats.setdefault(name, []).append(model(row[:, :-1], row[:, 1:], loss_reduction="sum").item())
        record = next(r for r in both if r["arm"] == arm and r["step"] == 0)
        for name, entry in record["domain"]["val"]["subdomains"].items():
            for got, _ in entry["docs"]:
                assert min(abs(got - n) for n in nats[name]) < 1e-3, f"{arm} {name}: {got} is not among {nats[name]}"


def test_dense_beside_cl_learns_bit_for_bit_what_dense_learns_alone(base, both):
    alone = run(base, "alone", "--arms", "dense")
    beside, single = (last_state(base, name)["arms"]["dense"] for name in ("both", "alone"))
    for key, value in single["model"].items():
        assert torch.equal(value, beside["model"][key]), key
    for index, entry in single["optimizer"]["state"].items():
        for key, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(beside["optimizer"]["state"][index][key])), (index, key)
    assert [r["domain"] for r in alone] == [r["domain"] for r in both if r["arm"] == "dense"]


def test_a_run_trains_what_a_plain_loop_over_the_stream_trains(base, both, tokenizer):
    from nanochat import checkpoint_manager
    place = str(base / "base_checkpoints/d2_dense_s42")
    model, _, meta = checkpoint_manager.build_model(place, 3, torch.device("cpu"), "train")
    optimizer = model.setup_optimizer()
    optimizer.load_state_dict(checkpoint_manager.load_checkpoint(place, 3, torch.device("cpu"), load_optimizer=True)[1])
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * math.sqrt(256 / 128)  # batch of Phase B over that of Phase A
        if group["kind"] == "muon":
            group["momentum"], group["weight_decay"] = 0.95, 0.0
    stream, config, covered = Stream(base / "corpora/toy", tokenizer, "cyclic", 42, 8, toy_phase_a.T, 512), last_config(base, "cl"), []
    for step in range(10):
        batch = stream.batch(step)
        covered.append([mask.float().mean().item() for mask in routing.coverage(batch.inputs, config)])
        for half in (slice(0, 4), slice(4, 8)):
            (model(batch.inputs[half], batch.targets[half]) / 2).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
    learned = last_state(base, "both")["arms"]["dense"]["model"]
    for key, value in model.state_dict().items():
        assert torch.equal(value, learned[key]), f"{key} differs by {(value - learned[key]).abs().max().item()}"
    shares = [[r["blocks"]["constant_share"], r["blocks"]["own_share"]] for r in both if r["blocks"]]
    since = [torch.tensor(covered[a:b]).mean(0).tolist() for a, b in ((0, 4), (4, 8), (8, 10))]
    assert shares == [pytest.approx(each) for each in since] and len({*map(tuple, since)}) > 1, "of the steps since the last milestone"


def test_loaded_and_reset_optimizers_begin_with_the_same_rates_and_different_moments(base):
    from nanochat_cl import learner
    from nanochat_cl.recipes import Recipe
    with patching.applied():
        for arm in ("dense", "cl"):
            found = learner.find(arm, f"d2_{arm}_s42", "")
            load, reset = (learner.Learner(found, Recipe(optimizer=how), 256, torch.device("cpu"), 42) for how in ("load", "reset"))
            rates = [[(g["kind"], g["initial_lr"], g["weight_decay"], len(g["params"])) for g in each.optimizer.param_groups] for each in (load, reset)]
            assert rates[0] == rates[1]
            assert load.optimizer.state and not reset.optimizer.state


def test_frozen_shared_moves_only_mlps_and_routed_heads_and_a_budget_leaves_more_blocks_idle(base, both):
    run(base, "frozen", "--plasticity", "frozen-shared:0", "--max-tokens", "512")
    for arm in ("dense", "cl"):
        start = torch.load(base / f"base_checkpoints/d2_{arm}_s42/model_000003.pt", weights_only=True)
        moved = {k: v != start[k] for k, v in last_state(base, "frozen")["arms"][arm]["model"].items() if not torch.equal(v, start[k])}
        mlps = {f"transformer.h.{i}.mlp.{m}.weight" for i in range(2) for m in ("c_fc", "c_proj")}
        heads = {k for k in moved if ".attn." in k and not k.endswith("usage")}
        assert {k for k in moved if not k.endswith("usage")} - heads == mlps and bool(heads) == (arm == "cl"), arm
        assert all(len(moved[k]) == 4 and moved[k][1:].any() and not moved[k][0].any() for k in heads), "of four heads the first is shared"
    budget = run(base, "budget", "--plasticity", "budget:0.3+routers:1", "--lr-mult", "3", "--max-tokens", "1024")
    idle = [next(r for r in records if r["arm"] == "cl" and r["step"] == 4)["blocks"]["idle_share"] for records in (budget, both)]
    assert idle[0] >= 1 - math.ceil(0.3 * 14) / 14 - 1e-6 > idle[1], idle
    blocks = budget[-1]["blocks"]
    assert min(blocks["agreement"], blocks["heads"]["agreement"]) < 1, "routers that learn choose otherwise"


def test_a_budget_lets_the_blocks_learn_that_the_batch_used_most_for_its_kind_of_text(base, tokenizer):
    from nanochat_cl import learner, plasticity
    from nanochat_cl.recipes import Recipe
    batch = Stream(base / "corpora/toy", tokenizer, "cyclic", 42, 8, toy_phase_a.T, 512).batch(0)
    with patching.applied():
        found = learner.find("cl", "d2_cl_s42", "")
        free, budget = (learner.Learner(found, Recipe(plasticity=rule), 256, torch.device("cpu"), 42) for rule in ("all", "budget:0.3"))
        general, before = routing.usage(free.model), [layer.mlp.c_fc.weight.detach().clone() for layer in budget.model.transformer.h]
        for each in (free, budget):
            each.step(batch.inputs, batch.targets, 4, 0, 10)
        expected = plasticity.busiest(free.used[0], general[0], 0.3)
        moved = torch.stack([(layer.mlp.c_fc.weight != old)[layer.mlp.shared:].flatten(1).any(1) for layer, old in zip(budget.model.transformer.h, before)])
        busiest = free.used[0].argsort(1, descending=True)[:, :expected.sum(1).max()]
    assert torch.equal(moved, expected) and 0 < expected.sum() < (free.used[0] > 0).sum()
    assert not torch.equal(expected, torch.zeros_like(expected).scatter(1, busiest, True)), "not by use alone: against that of Phase A"


def test_light_milestones_ask_less_and_a_warning_says_when_they_take_too_long(base, capsys, monkeypatch):
    for most, warnings in ((0.0, 1), (1e9, 0)):
        monkeypatch.setattr(phase_b, "MAX_SHARE", {"cpu": most})
        records = run(base, f"tiers{warnings}", "--arms", "dense", "--max-tokens", "1792", "--milestone-tokens", "256")
        assert [r["tier"] for r in records] == ["full", "full", "full", "light", "full", "light", "light", "full"]
        assert all(("facts" in r, "plasticity" in r) == (r["tier"] == "full",) * 2 and r["floor"] and r["recall"] for r in records)
        lines = [line for line in capsys.readouterr().out.splitlines() if "warning: ordinary milestones take" in line]
        assert len(lines) == warnings and all("raise --milestone-tokens" in line for line in lines)


def test_records_say_how_far_and_how_fast_the_weights_move(both):
    first, last = both[:2], both[-2:]
    for r in first:
        assert r["update_ratio"] is None and not any(r["plasticity"]["drift"].values())
    for r in last:
        assert {"attn", "mlp", "wte"} <= set(r["update_ratio"]) and 0 < r["update_ratio"]["mlp"] < r["plasticity"]["drift"]["mlp"] < 2
        assert 0 < r["update_s"] < r["train_s"] and r["peak_memory_bytes"] > 10**8 and "mfu" not in r, "no peak of a CPU is known"
    assert 0 <= last[1]["blocks"]["unmoved"] <= last[1]["blocks"]["idle_share"], "who ever learned is not unmoved"


def kept(base: Path, name: str, arm: str) -> list[str]:
    return sorted(path.name for path in (base / f"base_checkpoints/{name}_{arm}_kept").iterdir())


def test_the_floor_guard_keeps_the_best_model_within_its_bound_for_nanochats_own_scripts(base, capsys):
    records = run(base, "loose", "--floor-guard", "99")
    said = capsys.readouterr().out
    for arm in ("dense", "cl"):
        best = min((r for r in records if r["arm"] == arm), key=lambda r: r["domain"]["val"]["bpb"])
        assert best["step"] and kept(base, "loose", arm) == [f"meta_{best['step']:06d}.json", f"model_{best['step']:06d}.pt",
                                                                       "phase_a.json"]
        ledger = files.read_json(base / f"base_checkpoints/loose_{arm}_kept/phase_a.json")
        assert (ledger["tokens"], ledger["phase_b_tokens"]) == (384, best["tokens"]), "not Phase B's steps times Phase A's batch"
        assert f"the best {arm} within it is milestone {best['milestone']}" in said
    run(base, "loose", "--floor-guard", "99")
    again = capsys.readouterr().out
    assert "complete" in again and again.count("sample from it: python") == 2, "asked once more it says so once more"
    command = re.search(r"python -m (nanochat_cl\.script .*loose_cl_kept)", said)[1].split()
    out = subprocess.run([sys.executable, "-m", *command, "--device-type", "cpu"], capture_output=True, text=True, cwd=REPO)
    assert out.returncode == 0 and "The capital of France" in out.stdout, out.stderr[-2000:]


def test_the_model_that_was_kept_routes_and_computes_as_the_one_that_was_scored_and_can_go_on(base, monkeypatch):
    """Embeddings have moved and the counters are a step's: what Phase A made of both is in the checkpoint. The run's name is a path."""
    from nanochat import checkpoint_manager
    seen, keep = {}, phase_b.PhaseB.keep_within
    idx = torch.randint(1, 256, (16, 32), generator=torch.Generator().manual_seed(5))

    def found(model):
        with torch.no_grad():
            return model.eval()(idx), routing.choices(model, idx)[0] if hasattr(model.config, "cl") else torch.zeros(0)

    def keeping(self, learner, records):
        keep(self, learner, records)
        seen[learner.name, self.state["step"]] = found(learner.model)
    monkeypatch.setattr(phase_b.PhaseB, "keep_within", keeping)
    records = run(base, "path/moved", "--floor-guard", "99", "--lr-mult", "3")
    for arm in ("dense", "cl"):
        best = phase_b.within(records, arm, 99)
        assert best["step"] > 0
        with patching.applied():
            model = checkpoint_manager.build_model(str(base / f"base_checkpoints/path_moved_{arm}_kept"), best["step"], torch.device("cpu"), "eval")[0]
            assert all(torch.equal(a, b) for a, b in zip(found(model), seen[arm, best["step"]]))
            rates = {group["initial_lr"] for group in model.setup_optimizer().param_groups if group.get("routing")}
    assert rates == {0.0}, "routers stand still in nanochat's own scripts, too"
    begun = torch.load(base / "base_checkpoints/d2_cl_s42/model_000003.pt", weights_only=True)
    assert all(torch.equal(t, model.state_dict()[key]) for key, t in begun.items() if key.endswith("usage")), "not Phase A's: budget:p reads them"
    isolation.main(["audit", str(base / "base_checkpoints/d2_cl_s42"), str(base / "base_checkpoints/path_moved_cl_kept")])
    again = run(base, "again", "--arms", "cl", "--from", "path_moved_cl_kept", "--optimizer", "reset", "--max-tokens", "256")
    assert again[0]["domain"] == best["domain"] and again[-1]["blocks"]["agreement"] == 1


def test_what_is_within_the_floor_guard_is_the_best_domain_score_of_those_that_lost_no_more():
    rows = [{"arm": "a", "milestone": i, "domain": {"val": {"bpb": domain}}, "general": {"val": {"bpb": general}}}
            for i, (domain, general) in enumerate([(2.0, 1.0), (1.5, 1.125), (1.25, 1.25), (1.75, 0.5)])]
    other = {**rows[1], "arm": "b", "milestone": 9}
    assert [phase_b.within([other, *rows], "a", bound)["milestone"] for bound in (0, 0.125, 0.2, 0.25)] == [3, 1, 1, 2]
    assert phase_b.within(rows[:3], "a", 0.1)["milestone"] == 0, "Phase A itself"


def test_a_cooled_schedule_shows_in_the_records(base):
    records = run(base, "cooled", "--arms", "dense", "--lr-schedule", "linear", "--lr-mult", "0.5", "--max-tokens", "1024")
    assert [r["lr_mult"] for r in records] == pytest.approx([0.5, 0.5 * 0.25])
    assert records[0]["recipe"] == "lr_mult=0.5,lr_schedule=linear,total_batch_size=256"


def test_training_goes_on_while_a_state_is_written_and_the_records_follow_it(base, both, monkeypatch):
    going_on, seen, held = threading.Event(), [], {}
    write_part, train = runs.write_part, phase_b.PhaseB.train

    def waiting(folder, step, state):
        held[step] = state
        assert step or going_on.wait(60), "training waited for the file"
        return write_part(folder, step, state)

    def training(self):
        if self.state["step"] == 2:
            seen.append((runs.saved_steps(self.folder), (self.folder / "records.jsonl").exists()))
            going_on.set()
        train(self)
    monkeypatch.setattr(runs, "write_part", waiting)
    monkeypatch.setattr(phase_b.PhaseB, "train", training)
    records = run(base, "overlapped")
    assert seen == [([], False)], "what is not written yet counts already"
    assert [(r["arm"], r["step"], r["domain"]) for r in records] == [(r["arm"], r["step"], r["domain"]) for r in both]
    for arm in ("dense", "cl"):  # ten steps later, what was handed over is still Phase A
        place, state = base / f"base_checkpoints/d2_{arm}_s42", held[0]["arms"][arm]
        begun = torch.load(place / "model_000003.pt", weights_only=True), torch.load(place / "optim_000003_rank0.pt", weights_only=True)["state"]
        assert all(torch.equal(value, begun[0][key]) for key, value in state["model"].items() if not key.endswith("usage"))
        assert len(begun[1]) == len(state["optimizer"]["state"]) and all(
            torch.equal(torch.as_tensor(value), torch.as_tensor(begun[1][i][key]))
            for i, entry in state["optimizer"]["state"].items() for key, value in entry.items())


def test_states_at_milestones_1_2_4_are_kept_on_request(base):
    run(base, "kept", "--arms", "dense", "--milestone-tokens", "256", "--max-tokens", "1792", "--keep-milestones")
    assert runs.saved_steps(base / "evolve/kept") == [1, 2, 4, 6, 7], "and the newest two"


def test_a_confirmatory_run_is_declared_and_cannot_be_continued_as_another(base):
    declared = ["--arms", "dense", "--max-tokens", "256"]
    assert all(r["confirmatory"] is True for r in run(base, "declared", *declared, "--confirmatory"))
    with pytest.raises(UserError, match="confirmatory: true -> false"):
        run(base, "declared", *declared)


def test_wandb_gets_a_point_per_milestone_and_a_continued_run_continues_its_curve(base, monkeypatch):
    """The library itself without a network, then what it is told."""
    usual, folder = ["--arms", "dense", "--milestone-tokens", "256", "--run", "curve"], base / "evolve/curve"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(base, "curve", *usual, "--max-tokens", "256")
    offline = [path.name for path in (folder / "wandb").glob("offline-run-*")]
    assert len(offline) == 1 and any((folder / "wandb" / offline[0]).glob("*.wandb"))
    begun, points = [], []

    class Wandb:
        def init(self, **asked):
            begun.append(asked)
            return self

        def log(self, row, step):
            points.append((step, row))

        def finish(self):
            pass
    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    train = phase_b.PhaseB.train

    def once(self):
        monkeypatch.setattr(phase_b.PhaseB, "train", train)
        train(self)
        raise KeyboardInterrupt
    monkeypatch.setattr(phase_b.PhaseB, "train", once)
    with pytest.raises(KeyboardInterrupt):
        run(base, "curve2", *usual, "--max-tokens", "768")
    run(base, "curve2", *usual, "--max-tokens", "768")
    assert begun[0]["id"] == begun[1]["id"] != files.read_json(folder / "config.json")["wandb_id"] and begun[0]["resume"] == "allow" and begun[0]["name"] == "curve" and begun[0]["config"]["seed"] == 42
    assert [step for step, _ in points] == [0, 1, 2, 3] and all({"tokens", "dense/domain/val/bpb", "dense/general/val/bpb", "dense/tok_per_s", "dense/floor/copying/accuracy",
                                                                   "dense/peak_memory_bytes"} <= set(row) for _, row in points)


def test_samples_come_from_both_arms_before_and_after(base, both):
    samples = files.read_json(base / "evolve/both/samples.json")
    assert [(s["arm"], s["when"]) for s in samples] == [(arm, when) for when in ("before", "after") for arm in ("dense", "cl") for _ in range(4)]
    assert len({s["prompt"] for s in samples}) == 4 and all(s["text"] for s in samples)


def test_the_configuration_says_what_ran_on_what(base, both):
    config = files.read_json(base / "evolve/both/config.json")
    assert config["argv"][:3] == ["python", "-m", "nanochat_cl.evolve"] and evolve.parse(config["argv"][3:]).name == "both"
    assert config["asked"]["batch_tokens"] == 256 and config["steps"] == 10
    for arm, entry in config["arms"].items():
        meta = files.read_json(base / f"base_checkpoints/d2_{arm}_s42/meta_000003.json")
        assert entry["params_total"] == accounting.params(meta["model_config"])["total"] and entry["phase_a"]["tokens"] == 384
    assert len(config["machine"]["upstream"]["sha256"]) == 64 and config["machine"]["torch"] == torch.__version__


def test_progress_has_a_first_line_a_line_a_step_and_what_comes_next(base, capsys):
    run(base, "lines", "--arms", "dense", "--max-tokens", "1024")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("evolve")]
    assert "2 milestones, 4 steps of 256 tokens of toy (cyclic), from Phase A" in lines[0]
    assert lines[-3].startswith("evolve | 1k/1k tokens 100% | ") and "tok/s" in lines[-3] and "0.0m left" in lines[-3]
    shares = [int(share) for share in re.findall(r"(?:data|backward|optimizer|evaluation|checkpoints) (\d+)%[,;]", lines[-2])]
    assert len(shares) == 5 and 97 <= sum(shares) <= 103 and "peak memory" in lines[-2], lines[-2]
    assert lines[-1].endswith(f"next: python -m nanochat_cl.report {base / 'evolve/lines'}") 
    assert len(lines) == 1 + 5 + 2
    assert evolve.what_next(evolve.parse(["--arms", "dense,cl"]), Path("r")) == \
        "next: python -m nanochat_cl.crossover r, then python -m nanochat_cl.report r"
    assert evolve.what_next(evolve.parse(["--arms", "dense,cl-mlp"]), Path("r")) == \
        "next: python -m nanochat_cl.crossover r --arm cl-mlp, then python -m nanochat_cl.report r --arm cl-mlp"
    assert evolve.what_next(evolve.parse(["--arms", "dense,dense-rows"]), Path("r")) == "next: python -m nanochat_cl.report r"

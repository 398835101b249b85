"""What a step, a record and a run of either phase are made of: counters, rates, seeds, and what of them a later one goes on from."""
import copy
import shutil
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import toy_phase_a
from nanochat_cl import accounting, evolve, files, learner, patching, phase_b, plasticity, pretrain, routing
from nanochat_cl.command import UserError
from nanochat_cl.recipes import Recipe, multiplier
from nanochat_cl.stream import Stream
from patches import settings
from test_evolve import last_state, run
from tests.tiny_cl import build


def batch(base, tokenizer, step=0):
    return Stream(base / "corpora/toy", tokenizer, "cyclic", 42, 8, toy_phase_a.T, 512).batch(step)


def made(arm, recipe=Recipe(), audit=False, of=None):
    return learner.Learner(learner.find(arm, f"d2_{of or arm}_s42", ""), recipe, 256, torch.device("cpu"), 42, audit)


def begun(*more):
    with patching.applied(), ExitStack() as held:
        return evolve.begin(evolve.parse([*toy_phase_a.ARGS, *more]), held)


def test_a_state_holds_every_counter_that_steps_change(base, tokenizer):
    with patching.applied():
        one, other, b = made("cl", audit=True), made("cl", audit=True), batch(base, tokenizer)
        begun = dict(vars(one))
        for _ in range(2):
            one.step(b.inputs, b.targets, 4, 0, 10, True)
            one.since_milestone()
        one.step(b.inputs, b.targets, 4, 0, 10, True)
        one.eval_s, one.before = 1.0, [[2.0, 3.0]]
        changed = [key for key, value in vars(one).items() if value is not begun[key]]
        assert {"losses", "train_s", "begun_s", "update_ratio", "audited", "flops"} <= {*changed}
        other.load_state_dict(copy.deepcopy(one.state_dict()))
        for key in changed:
            assert str(getattr(other, key)) == str(getattr(one, key)), key


def test_a_step_is_made_at_the_rate_of_its_number(base, tokenizer):
    with patching.applied():
        recipe, b = Recipe(lr_schedule="linear", warmup_steps=2), batch(base, tokenizer)
        arm = made("dense", recipe)
        for step in range(4):
            arm.step(b.inputs, b.targets, 4, step, 4)
            assert {g["lr"] / g["initial_lr"] for g in arm.optimizer.param_groups} == {multiplier(step, 4, recipe)} and multiplier(3, 4, recipe) == 0.5


def test_entropy_is_of_the_blocks_that_may_work():
    with patching.applied():
        model = build("cl-flops", lively=False)
        used = torch.ones(2, 28)
        used[:, 14:] = 0.0  # held back
        fake = SimpleNamespace(model=model, sparse=True, count=1, idle_sum=[0.0, 0.0], used=[used, torch.ones(2, 3)], covered=torch.zeros(2), audited=None)
        assert learner.Learner.blocks(fake)["entropy"] == pytest.approx(1)


def test_after_one_step_what_is_unmoved_is_what_was_idle(base, tokenizer):
    with patching.applied():
        arm, b = made("cl", Recipe(plasticity="budget:0.3")), batch(base, tokenizer)
        arm.step(b.inputs, b.targets, 4, 0, 10)
        assert arm.drift()[1] == pytest.approx(arm.blocks()["idle_share"]) and arm.drift()[1] > 0.5


def test_a_record_is_of_what_came_since_the_last_one(base):
    both = run(base, "both")
    for arm in ("dense", "cl"):
        rows, losses = [r for r in both if r["arm"] == arm], last_state(base, "both")["arms"][arm]["losses"]
        assert [r["train_loss"] for r in rows[1:]] == pytest.approx([np.mean(losses[a:b]) for a, b in ((0, 4), (4, 8), (8, 10))])
        bpb = lambda r, name: r["domain"]["val"]["subdomains"][name]["bpb"]
        for r in rows:
            for w in r["recall"]["windows"]:
                assert w["heldout_gain_bpb"] == pytest.approx(bpb(rows[0], w["subdomain"]) - bpb(r, w["subdomain"]))


def test_update_ratios_are_of_the_last_step_before_each_record(base, monkeypatch):
    asked, step = [], learner.Learner.step

    def stepping(self, inputs, targets, rows, number, steps, measured=False):
        asked.extend([number] * measured)
        step(self, inputs, targets, rows, number, steps, measured)
    monkeypatch.setattr(learner.Learner, "step", stepping)
    run(base, "measured", "--arms", "dense")
    assert asked == [3, 7, 9]


def test_reset_lr0_begins_without_moments(base):
    with patching.applied():
        assert not made("dense", Recipe(optimizer="reset-lr0", warmup_steps=2)).optimizer.state


def test_a_control_learns_by_what_it_differs_in(base):
    run = begun("--name", "controls", "--arms", "dense,dense-rows,dense-low-lr,dense-frozen")
    dense, rows, low, frozen = (each.optimizer.param_groups for each in run.learners)
    assert [g.get("rows") for g in dense].count(1) == 0 and [g.get("rows") for g in rows].count(1) == 2
    assert [g["initial_lr"] for g in low] == pytest.approx([0.1 * g["initial_lr"] for g in dense]) and all(g["initial_lr"] for g in dense)
    assert {g["initial_lr"] > 0 for g in frozen} == {True, False}


def test_what_is_asked_for_again_was_trained_in_its_window(base):
    run = begun("--name", "asked", "--arms", "dense")
    steps = {(name, *x.tolist(), y[-1].item()): step for step in range(10) for b in [run.stream.batch(step)] for name, x, y in zip(b.subdomains, b.inputs, b.targets)}
    found = {}
    for at, name, row in run.passages:
        found.setdefault(at // 256, set()).add(steps[name, *row.tolist()])
    assert set(found) == {4, 8, 10} and all(min(found[end]) >= begin and max(found[end]) < end for begin, end in ((0, 4), (4, 8), (8, 10))), found


def test_a_run_with_replay(base, monkeypatch, tmp_path):
    from nanochat import dataset
    toy_phase_a.table(tmp_path / "shards/shard_00000.parquet", ["general"], 30, 120)
    toy_phase_a.table(tmp_path / "shards/shard_00001.parquet", ["general"], 30, 120)
    monkeypatch.setattr(dataset, "DATA_DIR", str(tmp_path / "shards"))
    records = run(base, "replayed", "--arms", "dense-replay-25", "--max-tokens", "2048")
    assert records[-1]["unique_tokens"] == 0.75 * records[-1]["tokens"] and records[-1]["recall"]["windows"] and {w["subdomain"] for w in records[-1]["recall"]["windows"]} <= {"alpha", "beta", "gamma"}


def test_a_run_does_not_go_on_from_another_phase_a(base, monkeypatch):
    usual, place = ["--arms", "dense", "--from", "again", "--max-tokens", "512"], base / "base_checkpoints/again"
    shutil.copytree(base / "base_checkpoints/d2_dense_s42", place)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(phase_b.PhaseB, "train", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        run(base, "phase_a", *usual)
    for path in place.glob("*_000003*"):
        path.rename(place / path.name.replace("000003", "000004"))
    with pytest.raises(UserError, match="phase_a.dense.step: 3 -> 4"):
        run(base, "phase_a", *usual)


def test_phase_a_trains_under_its_seed_and_arm(base, monkeypatch, tmp_path):
    from nanochat import dataset
    seen = []
    monkeypatch.setattr(pretrain, "check", lambda *_: None)
    monkeypatch.setattr(dataset, "DATA_DIR", str(tmp_path))

    def stop(flags):
        seen.append((settings.seed, settings.arm))
        raise UserError("enough")
    monkeypatch.setattr(pretrain, "base_train", stop)
    for arm, seed in (("dense", 7), ("cl", 43)):
        with pytest.raises(UserError, match="enough"):
            pretrain.pretrain(pretrain.parse(["--arm", arm, "--seed", str(seed), "--device-type", "cpu", "--model-tag", f"tag_{arm}"]))
    assert [seed for seed, _ in seen] == [7, 43] and seen[0][1] is None and seen[1][1]["blocks"] == 16


def test_the_use_of_a_step_is_that_of_its_tokens(base, tokenizer):
    with patching.applied():
        arm, b = made("cl"), batch(base, tokenizer)
        for step in (1, 2):
            arm.step(b.inputs, b.targets, 4, 0, 10)
            assert [kind.sum(1).tolist() for kind in arm.used] == [[step * 256.0 * k] * 2 for k in (4, 2)]


def test_a_budget_is_of_the_batch_not_of_those_before_it(base, tokenizer):
    with patching.applied():
        free, budget = made("cl"), made("cl", Recipe(plasticity="budget:0.3"))
        general = routing.usage(free.model)
        for step in (0, 5):  # of other sub-domains
            b, before = batch(base, tokenizer, step), [layer.mlp.c_fc.weight.detach().clone() for layer in budget.model.transformer.h]
            free.since_milestone()
            for each in (free, budget):
                each.step(b.inputs, b.targets, 4, step, 10)
            expected = plasticity.busiest(free.used[0], general[0], 0.3)
            moved = torch.stack([(layer.mlp.c_fc.weight != old)[layer.mlp.shared:].flatten(1).any(1) for layer, old in zip(budget.model.transformer.h, before)])
            assert torch.equal(moved, expected), step


def test_another_seed_reads_the_stream_in_another_order(base):
    places = [[run.stream.places(step) for step in range(6)] for run in
              (begun("--name", f"seed{seed}", "--arms", "dense", "--from", "d2_dense_s42", "--schedule", "iid", "--seed", str(seed)) for seed in (42, 43))]
    assert places[0] != places[1] and sorted(sum(places[0], [])) != sorted(sum(places[1], []))


def test_phase_as_ledger_is_of_the_model_that_was_trained(base, monkeypatch, tmp_path):
    from nanochat import dataset
    monkeypatch.setattr(pretrain, "check", lambda *_: None)
    monkeypatch.setattr(dataset, "DATA_DIR", str(tmp_path))

    def trained(flags):
        config = {**pretrain.model_config(flags, 300), "cl": settings.arm}
        files.write_json(base / "base_checkpoints/ledger/meta_000128.json", {"val_bpb": 2.0, "total_batch_size": 8192, "model_config": config, "loop_state": {"total_training_time": 1.0}})
    monkeypatch.setattr(pretrain, "base_train", trained)
    pretrain.pretrain(pretrain.parse(["--arm", "cl", "--device-type", "cpu", "--model-tag", "ledger"]))
    result, config = (files.read_json(base / "base_checkpoints/ledger" / name) for name in ("phase_a.json", "meta_000128.json"))
    config = config["model_config"]
    assert result["flops"] == 128 * 8192 * result["flops_per_token"] and result["flops_per_token"] == accounting.flops_per_token(config) < accounting.flops_per_token({**config, "cl": None})
    assert result["params"] == accounting.params(config) and result["tokens"] == 128 * 8192

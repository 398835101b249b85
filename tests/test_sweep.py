"""A sweep: what is planned, in which order it runs, what is chosen, when the grid grows, and a real one at toy size."""
import importlib.util
import json
import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import toy_phase_a
from nanochat_cl import command, evolve, files, pretrain, sweep, upstream
from nanochat_cl.command import UserError
from nanochat_cl.recipes import Recipe, read
from nanochat_cl.sweep import Job

TOY = ["--domain", "toy", "--depth", "2"]


class Fake:
    """A process that ends after some polls with a status, and writes what the real one would."""

    def __init__(self, polls: int = 1, status: int = 0, write=lambda: None):
        self.polls, self.status, self.write, self.signals = polls, status, write, []

    def poll(self):
        self.polls -= 1
        if self.polls > 0:
            return None
        self.write()
        return self.status

    def send_signal(self, number):
        self.signals.append(number)

    def wait(self):
        return self.status


def ends_with(job: Job, curve) -> Fake:
    """curve(arm, job) -> val bpb at the end."""
    def write():
        if job.recipe is None:
            files.write_json(job.folder / "phase_a.json", {})
        else:
            files.write_jsonl(job.folder / "records.jsonl", [
                {"arm": a, "final": True, "domain": {"val": {"bpb": curve(a, job)}}, "tok_per_s": 0.0} for a in job.arms])
    return Fake(write=write)


def run(base: Path, curve, *argv: str, seen: list | None = None) -> dict:
    def start(job, slot):
        seen is None or seen.append(job)
        return ends_with(job, curve)
    return sweep.sweep(sweep.parse([*TOY, *argv]), base, start)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(sweep.time, "sleep", lambda s: None)


def bowl(best: dict):
    """bpb with its minimum at the learning rate best[arm], and a small, known difference between seeds."""
    return lambda a, job: 1 + math.log(job.recipe.lr_mult / best[a]) ** 2 + job.seed / 1e6


def test_the_plan_is_every_point_of_the_grid_with_the_commands_a_user_would_type(tmp_path):
    args = sweep.parse([*TOY, "--arms", "dense,dense-rows,cl", "--lrs", "0.1,0.3", "--seeds", "1,2", "--recipes", "lr_schedule=wsd",
                        "lr_schedule=linear,plasticity=frozen-shared", "--max-tokens", "20000"])
    first = sweep.phase_a(args, tmp_path)
    assert [(job.arms, job.seed) for job in first] == [(("dense",), 1), (("cl",), 1), (("dense",), 2), (("cl",), 2)], "dense-rows begins from dense"
    assert all(pretrain.parse(list(job.argv[1:])).arm == job.arms[0] and job.folder.name == f"d2_{job.arms[0]}_s{job.seed}" for job in first)
    second = sweep.phase_b(args, tmp_path, [0.1, 0.3])
    asked = [evolve.parse(list(job.argv[1:])) for job in second]
    assert len({job.name for job in second}) == 8
    assert {(a.seed, a.recipe.lr_mult, a.recipe.lr_schedule, a.recipe.plasticity) for a in asked} == {
        (s, lr, *rest) for s in (1, 2) for lr in (0.1, 0.3) for rest in (("wsd", "all"), ("linear", "frozen-shared"))}
    for job, a in zip(second, asked):
        assert a.recipe == job.recipe and tuple(a.arms) == job.arms == ("dense", "dense-rows", "cl")
        assert a.sizes["domain"] == "toy" and a.depth == 2 and tmp_path / "evolve" / a.name == job.folder
        assert job.tokens == 16384, "whole batches of 8,192"


def test_arms_with_a_replay_share_of_their_own_get_runs_of_their_own(tmp_path):
    args = sweep.parse([*TOY, "--arms", "dense,dense-replay-5,cl", "--lrs", "0.1,0.3", "--seeds", "1"])
    jobs = sweep.phase_b(args, tmp_path, [0.1])
    assert [job.arms for job in jobs] == [("dense", "cl"), ("dense-replay-5",)] and len({job.folder for job in jobs}) == 2


def test_two_recipes_that_are_one_to_an_arm_are_run_once_for_it(tmp_path):
    """A budget is nothing to dense, and dense-frozen has a plasticity of its own: under two of them, or with a rate that is added, each runs once."""
    args = sweep.parse([*TOY, "--arms", "dense,dense-frozen,cl", "--seeds", "1,2", "--recipes", "plasticity=budget:0.25", "plasticity=budget:0.5"])
    for grid in ([0.1, 0.3], [0.1, 0.3, 1.0]):
        jobs = sweep.phase_b(args, tmp_path, grid)
        assert [job.arms for job in jobs] == 2 * len(grid) * [("dense", "dense-frozen", "cl")] + 2 * len(grid) * [("cl",)]
    args = sweep.parse([*TOY, "--arms", "dense,dense-replay-5,cl", "--seeds", "1", "--recipes", "default", "replay=0.05", "replay=0.25"])
    assert [job.arms for job in sweep.phase_b(args, tmp_path, [1.0])] == [("dense", "cl"), ("dense-replay-5",), ("dense", "cl"), ("dense", "cl")]


def test_the_next_learning_rate_lies_beyond_the_edge_by_the_same_factor():
    grid = [0.1, 0.3, 1.0, 3.0]
    assert [sweep.beyond(grid, x) for x in grid] == [0.0333, None, None, 9.0]
    assert sweep.beyond([0.25, 1.0], 1.0) == 4.0 and sweep.beyond([1.0], 1.0) is None


def test_the_best_is_that_of_the_mean_over_seeds_and_a_run_that_did_not_end_never_is():
    job = lambda a, lr, seed: Job(f"{a} {lr} {seed}", Path(), (), (a,), seed, 1, replace(read("default"), lr_mult=lr), "default")
    jobs = [job(a, lr, s) for a in ("dense", "dense-rows", "cl") for lr in (0.1, 1.0) for s in (1, 2)]
    scores = {"dense 0.1 1": 1.0, "dense 0.1 2": 3.0, "dense 1.0 1": 1.9, "dense 1.0 2": 1.9, "dense-rows 0.1 1": 1.8, "dense-rows 0.1 2": 1.9,
              "dense-rows 1.0 1": 0.5, "cl 0.1 1": 5.0, "cl 0.1 2": 5.0, "cl 1.0 1": 2.0, "cl 1.0 2": 7.0}
    best = sweep.optima(jobs, {name: {name.split()[0]: bpb} for name, bpb in scores.items()})
    assert best == {"dense": {"val_bpb": pytest.approx(1.85), "arm": "dense-rows", "recipe": "default", "lr_mult": 0.1},
                    "cl": {"val_bpb": 4.5, "arm": "cl", "recipe": "default", "lr_mult": 1.0}}


def test_the_grid_grows_for_all_arms_until_every_optimum_is_interior(tmp_path, capsys):
    made = run(tmp_path, bowl({"dense": 0.1, "cl": 2.8}), "--lrs", "0.1,0.3,1", "--seeds", "1,2")
    assert made["grid"] == [0.0333, 0.1, 0.3, 1.0, 3.33, 11.1]
    assert made["trials"] == {"dense": 12, "cl": 12}, "an extension gives both as many trials"
    assert (made["best"]["dense"]["lr_mult"], made["best"]["cl"]["lr_mult"]) == (0.1, 3.33)
    said = capsys.readouterr().out
    assert "x0.0333 is added, for all arms" in said and "NO optimum" not in said
    assert files.read_json(tmp_path / "evolve/sweep/sweep.json") == json.loads(json.dumps(made))


def test_an_optimum_that_stays_at_the_edge_is_not_called_one(tmp_path, capsys):
    made = run(tmp_path, lambda a, job: -job.recipe.lr_mult, "--arms", "dense", "--lrs", "0.5,1", "--seeds", "1")
    assert made["grid"] == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert "NO optimum, still the edge after 3 extensions" in capsys.readouterr().out


def test_what_is_complete_is_not_run_again_and_a_larger_sweep_runs_only_what_is_new(tmp_path):
    seen, curve = [], bowl({"dense": 0.3, "cl": 0.3})
    for seeds, runs_, first in (("1", 3, 2), ("1", 0, 0), ("1,2", 3, 2)):
        seen.clear()
        run(tmp_path, curve, "--lrs", "0.1,0.3,1", "--seeds", seeds, seen=seen)
        assert (sum(job.recipe is not None for job in seen), sum(job.recipe is None for job in seen)) == (runs_, first)
    made = run(tmp_path, curve, "--lrs", "0.3,1", "--seeds", "2", seen=(again := []))
    assert not again and {row["seed"] for row in made["runs"]} == {1, 2}, "no seed is dropped for what it showed"
    with pytest.raises(UserError, match=r'max-tokens.*only seeds and rates may change, or --name'):
        run(tmp_path, curve, "--lrs", "0.1,0.3,1", "--seeds", "1", "--max-tokens", "16384")


def test_phase_a_ends_before_phase_b_begins_and_no_more_run_at_once_than_asked(tmp_path):
    alive, most, order = set(), [], []

    def start(job, slot):
        assert slot not in alive
        alive.add(slot)
        most.append(len(alive))
        order.append(job.recipe is None)
        process = ends_with(job, bowl({"dense": 0.3, "cl": 0.3}))
        process.polls, process.write = 1 + len(order) % 3, lambda write=process.write: (alive.discard(slot), write())
        return process
    sweep.sweep(sweep.parse([*TOY, "--lrs", "0.1,0.3,1", "--seeds", "1,2,3", "--jobs", "2"]), tmp_path, start)
    assert max(most) == 2 and order == sorted(order, reverse=True)


def test_the_arm_that_a_guard_stopped_has_lost_a_trial_and_the_others_run_again_without_it(tmp_path, capsys):
    def start(job, slot):
        curve = bowl({"dense": 1.0, "dense-rows": 1.0, "cl": 0.3})
        explodes = next((a for a in ("cl", "dense-rows") if a in job.arms and job.recipe and job.recipe.lr_mult == 3.0), None)
        return Fake(status=1, write=lambda: files.write_json(job.folder / "stopped.json", {"arm": a})) if (a := explodes) else ends_with(job, curve)
    for seeds in ("1", "1,2", "1"):  # at the end a narrower call
        made = sweep.sweep(sweep.parse([*TOY, "--arms", "dense,dense-rows,cl", "--lrs", "0.1,0.3,1,3", "--seeds", seeds]), tmp_path, start)
    assert made["trials"] == {"dense": 8, "dense-rows": 8, "cl": 8}, "a trial is not forgotten"
    ended = {row["run"]: (row["status"], row["arms"]) for row in made["runs"] if row["lr_mult"] == 3.0 and row["seed"] == 1}
    assert ended == {f"lr_mult=3.0,{sweep.RECIPE}_s1": ("lost", ("cl",)), f"dense+dense-rows_lr_mult=3.0,{sweep.RECIPE}_s1": ("lost", ("dense-rows",)),
                     f"dense_lr_mult=3.0,{sweep.RECIPE}_s1": ("complete", ("dense",))}
    assert (made["best"]["dense"]["lr_mult"], made["best"]["cl"]["lr_mult"]) == (1.0, 0.3)
    made = sweep.sweep(sweep.parse([*TOY, "--arms", "dense,dense-rows,cl", "--lrs", "0.3,1", "--seeds", "1,1"]), tmp_path,
                       lambda job, slot: pytest.fail(f"{job.name} ran again"))
    assert made["trials"]["dense"] == 8 and made["grid"] == [0.1, 0.3, 1.0, 3.0] and made["best"]["dense"]["lr_mult"] == 1.0


def test_any_other_failure_stops_the_sweep_and_is_no_trial(tmp_path):
    others, status = [], 2

    def broken(job, slot):
        others.append(Fake(polls=99) if others else Fake(status=status))
        return others[-1]
    with pytest.raises(UserError, match="ended with status 2.*the same command continues"):
        sweep.sweep(sweep.parse([*TOY, "--name", "other", "--seeds", "7,8", "--jobs", "3"]), tmp_path, broken)
    assert [fake.signals for fake in others[1:]] == [[signal.SIGTERM]] * 2
    others, status = [], 1  # a crash, and what torchrun makes of every status; that it had begun changes nothing
    for job in sweep.phase_b(sweep.parse([*TOY, "--name", "other"]), tmp_path, [0.1]):
        files.write_jsonl(job.folder / "records.jsonl", [{"arm": "dense", "final": False, "tok_per_s": 0.0}])
    with pytest.raises(UserError, match="ended with status 1"):
        sweep.sweep(sweep.parse([*TOY, "--name", "other", "--seeds", "7,8", "--jobs", "3"]), tmp_path, broken)
    assert not (tmp_path / "evolve/other/sweep.json").exists()


@pytest.mark.parametrize("error, number", [(KeyboardInterrupt, signal.SIGINT), (command.Terminated, signal.SIGTERM)])
def test_an_interruption_reaches_every_child_and_is_raised_when_they_have_stopped(error, number, tmp_path, monkeypatch):
    children = []

    def start(job, slot):
        children.append(Fake(polls=10**9))
        return children[-1]

    def interrupt(seconds):
        raise error
    monkeypatch.setattr(sweep.time, "sleep", interrupt)
    with pytest.raises(error):
        sweep.sweep(sweep.parse([*TOY, "--jobs", "2"]), tmp_path, start)
    assert [child.signals for child in children] == [[number]] * 2


def test_children_get_their_part_of_the_machine_and_their_output_goes_to_a_log(tmp_path, monkeypatch):
    (tmp_path / "shown.py").write_text("import os, sys\nprint(os.environ['OMP_NUM_THREADS'], os.environ.get('CUDA_VISIBLE_DEVICES'), *sys.argv[1:])")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    job = Job("a=1", tmp_path, ("shown", "--x"), ("dense",), 1, 1)
    for visible, expected in (("", "2  --x\n"), ("4,6", f"{os.environ['OMP_NUM_THREADS']} 6 --x\n")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        start = sweep.launch(sweep.parse(["--jobs", "4"]), tmp_path / "logs")
        assert start(job, 1).wait() == 0
        assert (tmp_path / "logs/a=1.log").read_text() == expected
        (tmp_path / "logs/a=1.log").unlink()


BAD = {"more Model-CL arms than dense ones": (["--arms", "dense,cl,cl-noiso"], "got 1 different ones of 3.*--explore"),
       "one dense trial under two names": (["--recipes", "plasticity=budget:0.2", "plasticity=budget:0.3"], "got 1 different ones of 3"),
       "recipes of two contexts": (["--recipes", "default", "max_seq_len=1024"], "one max_seq_len"),
       "recipes scored after other tokens": (["--recipes", "default", "total_batch_size=24576"], "that each total_batch_size divides"),
       "no dense arm": (["--arms", "cl"], "at least as many trials"),
       "one learning rate": (["--lrs", "1"], "two at least"),
       "a learning rate of zero": (["--lrs", "0,1"], "positive --lrs"),
       "jobs of many processes": (["--jobs", "2", "--nproc", "2"], "one of them 1"),
       "a rate in a recipe": (["--recipes", "lr_mult=0.1"], "--lrs, not in --recipes"),
       "an unknown option": (["--recipes", "speed=1"], "can't read the recipe 'speed=1'.*lr_schedule"),
       "an unknown arm": (["--arms", "dense,clx"], "no arm 'clx'"),
       "a recipe by flags": (["--replay", "0.1"], "--recipes OPTION=VALUE"),
       "a seed by flag": (["--seed", "1"], "--seeds")}


@pytest.mark.parametrize("what", BAD)
def test_one_line_refuses(what):
    more, said = BAD[what]
    with pytest.raises(UserError, match=said) as error:
        sweep.parse(more)
    assert "\n" not in str(error.value)


def test_a_dry_run_writes_nothing_and_counts_tokens_flops_and_hours(tmp_path, capsys):
    from nanochat_cl import accounting
    args = sweep.parse(["--seeds", "1,2", "--lrs", "0.1,1", "--dry-run", "--tok-per-s", "1000", "--jobs", "2"])
    assert sweep.sweep(args, tmp_path) == {} and not list(tmp_path.iterdir())
    dense, _, both = capsys.readouterr().out.splitlines()
    tokens = 2 * 128 * 8192 + 4 * 1_048_576  # of Phase A and B in the cpu profile
    assert f"{tokens / 1e6:.1f}M tokens, {tokens * accounting.flops_per_token(sweep.config(args.size, 'dense')):.2e} FLOPs" in dense
    assert f"{tokens / 1000 / 3600:.2f} h at 1k tok/s" in dense and f"about {2 * tokens / 1000 / 3600 / 2:.2f} h" in both
    assert "8 runs, 8 to do, 2 at once" in both
    files.write_jsonl(tmp_path / "evolve/x/records.jsonl", [
        {"params_total": accounting.params(sweep.config(args.size, "dense"))["total"], "tok_per_s": s} for s in (0.0, 2000.0)])
    args.tok_per_s = None
    sweep.sweep(args, tmp_path)
    dense, cl, both = capsys.readouterr().out.splitlines()
    assert f"{tokens / 2000 / 3600:.2f} h at 2k tok/s" in dense and "unknown" in cl and "after the first run" in both, "nothing is known of cl"


def test_the_map_of_an_ablation_holds_mean_and_deviation_over_seeds_and_refuses_a_run_that_is_there_twice(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("map", upstream.REPO / "runs/map.py")
    spec.loader.exec_module(table := importlib.util.module_from_spec(spec))
    panel = lambda x: {split: {"bpb": x + (split == "test")} for split in ("val", "test")}
    record = lambda seed, final: {"arm": "cl", "recipe": "default", "seed": seed, "final": final, "domain": panel(2.0 + seed * final),
                                  "general": panel(4.0), "blocks": {"idle_share": 0.25} if final else None}
    for seed in (1, 3):
        files.write_jsonl(tmp_path / f"e/s{seed}/records.jsonl", [record(seed, False), record(seed, True)])
        files.write_json(tmp_path / f"e/s{seed}/config.json", {"arms": {"cl": {"phase_a": {"val_bpb": 1.5}}}})
    files.write_jsonl(tmp_path / "e/unfinished/records.jsonl", [record(5, False)])
    files.write_json(tmp_path / "e/unfinished/config.json", {"arms": {"cl": {"phase_a": {}}}})
    table.main([str(tmp_path / "e"), "--out", str(tmp_path / "map.md")])
    row = capsys.readouterr().out.splitlines()[2]
    still = lambda x: f"{x:.4f} ± 0.0000"
    assert row.split(" | ") == ["| cl", "default", "2", still(1.5), still(2), "4.0000 ± 1.4142", still(3), "5.0000 ± 1.4142", *[still(4)] * 2,
                                *[still(5)] * 2, still(0.25) + " |"]
    assert row in (tmp_path / "map.md").read_text()
    files.write_jsonl(tmp_path / "e/again/records.jsonl", [record(1, False), record(1, True)])
    files.write_json(tmp_path / "e/again/config.json", {"arms": {"cl": {"phase_a": {}}}})
    with pytest.raises(SystemExit, match="cl with default, seed 1, is there twice"):
        table.main([str(tmp_path / "e")])


# --- the real commands, at toy size

class Forked:
    """`python -m nanochat_cl.evolve` without the seconds that importing torch takes."""

    def __init__(self, argv: list[str], log: Path):
        self.pid = os.fork()
        if self.pid == 0:
            log.parent.mkdir(parents=True, exist_ok=True)
            os.dup2(fd := os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 1), os.dup2(fd, 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
            try:
                command.run(lambda: evolve.main(argv))
                os._exit(0)
            except SystemExit as e:
                os._exit(e.code if isinstance(e.code, int) else 1)
            finally:
                os._exit(70)

    def poll(self):
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_real_sweep_ends_with_a_ledger_a_certificate_and_a_report(base, monkeypatch, capsys):
    monkeypatch.undo()  # children need the processor while we wait
    small = [*toy_phase_a.ARGS, "--max-tokens", "1536", "--milestone-tokens", "1536"]
    argv = ["--arms", "dense,cl", "--lrs", "0.3,1,1e30", "--seeds", "42", "--recipes", "lr_schedule=linear", *small]  # the last explodes
    reported = []
    monkeypatch.setattr(sweep.report, "main", reported.append)
    logs = base / "evolve/sweep/logs"
    monkeypatch.setattr(sweep, "launch", lambda args, logs: lambda job, slot: Forked(list(job.argv[1:]), logs / f"{job.name}.log"))
    monkeypatch.setattr(sweep, "EXTENSIONS", 0)
    sweep.main(argv)
    said = capsys.readouterr().out
    made = files.read_json(base / "evolve/sweep/sweep.json")
    ended = [row for row in made["runs"] if row["status"] == "complete"]
    lost = [(row["lr_mult"], row["arms"]) for row in made["runs"] if row["status"] == "lost"]
    assert len(ended) == 2 and lost == [(1e30, ["dense"]), (1e30, ["cl"])], [p.read_text()[-500:] for p in logs.iterdir()]
    for row in ended:
        records = files.read_jsonl(base / "evolve/sweep" / row["run"] / "records.jsonl")
        assert row["val_bpb"] == {r["arm"]: r["domain"]["val"]["bpb"] for r in records if r["final"]}
        assert {r["recipe"] for r in records} == {row["recipe"]} and records[-1]["lr_mult"] < records[0]["lr_mult"], "cooled down"
    first = base / "evolve/sweep" / made["runs"][0]["run"]
    certificate = files.read_json(first / "crossover.json")
    assert certificate["checks"]["cool-down"]["state"] == certificate["checks"]["equal trials"]["state"] == "pass"
    assert len(certificate["inputs"]) == 2 + 2 * 2 and "2 stopped by a guard" in certificate["checks"]["equal trials"]["found"]
    assert "0.3, 1, 1e+30 tried" in certificate["checks"]["interior dense optimum"]["found"] and reported == [[*(str(first.parent / row["run"]) for row in made["runs"]), "--arm", "cl"]]
    assert certificate["sentence"].split(":")[0] in said
    before = (base / "evolve/sweep/sweep.json").read_bytes()
    monkeypatch.setattr(sweep, "launch", lambda args, logs: lambda job, slot: pytest.fail(f"{job.name} ran again"))
    sweep.main(argv)
    assert (base / "evolve/sweep/sweep.json").read_bytes() == before


def test_a_run_that_ended_after_its_sweep_was_killed_is_a_trial_as_well(tmp_path):
    args = sweep.parse([*TOY, "--lrs", "0.1,1", "--seeds", "1"])
    for job in sweep.phase_b(args, tmp_path, [9.0]):
        files.write_json(job.folder / "config.json", {"asked": {"arms": job.arms, "seed": 7, "recipe": {"lr_mult": 9.0}}})
        files.write_jsonl(job.folder / "records.jsonl", [{"arm": a, "final": True, "domain": {"val": {"bpb": 1.0}}, "tok_per_s": 0.0} for a in job.arms])
    began = tmp_path / "evolve" / args.name / "began"
    files.write_json(began / "config.json", {"asked": {"arms": ["dense"], "seed": 8, "recipe": {"lr_mult": 5.0}}})
    made = sweep.sweep(args, tmp_path, lambda job, slot: ends_with(job, lambda a, job: 1.0))
    assert {0.1, 1.0, 9.0} <= {*made["grid"]} and 5.0 not in made["grid"] and {row["seed"] for row in made["runs"]} == {1, 7}


def test_where_a_checkpoint_is_named_no_phase_a_is_planned(tmp_path):
    assert sweep.phase_a(sweep.parse([*TOY, "--arms", "dense", "--from", "mine"]), tmp_path) == []


def test_a_run_of_which_one_arm_ended_is_not_complete(tmp_path):
    job = sweep.Job("x", tmp_path, (), ("dense", "cl"), 1, 1, Recipe(), "default")
    row = lambda a, final: {"arm": a, "final": final, "domain": {"val": {"bpb": 1.0}}}
    files.write_jsonl(tmp_path / "records.jsonl", [row("dense", True)])
    assert job.scores() == {}
    files.write_jsonl(tmp_path / "records.jsonl", [row("dense", True), row("cl", True)])
    assert job.scores() == {"dense": 1.0, "cl": 1.0}


def test_a_lost_run_belongs_to_the_certificate_of_its_sweep(tmp_path, monkeypatch):
    """What a guard stopped is an edge of the grid and a trial; of one it is told by its folder alone."""
    rows = [{"run": name, "status": status} for name, status in (("a", "lost"), ("b", "complete"))]
    asked = {}
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(sweep, "sweep", lambda args, base: {"runs": rows})
    monkeypatch.setattr(sweep.machine, "prepare", lambda: None)
    for name in ("crossover", "report"):
        monkeypatch.setattr(getattr(sweep, name), "main", lambda argv, name=name: asked.update({name: argv}))
    sweep.main(["--arms", "dense,cl"])
    assert asked["crossover"] == asked["report"] == [str(tmp_path / "evolve/sweep/b"), str(tmp_path / "evolve/sweep/a"), "--arm", "cl"]

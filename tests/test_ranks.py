"""Several ranks on a CPU do what one does, in both phases, and say which of them is lost."""
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import toy_phase_a
from killed_runs import base_directory, comparable, kill_at, said, start, wait
from nanochat_cl import evolve, pretrain, runs, upstream
from tests import toy_pretraining as toy

RESET = "--optimizer", "reset"  # the toy's Phase A has optimizer state for one rank


# --- phase B ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    with base_directory(tmp_path_factory.mktemp("base")) as base:
        yield base


def keep_everything(out: Path):
    """Planted in a rank: what it holds after every save goes to `out`. The counters `usage` of the last step are a rank's own until summed."""
    def plant() -> None:
        save = evolve.Run.save

        def saved(self) -> None:
            save(self)
            torch.save({learner.name: {"weights": dict(learner.model.named_parameters()), "counts": learner.used, "losses": learner.losses,
                                       "buffers": {k: v for k, v in learner.model.named_buffers() if not k.endswith("usage")}} for learner in self.learners},
                       out / f"{self.state['step']}_{runs.ranks()[0]}_{runs.ranks()[1]}.pt")
        evolve.Run.save = saved
    return plant


@pytest.fixture(scope="module")
def pair(base):
    """What one rank and two hold at the end of the same run, and the records."""
    out = base / "held"
    out.mkdir()
    for ranks in (1, 2):
        assert wait(start(f"on{ranks}", base, *RESET, ranks=ranks, planted=dict.fromkeys(range(ranks), keep_everything(out)))) == [0] * ranks, said(base, f"on{ranks}")
    return [torch.load(out / f"10_{name}.pt") for name in ("0_1", "0_2", "1_2")], [comparable(base, f"on{ranks}") for ranks in (1, 2)]


def leaves(value) -> list:
    if isinstance(value, (dict, list, tuple)):
        return [leaf for part in (value.values() if isinstance(value, dict) else value) for leaf in leaves(part)]
    return [torch.as_tensor(value)]


def test_two_ranks_follow_one(pair):
    (one, two, _), (alone, together) = pair
    for arm in ("dense", "cl"):
        assert len(one[arm]["losses"]) == 10
        torch.testing.assert_close(torch.tensor(two[arm]["losses"]), torch.tensor(one[arm]["losses"]), atol=1e-4, rtol=0)
    for a, b in zip(alone, together, strict=True):
        assert (a["arm"], a["step"], a["tokens"], a["stream_hash"], a["flops"]) == (b["arm"], b["step"], b["tokens"], b["stream_hash"], b["flops"])
        for panel in ("domain", "general"):
            assert b[panel]["test"]["bpb"] == pytest.approx(a[panel]["test"]["bpb"], abs=0.01)
    assert alone[-1]["final"] and abs(alone[-1]["domain"]["test"]["bpb"] - alone[0]["domain"]["test"]["bpb"]) > 0.1, "nothing was learnt"


def test_both_ranks_hold_the_same_weights_and_counts_to_the_bit(pair):
    _, first, second = pair[0]
    mine, theirs = leaves(first), leaves(second)
    assert len(mine) == len(theirs) > 60
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs))


def test_a_run_of_two_ranks_killed_in_a_step_and_in_a_save_ends_with_the_same_records(base, pair):
    for victim, moment, count in ((1, "optimizer step", 13), (0, "rename", 4)):
        status = wait(start("torn", base, *RESET, ranks=2, planted={victim: kill_at(moment, count)}))
        assert status[victim] == -signal.SIGKILL and status[1 - victim] == 1, (status, said(base, "torn"))
    assert wait(start("torn", base, *RESET, ranks=2)) == [0, 0], said(base, "torn")
    assert comparable(base, "torn") == pair[1][1]
    log = said(base, "torn")
    assert re.search(r"stopped, rank 1 of 2 died .* at step 6 \(1,536 tokens\); last good checkpoint: .*/000004", log), log
    assert "stopped, rank 0 of 2 died" in log and "Traceback" not in log


def hang() -> None:
    """Planted in a rank: it stops in the fifth step, for good."""
    train = evolve.Run.train
    evolve.Run.train = lambda self: time.sleep(600) if self.state["step"] == 5 else train(self)


def test_a_rank_that_hangs_is_named_by_the_other(base):
    processes = start("hanging", base, "--arms", "cl", *RESET, ranks=2, planted={1: hang})
    assert wait(processes[:1]) == [1], said(base, "hanging")
    os.kill(processes[1], signal.SIGKILL)  # torchrun's part
    wait(processes[1:])
    line = said(base, "hanging").splitlines()[-1]
    assert line.startswith("stopped, rank 1 of 2 died or did not answer for 8 s: at step 5 (1,280 tokens); last good checkpoint: "), line
    assert line.count(str(base / "evolve/hanging/checkpoints/000004")) == 1


def fail() -> None:
    """Planted in a rank: its fifth step is a mistake of the program."""
    train = evolve.Run.train
    evolve.Run.train = lambda self: torch.ones(2, 3) @ torch.ones(2, 3) if self.state["step"] == 5 else train(self)


def test_the_rank_that_makes_a_mistake_shows_it_and_the_other_names_that_rank(base):
    assert wait(start("failing", base, "--arms", "cl", *RESET, ranks=2, planted={0: fail})) == [70, 1]
    log = said(base, "failing")
    assert log.count("Traceback") == 1 and "shapes cannot be multiplied" in log and log.count("stopped, rank 0 of 2 died") == 1, log


# --- phase A ----------------------------------------------------------------------------------------------------------

# Step by step the validation bpb of all ranks is the loss to compare: what base_train prints is one micro-batch's on rank 0.
PRETRAIN = [*(flag for flag in toy.FLAGS if not flag.startswith(("--max-seq", "--total", "--eval", "--save", "--num"))), "--max-seq-len=32",
            "--total-batch-size=256", "--eval-every=1", "--eval-tokens=256", "--save-every=-1", "--num-iterations=16"]
T, ROWS = 32, 4


@pytest.fixture(scope="module")
def shards(base):
    """Documents of exactly one row: then row groups are micro-batches, and two ranks share a batch whichever way one rank fills it."""
    from nanochat.tokenizer import get_tokenizer
    tokenizer, r = get_tokenizer(), random.Random(0)
    texts = []
    while len(texts) < 600:
        text = " ".join(r.choice(toy.WORDS[:12]) for _ in range(r.randint(6, 14)))
        texts += [text] if len(tokenizer.encode(text)) == T else []
    folder = base / "base_data_climbmix"
    folder.mkdir()
    for i, part in enumerate((texts[:500], texts[500:])):
        pq.write_table(pa.table({"text": part}), folder / f"shard_{i:05d}.parquet", row_group_size=ROWS)
    return folder


def see(shards: Path) -> None:
    """Planted: nanochat found its base directory when the parent of this process imported it."""
    from nanochat import dataset
    dataset.base_dir, dataset.DATA_DIR = str(shards.parent), str(shards)


@pytest.mark.parametrize("arm", ["dense", "cl"])
def test_two_ranks_pretrain_as_one_does(base, shards, arm):
    curves = {}
    for ranks in (1, 2):
        name = f"{arm}_on{ranks}"
        argv = [*PRETRAIN, f"--arm={arm}", f"--device-batch-size={ROWS}", f"--model-tag={name}"]
        assert wait(start(name, base, *argv, ranks=ranks, planted=dict.fromkeys(range(ranks), lambda: see(shards)),
                          main=pretrain.main)) == [0] * ranks, said(base, name)
        curves[ranks] = [float(bpb) for bpb in re.findall(r"Validation bpb: ([\d.]+)", said(base, name))]
    assert len(curves[1]) == 17 and curves[1][0] - curves[1][-1] > 0.5, curves[1]
    assert curves[2][:11] == pytest.approx(curves[1][:11], abs=1e-4)
    assert curves[2][-1] == pytest.approx(curves[1][-1], abs=0.01)
    assert len(list((base / "base_checkpoints" / f"{arm}_on2").glob("optim_*_rank*.pt"))) == 2


# --- launched by torchrun ---------------------------------------------------------------------------------------------

def torchrun(base: Path, *argv: str, **more: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *argv], cwd=upstream.REPO, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=toy.environment(base, **more))


def test_torchrun_pretrains_on_a_tree_whose_optimizer_waits_for_futures(base, shards, tmp_path):
    shutil.copytree(upstream.tree(), tmp_path / "tree", ignore=shutil.ignore_patterns("__pycache__"))
    optim = tmp_path / "tree" / "nanochat" / "optim.py"
    optim.write_text(optim.read_text().replace("async_op=True)", "async_op=True).get_future()"))
    assert optim.read_text().count("get_future()") == 5
    argv = [*PRETRAIN, "--num-iterations=3", "--arm=dense", f"--device-batch-size={ROWS}", "--model-tag=futures"]
    process = torchrun(base, "--standalone", "--nproc_per_node=2", "-m", "nanochat_cl.pretrain", "--", *argv, NANOCHAT_CL_UPSTREAM=str(tmp_path / "tree"))
    out = process.communicate()[0]
    assert process.returncode == 0, out
    found = [float(bpb) for bpb in re.findall(r"Validation bpb: ([\d.]+)", out)]
    assert len(found) == 4 and found[3] < found[0]


def test_two_agents_as_on_two_machines_stop_on_sigterm_with_their_state_and_end_as_two_processes_do(base, pair):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    agents = [torchrun(base, "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}",
                       "-m", "nanochat_cl.evolve", "--", *toy_phase_a.ARGS, "--name", "agents", *RESET) for node in range(2)]
    folder = base / "evolve" / "agents"
    while 4 not in runs.saved_steps(folder):
        assert not any(agent.poll() for agent in agents), "".join(agent.communicate()[0] for agent in agents)
        time.sleep(0.02)
    agents[1].send_signal(signal.SIGTERM)  # all ranks stop, whichever machine hears of it
    said_by = [agent.communicate()[0] for agent in agents]
    assert all(agent.returncode for agent in agents), said_by
    assert all("nanochat_cl.evolve: terminated; the same command continues" in lines for lines in said_by), said_by
    assert "exitcode  : 143" in said_by[0], said_by[0]
    assert wait(start("agents", base, *RESET, ranks=2)) == [0, 0], said(base, "agents")
    assert comparable(base, "agents") == pair[1][1]

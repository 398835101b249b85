"""runs/bench.py: the workers answer with every figure that the tables ask for, and the tables say what was measured and what was not."""
import sys

import pytest

from nanochat_cl import upstream
from nanochat_cl.command import UserError

sys.path.insert(0, str(upstream.REPO / "runs"))
import bench  # noqa: E402


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("bench")
    bench.make_text(base, 320, documents=1800)
    return base


def test_worker_measures_dense_and_cl_and_the_tables_show_it(base, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    case = bench.Case("d1", 1, 320, rows=2, seq_len=64, micro=2, dtype="float32")
    sides = {"dense": {"arm": "dense"}, "cl": {"arm": "cl"}}
    results = bench.alternate(case, sides, rounds=1, steps=2, base=base)
    for got in (results["dense"][0], results["cl"][0]):
        assert got["vocab_size"] == 320 and got["batches"] == 4 and 0 <= got["queue_empty"] <= 4 and got["recompiles"] == 0, got
        assert got["tok_per_s"] == pytest.approx(2 * 2 * 64 / (got["step_ms"] / 1000))
        assert min(got[f"{part}_ms"] for part in ("forward", "backward", "optimizer")) > 0 and 0 < got["loader_frac"] < 1, got
        assert got["memory_mib"] > 50 and got["startup_s"] > 0 and got["first_step_s"] > 0, got
    row = bench.pairs_table({"d1": results}, "cl", "dense").splitlines()[-1].split(" | ")
    saved = 6 * 2 * 128 * 512 * 5 / 8  # FLOPs per token of the blocks that rest, of which routing takes a little
    dense = results["dense"][0]["flops_per_token"]
    assert 0.95 * saved < dense - dense / float(row[2]) < 1.001 * saved, row
    assert len(bench.steps_table({"d1": results}).splitlines()) == 4


def test_a_ratio_is_that_of_the_medians_with_its_smallest_and_largest_round():
    assert bench.ratio([1.0, 4.0, 9.0], [2.0, 2.0, 3.0]) == "2.000 (0.500-3.000)"


def test_layers_are_compared_with_dense_and_with_the_ceiling_of_their_shape():
    variants = {"dense": {"pass_s": [0.2, 0.1, 0.3], "optimizer_s": [0.1] * 3, "flops": 1.0},
                "bmm": {"pass_s": [0.1, 0.05, 0.075], "optimizer_s": [0.2] * 3, "flops": 0.375}}
    row = bench.layers_table({"n=64": variants}).splitlines()[-1]
    assert row == "| n=64 | bmm | 75.00 | 0.375 (0.250-0.500) | 0.375 | 200.00 | 0.917 (0.688-1.250) |", row


def test_what_a_machine_cannot_run_is_said_to_be_unmeasured():
    results = {label: [bench.NO_GPU] for label in ("dense", "cl")}
    for text in (bench.pairs_table({"d20": results}, "cl", "dense"), bench.steps_table({"d20": results}),
                 bench.layers_table({"d20": bench.NO_GPU})):
        assert "UNMEASURED: this machine has no GPU" in text.splitlines()[-1]
        assert len({line.count("|") for line in text.splitlines()}) == 1, text


@pytest.mark.parametrize("on_gpu", [False, True])
def test_blocks_are_measured_beside_dense_on_a_gpu_matched_by_flops_too(monkeypatch, on_gpu):
    asked = []
    monkeypatch.setattr(bench, "call", lambda work, environment, **arguments: asked.append(arguments) or bench.NO_GPU)
    text = bench.bench_blocks(bench.parse(["blocks", "--rounds", "1", "--steps", "1"]), upstream.REPO, on_gpu)
    models = [(a["case"]["depth"], a["case"]["head_dim"], a["case"]["pattern"], a["arm"]) for a in asked if "case" in a]
    if on_gpu:
        assert models[0] == (20, 128, "L", "dense") and text.count("cl-flops |") == 2 and "on a CPU | UNMEASURED" in text
    else:
        assert models[-1] == (4, 64, "SSSL", "dense"), "of four heads of 64 three are routed"
    assert "d20 on a GPU, FA3, SSSL | cl-flops | UNMEASURED" in text or on_gpu


def test_memory_that_is_short_halves_the_rows_of_all_sides(monkeypatch):
    asked = []
    def call(work, environment, case, arm, **arguments):
        asked.append((arm, case["rows"], case["micro"]))
        short = case["rows"] > 8 and arm == "dense"
        return {"unmeasured": "torch.OutOfMemoryError", "out_of_memory": True} if short else {"tok_per_s": 1.0}
    monkeypatch.setattr(bench, "call", call)
    sides = {arm: {"arm": arm} for arm in ("cl", "dense")}
    got = bench.alternate(bench.Case("d20", 20, rows=16), sides, rounds=2, steps=1, base=upstream.REPO)
    assert {label: len(results) for label, results in got.items()} == {"cl": 2, "dense": 2}
    assert asked == [("cl", 16, 4), ("dense", 16, 4), *[("cl", 8, 8), ("dense", 8, 8)] * 2], asked


def test_a_folder_that_is_no_nanochat_tree_is_refused(tmp_path):
    with pytest.raises(UserError, match="nanochat/gpt.py"):
        bench.parse(["base", "--against", str(tmp_path)])

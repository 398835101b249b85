"""scripts.base_train: the scaling rules against recorded tables, and whole small runs: deterministic, resumable to the last bit."""
import importlib
import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import nanochat.gpt
from nanochat import dataset
from nanochat.checkpoint_manager import load_checkpoint, load_model
from nanochat.command import UserError, run
from nanochat.fp8 import Float8Linear, convert_to_float8_training
from nanochat.gpt import Linear
from nanochat_cl.upstream import REPO, tree
from scripts import base_train, tok_train

# --- the rules --------------------------------------------------------------------------------------------------------

# depth: (S, raw batch, B, LR factor, Muon wd, {ratio: (iterations, tokens, FLOPs)}), specification 25.1 and 25.3: vocabulary 32768, all
# flags at their defaults.
HORIZON = {
    4: (11_534_384, 220_957, 262_144, 0.707107, 1.889903, {12: (528, 138_412_032, 1.1103e16), 10.5: (462, 121_110_528, 9.7151e15)}),
    6: (23_199_852, 288_765, 262_144, 0.707107, 0.939612, {12: (1_062, 278_396_928, 4.6634e16), 10.5: (929, 243_531_776, 4.0794e16)}),
    12: (110_100_912, 524_288, 524_288, 1.0, 0.28, {12: (2_520, 1_321_205_760, 1.0037e18), 10.5: (2_205, 1_156_055_040, 8.7825e17)}),
    20: (435_160_240, 887_497, 1_048_576, 1.414214, 0.100188,
         {12: (4_980, 5_221_908_480, 1.5072e19), 10.5: (4_357, 4_568_645_632, 1.3186e19)}),
    24: (729_810_624, 1_081_866, 1_048_576, 1.414214, 0.059738,
         {12: (8_352, 8_757_706_752, 4.1820e19), 10.5: (7_308, 7_662_993_408, 3.6593e19)}),
}
# depth: peak learning rates of lm_head, wte, value embeddings, resid, x0, smear/backout, Muon, Muon on c_fc; warmdown steps (25.4).
PEAKS = {
    4: (0.0097980, 0.367423, 0.183712, 0.0035355, 0.353553, 0.2, 0.0141421, 0.0282843, 343),
    6: (0.008, 0.3, 0.15, 0.0035355, 0.353553, 0.2, 0.0141421, 0.0282843, 690),
    12: (0.008, 0.3, 0.15, 0.005, 0.5, 0.2, 0.02, 0.04, 1_638),
    20: (0.0087636, 0.328634, 0.164317, 0.0070711, 0.707107, 0.2, 0.0282843, 0.0565685, 3_237),
    24: (0.008, 0.3, 0.15, 0.0070711, 0.707107, 0.2, 0.0282843, 0.0565685, 5_429),
}


def meta_model(depth: int):
    args = base_train.parse(["--depth", str(depth)])
    return args, base_train.build_model_meta(depth, args, 32768)


@pytest.mark.parametrize("depth", HORIZON)
def test_batch_horizon_and_weight_decay_are_those_of_the_table(depth):
    params, raw, batch, lr_factor, decay, horizons = HORIZON[depth]
    args, model = meta_model(depth)
    assert base_train.scaling_params(model) == params
    reference_params = base_train.scaling_params(meta_model(12)[1])
    for ratio, (iterations, tokens, flops) in horizons.items():
        args.target_param_data_ratio = ratio
        target, reference = int(ratio * params), ratio * reference_params
        assert round(2 ** 19 * (target / reference) ** 0.383) == pytest.approx(raw, abs=1)
        assert base_train.auto_batch_size(target, reference) == batch
        assert base_train.batch_lr_factor(batch) == pytest.approx(lr_factor, abs=1e-6)
        assert base_train.scaled_weight_decay(args.weight_decay, batch, target, reference) == pytest.approx(decay, abs=1e-6)
        n, _ = base_train.horizon(args, batch, model.estimate_flops(), target)
        assert (n, n * batch) == (iterations, tokens)
        assert model.estimate_flops() * tokens == pytest.approx(flops, rel=1e-4)


@pytest.mark.parametrize("depth", PEAKS)
def test_peak_learning_rates_and_warmdown_are_those_of_the_table(depth):
    *peaks, warmdown = PEAKS[depth]
    args, model = meta_model(depth)
    _, _, batch, _, decay, horizons = HORIZON[depth]
    factor = base_train.batch_lr_factor(batch)
    optimizer = model.setup_optimizer(unembedding_lr=args.unembedding_lr * factor, embedding_lr=args.embedding_lr * factor,
                                      matrix_lr=args.matrix_lr * factor, weight_decay=decay, scalar_lr=args.scalar_lr * factor)
    groups = optimizer.param_groups
    wide = next(g for g in groups if g["kind"] == "muon" and g["params"][0].shape[0] == 4 * g["params"][0].shape[1])
    lrs = [g["initial_lr"] for g in groups[:6]] + [groups[6]["initial_lr"], wide["initial_lr"] * math.sqrt(4)]
    assert lrs == pytest.approx(peaks, rel=2e-5)
    n = horizons[12][0]
    flat = [it for it in range(n) if it >= args.warmup_steps and base_train.lr_multiplier(it, n, args) == 1.0]
    assert flat == list(range(args.warmup_steps, n - warmdown + 1))


def test_the_batch_grows_with_the_power_0383_of_the_horizon():
    turn = 2 ** (0.5 / 0.383)  # where the exponent of two is halfway between 19 and 20
    assert [base_train.auto_batch_size(turn * x, 1.0) for x in (0.999, 1.001)] == [2 ** 19, 2 ** 20]


def test_the_horizon_flags_have_their_order():
    explicit = base_train.parse(["--num-iterations", "7", "--target-flops", "1e9"])
    assert base_train.horizon(explicit, 100, 1e4, 5_000)[0] == 7
    budget = base_train.parse(["--target-flops", "1e9"])
    assert base_train.horizon(budget, 100, 1e4, 5_000)[0] == 1000
    assert base_train.horizon(base_train.parse([]), 100, 1e4, 5_099)[0] == 50


def test_schedules_pass_through_their_corners():
    args = base_train.parse([])
    lr = lambda it: base_train.lr_multiplier(it, 1000, args)
    assert [lr(0), lr(19), lr(39), lr(40), lr(350)] == pytest.approx([1 / 40, 0.5, 1, 1, 1])
    assert [lr(675), lr(1000)] == pytest.approx([0.5 + 0.5 * 0.05, 0.05])
    momentum = lambda it: base_train.muon_momentum(it, 2000, args)
    assert [momentum(0), momentum(200), momentum(400), momentum(699), momentum(1350), momentum(2000)] == pytest.approx(
        [0.85, 0.91, 0.97, 0.97, 0.935, 0.90])
    assert base_train.muon_momentum(90, 100, args) == pytest.approx(0.85 + 90 / 400 * 0.12), "in a short run the warm-up wins"
    decay = lambda it: base_train.muon_weight_decay(it, 1000, 0.2)
    assert [decay(0), decay(500), decay(1000)] == pytest.approx([0.2, 0.1, 0.0])


def test_odd_depths_get_a_padded_width():
    args = base_train.parse(["--aspect-ratio", "64", "--head-dim", "128"])
    assert base_train.build_model_meta(5, args, 512).config.n_embd == 384


# --- flags ------------------------------------------------------------------------------------------------------------

def test_flags_and_defaults_are_those_of_nanochat():
    assert vars(base_train.parse([])) == {
        "run": "dummy", "device_type": "", "fp8": False, "fp8_recipe": "tensorwise", "depth": 20, "aspect_ratio": 64, "head_dim": 128,
        "max_seq_len": 2048, "window_pattern": "SSSL", "num_iterations": -1, "target_flops": -1.0, "target_param_data_ratio": 12,
        "device_batch_size": 32, "total_batch_size": -1, "embedding_lr": 0.3, "unembedding_lr": 0.008, "weight_decay": 0.28,
        "matrix_lr": 0.02,
        "scalar_lr": 0.5, "warmup_steps": 40, "warmdown_ratio": 0.65, "final_lr_frac": 0.05, "resume_from_step": -1, "eval_every": 250,
        "eval_tokens": 41943040, "core_metric_every": 2000, "core_metric_max_per_task": 500, "sample_every": 2000, "save_every": -1,
        "model_tag": None}


@pytest.mark.parametrize("argv, words", [
    (["--depth", "0"], "--depth must be at least 1, got 0"), (["--max-seq-len", "1"], "--max-seq-len must be at least 2, got 1"),
    (["--window-pattern", "SXL"], "letters S and L, got 'SXL'"), (["--target-param-data-ratio", "-1"], "no horizon: give"),
    (["--target-param-data-ratio", "0", "--num-iterations", "3"], "undefined"), (["--warmdown-ratio", "1.5"], "from 0 to 1; got 1.5"),
    (["--total-batch-size", "0"], "--total-batch-size"), (["--fp8", "--fp8-recipe", "rowwise"], "tensorwise is implemented, got rowwise"),
])
def test_a_flag_that_no_run_can_obey_ends_with_one_line_and_status_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        run(lambda: base_train.main(argv))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and words in lines[0], lines


# --- fp8 --------------------------------------------------------------------------------------------------------------

def test_fp8_is_left_out_of_small_layers_and_around_evaluation():
    model = torch.nn.Sequential(Linear(128, 256, bias=False), Linear(128, 12, bias=False), Linear(136, 130, bias=False))
    weight = model[0].weight
    convert_to_float8_training(model, module_filter_fn=base_train.fp8_eligible)
    converted = model[0]
    assert [type(m) for m in model] == [Float8Linear, Linear, Linear]
    with pytest.raises(RuntimeError, match="inside"):
        with base_train.disable_fp8(model):
            assert type(model[0]) is Linear and model[0].weight is weight
            raise RuntimeError("inside")
    assert model[0] is converted and converted.weight is weight


def test_evaluation_is_in_eval_mode_without_fp8_and_training_goes_on_as_before():
    model = torch.nn.Sequential(Linear(128, 256, bias=False), torch.nn.Dropout(0.5))
    convert_to_float8_training(model)
    with base_train.evaluating(model):
        assert type(model[0]) is Linear and not model.training and not model[1].training
    assert type(model[0]) is Float8Linear and model.training and model[0].training and model[1].training


# --- now and then -----------------------------------------------------------------------------------------------------

def test_what_recurs_skips_the_first_step_and_never_the_last():
    at = lambda every: [step for step in range(8) if base_train.due(step, every, last_step=step == 7)]
    assert (at(3), at(7), at(100), at(0), at(-1)) == ([3, 6, 7], [7], [7], [], [])


def test_the_metadata_hold_the_place_of_every_rank_in_the_data(monkeypatch):
    states = [{"rank": r, "world_size": 2, "tokenizer_batch_size": 128, "pq_idx": r} for r in range(2)]
    assert base_train.gather_loader_state(states[0]) == states[0], "one rank keeps its own"
    monkeypatch.setattr(base_train, "is_ddp_initialized", lambda: True)
    monkeypatch.setattr(base_train.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(base_train.dist, "all_gather_object", lambda out, mine: out.__setitem__(slice(None), states))
    gathered = base_train.gather_loader_state(states[1])
    assert gathered["pq_idx"] == 0, "another tree reads rank 0's"
    for rank in range(2):
        for name, value in [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)]:
            monkeypatch.setenv(name, str(value))
        assert base_train.exact_state(gathered) == {**states[rank], **({"other_ranks": states[1:]} if rank == 0 else {})}


# --- whole runs -------------------------------------------------------------------------------------------------------

TINY = ["--device-type=cpu", "--depth=2", "--aspect-ratio=32", "--head-dim=32", "--max-seq-len=64", "--device-batch-size=2",
        "--total-batch-size=256", "--num-iterations=6", "--warmup-steps=2", "--eval-every=3", "--eval-tokens=256", "--core-metric-every=-1",
        "--sample-every=-1", "--save-every=2"]
WORDS = "the a cat dog stone river runs sleeps under over light and then it rains on every quiet hill while nobody looks".split()


def documents(seed: int, n: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    pick = lambda high: int(torch.randint(high, (1,), generator=generator))
    return [" ".join(WORDS[pick(len(WORDS))] for _ in range(5 + pick(60))) + "." for _ in range(n)]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """A base directory with three shards and a tokenizer of 300 entries."""
    base = tmp_path_factory.mktemp("base")
    (base / "base_data_climbmix").mkdir()
    for i in range(3):
        pq.write_table(pa.table({"text": documents(i, 1500)}), base / "base_data_climbmix" / f"shard_{i:05d}.parquet", row_group_size=100)
    with pytest.MonkeyPatch.context() as patch:
        use(base, patch)
        tok_train.main(["--vocab-size=300", "--max-chars=100000"])
    return base


def use(base, monkeypatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.setattr(dataset, "base_dir", str(base))
    monkeypatch.setattr(dataset, "DATA_DIR", str(base / "base_data_climbmix"))


@pytest.fixture
def train(base_dir, monkeypatch, capsys):
    """train(tag, more flags) -> what was printed; in this process, without the compiler."""
    use(base_dir, monkeypatch)

    def call(tag: str, *argv: str) -> str:
        capsys.readouterr()
        with torch.compiler.set_stance("force_eager"):
            base_train.main([*TINY, f"--model-tag={tag}", *argv])
        return capsys.readouterr().out
    return call


@pytest.fixture(scope="module")
def whole(base_dir) -> tuple[str, str]:
    """(tag, output) of an uninterrupted run as a command of its own, with samples at the end."""
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(base_dir), "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": str(tree())}
    result = subprocess.run([sys.executable, "-m", "scripts.base_train", *TINY, "--sample-every=6", "--model-tag=whole"],
                            env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return "whole", result.stdout


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def checkpoint(base_dir, tag: str, step: int):
    model, optimizer, meta = load_checkpoint(str(base_dir / "base_checkpoints" / tag), step, "cpu", load_optimizer=True)
    for key in ("model_tag", "resume_from_step", "sample_every"):
        del meta["user_config"][key]
    del meta["loop_state"]["total_training_time"]
    return model, optimizer, meta


def test_the_same_run_in_another_process_gives_the_same_bits(base_dir, whole, train):
    tag, _ = whole
    train("again")
    for step in (2, 4, 6):
        assert equal(checkpoint(base_dir, "again", step), checkpoint(base_dir, tag, step)), f"step {step}"


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(base_dir, whole, train, step):
    tag, _ = whole
    folder = base_dir / "base_checkpoints" / f"resumed{step}"
    folder.mkdir()
    for name in (f"model_{step:06d}.pt", f"meta_{step:06d}.json", f"optim_{step:06d}_rank0.pt"):
        shutil.copy(base_dir / "base_checkpoints" / tag / name, folder / name)
    before = (folder / f"model_{step:06d}.pt").stat().st_mtime_ns
    out = train(folder.name, f"--resume-from-step={step}")
    assert equal(checkpoint(base_dir, folder.name, 6), checkpoint(base_dir, tag, 6))
    assert (folder / f"model_{step:06d}.pt").stat().st_mtime_ns == before, "the step it resumed from is not saved again"
    assert "The data continue with the very next batch" in out
    lines = lambda text: [re.sub(r"dt:.*mfu: [\d.]+|total time.*", "", s) for s in text.splitlines() if re.match(f"step 0000[{step}-5]", s)]
    assert lines(out) == lines(whole[1]) and len(lines(out)) == 6 - step


def test_the_output_has_the_lines_that_scripts_read(whole):
    _, out = whole
    for pattern in [r"COMPUTE_DTYPE: torch\.float32 \(.*\)", r"Vocab size: 300", r"Model config:", r"Parameter counts:",
                    r"transformer_matrices    : [\d,]+", r"Estimated FLOPs per token: \d\.\d+e\+\d+",
                    r"Scaling LRs by 0\.0221 for batch size 256 .*", r"Scaling weight decay from 0\.280000 to \d+\.\d{6} for depth 2",
                    r"Using user-provided number of iterations: 6", r"Total number of training tokens: 1,536",
                    r"Tokens : Scaling params ratio: \d+\.\d\d", r"Total training FLOPs estimate: \d\.\d+e\+\d+",
                    r"Tokens / micro-batch / rank: 2 x 64 = 128", r"Tokens / micro-batch: 128",
                    r"Total batch size 256 => gradient accumulation steps: 2", r"Step 0000[036] \| Validation bpb: \d\.\d{6}",
                    r"step 00004/00006 \(66\.67%\) \| loss: \d\.\d{6} \| lrm: 0\.\d\d \| dt: \d+\.\d\dms \| tok/sec: [\d,]+ \| "
                    r"bf16_mfu: 0\.00 \| epoch: 1 pq: 0 rg: \d+ \| total time: 0\.00m", r"Peak memory usage: \d+\.\d\dMiB",
                    r"Total training time: 0\.00m",
                    r"Minimum validation bpb: \d\.\d{6}", r"Start-up to the first step: \d+\.\d\ds"]:
        assert re.search(f"^{pattern}$", out, re.MULTILINE), f"no line like {pattern}"
    assert len(re.findall("Validation bpb", out)) == 3
    assert sum(line.startswith("<|bos|>") for line in out.splitlines()) == 7, "the seven prompts are sampled at the end"


def test_files_and_metadata_are_those_of_nanochat(base_dir, whole):
    folder = base_dir / "base_checkpoints" / whole[0]
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        f"{kind}_{step:06d}{rest}" for step in (2, 4, 6) for kind, rest in [("model", ".pt"), ("meta", ".json"), ("optim", "_rank0.pt")])
    meta = json.loads((folder / "meta_000006.json").read_text())
    assert {"step", "val_bpb", "model_config", "user_config", "device_batch_size", "max_seq_len", "total_batch_size",
            "dataloader_state_dict", "loop_state"} <= set(meta)
    assert meta["step"] == 6 and meta["total_batch_size"] == 256 and meta["user_config"]["model_tag"] == "whole"
    assert set(meta["model_config"]) == {"sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern"}
    assert {"pq_idx", "rg_idx", "epoch"} <= set(meta["dataloader_state_dict"])
    assert set(meta["loop_state"]) == {"min_val_bpb", "smooth_train_loss", "total_training_time"}


def test_the_trained_model_loads_and_is_better_than_an_untrained_one(base_dir, whole, monkeypatch):
    use(base_dir, monkeypatch)
    model, tokenizer, meta = load_model("base", torch.device("cpu"), phase="eval", model_tag=whole[0])
    assert not model.training and tokenizer.get_vocab_size() == 300 and meta["step"] == 6
    bpbs = [float(x) for x in re.findall(r"Validation bpb: ([\d.]+)", whole[1])]
    assert bpbs[-1] < bpbs[0] and meta["val_bpb"] == pytest.approx(bpbs[-1], abs=1e-6)


def test_a_patched_process_trains_the_patched_model(base_dir, train, monkeypatch):
    """As an extension does it: patch nanochat.*, then run the module as __main__."""
    built = []

    class CountedMLP(nanochat.gpt.MLP):
        def __init__(self, config):
            super().__init__(config)
            built.append(config.n_embd)
    monkeypatch.setattr(nanochat.gpt, "MLP", CountedMLP)
    monkeypatch.delitem(sys.modules, "scripts.base_train")
    monkeypatch.setattr(sys, "argv", ["base_train", *TINY, "--num-iterations=1", "--eval-every=-1", "--model-tag=patched"])
    with torch.compiler.set_stance("force_eager"):
        runpy.run_module("scripts.base_train", run_name="__main__")
    assert built.count(64) == 2 and (base_dir / "base_checkpoints" / "patched" / "model_000001.pt").exists()


def test_without_validation_the_metadata_say_so(base_dir, train):
    out = train("unvalidated", "--num-iterations=1", "--eval-every=-1", "--save-every=-1")
    meta = checkpoint(base_dir, "unvalidated", 1)[2]
    assert meta["val_bpb"] is None and meta["loop_state"]["min_val_bpb"] == float("inf") and "Minimum" not in out


@pytest.mark.parametrize("argv, words", [
    (["--total-batch-size=200"], "multiple of rows x context x ranks = 2 x 64 x 1 = 128 tokens, got 200"),
    (["--eval-tokens=100"], "--eval-tokens must fill at least one batch of 128 tokens, got 100"),
    (["--resume-from-step=3"], "model_000003.pt; steps with a model there: 2, 4, 6"),
    (["--resume-from-step=2", "--depth=3"], "n_layer 2 there, 3 here"),
    (["--resume-from-step=6", "--num-iterations=4"], "at step 6 but the run ends at 4"),
])
def test_what_this_run_cannot_do_is_said_in_one_line(base_dir, whole, train, argv, words):
    with pytest.raises((UserError, FileNotFoundError)) as error:
        train(whole[0], *argv)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_ranks_that_nothing_connects_and_another_number_of_ranks_are_refused(base_dir, whole, train, monkeypatch):
    for name, value in [("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")]:
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="nothing averages the gradients of 2 ranks"):
        train("alone")
    monkeypatch.setattr(base_train, "is_ddp_initialized", lambda: True)
    with pytest.raises(UserError, match="saved by 1 ranks, this run has 2"):
        train(whole[0], "--resume-from-step=2")


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_named(base_dir, whole, train):
    folder = base_dir / "base_checkpoints" / "damaged"
    shutil.copytree(base_dir / "base_checkpoints" / whole[0], folder)
    path = folder / "model_000006.pt"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"damaged/model_000006\.pt cannot be read .* newest older step that is readable is 4"):
        train("damaged", "--resume-from-step=6", "--num-iterations=8")


def test_in_float16_the_gradient_scaler_is_saved_and_a_resumed_run_has_the_same_bits(base_dir):
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(base_dir), "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": str(tree()),
           "NANOCHAT_DTYPE": "float16"}
    for tag, more in [("half", []), ("half2", ["--resume-from-step=2"])]:
        folder = base_dir / "base_checkpoints" / tag
        folder.mkdir(parents=True)
        for path in (base_dir / "base_checkpoints" / "half").glob("*000002*") if more else []:
            shutil.copy(path, folder)
        command = [sys.executable, "-m", "scripts.base_train", *TINY, "--num-iterations=4", "--eval-every=-1", f"--model-tag={tag}", *more]
        result = subprocess.run(command, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    assert equal(checkpoint(base_dir, "half", 4), checkpoint(base_dir, "half2", 4))
    model, _, meta = checkpoint(base_dir, "half", 4)
    assert meta["loop_state"]["grad_scaler"]["_growth_tracker"] == 4, "four steps without an overflow"
    assert {value.dtype for value in model.values()} == {torch.float32}


def test_training_draws_no_random_numbers(train):
    """Why a resumed run needs no state of a generator: after the initial weights, none is asked again."""
    states = []
    for steps in (1, 4):
        train("draws", f"--num-iterations={steps}", "--eval-every=-1", "--save-every=-1")
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_what_wandb_gets_has_nanochats_keys(train, monkeypatch):
    logged, runs = [], []

    class Wandb:
        @staticmethod
        def init(**kwargs):
            runs.append(kwargs)
            return Wandb

        @staticmethod
        def log(values):
            logged.append(values)

        @staticmethod
        def finish():
            runs.append("finished")
    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    monkeypatch.setattr(base_train, "evaluate_core", lambda model, tokenizer, device, max_per_task: {
        "core_metric": max_per_task / 1000, "centered_results": {"cats": float(model.training)}})
    out = train("logged", "--run=mine", "--core-metric-every=4", "--core-metric-max-per-task=250")
    assert runs[0]["project"] == "nanochat" and runs[0]["name"] == "mine" and runs[0]["config"]["depth"] == 2 and runs[1] == "finished"
    at = {"step", "total_training_flops"}
    assert [(v["step"], set(v) - at) for v in logged] == [
        (0, {"total_training_time", "val/bpb"}),
        (0, {"total_training_time", "train/loss", "train/lrm", "train/dt", "train/tok_per_sec", "train/mfu", "train/epoch"}),
        (3, {"total_training_time", "val/bpb"}), (4, {"core_metric", "centered_results"}),
        (6, {"total_training_time", "val/bpb"}), (6, {"core_metric", "centered_results"})]
    flops = float(re.search(r"FLOPs per token: (\S+)", out)[1])
    assert logged[-1]["total_training_flops"] == pytest.approx(flops * 256 * 6) and logged[-1]["centered_results"] == {"cats": 0.0}
    assert re.findall(r"^Step (\d+) \| CORE metric: (.*)$", out, re.MULTILINE) == [("00004", "0.2500"), ("00006", "0.2500")]


# --- recipes ----------------------------------------------------------------------------------------------------------

def commands(recipe: str) -> list[tuple[str, list[str]]]:
    """(module, arguments) of every command in a recipe, with a number in place of each variable."""
    text = (tree() / "runs" / recipe).read_text()
    found = re.findall(r"^ *(?:python -m|launch) ([\w.]+)(.*)$", text.replace("\\\n", " "), re.MULTILINE)
    words = lambda arguments: shlex.split(re.sub(r"\$\w+", "3", arguments.split("#")[0].split(" & ")[0]))
    return [(module, words(arguments)) for module, arguments in found]


@pytest.mark.skipif(tree() != REPO / "upstream", reason="another tree is in use")
@pytest.mark.parametrize("recipe, modules", [
    ("speedrun.sh", "dataset dataset tok_train tok_eval base_train base_eval"),
    ("runcpu.sh", "dataset tok_train tok_eval base_train base_eval"), ("miniseries.sh", "dataset tok_train"), ("scaling_laws.sh", "")])
def test_every_command_of_a_recipe_is_accepted(recipe, modules):
    assert subprocess.run(["bash", "-n", tree() / "runs" / recipe]).returncode == 0
    assert [module.split(".")[1] for module, _ in commands(recipe)] == modules.split()
    for module, argv in commands(recipe):
        if not module.endswith("tok_eval"):  # takes none
            args = importlib.import_module(module).parse(argv)
            if module.endswith("base_train"):
                base_train.check(args)


@pytest.mark.skipif(tree() != REPO / "upstream", reason="another tree is in use")
@pytest.mark.parametrize("recipe, folder, models", [
    ("miniseries.sh", "toy_miniseries_results", [("d12_toy", 12, 32), ("d20_toy", 20, 16)]),
    ("scaling_laws.sh", "scaling_laws_results_toy", [("d12_1e18", 12, 32), ("d20_1e18", 20, 32)])])
def test_a_series_gets_one_row_per_model_and_continues_where_it_stopped(whole, tmp_path, recipe, folder, models):
    """torchrun is replaced by the output of a real run, so the labels that the recipe looks for are those that base_train prints."""
    output = tmp_path / "output"
    output.write_text(whole[1] + "Step 00006 | CORE metric: 0.1234\n")
    (tmp_path / "torchrun").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncat {output}\n')
    (tmp_path / "torchrun").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "NANOCHAT_BASE_DIR": str(tmp_path), "SKIP_SETUP": "1",
           "SERIES_NAME": "toy", "BUDGETS": "1e18"}
    for depths in ("12", "12 20"):
        subprocess.run(["bash", tree() / "runs" / recipe], env={**env, "DEPTHS": depths}, check=True, capture_output=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    arguments = [base_train.parse(call.split(" -- ")[1].split()) for call in calls]
    assert [(args.model_tag, args.depth, args.device_batch_size) for args in arguments] == models
    assert arguments[0].run == f"toy_{models[0][0]}"
    for args in arguments:
        base_train.check(args)
    header, *rows = [line.split(",") for line in (tmp_path / folder / "results.csv").read_text().splitlines()]
    number = lambda pattern: re.findall(pattern, whole[1])[-1].replace(",", "")
    for (name, depth, _), row in zip(models, rows, strict=True):
        assert dict(zip(header, row, strict=True)) == {
            "name": name, "depth": str(depth), "params": number(r"total +: (\S+)"), "matrices": number(r"transformer_matrices +: (\S+)"),
            "lm_head": number(r"lm_head +: (\S+)"), "iterations": "6", "tokens": "1536", "flops": number(r"FLOPs estimate: (\S+)"),
            "val_bpb": number(r"Validation bpb: (\S+)"), "core": "0.1234", "minutes": "0.00"}

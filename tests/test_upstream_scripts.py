"""scripts.tok_train, tok_eval and base_eval as commands, on a small base directory."""
import csv
import json
import re
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
import torch

from nanochat import dataset
from nanochat.checkpoint_manager import save_checkpoint
from nanochat.command import UserError, run
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer, get_token_bytes, get_tokenizer
from nanochat_cl.upstream import REPO, tree
from scripts import base_eval, tok_eval, tok_train

WORDS = "the a cat dog stone river runs sleeps under over light and then it rains on every quiet hill while nobody looks".split()


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A base directory with a training and a validation shard."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(dataset, "base_dir", str(tmp_path))
    monkeypatch.setattr(dataset, "DATA_DIR", str(tmp_path / "base_data_climbmix"))
    (tmp_path / "base_data_climbmix").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(2):
        texts = [" ".join(WORDS[j] for j in torch.randint(len(WORDS), (30,), generator=generator).tolist()) for _ in range(400)]
        pq.write_table(pa.table({"text": texts}), tmp_path / "base_data_climbmix" / f"shard_{i:05d}.parquet", row_group_size=100)
    return tmp_path


# --- tok_train --------------------------------------------------------------------------------------------------------

def test_a_tokenizer_is_trained_and_stored_with_its_byte_lengths(base, capsys):
    tok_train.main(["--vocab-size=300", "--max-chars=20000"])
    out = capsys.readouterr().out
    assert "max_chars: 20,000" in out and "doc_cap: 10,000" in out and "vocab_size: 300" in out and "Training time" in out
    assert sorted(p.name for p in (base / "tokenizer").iterdir()) == ["token_bytes.pt", "tokenizer.json", "tokenizer.pkl"]
    tokenizer, lengths = get_tokenizer(), get_token_bytes()
    assert tokenizer.get_vocab_size() == 300 and lengths.dtype == torch.int32 and lengths.shape == (300,)
    assert lengths[:256].tolist() == [1] * 256 and lengths[-9:].tolist() == [0] * 9 and (lengths[256:-9] > 1).all()
    text = "the quiet hill: ünïcode 12345 <|bos|>"
    assert lengths[torch.tensor(tokenizer.encode(text))].sum() == len(text.encode())


def test_training_text_is_cut_per_document_and_ends_with_the_one_that_passes_the_limit(monkeypatch):
    monkeypatch.setattr(tok_train, "parquets_iter_batched", lambda split: iter([["abcdef", "gh"], ["ijklmnop", "q", "r"]]))
    text = lambda max_chars, doc_cap=4: list(tok_train.training_text(max_chars, doc_cap))
    assert text(100) == ["abcd", "gh", "ijkl", "q", "r"]
    assert text(6) == ["abcd", "gh", "ijkl"], "exactly the limit is not beyond it"
    assert text(5) == ["abcd", "gh"]


def test_flags_of_the_tokenizer_training_are_those_of_nanochat(base):
    assert vars(tok_train.parse([])) == {"max_chars": 2_000_000_000, "doc_cap": 10_000, "vocab_size": 32768}
    with pytest.raises(UserError, match="at least 265.*got 264"):
        tok_train.main(["--vocab-size=264"])


def test_missing_data_end_the_command_with_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dataset, "base_dir", str(tmp_path))
    monkeypatch.setattr(dataset, "DATA_DIR", str(tmp_path / "none"))
    with pytest.raises(SystemExit) as stop:
        run(lambda: tok_train.main([]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "python -m nanochat.dataset -n 8" in error


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


# --- tok_eval ---------------------------------------------------------------------------------------------------------

def test_compression_is_compared_with_the_published_tokenizers(base, monkeypatch, capsys):
    tok_train.main(["--vocab-size=300", "--max-chars=20000"])
    # Stand-ins for what would be fetched: single bytes for GPT-2, the local tokenizer itself for GPT-4.
    by_bytes = RustBPETokenizer.train_from_iterator([""], 265)
    published = {"gpt2": by_bytes, "cl100k_base": get_tokenizer()}
    monkeypatch.setattr(RustBPETokenizer, "from_pretrained", classmethod(lambda cls, name: published[name]))
    capsys.readouterr()
    tok_eval.main()
    out = re.sub(r"\033\[\d+m", "", capsys.readouterr().out)
    assert "GPT-2: 265" in out and "GPT-4: 300" in out and "Ours: 300" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("climbmix-train")]
    text = "\n".join(next(dataset.parquets_iter_batched("train")))
    size, ours = len(text.encode()), len(get_tokenizer().encode(text))
    relative = f"{100 * (size - ours) / size:+.1f}%"
    assert rows[0] == ["climbmix-train", str(size), str(size), "1.00", str(ours), f"{size / ours:.2f}", relative, "Ours"]
    assert rows[1][-2:] == ["+0.0%", "equal"]
    kinds = ("news", "korean", "code", "math", "science", "climbmix", "=", "-")
    assert all(len(line) == 95 for line in out.splitlines() if line.startswith(kinds))
    assert {line.split()[0] for line in out.splitlines()} > {"news", "korean", "code", "math", "science", "climbmix-train", "climbmix-val"}


def test_without_a_network_the_local_tokenizer_is_reported_alone(base, monkeypatch, capsys):
    tok_train.main(["--vocab-size=300", "--max-chars=20000"])

    def unreachable(cls, name):
        raise requests.ConnectionError("no network")
    monkeypatch.setattr(RustBPETokenizer, "from_pretrained", classmethod(unreachable))
    tok_eval.main()
    out = capsys.readouterr().out
    assert "GPT-2's tokenizer could not be fetched" in out and re.search(r"^korean +\d+ bytes +\d+ tokens", out, re.MULTILINE)


# --- base_eval --------------------------------------------------------------------------------------------------------

@pytest.fixture
def model(base):
    """A tokenizer and a model with all weights of its output layer at zero: every token is equally likely."""
    tok_train.main(["--vocab-size=320", "--max-chars=20000"])
    torch.manual_seed(0)
    config = GPTConfig(sequence_len=64, vocab_size=320, n_layer=1, n_head=1, n_kv_head=1, n_embd=32, window_pattern="L")
    model = GPT(config)
    model.init_weights()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    save_checkpoint(str(base / "base_checkpoints" / "d1"), 4, model.state_dict(), None, {"step": 4, "model_config": vars(config).copy()})
    return model


def test_bpb_of_both_splits_is_the_mean_over_their_packed_batches(base, model, capsys):
    base_eval.main(["--eval=bpb", "--device-batch-size=2", "--split-tokens=300", "--device-type=cpu"])
    got = dict(re.findall(r"(\w+) bpb: ([\d.]+)", capsys.readouterr().out))
    # Uniform over the 320 entries: log2(320) bits per token with bytes, over those bytes; two batches (300 // 128) per split.
    lengths = get_token_bytes()
    for split in ("train", "val"):
        loader = base_eval.tokenizing_distributed_data_loader_bos_bestfit(get_tokenizer(), 2, 64, split, device="cpu")
        sizes = torch.cat([lengths[next(loader)[1]].flatten() for _ in range(2)])
        expected = torch.log2(torch.tensor(320.0)) * (sizes > 0).sum() / sizes.sum()
        assert float(got[split]) == pytest.approx(expected.item(), abs=2e-5)


def test_samples_are_the_seven_prompts_and_eight_free_ones(base, model, capsys):
    base_eval.main(["--eval=sample", "--device-type=cpu"])
    out = capsys.readouterr().out
    assert all(f"<|bos|>{prompt}" in out for prompt in base_eval.SAMPLE_PROMPTS) and len(base_eval.SAMPLE_PROMPTS) == 7
    assert out.count("-" * 80) == 8


def test_core_is_written_as_a_table(base, model, capsys):
    items = [{"query": "the cat", "choices": ["runs", "sleeps"], "gold": 0} for _ in range(3)]
    with zipfile.ZipFile(base / "eval_bundle.zip", "w") as archive:
        archive.writestr("eval_bundle/core.yaml", "icl_tasks:\n- {label: cats, dataset_uri: toy/cats.jsonl, num_fewshot: [1], "
                                                  "icl_task_type: multiple_choice}\n")
        archive.writestr("eval_bundle/eval_meta_data.csv", "Eval Task,Random baseline\ncats,50\n")
        archive.writestr("eval_bundle/eval_data/toy/cats.jsonl", "\n".join(map(json.dumps, items)))
    base_eval.main(["--eval=core", "--device-type=cpu"])
    out = capsys.readouterr().out
    assert "CORE metric: 1.0000" in out, "equal losses: the first choice, which is the right one"
    assert "cats (1-shot, multiple_choice) | accuracy: 1.0000 | centered: 1.0000" in out
    with open(base / "base_eval" / "base_model_000004.csv") as f:
        rows = [[cell.strip() for cell in row] for row in csv.reader(f)]
    assert rows == [["Task", "Accuracy", "Centered"], ["cats", "1.000000", "1.000000"], ["CORE", "", "1.000000"]]


def test_a_second_rank_that_unpacks_the_bundle_finds_it_in_place(base, monkeypatch):
    with zipfile.ZipFile(base / "eval_bundle.zip", "w") as archive:
        archive.writestr("eval_bundle/core.yaml", "icl_tasks: []\n")
        archive.writestr("eval_bundle/eval_data/a.b/LICENSE", "free")
    flushed, fsync = [], base_eval.os.fsync
    monkeypatch.setattr(base_eval.os, "fsync", lambda fd: (flushed.append((base / "eval_bundle").exists()), fsync(fd)))
    base_eval.place_eval_bundle(str(base / "eval_bundle.zip"))
    assert flushed == [False, False], "both files are on the disk before the folder has its name"
    for _ in range(2):
        base_eval.place_eval_bundle(str(base / "eval_bundle.zip"))
    assert (base / "eval_bundle" / "core.yaml").read_text() == "icl_tasks: []\n"
    assert [p.name for p in base.iterdir() if p.name.startswith("tmp")] == []


def test_flags_of_the_evaluation_are_those_of_nanochat(base, model, capsys):
    args = vars(base_eval.parse([]))
    assert args.pop("modes") == ["core", "bpb", "sample"]
    assert args == {"eval": "core,bpb,sample", "model_tag": None, "step": None, "max_per_task": -1, "device_batch_size": 32,
                    "split_tokens": 20971520, "device_type": ""}
    with pytest.raises(SystemExit):
        base_eval.parse(["--eval", "bpb,speed"])
    assert "got speed" in capsys.readouterr().err
    with pytest.raises(UserError, match="at least one batch of 2,048 tokens, got 100"):
        base_eval.main(["--eval=bpb", "--split-tokens=100", "--device-type=cpu"])
    with pytest.raises(FileNotFoundError, match="steps with a model there: 4"):
        base_eval.main(["--eval=bpb", "--step=5", "--device-type=cpu"])


# --- README -----------------------------------------------------------------------------------------------------------

def test_the_readme_lists_every_module_with_its_size_and_tests_that_exist():
    if tree() != REPO / "upstream":
        pytest.skip("another tree is in use")
    table = [line for line in (tree() / "README.md").read_text().splitlines() if line.startswith("|") and ".py`" in line]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    listed = {}
    for cells in rows:
        assert len(cells) == 5 and all(cells), f"an open cell: {cells}"
        _, modules, lines, tests, _ = cells
        modules = re.findall(r"`([\w/]+\.py)`", modules)
        real = sum(len((tree() / m).read_text().splitlines()) for m in modules)
        assert abs(real - int(lines)) <= 0.1 * real, f"{modules}: the README says {lines} lines, there are {real}"
        assert all((REPO / "tests" / f"test_upstream_{name}.py").exists() for name in re.findall(r"`(\w+)`", tests)), tests
        listed.update(dict.fromkeys(modules))
    present = {p.relative_to(tree()).as_posix() for folder in ("nanochat", "scripts") for p in (tree() / folder).glob("*.py")}
    assert set(listed) == present - {"nanochat/__init__.py"}

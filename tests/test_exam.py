"""nanochat_cl.exam: choice tests from files become items, and all that is asked is in the record."""
import json
import os
from pathlib import Path

import pytest
import torch
import toy_phase_a

from nanochat_cl import exam, patching
from nanochat_cl.command import UserError
from nanochat_cl.probes import Item

SHARED = Path(os.environ.get("NANOCHAT_CL_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def write(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("row, item", [
    ({"good": "It is.", "bad": "It are.", "paradigm": "p"}, Item("x", "", ("It are.", "It is."), 1)),
    ({"context": "The sun is", "choices": ["hot.", " a bear."], "answer": 0}, Item("x", "The sun is", (" hot.", " a bear."), 0, per_byte=True)),
    ({"question": "Who?", "choices": ["I", "you", "he"], "answer": "2"}, Item("x", "Who?", (" I", " you", " he"), 2, per_byte=True)),
    ({"context": "Sarah helped Maria since _ was kind.", "choices": ["Sarah", "Maria"], "answer": 1},
     Item("x", "", ("Sarah helped Maria since Sarah was kind.", "Sarah helped Maria since Maria was kind."), 1)),
    ({"context": "Fill ____ in.", "choices": ["a", "b"], "answer": 0}, Item("x", "Fill ____ in.", (" a", " b"), 0, per_byte=True)),
    ({"context": "I look at the clear", "choices": ["signs"], "answer": 0}, Item("x", "I look at the clear", (" signs",), 0, per_byte=True)),
])
def test_each_format_becomes_an_item(tmp_path, row, item):
    assert exam.read(write(tmp_path / "x.jsonl", row), 9) == [item]


def test_a_limit_takes_the_same_items_in_any_order_of_the_file(tmp_path):
    rows = [{"context": f"c{i}", "choices": ["a", "b"], "answer": i % 2} for i in range(50)]
    some = exam.read(write(tmp_path / "a.jsonl", *rows), 10)
    assert exam.read(write(tmp_path / "a.jsonl", *rows[::-1]), 10) == some and len(some) == 10


@pytest.mark.parametrize("text", ['{"context": "x"}\n', "[1]\n", "hello\n"])
def test_a_bad_file_is_one_line(tmp_path, text):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(UserError, match="bad.jsonl: expected lines with") as e:
        exam.read(tmp_path / "bad.jsonl", 9)
    assert "\n" not in str(e.value)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the folder of evaluation sets beside the checkout")
def test_the_evaluation_sets_at_hand_are_read():
    for path in {*SHARED.glob("eval/*.jsonl"), *SHARED.glob("medical_qa/*.jsonl")} - {SHARED / "eval/lambada.jsonl"}:
        items = exam.read(path, limit=50)
        assert len(items) == 50 and all(0 <= i.gold < len(i.choices) and all(map(str.strip, i.choices)) for i in items), path


def test_files_in_the_folders_of_the_base_directory_are_asked_beside_all_the_rest(tmp_path, monkeypatch):
    from nanochat import checkpoint_manager
    from nanochat.tokenizer import get_token_bytes, get_tokenizer
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    toy_phase_a.make(tmp_path, names=("cl",))
    write(tmp_path / "eval/facts/capitals.jsonl", *({"context": f"city {i}", "choices": ["a", "b", "c"], "answer": i % 3} for i in range(9)))
    write(tmp_path / "eval/floor/pairs.jsonl", {"good": "It is.", "bad": "It are."})
    with patching.applied():
        model, _, _ = checkpoint_manager.build_model(str(tmp_path / "base_checkpoints/d2_cl_s42"), 3, torch.device("cpu"), "train")
        asked = exam.Exam(tmp_path / "corpora/toy", get_tokenizer(), get_token_bytes(), toy_phase_a.T, rows=4, docs=2, probe_items=4)
        before, paused = [layer.mlp.usage.clone() for layer in model.transformer.h], []
        scores = asked.scores(model, lambda: paused.append(1))
    assert {key: list(scores[key]) for key in ("facts", "questions")} == {"facts": ["capitals"], "questions": []}
    assert scores["facts"]["capitals"]["chance"] == pytest.approx(1 / 3) and len(scores["facts"]["capitals"]["items"]) == 4
    assert [len(panels[split].sequences) for panels in (asked.domain, asked.general) for split in ("val", "test")] == [3, 6, 6, 6]
    assert {"pairs", "negation"} <= set(scores["floor"]) and 0 <= scores["plasticity"]["dormant_0.025"] <= 1
    assert all(torch.equal(layer.mlp.usage, b) for layer, b in zip(model.transformer.h, before)), "scoring counted as training"
    assert paused
    json.dumps(scores, allow_nan=False)

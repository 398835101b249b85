"""nanochat_cl.exam: choice tests from files become items, and all that is asked is in the record."""
import json
import os
from pathlib import Path

import pytest
import torch
import toy_phase_a
from test_evaluate import BOS, TOKEN_BYTES, TOKENIZER, tiny_gpt

from nanochat_cl import evaluate, exam, patching
from nanochat_cl.command import UserError
from nanochat_cl.probes import Item
from nanochat_cl.sources import Document, write_parquet

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
     Item("x", ("Sarah helped Maria since Sarah", "Sarah helped Maria since Maria"), (" was kind.",) * 2, 1)),
    ({"context": "He ate the _.", "choices": ["egg", "pan"], "answer": 0}, Item("x", "He ate the _.", (" egg", " pan"), 0, per_byte=True)),
    ({"sentence_good": "It is.", "sentence_bad": "It are.", "UID": "p"}, Item("x", "", ("It are.", "It is."), 1)),
    ({"context": "The grass was wet.", "question": "cause", "choices": ["It rained.", "The sun rose."], "answer": 0},
     Item("x", "The grass was wet because", (" it rained.", " the sun rose."), 0, per_byte=True)),
    ({"context": "It rained.", "question": "effect", "choices": ["The grass was wet."] * 2, "answer": 1},
     Item("x", "It rained so", (" the grass was wet.",) * 2, 1, per_byte=True)),
    ({"ctx": "A man", "endings": ["sits.", "flies."], "label": "0", "ind": 4}, Item("x", "A man", (" sits.", " flies."), 0, per_byte=True)),
    ({"query": "Q: Who?", "choices": ["I", "you"], "gold": 1}, Item("x", "Q: Who?", (" I", " you"), 1, per_byte=True)),
    ({"context_options": ["The cat", "The dog"], "continuation": "barks", "gold": 1}, Item("x", ("The cat", "The dog"), (" barks",) * 2, 1)),
    ({"context": "I look at the clear ", "continuation": "signs"}, Item("x", "I look at the clear", (" signs",), 0)),
    ({"context": "I look at the clear", "target": "signs"}, Item("x", "I look at the clear", (" signs",), 0)),
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


def test_core_tasks_come_from_the_bundle_with_their_own_delimiter(tmp_path):
    write(tmp_path / "eval_data/world/jeopardy_all.jsonl", {"context": "CITIES: It has a tower ", "continuation": "Paris"})
    write(tmp_path / "eval_data/squad.jsonl", {"context": "x", "continuation": "y"})
    (tmp_path / "core.yaml").write_text(
        "icl_tasks:\n- {label: jeopardy, dataset_uri: world/jeopardy_all.jsonl, num_fewshot: [10], icl_task_type: language_modeling, "
        "continuation_delimiter: \"\\nAnswer: \"}\n- {label: squad, dataset_uri: squad.jsonl, num_fewshot: [10], icl_task_type: language_modeling}\n")
    assert exam.core(tmp_path, "facts", 9) == [Item("jeopardy_all", "CITIES: It has a tower\nAnswer:", (" Paris",), 0)], "only the answer is scored"
    assert exam.core(tmp_path, "floor", 9) == exam.core(tmp_path, "questions", 9) == exam.core(tmp_path / "none", "facts", 9) == []


TOWNS = ["Rome", "Oslo", "Bern", "Kyiv", "Lima", "Cairo"]
FACTS = [f"Here is a list. The best known town of the {i}th country is, as everyone will have heard, {town}. It is large.\n"
         f"They say so. The very first stone of its oldest tower was laid by the mayor in {1900 + i}. The End was near."
         for i, town in enumerate(TOWNS)]


def test_cloze_questions_are_ends_of_training_sentences_against_three_of_their_kind():
    items = exam.cloze(FACTS, 99)
    assert len(items) == 12 and exam.cloze(FACTS, 99) == items and exam.cloze(FACTS, 4) == [i for i in items if i in exam.cloze(FACTS, 4)]
    for item in items:
        answer, text = item.choices[item.gold], " ".join(" ".join(FACTS).split())
        assert f"{item.context}{answer}. " in text and len(set(item.choices)) == 4 and item.per_byte
        assert {choice.strip().isdigit() for choice in item.choices} == {answer.strip().isdigit()}
    assert len({item.gold for item in items}) == 4
    assert exam.cloze(FACTS[:3], 99) == [], "three others are needed"
    assert not any("Rome" in str(item) for item in exam.cloze([*FACTS, "a rome of one's own"], 99)), "a word that is also written small is no name"


def test_a_word_that_is_not_rare_is_not_asked_for():
    asked = lambda times: {i.choices[i.gold].strip() for i in exam.cloze([*FACTS, "Oslo, " * times], 99)}
    assert "Oslo" in asked(exam.RARE - 1) and "Oslo" not in asked(exam.RARE), "it stands once in the facts"


def test_cloze_questions_never_come_from_the_held_out_shard(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from nanochat import dataset
    monkeypatch.setattr(dataset, "DATA_DIR", str(tmp_path / "shards"))
    (tmp_path / "shards").mkdir()
    for name, text in (("shard_0", "first"), ("shard_1", "second"), ("shard_2", "held out")):
        pq.write_table(pa.table({"text": [text]}), tmp_path / "shards" / f"{name}.parquet")
    assert list(exam.training_texts(tmp_path)) == ["first", "second"]
    monkeypatch.setattr(exam, "CLOZE_DOCS", 1)
    assert list(exam.training_texts(tmp_path)) == ["first"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the folder of evaluation sets beside the checkout")
def test_the_evaluation_sets_at_hand_are_read():
    for path in {*SHARED.glob("eval/*.jsonl"), *SHARED.glob("medical_qa/*.jsonl")}:
        items = exam.read(path, limit=50)
        assert len(items) == 50 and all(0 <= i.gold < len(i.choices) and all(map(str.strip, i.choices)) for i in items), path


def test_files_in_the_folders_of_the_base_directory_are_asked_beside_all_the_rest(tmp_path, monkeypatch):
    from nanochat import checkpoint_manager, dataset
    from nanochat.tokenizer import get_token_bytes, get_tokenizer
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    toy_phase_a.make(tmp_path, names=("cl",))
    write(tmp_path / "eval/facts/capitals.jsonl", *({"context": f"city {i}", "choices": ["a", "b", "c"], "answer": i % 3} for i in range(9)))
    write(tmp_path / "eval/floor/pairs.jsonl", {"good": "It is.", "bad": "It are."})
    write(tmp_path / "corpora/toy/questions/own.jsonl", {"context": "The sun is", "choices": ["hot", "cold"], "answer": 0})
    write(tmp_path / "eval_bundle/eval_data/j.jsonl", {"context": "CITIES: It has a tower", "continuation": "Paris"})
    (tmp_path / "eval_bundle/core.yaml").write_text("icl_tasks:\n- {label: jeopardy, dataset_uri: j.jsonl}\n")
    for name in ("shard_0", "shard_1"):
        write_parquet(tmp_path / Path(dataset.DATA_DIR).name / f"{name}.parquet", [Document(text, "general", "") for text in FACTS])
    with patching.applied():
        model, _, _ = checkpoint_manager.build_model(str(tmp_path / "base_checkpoints/d2_cl_s42"), 3, torch.device("cpu"), "train")
        asked = exam.Exam(tmp_path / "corpora/toy", get_tokenizer(), get_token_bytes(), toy_phase_a.T, rows=4, docs=2, probe_items=4)
        before, paused = [layer.mlp.usage.clone() for layer in model.transformer.h], []
        scores = asked.scores(model, lambda: paused.append(1))
        light = asked.scores(model, lambda: None, full=False)
    assert {key: list(scores[key]) for key in ("facts", "questions")} == {"facts": ["capitals", "cloze", "j"], "questions": ["own"]}
    assert scores["facts"]["capitals"]["chance"] == pytest.approx(1 / 3) and len(scores["facts"]["capitals"]["items"]) == 4
    assert [len(panels[split].sequences) for panels in (asked.domain, asked.general) for split in ("val", "test")] == [3, 6, 6, 6]
    assert {"pairs", "negation"} <= set(scores["floor"]) and 0 <= scores["plasticity"]["dormant_0.025"] <= 1
    assert all(torch.equal(layer.mlp.usage, b) for layer, b in zip(model.transformer.h, before)), "scoring counted as training"
    assert paused and "pairs" not in light["floor"] and not {"facts", "questions", "plasticity"} & {*light}
    assert all(light["floor"][kind] == scores["floor"][kind] for kind in light["floor"]) and light["domain"] == scores["domain"]
    json.dumps(scores, allow_nan=False)
    shares = asked.constant_share(model.config.cl)
    assert set(shares) == {"domain", "general", "floor", "facts", "questions"} and 0.1 < shares["facts"] < 1, shares
    assert 0.4 < shares["domain"] < 1 and asked.constant_share(model.config.cl | {"reach": "token", "chunk": 1})["facts"] == 0, shares


@pytest.mark.parametrize("row", ['{"context": "a", "choices": ["b", "c"], "answer": 2}', '{"context": "a", "choices": ["b", ""], "answer": 0}',
                                 '{"context": "a", "choices": [], "answer": 0}', '{"context": "a", "choices": ["b", "c"], "answer": -1}'])
def test_an_answer_that_is_no_choice_is_refused_in_one_line(row, tmp_path):
    (tmp_path / "winogrande.jsonl").write_text(row + "\n")
    with pytest.raises(UserError, match="winogrande.jsonl.*counted from 0"):
        exam.read(tmp_path / "winogrande.jsonl", 10)


def test_every_panel_is_of_its_own_file(tmp_path, monkeypatch):
    from nanochat import dataset
    asked = {}
    def load(path, tokenizer, docs, seq_len, rows):
        asked.setdefault(str(Path(path).relative_to(tmp_path)), docs)
        return TOY[str(Path(path).relative_to(tmp_path))]
    TOY = {f"corpora/{place}/{split}.parquet": evaluate.plan(["x"], [[BOS, 1, 2, 3 + i]], rows=1)
           for i, (place, split) in enumerate((p, s) for p in ("toy", "general") for s in ("val", "test"))}
    monkeypatch.setattr(evaluate, "load_panel", load)
    monkeypatch.setattr(dataset, "DATA_DIR", "none")
    made = exam.Exam(tmp_path / "corpora/toy", TOKENIZER, TOKEN_BYTES, 64, rows=4, docs=4, probe_items=2)
    assert {(part, split): getattr(made, part)[split] is TOY[f"corpora/{place}/{split}.parquet"] for part, place in (("domain", "toy"), ("general", "general"))
            for split in ("val", "test")} == {(part, split): True for part in ("domain", "general") for split in ("val", "test")}
    assert asked == {"corpora/toy/val.parquet": 2, "corpora/toy/test.parquet": 4, "corpora/general/val.parquet": 8, "corpora/general/test.parquet": 16}
    got = made.scores(tiny_gpt(sequence_len=256), lambda: None, full=False)
    for part, place in (("domain", "toy"), ("general", "general")):
        for split in ("val", "test"):
            docs = got[part][split]["subdomains"]["x"]["docs"] if part == "domain" else got[part][split]["docs"]
            (nats, size), = evaluate.score(tiny_gpt(sequence_len=256), TOY[f"corpora/{place}/{split}.parquet"], TOKEN_BYTES)
            assert docs == [[pytest.approx(nats), int(size)]], (part, split)


def test_what_would_also_be_right_is_no_wrong_choice_and_the_question_does_not_hold_its_answer():
    ask = "The best known town of the great and old country by the sea is, as everyone will have heard"
    texts = [f"So it is. {ask}, {town}. It is large." for town in ("Rome", "Oslo")]
    texts += [f"So it is. Another one, as far as anybody is able to say about number {i}, is {town}. It is small."
              for i, town in enumerate(("Bern", "Kyiv", "Lima", "Cairo"))]
    for text in texts[:2]:
        assert exam.SENTENCE.findall(text)
    items = exam.cloze(texts, 99)
    assert items and all(item.choices[item.gold].strip() not in item.context for item in items)
    inside = exam.cloze([*texts, "So it is. They all say that the towers of Paris are by far the best known ones in Paris. It is."], 99)
    assert not any(item.choices[item.gold] == " Paris" for item in inside)


def test_no_wrong_choice_stands_in_the_question():
    towns = ["Rome", "Oslo", "Bern", "Kyiv", "Lima", "Cairo"]
    texts = [f"So it is. As far as anybody in {towns[i - 1]} or in {towns[i - 2]} is able to say about number {i}, that one is {town}. It is."
             for i, town in enumerate(towns)]
    items = exam.cloze(texts, 99)
    assert len(items) == 6 and not any(choice.strip() in item.context for item in items for choice in item.choices)


def test_an_underscore_within_a_word_is_no_gap(tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "What does sys.max_size hold?", "choices": ["a limit", "a name"], "answer": 0}))
    (item,) = exam.read(tmp_path / "q.jsonl", 9)
    assert (item.context, item.choices, item.per_byte) == ("What does sys.max_size hold?", (" a limit", " a name"), True)


@pytest.mark.parametrize("name", ["order", "cloze"])
def test_a_file_that_is_called_like_a_probe_of_ours_is_refused(base, monkeypatch, name):
    from nanochat import dataset
    from nanochat.tokenizer import get_tokenizer
    monkeypatch.setattr(dataset, "DATA_DIR", "none")
    path = base / "eval" / "floor" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"good": "It is.", "bad": "It are."}))
    with pytest.raises(UserError, match=f"{name}.jsonl: there is a probe called {name} already; rename the file"):
        exam.Exam(base / "corpora/toy", get_tokenizer(), TOKEN_BYTES, 32, rows=4, docs=2, probe_items=2)
    path.unlink()

"""nanochat.core_eval and evaluate_core: prompts and spans of hand-made cases, and scores of models whose every answer is known."""
import json
import random
import zipfile

import pytest
import torch

from nanochat import core_eval
from nanochat.core_eval import (batch_sequences_lm, batch_sequences_mc, batch_sequences_schema, evaluate_example, evaluate_task,
                                find_common_length, forward_model, render_prompts_lm, render_prompts_mc, render_prompts_schema,
                                stack_sequences)

BOS = 1


class CharTokenizer:
    """One id per character: its code point."""

    def get_bos_token_id(self) -> int:
        return BOS

    def __call__(self, texts: list[str], prepend: int) -> list[list[int]]:
        return [[prepend, *map(ord, text)] for text in texts]


class Parrot:
    """
    Knows some texts by heart: after a prefix of one of them it expects the character that follows there, otherwise "?".
    The expected character has logit `sure`, all others 0.
    """

    def __init__(self, *texts: str, sure: float = 5.0):
        self.texts, self.sure, self.shapes = texts, sure, []

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(ids.shape))
        logits = torch.zeros(*ids.shape, 128)
        for n, row in enumerate(ids.tolist()):
            for s in range(len(row)):
                seen = "".join(map(chr, row[1:s + 1]))
                after = [t[len(seen)] for t in self.texts if t.startswith(seen) and len(t) > len(seen)]
                logits[n, s, ord(after[0] if after else "?")] = self.sure
        return logits


# --- prompts ----------------------------------------------------------------------------------------------------------

def test_multiple_choice_prompts_repeat_the_question_for_every_choice_and_strip_nothing():
    item = {"query": "Q: 2+2?\n", "choices": ["3 ", "4"], "gold": 1}
    assert render_prompts_mc(item, "\nA: ") == ["Q: 2+2?\n\nA: 3 ", "Q: 2+2?\n\nA: 4"]
    shots = [{"query": "Q: 1+1?", "choices": ["2", "5"], "gold": 0}, {"query": "Q: 1+2?", "choices": ["2", "3"], "gold": 1}]
    assert render_prompts_mc(item, " ", shots)[1] == "Q: 1+1? 2\n\nQ: 1+2? 3\n\nQ: 2+2?\n 4"


def test_schema_prompts_share_the_continuation():
    item = {"context_options": ["The cup fell because the cup", "The cup fell because the hand"], "continuation": "shook.", "gold": 1}
    shot = {"context_options": ["A b", "C d"], "continuation": "e", "gold": 0}
    assert render_prompts_schema(item, " ", [shot]) == [
        "A b e\n\nThe cup fell because the cup shook.", "A b e\n\nThe cup fell because the hand shook."]


def test_language_modeling_prompts_are_stripped_only_without_the_continuation():
    item = {"context": "  one two \n", "continuation": "three "}
    assert render_prompts_lm(item, " ") == ["one two", "one two three "]
    shot = {"context": " a ", "continuation": "b"}
    assert render_prompts_lm(item, "\nAnswer: ", [shot]) == [
        "a\nAnswer: b\n\none two\nAnswer:", "a\nAnswer: b\n\none two\nAnswer: three "]


def test_template_characters_in_the_data_stay_as_they_are():
    item = {"query": "{{ x }} <b>&", "choices": ["{% y %}"], "gold": 0}
    assert render_prompts_mc(item, " ") == ["{{ x }} <b>& {% y %}"]


# --- spans ------------------------------------------------------------------------------------------------------------

def test_common_length_counts_from_either_end_and_never_beyond_the_shortest():
    rows = [[1, 2, 3, 9], [1, 2, 4, 3, 9], [1, 2, 3, 3, 9]]
    assert (find_common_length(rows), find_common_length(rows, direction="right")) == (2, 2)
    assert find_common_length([[1, 2], [1, 2, 3]]) == 2
    assert find_common_length([[2, 3], [1, 2, 3]], direction="right") == 2
    assert find_common_length([[1], [2]]) == 0


def test_spans_cover_the_choices_the_common_end_and_the_continuation():
    tok = CharTokenizer()
    tokens, starts, ends = batch_sequences_mc(tok, ["q: yes", "q: no"])
    assert (starts, ends) == ([4, 4], [7, 6])
    assert [row[s:e] for row, s, e in zip(tokens, starts, ends)] == [[*map(ord, "yes")], [*map(ord, "no")]]
    tokens, starts, ends = batch_sequences_schema(tok, ["tall one ran", "he ran"])
    assert [row[s:e] for row, s, e in zip(tokens, starts, ends)] == [[*map(ord, "e ran")]] * 2
    tokens, starts, ends = batch_sequences_lm(tok, ["one two", "one two three"])
    assert (len(tokens), starts, ends) == (1, [8], [14])
    with pytest.raises(AssertionError, match="strict token prefix"):
        batch_sequences_lm(tok, ["one two", "one too"])
    with pytest.raises(AssertionError, match="strict token prefix"):
        batch_sequences_lm(tok, ["one", "one"])


def test_rows_are_padded_on_the_right():
    assert stack_sequences([[1, 2, 3], [4]], 9).tolist() == [[1, 2, 3], [4, 9, 9]]


# --- scores -----------------------------------------------------------------------------------------------------------

def test_losses_are_those_of_the_next_token_and_the_last_column_has_none():
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 2, 0, 4], [3, 3, 1, 0]])
    losses, predictions = forward_model(lambda x: table[x], ids)
    for n in range(2):
        for s in range(3):
            expected = -torch.log_softmax(table[ids[n, s]], 0)[ids[n, s + 1]]
            assert losses[n, s].item() == pytest.approx(expected.item(), abs=1e-6)
            assert predictions[n, s] == table[ids[n, s]].argmax()
    assert losses[:, -1].isnan().all()


def meta(task_type: str, num_fewshot: int = 0, delimiter: str = " ") -> dict:
    return {"task_type": task_type, "num_fewshot": num_fewshot, "continuation_delimiter": delimiter}


def run(model, data: list[dict], task_meta: dict, idx: int = 0) -> bool:
    return evaluate_example(idx, model, CharTokenizer(), data, torch.device("cpu"), task_meta)


def test_the_choice_that_the_model_finds_likeliest_per_token_wins():
    data = [{"query": "sky is", "choices": ["green and wet", "blue", "red"], "gold": 1}]
    assert run(Parrot("sky is blue"), data, meta("multiple_choice"))
    assert not run(Parrot("sky is red"), data, meta("multiple_choice"))
    # Long choices are not punished for their length: the mean over the span counts, padding does not.
    data[0]["gold"] = 0
    assert run(Parrot("sky is green and wet"), data, meta("multiple_choice"))


def test_a_tie_goes_to_the_first_choice():
    data = [{"query": "q", "choices": ["aa", "bb"], "gold": 0}]
    assert run(Parrot("nothing"), data, meta("multiple_choice"))
    assert not run(Parrot("nothing"), [{**data[0], "gold": 1}], meta("multiple_choice"))


def test_a_schema_is_solved_by_the_context_that_makes_the_ending_likely():
    data = [{"context_options": ["the cup", "the hand"], "continuation": "shook", "gold": 1}]
    assert run(Parrot("the hand shook"), data, meta("schema"))
    assert not run(Parrot("the cup shook"), data, meta("schema"))


def test_a_continuation_counts_only_if_every_token_is_the_greedy_one():
    data = [{"context": "one two", "continuation": "three"}]
    assert run(Parrot("one two three"), data, meta("language_modeling"))
    assert not run(Parrot("one two threw"), data, meta("language_modeling"))


def test_few_shot_examples_are_drawn_from_the_others_by_a_seed_per_example(monkeypatch):
    data = [{"query": f"q{i}", "choices": [f"a{i}", "zz"], "gold": 0} for i in range(9)]
    seen = []
    original = core_eval.render_prompts_mc
    monkeypatch.setattr(core_eval, "render_prompts_mc",
                        lambda item, delimiter, shots: seen.append((item, shots)) or original(item, delimiter, shots))
    for idx in (0, 4):
        run(Parrot("x"), data, meta("multiple_choice", num_fewshot=3), idx=idx)
        expected = random.Random(1234 + idx).sample([i for i in range(9) if i != idx], 3)
        assert seen[-1] == (data[idx], [data[i] for i in expected])


def test_a_model_with_a_length_limit_sees_the_end_of_a_long_prompt_and_others_see_all():
    data = [{"query": "x" * 50, "choices": ["ab", "cd"], "gold": 0}]
    plain, limited = Parrot("y"), Parrot("y")
    limited.max_seq_len = 20
    run(plain, data, meta("multiple_choice"))
    run(limited, data, meta("multiple_choice"))
    assert (plain.shapes, limited.shapes) == ([(2, 54)], [(2, 20)])
    limited.max_seq_len = 1
    with pytest.raises(AssertionError, match="does not fit into 1"):
        run(limited, data, meta("multiple_choice"))


def test_an_unknown_task_type_is_refused():
    with pytest.raises(ValueError, match="essay"):
        run(Parrot("y"), [{}], meta("essay"))


def test_a_task_scores_the_share_of_right_examples_and_ranks_share_the_examples(monkeypatch):
    data = [{"context": f"say {c}", "continuation": c} for c in "abcde"]
    model = Parrot("say a a", "say c c", "say e e")
    task = lambda: evaluate_task(model, CharTokenizer(), data, torch.device("cpu"), meta("language_modeling"))
    assert task() == pytest.approx(3 / 5)
    # Rank 1 of 2 sees b and d, both wrong; the sum with rank 0's vector is asked for.
    reduced = []
    monkeypatch.setattr(core_eval.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(core_eval.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(core_eval.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(core_eval.dist, "all_reduce", lambda t, op: reduced.append(t.tolist()) or t.add_(torch.tensor([1., 0, 1, 0, 1])))
    assert task() == pytest.approx(3 / 5) and reduced == [[0.0] * 5]


# --- the bundle -------------------------------------------------------------------------------------------------------

@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """A CORE archive of two tasks, as downloaded, in the base directory."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    core_yaml = """
icl_tasks:
- {label: letters, dataset_uri: toy/letters.jsonl, num_fewshot: [0], icl_task_type: language_modeling}
- {label: colours, dataset_uri: toy/colours.jsonl, num_fewshot: [0], icl_task_type: multiple_choice, continuation_delimiter: "="}
"""
    letters = [{"context": f"say {c}", "continuation": c} for c in "abcd"]
    colours = [{"query": f"c{i}", "choices": ["red", "blue"], "gold": i % 2} for i in range(4)]
    with zipfile.ZipFile(tmp_path / "eval_bundle.zip", "w") as archive:
        archive.writestr("eval_bundle/core.yaml", core_yaml)
        archive.writestr("eval_bundle/eval_meta_data.csv",
                         "Eval Task,Task Category,Random baseline,Description\nletters,toy,0,\"a, b\"\ncolours,toy,50,\"c\"\n")
        archive.writestr("eval_bundle/eval_data/toy/letters.jsonl", "\n".join(map(json.dumps, letters)))
        archive.writestr("eval_bundle/eval_data/toy/colours.jsonl", "\n".join(map(json.dumps, colours)) + "\n")
    return tmp_path


def test_core_is_the_mean_of_the_accuracies_centered_on_chance(bundle, capsys):
    from scripts.base_eval import evaluate_core, write_core_csv
    # One letter of four; of the colours the even ones by knowledge, c1 by knowledge, c3 wrong by the tie.
    model = Parrot("say a a", "c0=red", "c1=blue", "c2=red")
    core = evaluate_core(model, CharTokenizer(), torch.device("cpu"))
    assert core["results"] == {"letters": pytest.approx(0.25), "colours": pytest.approx(0.75)}
    assert core["centered_results"] == {"letters": pytest.approx(0.25), "colours": pytest.approx(0.5)}
    assert core["core_metric"] == pytest.approx(0.375)
    assert "colours (0-shot, multiple_choice) | accuracy: 0.7500 | centered: 0.5000" in capsys.readouterr().out
    assert sorted(p.name for p in bundle.iterdir()) == ["eval_bundle", "eval_bundle.zip"], "nothing is left of the unpacking"

    write_core_csv(str(bundle / "base_eval" / "base_model_000007.csv"), core)
    header, first, *_, last = (bundle / "base_eval" / "base_model_000007.csv").read_text().splitlines()
    assert [cell.strip() for cell in header.split(",")] == ["Task", "Accuracy", "Centered"]
    assert first == "letters" + " " * 28 + ", 0.250000  , 0.250000  "
    assert last == "CORE" + " " * 31 + ", " + " " * 10 + ", 0.375000  "


def test_a_limit_per_task_takes_the_first_examples_of_a_fixed_shuffle(bundle):
    from scripts.base_eval import evaluate_core
    order = list("abcd")
    random.Random(1337).shuffle(order)
    model = Parrot(f"say {order[0]} {order[0]}")
    core = evaluate_core(model, CharTokenizer(), torch.device("cpu"), max_per_task=1)
    assert core["results"]["letters"] == 1.0

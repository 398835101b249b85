"""nanochat_cl.probes: items that only reading the context can solve, and log-probabilities against a slow computation."""
import dataclasses
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from test_evaluate import BOS, TOKEN_BYTES, TOKENIZER, tiny_gpt

from nanochat_cl import arms, evaluate, probes
from nanochat_cl.probes import KINDS, Item

ITEMS = probes.items(240)
OF = {kind: [item for item in ITEMS if item.kind == kind] for kind in KINDS}


def accuracy(items: list[Item], cost) -> float:
    """Of whoever takes the choice of the least cost(item, choice), the first on ties."""
    return float(np.mean([min(range(len(i.choices)), key=lambda c: cost(i, i.choices[c])) == i.gold for i in items]))


def test_items_depend_on_the_seed_only_and_fewer_are_the_first_ones():
    assert probes.items(240) == ITEMS
    few = probes.items(24)
    assert [i for kind in KINDS for i in OF[kind][:24]] == few
    other = probes.items(24, seed=1)
    assert sum(a == b for a, b in zip(few, other)) < 0.05 * len(few)
    assert probes.items(5) == probes.items(6), "twins come whole"


@pytest.mark.parametrize("kind", KINDS)
def test_gold_positions_levels_and_twins_are_balanced(kind):
    items = OF[kind]
    assert Counter(i.gold for i in items) == {0: 120, 1: 120}
    assert Counter((i.level, i.gold) for i in items) == {(level, gold): 40 for level in range(3) for gold in range(2)}
    for a, b in zip(items[::2], items[1::2]):
        assert {a.choices, b.choices} == {a.choices} or kind == "order"
        assert sorted(a.choices) == sorted(b.choices)
        assert a.choices[a.gold] != b.choices[b.gold] or kind == "order"  # there the sentence alone decides
    assert all(choice.startswith(" ") and not i.context.endswith(" ") for i in items for choice in i.choices)
    assert all(i.choices[0] != i.choices[1] for i in items)


@pytest.mark.parametrize("kind", KINDS)
def test_who_does_not_read_the_context_is_right_on_half_of_the_items(kind):
    counts = Counter(t for i in ITEMS for c in i.choices for t in TOKENIZER.encode(c))
    unigram = lambda item, choice: -math.fsum(np.log(counts[t]) for t in TOKENIZER.encode(choice))
    random = np.random.default_rng(0).normal(size=len(TOKEN_BYTES))
    for cost in (lambda item, choice: len(choice), lambda item, choice: -len(choice), lambda item, choice: len(TOKENIZER.encode(choice)),
                 unigram, lambda item, choice: math.fsum(random[TOKENIZER.encode(choice)])):
        assert accuracy(OF[kind], cost) == 0.5


NONCE = ("membership", "transitivity", "syllogism", "if_then", "negation", "copying", "induction", "brackets")
BOTH_SAID = {kind: [i for i in OF[kind] if i.level or kind == "brackets"] for kind in NONCE}  # of the others what was said is right


@pytest.mark.parametrize("kind", NONCE)
def test_which_choice_was_mentioned_first_last_or_most_often_gives_nothing_away(kind):
    for name, cost in {"first": lambda i, c: i.context.find(c), "last": lambda i, c: -i.context.rfind(c),
                       "often": lambda i, c: -i.context.count(c), "seldom": lambda i, c: i.context.count(c)}.items():
        share = accuracy(BOTH_SAID[kind], cost)
        if kind == "copying" and name in ("often", "seldom", "last") or kind == "brackets":
            continue  # what was just said, or closed, is not said next: that is the task
        assert 0.38 < share < 0.62, f"{kind}: the choice mentioned {name} is right in {share:.0%}"


@pytest.mark.parametrize("kind", sorted(set(NONCE) - {"brackets", "membership"}))
def test_inference_choices_are_equally_long_and_both_stand_in_the_context(kind):
    assert all(len(item.choices[0]) == len(item.choices[1]) for item in OF[kind])
    for item in BOTH_SAID[kind]:
        assert all(choice.strip() in item.context for choice in item.choices)


def bare(context: str) -> str:
    return context.split(f"{probes.LEAD_IN[-1]} ")[-1]


def solve(item: Item) -> str:
    """The right choice, by rules that parse the text: an oracle that shares no line with the makers."""
    text = bare(item.context)
    words = text.replace(".", " .").replace(",", " ,").split()
    if item.level == 0 and item.kind not in ("agreement", "order", "determiner", "brackets"):  # what was said all the time
        return next(choice for choice in item.choices if len(re.findall(rf"{choice}\b", f" {text}")) >= 6)
    after = lambda word, n=1: words[words.index(word) + n]
    match item.kind:
        case "agreement":
            return [" is", " was", " has", " are", " were", " have"][3 * words[1].endswith("s"):][:3]
        case "polarity":
            return " any" if words[0] in ("Nobody", "No", "None") else " some"
        case "anaphora":
            return {"man": " himself", "boy": " himself", "king": " himself", "woman": " herself", "girl": " herself",
                    "queen": " herself"}.get(words[1], " themselves")
        case "order":
            return next(c for c in item.choices if c.split()[0] == "the" and c.split()[4] == "the" and c.split()[3] in probes.VERBS
                        and c.split()[1] in probes.ADJECTIVES)
        case "determiner":
            singular = words[2] in ("this", "that", "one", "every")
            return [c for c in item.choices if (c in (" man", " woman", " child") or c[-1] not in "sn") == singular]
        case "membership":
            holds = {s.split(" box holds ")[0].split()[1]: s.split(" box holds ")[1].split(" and ") for s in text.split(". ")[:-1]}
            return next(f" {box} box" for box, things in holds.items() if after("So") in things)
        case "transitivity":
            more = {"taller": 1, "older": 1, "faster": 1, "shorter": -1, "younger": -1, "slower": -1}
            beats = set()
            for sentence in text.removeprefix("We know: ").split(". ")[:-1]:
                a, _, word, _, b = sentence.split()
                beats.add((a, b) if more[word] > 0 else (b, a))
            x, y = words[words.index("Of") + 1], words[words.index("Of") + 3]
            reach = {x}
            for _ in beats:
                reach |= {b for a, b in beats if a in reach}
            return f" {x}" if (y in reach) == (more[words[-3]] > 0) else f" {y}"
        case "syllogism":
            step = {s.split()[1]: s.split()[3] for s in text.split(". ")[:-1]}
            at = words[-2]
            while at in step:
                at = step[at]
            return f" {at}"
        case "if_then":
            rules = {s.split(",")[0].split()[-1]: s.split()[-1] for s in text.split(". ")[:-1]}
            return f" {rules[words[-5]]}"
        case "negation":
            one, two = after("is"), after("or")
            said = words[words.index(",") - 1]
            return f" {said if words[words.index(',') - 2] != 'not' else two if said == one else one}"
        case "copying":
            first, second = [part.split() for part in text.removeprefix("Say ").split(". Again, say ")]
            return f" {first[len(second)]}"
        case "induction":
            return f" {after(words[-1])}"
        case "brackets":
            stack = []
            for b in words[2:]:
                stack.append({"(": ")", "[": "]", "{": "}"}[b]) if b in "([{" else stack.pop()
            return f" {stack[-1]}"
        case "counting":
            return f" {['one', 'two', 'three', 'four', 'five'][words[:words.index('.')].count(words[3]) - 1]}"


@pytest.mark.parametrize("kind", KINDS)
def test_an_independent_solver_finds_every_gold_choice(kind):
    for item in OF[kind]:
        answer, gold, other = solve(item), item.choices[item.gold], item.choices[1 - item.gold]
        if isinstance(answer, list):
            assert gold in answer and other not in answer, item
        else:
            assert gold.startswith(answer) and not other.startswith(answer), item


def test_nonce_words_are_many_and_of_one_length():
    import random
    words = probes.nonce(random.Random(0), 1000)
    assert len(set(words)) == 1000 and {len(w) for w in words} == {5}


def test_no_procedural_choice_is_predicted_in_the_first_chunk():
    assert evaluate.constant_share(probes.panel(TOKENIZER, ITEMS, 512, 64), arms.cl(128, 4, BOS, "cl")) == 0
    shortest = min(len(re.findall(r"\w+|\S", item.context)) for item in ITEMS)
    assert shortest >= 16, f"a tokenizer with a token per word would put choices at position {shortest}"


def log_probability(model, context: str, choice: str) -> float:
    ids = [BOS] + TOKENIZER.encode(context) + TOKENIZER.encode(choice)
    n = len(TOKENIZER.encode(choice))
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor([ids]))[0].double(), -1)
    return sum(logp[t - 1, ids[t]].item() for t in range(len(ids) - n, len(ids)))


def test_scores_are_those_of_one_choice_at_a_time():
    model, items = tiny_gpt(sequence_len=256), probes.items(4)
    result = probes.score_probes(model, TOKENIZER, TOKEN_BYTES, items, rows=5)
    assert list(result) == list(KINDS)
    for kind, found in result.items():
        mine = [i for i in items if i.kind == kind]
        logp = [[log_probability(model, i.context, choice) for choice in i.choices] for i in mine]
        bpb = [-row[i.gold] / (np.log(2) * len(i.choices[i.gold])) for i, row in zip(mine, logp)]
        np.testing.assert_allclose([b for b, _ in found["items"]], bpb, rtol=1e-4)
        assert [c for _, c in found["items"]] == [int(np.argmax(row) == i.gold) for i, row in zip(mine, logp)]
        assert found["gold_bpb"] == pytest.approx(np.mean(bpb), rel=1e-4) and found["chance"] == 0.5
        assert found["accuracy"] == np.mean([c for _, c in found["items"]])
        assert found["levels"] == [np.mean([c for (_, c), i in zip(found["items"], mine) if i.level == level]) for level in (0, 1)]
    json.dumps(result, allow_nan=False)


class Fixed(torch.nn.Module):
    """A model of five tokens that gives the same logits at every position."""
    config = type("Config", (), {"sequence_len": 8})
    logits = torch.tensor([0.0, 4.0, 2.0, 1.0, 0.0]).log_softmax(-1)

    def get_device(self):
        return torch.device("cpu")

    def forward(self, x, y=None, loss_reduction="mean"):
        logits = self.logits.expand(*x.shape, 5)
        return logits if y is None else torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1, reduction="none")


class Letters:
    """A tokenizer: BOS is 0, and a to d are 1 to 4."""
    def get_bos_token_id(self):
        return 0

    def encode(self, texts):
        return [["_abcd".index(letter) for letter in text] for text in texts]


def test_each_kind_of_item_is_scored_as_computed_by_hand():
    """log-probabilities of a, b, c, d are 4, 2, 1, 0 less one constant z."""
    z, nats = math.log(math.exp(0) + math.exp(4) + math.exp(2) + math.exp(1) + math.exp(0)), dict(a=4, b=2, c=1, d=0)
    cost = lambda text: sum(z - nats[letter] for letter in text)
    items = [Item("total", "d", ("b", "aab"), 0), Item("per byte", "d", ("b", "aab"), 1, per_byte=True), Item("pair", "", ("db", "ba"), 1),
             Item("contexts", ("a", "dd"), ("b", "b"), 1), Item("greedy", "d", ("aa",), 0), Item("greedy", "d", ("ab",), 0)]
    found = probes.score_probes(Fixed(), Letters(), torch.tensor([0, 1, 1, 1, 1]), items, rows=2)
    for name, accuracy, chance, gold in (("total", 1, .5, "b"), ("per byte", 1, .5, "aab"), ("pair", 1, .5, "ba"), ("contexts", 0, .5, "b")):
        assert (found[name]["accuracy"], found[name]["chance"]) == (accuracy, chance), name  # of equal contexts the first one wins
        assert found[name]["gold_bpb"] == pytest.approx(cost(gold) / len(gold) / math.log(2)), name
    assert cost("aab") / 3 < cost("b") < cost("aab"), "per byte and in total the choices differ"
    assert found["greedy"]["items"] == [[pytest.approx(cost("aa") / 2 / math.log(2)), 1], [pytest.approx(cost("ab") / 2 / math.log(2)), 0]]
    assert (found["greedy"]["accuracy"], found["greedy"]["chance"]) == (0.5, 0)


def test_of_what_exceeds_the_context_the_end_is_kept():
    class Listening(Fixed):
        def forward(self, x, y=None, loss_reduction="mean"):
            read.extend(x.tolist())
            return super().forward(x, y, loss_reduction)

    z, read = math.log(math.exp(0) + math.exp(4) + math.exp(2) + math.exp(1) + math.exp(0)), []
    items = [Item("long", "abcdabcdabcd", ("ab",), 0), Item("longer", "c", ("dddaaaaaaab", "d"), 0)]
    found = probes.score_probes(Listening(), Letters(), torch.tensor([0, 1, 1, 1, 1]), items, rows=1)
    assert [0, 3, 4, 1, 2, 3, 4, 1] in read, "BOS and the last eight letters, of which the last is only asked for"
    assert found["long"]["gold_bpb"] == pytest.approx((2 * z - 4 - 2) / 2 / math.log(2))
    assert found["longer"]["gold_bpb"] == pytest.approx((8 * z - 7 * 4 - 2) / 8 / math.log(2)), "of a choice alone what fits"


def test_a_random_model_is_at_chance():
    result = probes.score_probes(tiny_gpt(sequence_len=256), TOKENIZER, TOKEN_BYTES, probes.items(60), rows=16)
    mean = np.mean([kind["accuracy"] for kind in result.values()])
    assert 0.45 < mean < 0.55, {kind: found["accuracy"] for kind, found in result.items()}  # 720 items: s.d. 0.019 were they independent


def test_a_model_that_learned_a_probe_is_seen_by_it():
    """Trained on the text of fresh items: accuracy must rise from one half and gold bpb fall."""
    torch.manual_seed(0)
    model, learned = tiny_gpt(sequence_len=128, noise=0.02), ("brackets",)
    level_0 = lambda items: [i for i in items if i.kind in learned and i.level == 0]
    seen, items = level_0(probes.items(600, seed=7)), level_0(probes.items(60))
    before = probes.score_probes(model, TOKENIZER, TOKEN_BYTES, items, rows=16)
    texts = [bare(i.context) + i.choices[i.gold] for i in seen]
    panel = evaluate.plan([""] * len(seen), [[BOS] + TOKENIZER.encode(text) for text in texts], rows=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in [panel.batches[i] for _ in range(8) for i in torch.randperm(len(panel.batches))]:
        ids = torch.full((len(batch), len(panel.sequences[batch[0]])), -1)
        for b, i in enumerate(batch):
            ids[b, :len(panel.sequences[i])] = torch.from_numpy(panel.sequences[i])
        model(ids[:, :-1].clamp(min=0), ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    items = [dataclasses.replace(i, context=bare(i.context)) for i in items]
    after = probes.score_probes(model, TOKENIZER, TOKEN_BYTES, items, rows=16)
    for kind in learned:
        assert after[kind]["gold_bpb"] < before[kind]["gold_bpb"] - 0.5, (kind, before[kind]["gold_bpb"], after[kind]["gold_bpb"])
        assert after[kind]["accuracy"] >= 0.9, (kind, after[kind]["accuracy"])

"""
The floor: fluency and basic inference, made up from a seed, mostly of nonce words, so that nothing can be memorised.

Items come in twins: the same words and the same two choices, and a context that makes the one or the other right (`order`: the same two
orders, of which the one is right). Whoever looks at the choices alone (length, frequency) is right on exactly half of the items.
"""
import random
import re
from dataclasses import dataclass

import numpy as np
import torch

from nanochat_cl import accounting, evaluate
from nanochat_cl.seeds import seed_for

LEVELS = 3  # 0 easy, where it can be: the same was just said, again and again; .. 2 hard: distance, steps, or number of things to keep apart
SAID = 6    # times, at level 0
NOUNS = [("man", "men"), ("woman", "women"), ("child", "children"), ("boy", "boys"), ("girl", "girls"), ("king", "kings")]
THINGS = [("name", "names"), ("word", "words"), ("line", "lines"), ("number", "numbers"), ("case", "cases"), ("time", "times")]
NUMBERS = ["one", "two", "three", "four", "five"]
ADJECTIVES, VERBS = ["small", "old", "red", "new", "big", "good"], ["saw", "found", "liked", "helped", "followed"]
# The end of this stands before short contexts, so that no choice falls into the first chunk, which Model-CL routes by a constant.
LEAD_IN = "What follows is one more of the plain sentences that were written down for this list of short examples.".split()
Made = tuple[str, tuple[str, str]]


@dataclass(frozen=True)
class Item:
    """Which choice follows its context? A choice alone: does the model itself go on like that, greedily?"""
    kind: str
    context: str | tuple[str, ...]  # or one of each choice's own
    choices: tuple[str, ...]
    gold: int
    per_byte: bool = False  # compare log-probability per byte (choices of free length), not in total
    level: int | None = None


def nonce(r: random.Random, n: int) -> list[str]:
    """`n` different pronounceable words of five letters; the letters are chosen such that hardly any is English."""
    words: dict[str, None] = {}
    while len(words) < n:
        words["".join(map(r.choice, ("bdfklmnprst", "aeiou", "vzkgp", "aiou", "lmn")))] = None
    return list(words)


# --- makers: (generator, level, flip) -> (context, two choices). choices[flip] is right; both twins draw the same numbers. First fluency.

def agreement(r: random.Random, level: int, flip: bool) -> Made:
    subject, *others = nonce(r, 1 + level)  # `level` nouns of the other number stand between subject and verb
    nouns = [subject + "s" * flip] + [w + "s" * (not flip) for w in others]
    return "The " + " near the ".join(nouns), r.choice([("is", "are"), ("was", "were"), ("has", "have")])

def order(r: random.Random, level: int, flip: bool) -> Made:
    a, b = nonce(r, 2)
    good = ["the", r.choice(ADJECTIVES), a, r.choice(VERBS), "the", b]
    bad, i = list(good), (4, 2, 1)[level]
    bad[i], bad[i + 1] = bad[i + 1], bad[i]
    both = " ".join(good) + ".", " ".join(bad) + "."
    return "They said that", both[::-1] if flip else both

def polarity(r: random.Random, level: int, flip: bool) -> Made:
    if level == 0:
        ask = f"They {('will', 'will not')[flip]} {r.choice(('have', 'need', 'use', 'find', 'change', 'take'))}"
        return " ".join(f"{ask} {('some', 'any')[flip]} {things}." for _, things in r.sample(THINGS, SAID)) + f" {ask}", ("some", "any")
    subject = r.choice([("Somebody", "Nobody"), ("Someone", "No one"), ("All of them", "None of them")])[flip]
    between = "".join(f" near the {w}" for w in nonce(r, level))
    return f"{subject}{between} {r.choice(VERBS)}", r.choice([("something", "anything"), ("someone", "anyone")])

def anaphora(r: random.Random, level: int, flip: bool) -> Made:
    people = [("man", "boy", "king"), ("woman", "girl", "queen"), ("people", "children", "kings")]
    pair = r.sample([(r.choice(who), word) for who, word in zip(people, ("himself", "herself", "themselves"))], 2)
    subject, other = pair[flip][0], pair[not flip][0]
    between = ("", f" near the {other}", f" who {r.choice(VERBS)} the {other} near the {nonce(r, 1)[0]}")[level]
    ask = f"The {subject}{between} {r.choice(VERBS)}"
    return f"{ask} {pair[flip][1]}. " * SAID * (level == 0) + ask, (pair[0][1], pair[1][1])

def determiner(r: random.Random, level: int, flip: bool) -> Made:
    word = r.choice([("this", "these"), ("that", "those"), ("one", "two"), ("every", "many")][:4 if level else 1])[flip]
    return " ".join(["They", r.choice(VERBS), word, *r.sample(ADJECTIVES, level)]), r.choice(NOUNS if level else THINGS)

# Inference at levels 1 and 2; `n` words a side, of which the first ones are asked for. Level 0 is `stated`, but for brackets.

def transitivity(r: random.Random, level: int, flip: bool) -> Made:
    names = nonce(r, 2 * level)
    chain = [names[-1], *names[1:-1], names[0]] if flip else names
    more, less = r.choice([("taller", "shorter"), ("older", "younger"), ("faster", "slower")])
    said = [f"{a} is {more} than {b}." if r.random() < 0.5 else f"{b} is {less} than {a}." for a, b in zip(chain, chain[1:])]
    r.shuffle(said)
    (ask, choices), (x, y) = r.choice([(more, (names[0], names[-1])), (less, (names[-1], names[0]))]), r.sample([names[0], names[-1]], 2)
    return f"We know: {' '.join(said)} Of {x} and {y}, the {ask} one is", choices

def syllogism(r: random.Random, level: int, flip: bool) -> Made:
    words, n = nonce(r, 4 * level), 2 * level
    a, b = words[:n], words[n:]
    if flip:
        a[-1], b[-1] = b[-1], a[-1]
    said = [f"All {x}s are {y}s." for chain in (a, b) for x, y in zip(chain, chain[1:])]
    r.shuffle(said)
    return f"{' '.join(said)} So all {a[0]}s are", (f"{words[n - 1]}s", f"{words[-1]}s")

def if_then(r: random.Random, level: int, flip: bool) -> Made:
    words, n = nonce(r, 4 * level), 2 * level
    said = [f"If it is {a}, then it is {b}." for a, b in zip(words[:n], words[n:])]
    r.shuffle(said)
    return f"{' '.join(said)} It is {words[flip]}, so it is", (words[n], words[n + 1])

def negation(r: random.Random, level: int, flip: bool) -> Made:
    a, b, *others = nonce(r, 4 * level - 2)
    aside = "".join(f" The {x} is {y}." for x, y in zip(others[::2], others[1::2]))
    return f"The box is {' or '.join(r.sample([a, b], 2))}.{aside} The box is {'not ' * flip}{a}, so it is", (a, b)

def copying(r: random.Random, level: int, flip: bool) -> Made:
    words = nonce(r, 3 * level)
    at, later = r.randrange(1, len(words) - 1), r.randrange(2)  # of the two that the twins swap, the first or the second is asked for
    pair = words[at], words[at + 1]
    words[at:at + 2] = pair[::-1] if flip else pair
    return f"Say {' '.join(words)}. Again, say {' '.join(words[:at + later])}", pair[::-1] if later else pair

def induction(r: random.Random, level: int, flip: bool) -> Made:
    words, n = nonce(r, 4 * level), 2 * level
    pairs = [f"{a} {b}" for a, b in zip(words[:n], words[n:])]
    r.shuffle(pairs)
    return f"The pairs are {', '.join(pairs)}, {words[flip]}", (words[n], words[n + 1])

def brackets(r: random.Random, level: int, flip: bool) -> Made:
    a, b, c = r.sample(["()", "[]", "{}"], 3)
    x, y = (b, a) if flip else (a, b)   # x is still open
    closed = (x, y, c)[r.randrange(3)]
    pending = (closed + x[0], x[0] + closed, x[0] + c[0] + closed + c[1])[level]
    shown = r.sample([a[0] + b + a[1], b[0] + a + b[1]], 2)
    return f"Closed brackets: {' '.join(''.join(shown) + pending)}", (a[1], b[1])

def counting(r: random.Random, level: int, flip: bool) -> Made:
    low, word = r.randint(1, 2 * level), nonce(r, 1)[0]
    numbers = r.sample([low, low + 5 - 2 * level], 2)
    return f"Here we see {' and '.join([word] * numbers[flip])}. The number of {word}s is", (NUMBERS[numbers[0] - 1], NUMBERS[numbers[1] - 1])

def membership(r: random.Random, level: int, flip: bool) -> Made:
    (a, b), words, n = r.sample(ADJECTIVES, 2), nonce(r, 4 * level - 2), 2 * level - 1
    said = " ".join(f"The {box} box holds {' and '.join(mine)}." for box, mine in ((a, words[:n]), (b, words[n:])))
    return f"{said} So {words[r.randrange(n) + n * flip]} is in the", (f"{a} box", f"{b} box")


FLUENCY = (agreement, order, polarity, anaphora, determiner)
INFERENCE = (transitivity, syllogism, if_then, negation, copying, induction, brackets, counting, membership)
KINDS = {make.__name__: make for make in FLUENCY + INFERENCE}
# What is said, what is asked, and a choice: {} is one of two words, {a} another one.
STATED = {"transitivity": ("{a} is taller than {}.", "{a} is taller than", "{}"), "syllogism": ("All {a}s are {}s.", "So all {a}s are", "{}s"),
          "if_then": ("If it is {a}, then it is {}.", "It is {a}, so it is", "{}"), "negation": ("The box is {}.", "So the box is", "{}"),
          "copying": ("{}", "{}", "{}"), "induction": ("{a} {},", "{a}", "{}"), "counting": ("Here we see {} {a}s.", "Here we see", "{}"),
          "membership": ("The {} box holds {a}.", "So {a} is in the", "{} box")}


def stated(kind: str, r: random.Random, flip: bool) -> Made:
    """Level 0 of inference: nothing but the answer is said."""
    (said, asked, choice), (a, *pair), low = STATED[kind], nonce(r, 3), r.randrange(1, 4)
    pair = NUMBERS[low:low + 2] if kind == "counting" else pair
    return " ".join([said.format(pair[flip], a=a)] * SAID + [asked.format(pair[flip], a=a)]), (choice.format(pair[0]), choice.format(pair[1]))


def items(per_kind: int, seed: int = 0) -> list[Item]:
    """`per_kind` items (rounded up to whole twins) of each kind, levels in turn; fewer items of the same seed are the first of them."""
    made = []
    for kind, make in KINDS.items():
        for i in range(per_kind + per_kind % 2):
            r, level, flip = random.Random(seed_for(seed, f"probe/{kind}/{i // 2}")), i // 2 % LEVELS, i % 2 == 1
            context, choices = make(r, level, flip) if level or kind not in STATED else stated(kind, r, flip)
            missing = accounting.FIRST_CHUNK - len(re.findall(r"\w+|[^\w\s]", context))  # a word or a mark is a token at least
            context = " ".join(LEAD_IN[-missing:] + [context]) if missing > 0 else context
            made.append(Item(kind, context, tuple(f" {choice}" for choice in choices), i % 2, level=level))
    return made


def panel(tokenizer, items: list[Item], seq_len: int, rows: int) -> evaluate.Panel:
    """Every choice of every item in turn, after BOS and its context; scored is the choice. Of more than `seq_len` tokens the end is kept."""
    contexts = (item.context if isinstance(item.context, tuple) else (item.context,) * len(item.choices) for item in items)
    pairs = [pair for item, own in zip(items, contexts) for pair in zip(own, item.choices)]
    ids = dict(zip(texts := sorted({text for pair in pairs for text in pair}), tokenizer.encode(texts)))
    sequences = [[tokenizer.get_bos_token_id(), *(ids[context] + ids[choice])[-seq_len:]] for context, choice in pairs]
    first = [max(len(sequence) - len(ids[choice]), 1) for sequence, (_, choice) in zip(sequences, pairs)]
    return evaluate.plan([choice for _, choice in pairs], sequences, rows, first)


def score_probes(model: torch.nn.Module, tokenizer, token_bytes: torch.Tensor, items: list[Item], rows: int) -> dict[str, dict]:
    """
    {kind: {"accuracy", "gold_bpb", "chance", "levels": accuracies, "items": [[gold_bpb, correct], ...]}}: bits per byte of the right choice
    given its context (mean over items), how often it is the likeliest, at each level (where items have one), and would be by chance.
    """
    asked = {}
    for greedy in (False, True):
        mine = [item for item in items if (len(item.choices) == 1) == greedy]
        scores = evaluate.score(model, panel(tokenizer, mine, model.config.sequence_len, rows), token_bytes, greedy)
        for item, end in zip(mine, np.cumsum([len(item.choices) for item in mine], dtype=int)):
            nats, size, *missed = scores[end - len(item.choices):end].T
            right = missed[0][0] == 0 if greedy else np.argmin(nats / size if item.per_byte else nats) == item.gold
            asked.setdefault(item.kind, []).append((evaluate.bpb(nats[item.gold], size[item.gold]), int(right),
                                                    0.0 if greedy else 1 / len(item.choices)))
    result = {}
    for kind, found in asked.items():
        (gold_bpb, accuracy, chance), levels = map(float, np.mean(found, axis=0)), [item.level for item in items if item.kind == kind]
        result[kind] = {"accuracy": accuracy, "gold_bpb": gold_bpb, "chance": chance, "items": [list(item[:2]) for item in found]}
        if None not in levels:
            result[kind]["levels"] = [float(np.mean([right for (_, right, _), at in zip(found, levels) if at == level]))
                                      for level in sorted(set(levels))]
    return result

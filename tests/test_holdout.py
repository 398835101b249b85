import random

from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_cl.holdout import NEAR, WORD, Overlap, split_of


def test_classes_depend_on_the_key_alone_and_hold_five_percent_each():
    classes = [split_of(f"package/module_{i}") for i in range(40_000)]
    assert classes == [split_of(f"package/module_{i}") for i in range(40_000)]
    for name in ("val", "test"):
        assert abs(classes.count(name) / 40_000 - 0.05) < 0.005, classes.count(name)
    # python -c "from nanochat_cl.holdout import split_of; print([i for i in range(60) if split_of(str(i)) != 'train'])": another hash
    # would move held-out documents of existing corpora into training
    assert [i for i in range(60) if split_of(str(i)) != "train"] == [7, 20, 25, 45]


def slow_grams(text):
    words = WORD.findall(text.lower())
    n = min(13, len(words))
    return {tuple(words[i:i + n]) for i in range(len(words) - n + 1)} if words else set()


def slow_share(text, held_out):
    own, others = slow_grams(text), [slow_grams(t) for t in held_out]
    if not own:
        return 0.0
    return max(len(own & set().union(*others)) / len(own), *(len(own & other) / max(1, len(other)) for other in others))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9))
def test_share_is_what_sets_of_word_tuples_give(seed):
    r = random.Random(seed)
    words = ["Fish", "na\u00efve", "x_1", "42", "\u4e2d\u6587", "a", "the"] + [f"w{i}" for i in range(30)]
    text = lambda n: r.choice([" ", ", ", "\n  "]).join(r.choice(words) for _ in range(n))
    held_out = [text(r.randint(0, 60)) for _ in range(r.randint(1, 5))]
    copied = r.choice(held_out)
    candidate = r.choice([text(r.randint(0, 60)), copied.upper(), copied + " " + text(40), text(20) + " " + copied[:len(copied) // 2]])
    shares = Overlap({"first": held_out, "second": held_out[:1], "none": []}).of([candidate])[0]
    assert abs(shares - [slow_share(candidate, held_out), slow_share(candidate, held_out[:1]), 0]).max() < 1e-12, shares


def test_in_scripts_without_spaces_every_character_is_a_word():
    assert WORD.findall("Ein na\u00efver x_1-Test, \ud55c\uad6d\uc5b4 \u0440\u0443\u0441\u0441\u043a\u0438\u0439") == ["Ein", "na\u00efver", "x_1", "Test", "\ud55c\uad6d\uc5b4", "\u0440\u0443\u0441\u0441\u043a\u0438\u0439"]
    assert WORD.findall("\u4f7f\u7528Python\u7f16\u7a0b\u3002\u304b\u306a\u0e44\u0e17\u0e22") == ["\u4f7f", "\u7528", "Python", "\u7f16", "\u7a0b", "\u304b", "\u306a", "\u0e44", "\u0e17", "\u0e22"]
    r = random.Random(2)
    chinese = lambda n: "".join(chr(r.randrange(0x4e00, 0x5200)) for _ in range(n))
    original, changed = chinese(400), None
    changed = "".join(c if i % 60 else "\u9f98" for i, c in enumerate(original))  # one in sixty, and no space anywhere
    assert Overlap({"a": [original]}).of([changed])[0, 0] > NEAR > 0.05 > Overlap({"a": [original]}).of([chinese(400)])[0, 0]


def test_copies_with_changes_are_near_and_a_shared_licence_line_is_not():
    r = random.Random(1)
    fresh = lambda n: " ".join(f"word{r.randrange(5000)}" for _ in range(n))
    licence = "permission is hereby granted free of charge to any person obtaining a copy of this software and associated files "
    original = licence + fresh(300)
    held_out = Overlap({"held": [original, licence + fresh(200)]})
    share = lambda text: held_out.of([text])[0, 0]
    words = original.split()
    for i in range(0, len(words), 60):
        words[i] = "changed"
    assert share(" ".join(words)) > NEAR
    assert share(fresh(3000) + " " + original) > NEAR, "a long text that holds a held-out document whole"
    assert 0 < share(licence + fresh(300)) < 0.1
    assert share(fresh(300)) == 0 and share("") == 0 and Overlap({"none": []}).of([original])[0, 0] == 0


def test_any_number_of_workers_finds_the_same_shares():
    r = random.Random(2)
    texts = [" ".join(f"w{r.randrange(40)}" for _ in range(40)) for _ in range(300)]
    alone, four = (Overlap({"a": texts[:200], "b": texts[250:]}, workers).of(texts) for workers in (1, 4))
    assert (alone == four).all() and (alone[:200, 0] == 1).all() and (alone[200:250] < 1).all()


def test_which_class_is_which_is_pinned():
    """Another hash would train on what was held out so far."""
    assert {i: split_of(str(i)) for i in range(60) if split_of(str(i)) != "train"} == {7: "val", 20: "val", 25: "val", 45: "test"}

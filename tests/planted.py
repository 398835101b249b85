"""Small folders of installed packages and of domain text: copies of held-out documents have been planted among the training documents."""
import random
from pathlib import Path

from nanochat_cl.holdout import digest, split_of

KEPT, SECRET = "keptword", "secretword"  # in every ordinary training document; in every held-out document and its copies


def sentences(r: random.Random, words: int) -> str:
    consonants, vowels = "bcdfgklmnprst", "aeiou"
    word = lambda: f"{r.choice(consonants)}{r.choice(vowels)}{r.choice(consonants)}{r.choice(vowels)}{r.randrange(30)}"
    return " ".join(word() for _ in range(words))


def changed(text: str, every: int = 30) -> str:
    words = text.split()
    words[::every] = ["changed"] * len(words[::every])
    return " ".join(words)


def module(doc: str, code: str) -> str:
    return f'"""\n{doc}\n"""\n# a comment\nWORDS = [1, 2, 3]\n\n\ndef f(a):\n    return a\n' + code


def site_packages(root: Path, packages: int = 6, modules: int = 40) -> Path:
    """Packages p0, p1, ...; a module whose key is held out says SECRET in docstring and code; three training modules copy them."""
    r = random.Random(0)
    training, held = [], []
    for package in range(packages):
        for number in range(modules):
            key = f"p{package}/m{number}"
            word = KEPT if split_of(key) == "train" else SECRET
            doc = f"{word} {sentences(r, 60)} {word}"
            code = "".join(f"{word}_{i} = '{sentences(r, 1)}' + f({r.randrange(9**6)}) ** {i}\n" for i in range(30))
            (training if word == KEPT else held).append((key, doc, code))
    held.sort(key=lambda d: split_of(d[0]))
    assert {split_of(k) for k, _, _ in (held[0], held[-1])} == {"val", "test"}
    for i, (_, doc, code) in enumerate((held[0], held[-1])):
        training[3 * i] = (training[3 * i][0], doc, code)                                                                  # exact
        training[3 * i + 1] = (training[3 * i + 1][0], changed(doc), code.replace("_7 =", "_77 ="))                        # with changes
        longer = "".join(f"x{j} = {j}\n" for j in range(900)) + code
        training[3 * i + 2] = (training[3 * i + 2][0], f"{sentences(r, 900)} {doc}", longer)                       # inside a longer one
    for key, doc, code in training + held:
        path = root / f"{key}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(module(doc, code))
    (root / "p0" / "tests").mkdir(exist_ok=True)
    (root / "p0" / "tests" / "test_m.py").write_text(module("testonly " + sentences(r, 60), "testonly = 1\n" * 40))
    return root


def text_folder(root: Path, general: Path, documents: int = 60) -> None:
    """Two sub-domains of text files under `root`; near copies of held-out ones are in `root` and, with ordinary text, in `general`."""
    r = random.Random(1)
    near = []
    for name in ("law", "med"):
        (root / name).mkdir(parents=True)
        for i in range(documents):
            word, split = (KEPT, "train") if i % 8 else (SECRET, ("val", "test")[i // 8 % 2])
            text = next(t for t in iter(lambda: f"{word} {sentences(r, 60)}", None) if split_of(digest(t)) == split)
            (root / name / f"{i}.txt").write_text(text)
            if word == SECRET:
                near += [n for n in (f"{changed(text, every)} {SECRET}" for every in (25, 30, 35)) if split_of(digest(n)) == "train"]
    assert len(near) >= 3
    for i, text in enumerate(near):
        (root / "law" / f"near{i}.txt").write_text(text)
    general.mkdir()
    for i in range(120):
        (general / f"{i}.txt").write_text(f"general {sentences(r, 60)}")
    for i, text in enumerate(near):
        (general / f"near{i}.txt").write_text(f"{text} and more")

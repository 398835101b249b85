"""Real text, where it is at hand: a slice of it goes all the way to batches, and nothing that is held out is in what is trained on."""
import hashlib
import re
import shutil
import sys
from pathlib import Path

import pytest
from test_corpus import read, run, use

from nanochat_cl import domain, files, tokenizer
from nanochat_cl.stream import Stream

DATA = Path(__file__).parents[2] / "shared" / "data"
pytestmark = pytest.mark.skipif(not all((DATA / name).is_dir() for name in ("general", "medical", "eval", "medical_qa")),
                                reason="the study data is not here")
NAMES = ["trials_oncology", "molecular_genetics_research", "textbook_pharmacology", "qa_cancer", "qa_neurology"]  # as `given`


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base directory made by the three stages, from a part of the general text, five sub-domains and some evaluation items."""
    place = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tests"])
        base = use(place / "base", patch)
        for kind, path in (("floor", DATA / "eval" / "piqa.jsonl"), ("questions", DATA / "medical_qa" / "pubmedqa_labelled.jsonl")):
            (base / "eval" / kind).mkdir(parents=True)
            shutil.copy(path, base / "eval" / kind)
        run("--source", f"files:{DATA}/general/shard_00000.parquet", "--tokens", "4e5")
        sources = [{"source": f"files:{DATA}/medical/{name}.parquet", **({"key": "source"} if name in NAMES[:2] else {})} for name in NAMES]
        files.write_json(place / "medical.json", {"description": "a slice", "order": "given", "sources": sources})
        domain.build(domain.parse(["--domain", str(place / "medical.json"), "--subdomain-mb", "0.8", "--workers", "1"]))
        tokenizer.train(tokenizer.parse(["--vocab-size", "1024", "--max-chars", "1000000"]))
        yield base


def texts(base, name, *classes):
    return [d["text"] for c in classes for d in read(base / "corpora" / name / f"{c}.parquet")]


def trained_on(base):
    general = [d["text"] for path in sorted((base / "base_data_climbmix").glob("*.parquet"))[:-1] for d in read(path)]
    return general + texts(base, "medical", "train")


def grams(text):
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i:i + 13]) for i in range(len(words) - 12)}


def test_what_is_held_out_is_in_nothing_that_is_trained_on(base):
    training, held = trained_on(base), texts(base, "general", "val", "test") + texts(base, "medical", "val", "test")
    assert len(training) > 700 and len(held) > 100, (len(training), len(held))
    hashes = [{hashlib.md5(" ".join(text.split()).encode()).digest() for text in group} for group in (training, held)]
    assert not hashes[0] & hashes[1]
    where = {}
    for i, text in enumerate(held):
        for gram in grams(text):
            where.setdefault(gram, []).append(i)
    for text in training:
        own = grams(text)
        common = [where[gram] for gram in own if gram in where]
        assert len(common) < 0.4 * max(1, len(own)), f"{len(common)} of {len(own)} 13-grams are held out: {text[:200]}"
        for i in {i for owners in common for i in owners}:
            inside = sum(i in owners for owners in common)
            assert inside < 0.4 * len(grams(held[i])), f"holds {inside} 13-grams of a held-out document: {text[:200]}"


def test_classes_are_disjoint_and_pieces_of_one_article_are_in_the_same(base):
    rows = {c: read(base / "corpora" / "medical" / f"{c}.parquet") for c in ("train", "val", "test")}
    keys = {c: {(d["subdomain"], d["key"]) for d in found} for c, found in rows.items()}
    assert len(set.union(*keys.values())) == sum(map(len, keys.values())) and min(map(len, keys.values())) > 10
    assert list(dict.fromkeys(d["subdomain"] for d in rows["train"])) == NAMES
    source = {" ".join(d["text"].split()): d["source"] for name in NAMES[:2] for d in read(DATA / "medical" / f"{name}.parquet")}
    articles = {c: {source[" ".join(d["text"].split())] for d in found if d["subdomain"] in NAMES[:2]} for c, found in rows.items()}
    assert not articles["train"] & (articles["val"] | articles["test"]) and not articles["val"] & articles["test"] and articles["val"]


def test_the_stream_holds_the_training_documents_in_their_order_and_nothing_else(base, monkeypatch):
    use(base, monkeypatch)
    vocabulary = tokenizer.load("cpu")[0]
    stream = Stream(base / "corpora" / "medical", vocabulary, "sequential", 42, 4, 256, 4096)
    bos, found = vocabulary.get_bos_token_id(), {}
    for step in range(stream.total_tokens // 1024):
        batch = stream.batch(step)
        for name, row in zip(batch.subdomains, batch.targets.tolist()):
            found.setdefault(name, []).extend(row)
    train = read(base / "corpora" / "medical" / "train.parquet")
    documents = {name: [d["text"] for d in train if d["subdomain"] == name] for name in NAMES}
    assert list(found) == NAMES and stream.total_tokens > 5e5
    for name, tokens in found.items():
        ends = [i for i, token in enumerate(tokens) if token == bos][1:]
        streamed = [vocabulary.decode(tokens[a + 1:b]) for a, b in zip([0, *ends], ends)]
        assert streamed == documents[name][:len(streamed)] and len(streamed) >= len(documents[name]) - 5, name

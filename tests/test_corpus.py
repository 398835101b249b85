import itertools
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from planted import KEPT, SECRET, changed, sentences, site_packages

from nanochat_cl import corpus, files
from nanochat_cl.command import UserError
from nanochat_cl.holdout import split_of
from nanochat_cl.sources import Document


@pytest.fixture
def base(tmp_path, monkeypatch):
    return use(tmp_path / "base", monkeypatch)


def use(base, monkeypatch):
    from nanochat import dataset
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.setattr(dataset, "DATA_DIR", str(base / "base_data_climbmix"))
    return base


def trained_text(steps, split="train", rows=4, length=3000):
    """What upstream's own loader hands to Phase A, as text."""
    from nanochat import dataset
    from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit as loader
    from nanochat.tokenizer import RustBPETokenizer
    tokenizer = RustBPETokenizer.train_from_iterator(itertools.chain(*dataset.parquets_iter_batched("train")), 400)
    batches = loader(tokenizer, rows, length, split, device="cpu", buffer_size=16)
    return "".join(tokenizer.decode(row) for _ in range(steps) for row in next(batches)[0].tolist())


def run(*flags):
    corpus.build(corpus.parse(["--docs-per-shard", "32", "--workers", "1", *flags]))


def read(path):
    return pq.read_table(path).to_pylist()


def test_a_held_out_module_reaches_no_batch_of_phase_a_in_no_disguise(base, tmp_path, capsys):
    run("--packages", str(site_packages(tmp_path / "site")))
    held = {d["key"]: d["text"] for c in ("val", "test") for d in read(base / "corpora" / "general" / f"{c}.parquet")}
    assert len(held) > 10 and all(text.startswith(SECRET) for text in held.values())
    manifest = files.read_json(base / "base_data_climbmix" / "corpus.json")
    assert manifest["dropped"] == {"near_general": 6, "exact": 0} and "'near_general': 6" in capsys.readouterr().out
    text = trained_text(16)
    documents = read_all_train(base)
    assert text.count(KEPT) > 2 * len(documents), "more than one pass over the training documents"
    assert all(d["text"][:60] in text for d in documents[::7])
    assert SECRET not in text and "testonly" not in text
    assert SECRET in trained_text(1, "val"), "the planted word can be seen where it belongs"


def read_all_train(base):
    return [d for path in sorted((base / "base_data_climbmix").glob("*.parquet"))[:-1] for d in read(path)]


def test_shards_have_nanochats_layout_and_the_last_one_is_the_val_class(base, tmp_path):
    from nanochat import dataset
    run("--packages", str(site_packages(tmp_path / "site")))
    paths = dataset.list_parquet_files()
    assert [Path(p).name for p in paths] == [f"shard_{i:05d}.parquet" for i in range(len(paths))] and len(paths) >= 6
    assert [d["key"] for d in read(paths[-1])] == [d["key"] for d in read(base / "corpora" / "general" / "val.parquet")]
    for path in paths[:-1]:
        metadata = pq.read_metadata(path)
        assert metadata.schema.names == ["text", "subdomain", "key"] and metadata.row_group(0).column(0).compression == "ZSTD"
        assert metadata.num_row_groups >= 8, "a row group for each of 8 ranks"
    manifest = files.read_json(base / "base_data_climbmix" / "corpus.json")
    assert manifest["documents"]["train"] == len(read_all_train(base)) and set(manifest["files"]) == {Path(p).name for p in paths}


def test_the_same_packages_give_the_same_bytes_whoever_works_on_them(tmp_path, monkeypatch):
    site = site_packages(tmp_path / "site")
    content = []
    for name, workers in (("one", "1"), ("two", "2")):
        base = use(tmp_path / name, monkeypatch)
        run("--packages", str(site), "--workers", workers)
        content.append({p.relative_to(base): p.read_bytes() for p in sorted(base.rglob("*")) if p.is_file()})
    assert content[0] == content[1] and len(content[0]) > 8


def lines(path, documents=400):
    import random
    r = random.Random(3)
    path.mkdir(exist_ok=True)
    texts = [sentences(r, 40) for _ in range(documents)]
    (path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts + texts[:50]))
    return f"files:{path}/*.jsonl"


def test_of_copies_among_the_held_out_documents_one_is_kept():
    keys = [next(k for k in (f"{name}{i}" for i in range(999)) if split_of(k) == split) for name, split in zip("abcd", ("val", "val", "test", "test"))]
    documents = [Document(text, "s", key) for text, key in zip(("?! ...", "one two", "?! ...", "three four"), keys)]  # "?! ..." has no word to compare
    held = corpus.held_out([*documents, documents[1]], float("inf"), skipped := {}, 1)
    assert {c: [d.text for d in found] for c, found in held.items()} == {"val": ["?! ...", "one two"], "test": ["three four"]}
    assert skipped == {corpus.COPIES: [keys[2], keys[1]]}


def test_a_test_document_near_to_a_val_document_is_left_out():
    import random
    r, key = random.Random(7), lambda split: next(k for k in map(str, range(999)) if split_of(k) == split)
    near, other = changed(text := sentences(r, 60)), sentences(r, 60)
    held = corpus.held_out([Document(text, "s", key("val")), Document(near, "s", key("test")), Document(other, "s", key("test"))], 10**6, skipped := {}, 1)
    assert skipped == {corpus.COPIES: [key("test")]} and [d.text for d in held["test"]] == [other] and [d.text for d in held["val"]] == [text]


def test_the_beginning_of_the_source_gives_as_much_held_out_text_as_is_asked_for(base, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "HELD_OUT_BYTES", 1000)
    run("--source", lines(tmp_path / "text"))
    for c in ("val", "test"):
        sizes = [len(d["text"]) for d in read(base / "corpora" / "general" / f"{c}.parquet")]
        assert sum(sizes) >= 1000 > sum(sizes[:-1]), sizes


def test_the_limit_of_what_is_held_out_is_in_bytes_and_ends_the_reading(tmp_path):
    read = []
    documents = (read.append(i) or Document(f"\u4e2d\u6587 {i:05d}", "s", f"k{i}") for i in range(99_999))  # 12 bytes, 8 characters
    held = corpus.held_out(documents, 120, {}, 1)
    assert {c: len(found) for c, found in held.items()} == {"val": 10, "test": 10} and len(read) < 999


def test_a_build_that_died_continues_to_the_same_shards(tmp_path, monkeypatch):
    source = lines(tmp_path / "text")
    whole = use(tmp_path / "whole", monkeypatch)
    run("--source", source)
    died = use(tmp_path / "died", monkeypatch)
    write, written = corpus.write_parquet, []

    def failing(path, documents):
        if len(written) == 7:  # val, test and five shards
            raise KeyboardInterrupt
        written.append(path)
        return write(path, documents)

    monkeypatch.setattr(corpus, "write_parquet", failing)
    with pytest.raises(KeyboardInterrupt):
        run("--source", source)
    (died / "base_data_climbmix" / "shard_00005.parquet").write_bytes(b"written, not yet noted")
    stamp = (died / "base_data_climbmix" / "shard_00002.parquet").stat().st_mtime_ns
    monkeypatch.setattr(corpus, "write_parquet", write)
    run("--source", source)
    assert (died / "base_data_climbmix" / "shard_00002.parquet").stat().st_mtime_ns == stamp, "what was complete is kept"
    made = [{p.name: p.read_bytes() for p in base.rglob("*.*") if p.is_file()} for base in (whole, died)]
    assert made[0] == made[1]
    assert files.read_json(died / "base_data_climbmix" / "corpus.json")["dropped"]["exact"] > 30


def test_what_is_complete_is_skipped_and_what_differs_or_is_foreign_is_refused(base, tmp_path, capsys):
    source = lines(tmp_path / "text")
    run("--source", source, "--tokens", "2000")
    before = {p: p.stat().st_mtime_ns for p in base.rglob("*.parquet")}
    capsys.readouterr()
    run("--source", source, "--tokens", "2000")
    assert capsys.readouterr().out.count("\n") == 1 and before == {p: p.stat().st_mtime_ns for p in base.rglob("*.parquet")}
    assert 2000 * corpus.BYTES_PER_TOKEN <= files.read_json(base / "base_data_climbmix" / "corpus.json")["bytes"] < 25_000
    with pytest.raises(UserError, match=r"tokens: 2000\.0 -> null\); delete the folder"):
        run("--source", source)
    held = base / "corpora" / "general" / "test.parquet"
    whole = held.read_bytes()
    held.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="general/test.parquet is damaged.*; delete .*base_data_climbmix and run"):
        run("--source", source, "--tokens", "2000")
    held.write_bytes(whole)
    shard = base / "base_data_climbmix" / "shard_00001.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:99] + bytes([whole[99] ^ 1]) + whole[100:])
    with pytest.raises(UserError, match="shard_00001.parquet is damaged, missing or not ours: its sha256 .*; delete .*base_data_climbmix and run") as e:
        run("--source", source, "--tokens", "2000")
    assert "\n" not in str(e.value)
    (base / "base_data_climbmix" / "corpus.json").unlink()
    with pytest.raises(UserError, match="not ours"):
        run("--source", source)


@pytest.mark.parametrize("content, message", [
    ({}, "no files match"), ({"a.txt": b"one lonely document"}, "too few documents"),
    ({"a.txt": b"\xff\xfe", "b.md": b""}, "1 unreadable from there on .a.txt:1: .*; 1 without text .b.md:1.")])
def test_a_corpus_of_nothing_is_one_line_and_leaves_nothing_behind(base, tmp_path, content, message):
    (tmp_path / "text").mkdir()
    for name, data in content.items():
        (tmp_path / "text" / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as e:
        run("--source", f"files:{tmp_path / 'text'}")
    assert "\n" not in str(e.value) and not list(base.rglob("*.*"))

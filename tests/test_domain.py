import json
import random
import shutil
from collections import Counter

import pytest
from matplotlib.figure import Figure
from planted import KEPT, SECRET, sentences, site_packages, text_folder
from test_corpus import read, read_all_train, trained_text, use
from test_corpus import run as make_corpus
from test_stream import T, Words

from nanochat_cl import corpus, domain, files, stream, tokenizer
from nanochat_cl.command import UserError
from nanochat_cl.holdout import Overlap, digest, split_of
from nanochat_cl.sources import Document, checksums


@pytest.fixture
def base(tmp_path, monkeypatch):
    return use(tmp_path / "base", monkeypatch)


@pytest.fixture
def site(tmp_path):
    return site_packages(tmp_path / "site")


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """A folder of recipes with one of our own: adding a domain is one small file."""
    monkeypatch.setattr(domain, "RECIPES", tmp_path / "recipes")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "planted.json").write_text(json.dumps({"order": "name", "sources": [
        {"source": "embedded", "most": 6, "packages": ["absent", *(f"p{i}" for i in range(6))]}]}))


def run(name, *flags):
    domain.build(domain.parse(["--domain", name, "--workers", "1", *flags]))


def streamed_text(folder):
    s = stream.Stream(folder, Words(), "cyclic", 1, 2, T, 8 * T, repeat=True)
    return "".join(chr(t) for step in range(s.total_tokens // T // 2 + 1) for row in s.batch(step).targets.tolist() for t in row)


def test_a_held_out_module_reaches_no_batch_of_phase_b_in_no_disguise_and_is_the_one_held_out_as_prose(base, site, recipes, capsys):
    make_corpus("--packages", str(site))
    run("planted", "--packages", str(site))
    folder = base / "corpora" / "planted"
    text = streamed_text(folder)
    assert text.count(KEPT) > 2000 and SECRET not in text and "testonly" not in text and '"""' not in text and "# a comment" not in text
    for c in ("val", "test"):
        code, prose = ({d["key"] for d in read(base / "corpora" / name / f"{c}.parquet")} for name in ("planted", "general"))
        assert code == prose and len(code) > 4
        for d in read(folder / f"{c}.parquet"):
            assert split_of(d["key"]) == c and SECRET in d["text"] and d["subdomain"] == d["key"].split("/")[0]
    manifest = files.read_json(folder / "corpus.json")
    assert manifest["dropped"] == {"near_domain": 6, "near_general": 0, "near_evaluation": 0, "exact": 0}
    out = capsys.readouterr().out
    assert sorted(line.split()[0] for line in out.splitlines() if line.startswith("p")) == [f"p{i}" for i in range(6)]


def test_copies_of_held_out_domain_documents_are_taken_out_of_both_phases(base, tmp_path, capsys):
    text_folder(tmp_path / "company", tmp_path / "web")
    make_corpus("--source", f"files:{tmp_path / 'web'}")
    assert SECRET in trained_text(4), "planted"
    run(f"files:{tmp_path / 'company'}")
    folder = base / "corpora" / "company"
    text = streamed_text(folder)
    assert text.count(KEPT) > 90 and SECRET not in text
    assert SECRET not in trained_text(16) and "general " in trained_text(4)
    manifest, general = files.read_json(folder / "corpus.json"), files.read_json(base / "base_data_climbmix" / "corpus.json")
    assert set(manifest["subdomains"]) == {"law", "med"}
    assert manifest["general_pruned"]["near_domain"] == general["dropped"]["near_domain"] >= 3
    assert general["documents"]["train"] == len(read_all_train(base)) and manifest["general_files"] == general["files"]
    assert f"from the general corpus {manifest['general_pruned']}" in capsys.readouterr().out

    run(f"files:{tmp_path / 'company'}")
    assert capsys.readouterr().out.count("\n") == 1, "complete: one line"
    whole = (folder / "val.parquet").read_bytes()
    (folder / "val.parquet").write_bytes(whole + b".")
    with pytest.raises(UserError, match="company/val.parquet is damaged, missing or not ours.*; delete .*company and run"):
        run(f"files:{tmp_path / 'company'}")
    (folder / "val.parquet").write_bytes(whole)
    shutil.rmtree(base / "base_data_climbmix")
    make_corpus("--source", f"files:{tmp_path / 'web'}")
    run(f"files:{tmp_path / 'company'}")
    assert SECRET not in trained_text(16), "a general corpus made again is compared again"


def test_a_stop_while_the_general_corpus_is_changed_leaves_it_sound_and_the_same_command_ends_it(base, tmp_path, monkeypatch):
    text_folder(tmp_path / "company", tmp_path / "web")
    make_corpus("--source", f"files:{tmp_path / 'web'}")
    write = corpus.write_parquet

    def failing(path, documents):
        write(path, documents)
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "write_parquet", failing)
    with pytest.raises(KeyboardInterrupt):
        run(f"files:{tmp_path / 'company'}")
    monkeypatch.setattr(corpus, "write_parquet", write)
    make_corpus("--source", f"files:{tmp_path / 'web'}")
    run(f"files:{tmp_path / 'company'}")
    assert SECRET not in trained_text(16)
    general = files.read_json(base / "base_data_climbmix" / "corpus.json")
    assert general["files"] == checksums(base / "base_data_climbmix") and general["documents"]["train"] == len(read_all_train(base))


def test_what_another_general_corpus_holds_out_leaves_the_domain_that_was_there_before_it(base, tmp_path):
    text_folder(tmp_path / "company", tmp_path / "web")
    make_corpus("--source", f"files:{tmp_path / 'web'}")
    run(f"files:{tmp_path / 'company'}")
    folder = base / "corpora" / "company"
    copied, dropped = read(folder / "train.parquet")[0]["text"], files.read_json(folder / "corpus.json")["dropped"]
    longer = next(text for text in (f"{copied} {i}" for i in range(999)) if split_of(digest(text)) == "val")
    (tmp_path / "web" / "copy.txt").write_text(longer)
    shutil.rmtree(base / "base_data_climbmix")
    make_corpus("--source", f"files:{tmp_path / 'web'}")
    run(f"files:{tmp_path / 'company'}")
    assert copied not in [d["text"] for d in read(folder / "train.parquet")]
    assert files.read_json(folder / "corpus.json")["dropped"] == {
        **dropped, "near_general": dropped["near_general"] + 1}


def test_the_same_files_give_the_same_domain(tmp_path, site, recipes, monkeypatch):
    made = []
    for name in ("one", "two"):
        base = use(tmp_path / name, monkeypatch)
        make_corpus("--packages", str(site))
        run("planted", "--packages", str(site))
        made.append({p.name: p.read_bytes() for p in (base / "corpora" / "planted").iterdir()})
    assert made[0] == made[1] and set(made[0]) == {"train.parquet", "val.parquet", "test.parquet", "corpus.json"}


def test_a_subdomain_is_cut_at_its_limit_and_one_too_small_for_all_classes_is_named(base, tmp_path):
    r = random.Random(5)
    (tmp_path / "d").mkdir()
    for name, n in (("big", 400), ("small", 3)):
        (tmp_path / "d" / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": sentences(r, 50)}) for _ in range(n)))
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.jsonl").write_text("\n".join(json.dumps({"text": sentences(r, 50)}) for _ in range(150)))
    make_corpus("--source", f"files:{tmp_path / 'web'}")
    run(f"files:{tmp_path / 'd'}/*.jsonl", "--subdomain-mb", "0.03")
    manifest = files.read_json(base / "corpora" / "d" / "corpus.json")
    assert list(manifest["subdomains"]) == ["big"] and 29_000 < manifest["subdomains"]["big"]["bytes"] < 31_000
    assert manifest["skipped"] == "1 sub-domains too small for documents in train, val and test (small)"


def test_the_limit_of_a_subdomain_is_in_bytes_of_each_class_and_reading_ends_when_all_are_full(monkeypatch):
    read = []
    documents = lambda *_: (read.append(i) or Document(f"\u4e2d\u6587 {i:05d}", "ab"[i % 2], f"k{i}") for i in range(9_999))  # 12 bytes, 8 characters
    monkeypatch.setattr(domain.sources, "read", documents)
    count = lambda names: Counter((d.subdomain, split_of(d.key)) for d in domain.gather({"source": "files:x", "values": names}, 1200, None, {}))
    assert {key: n for key, n in count("ab").items() if key[1] == "train"} == {("a", "train"): 100, ("b", "train"): 100} and len(read) < 400
    assert count("abc") == {(name, split): n for name in "ab" for split, n in (("train", 100), ("val", 20), ("test", 20))}, "nothing of c"
    assert len(read) > 9_999


def test_what_cannot_be_a_domain_is_said_in_one_line_and_leaves_nothing_behind(base, tmp_path, site, recipes):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("a lonely document")
    with pytest.raises(UserError, match="make it first: python -m nanochat_cl.corpus"):
        run("planted", "--packages", str(site))
    make_corpus("--packages", str(site))
    for name, message in (("unknown", "no domain 'unknown': expected planted, the path of a recipe, files:"),
                          (f"files:{tmp_path / 'none'}", "no files match"), (f"files:{tmp_path / 'one'}", "too few documents"),
                          (f"files:{tmp_path / 'general'}", "cannot be called general")):
        with pytest.raises(UserError, match=message) as e:
            run(name)
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="too few documents"):
        run("planted", "--packages", str(tmp_path / "one"))
    assert {p.name for p in (base / "corpora").iterdir()} == {"general"}


@pytest.mark.parametrize("path", sorted(domain.RECIPES.glob("*.json")), ids=lambda p: p.stem)
def test_the_shipped_recipes_say_what_is_needed(path):
    recipe = files.read_json(path)
    assert set(recipe) <= {"description", "order", "sources", "questions"} and recipe["description"] and recipe["order"] in ("seed", "name", "size", "given", "time")
    for source in recipe["sources"]:
        assert set(source) <= {"source", "value", "values", "column", "pattern", "key", "data_files", "packages", "most"}
        assert source["source"] == "embedded" and len(source["packages"]) >= source["most"] or source["source"].startswith("hf:")


def test_the_help_names_the_recipes_and_where_the_documents_go(capsys):
    with pytest.raises(SystemExit):
        domain.parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "code, medical, python, the path of a recipe" in said and "$NANOCHAT_BASE_DIR/corpora/<domain>/" in said


def test_a_domain_is_named_after_its_folder_or_dataset():
    names = {"python": "python", "files:/data/company": "company", "files:/data/med/*.parquet": "med", "files:/data/a b/**/*.txt": "a-b",
             "hf:owner/set:config:column": "set", "hf:owner/set": "set"}
    assert {name: domain.name_of(name) for name in names} == names


def test_describe_prints_a_row_per_subdomain_and_draws(base, tmp_path, site, recipes, capsys, monkeypatch):
    make_corpus("--packages", str(site))
    run("planted", "--packages", str(site))
    with pytest.raises(UserError, match="nanochat_cl.tokenizer"):
        stream.main(["describe", "planted"])
    tokenizer.train(tokenizer.parse(["--vocab-size", "300"]))
    capsys.readouterr()
    made, drawn = files.read_json(base / "corpora" / "planted" / "corpus.json"), []
    for i, row in enumerate(made["subdomains"].values()):
        row["mean_share"] = (i + 1) / 100
    files.write_json(base / "corpora" / "planted" / "corpus.json", made)
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self) or save(self, *args, **kwargs))
    stream.main(["describe", "planted"])
    out = capsys.readouterr().out
    sizes, overlap, _ = drawn[0].axes
    names = [line.split()[0] for line in out.splitlines() if line.startswith("p")]
    assert [bar.get_width() for bar in overlap.patches] == pytest.approx([100 * made["subdomains"][name]["mean_share"] for name in names])
    assert overlap.get_xlabel() == "% held-out 13-grams" and sizes.get_xlabel() == "tokens (M)"
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith("p")}
    train = read(base / "corpora" / "planted" / "train.parquet")
    assert {name: int(row[1]) for name, row in rows.items()} == {name: sum(d["subdomain"] == name for d in train) for name in rows}
    assert len(rows) == 6 and {name: row[5] for name, row in rows.items()} == {
        name: f"{row['mean_share']:.2%}" for name, row in made["subdomains"].items()}
    assert (base / "corpora" / "planted" / "describe.png").read_bytes().startswith(b"\x89PNG")


def test_evaluation_items_reach_no_training_text_and_every_direction_is_counted(base, tmp_path, capsys):
    r = random.Random(9)
    text_folder(tmp_path / "company", tmp_path / "web")
    questions = [f"itemword {sentences(r, 20)}" for _ in range(40)]
    (base / "eval" / "facts").mkdir(parents=True)
    asked = [{"question": q, "choices": ["no", "yes"], "answer": 1} for q in (*questions[10:], "too short to be compared?")]
    (base / "eval" / "facts" / "q.jsonl").write_text("\n".join(map(json.dumps, asked)))
    bundle = base / "eval_bundle"
    (bundle / "eval_data").mkdir(parents=True)
    (bundle / "core.yaml").write_text("icl_tasks:\n- {label: jeopardy, dataset_uri: j.jsonl, continuation_delimiter: ' '}\n")
    (bundle / "eval_data" / "j.jsonl").write_text("\n".join(json.dumps({"context": q, "continuation": "yes"}) for q in questions[:10]))
    for i, question in enumerate(questions):
        place = (tmp_path / "company" / "law", tmp_path / "web")[i % 2]
        (place / f"item{i}.txt").write_text(f"{KEPT} {sentences(r, 60)} {question} yes {sentences(r, 60)}")
    make_corpus("--source", f"files:{tmp_path / 'web'}")
    assert "itemword" in trained_text(8), "planted"
    run(f"files:{tmp_path / 'company'}")
    assert "itemword" not in trained_text(16) + streamed_text(base / "corpora" / "company")
    manifest = files.read_json(base / "corpora" / "company" / "corpus.json")
    held = [d["text"] for c in ("val", "test") for name in ("company", "general") for d in read(base / "corpora" / name / f"{c}.parquet")]
    counts = manifest["dropped"]["near_evaluation"], manifest["general_pruned"]["near_evaluation"], sum("itemword" in text for text in held)
    assert sum(counts) == 40 and min(counts) > 0 and sum(manifest["held_out_near_evaluation"].values()) == counts[2]
    assert "40 evaluation items compared, 1 too short for it;" in capsys.readouterr().out
    assert (manifest["items"]["number"], manifest["items"]["too_short"]) == (40, 1)
    (base / "eval" / "facts" / "q.jsonl").write_text('{"question": "a"}\n{"choices": 3, "answer": 0}')
    with pytest.raises(UserError, match="q.jsonl: expected lines with good and bad"):
        run(f"files:{tmp_path / 'company'}")


def test_the_questions_of_a_recipe_lie_beside_the_domain_and_reach_no_training_text(base, tmp_path):
    r = random.Random(11)
    text_folder(tmp_path / "company", tmp_path / "web")
    asked = [{"question": f"itemword {sentences(r, 20)}", "choices": ["no", "yes"], "answer": 1} for _ in range(6)]
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "board.jsonl").write_text("\n".join(map(json.dumps, asked)))
    for i, item in enumerate(asked):
        (tmp_path / "company" / "law" / f"item{i}.txt").write_text(f"{KEPT} {sentences(r, 60)} {item['question']} yes")
    make = lambda *questions: files.write_json(tmp_path / "firm.json", {"sources": [{"source": f"files:{tmp_path / 'company'}"}],
                                                                        "questions": questions})
    make_corpus("--source", f"files:{tmp_path / 'web'}")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "board.jsonl").write_text(json.dumps(asked[0]))
    for wrong in (("none/*.jsonl",), ("ours/*.jsonl", "theirs/*.jsonl")):
        make(*wrong)
        with pytest.raises(UserError, match="firm.json names questions at .*: expected a jsonl file there, and no other one of that name"):
            run(str(tmp_path / "firm.json"))
    make("ours/*.jsonl", "./ours/board.jsonl")
    run(str(tmp_path / "firm.json"))
    folder = base / "corpora" / "firm"
    assert "itemword" not in streamed_text(folder) and files.read_json(folder / "corpus.json")["items"]["number"] == 6
    assert (folder / "questions" / "board.jsonl").read_text() == (tmp_path / "ours" / "board.jsonl").read_text()
    (tmp_path / "ours" / "board.jsonl").write_text(json.dumps({**asked[0], "choices": ["never", "yes"]}))
    run(str(tmp_path / "firm.json"))
    assert "never" in (folder / "questions" / "board.jsonl").read_text(), "what is asked has changed"


def test_a_recipe_may_be_any_file_and_pieces_of_one_work_are_held_out_together(base, tmp_path):
    r = random.Random(4)
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.jsonl").write_text("\n".join(json.dumps({"text": sentences(r, 50)}) for _ in range(150)))
    (tmp_path / "d").mkdir()
    rows = [{"text": sentences(r, 50), "book": f"book {i % 120}", "subdomain": "ab"[i % 2]} for i in range(600)]
    (tmp_path / "d" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {"order": "given", "sources": [{"source": f"files:{tmp_path / 'd'}", "key": "book"}]}
    (tmp_path / "library.json").write_text(json.dumps(recipe))
    make_corpus("--source", f"files:{tmp_path / 'web'}")
    run(str(tmp_path / "library.json"), "--order", "name")
    where = {c: {d["key"] for d in read(base / "corpora" / "library" / f"{c}.parquet")} for c in ("train", "val", "test")}
    assert sum(map(len, where.values())) == len(set.union(*where.values())) == 120 and min(map(len, where.values())) > 1
    assert files.read_json(base / "corpora" / "library" / "corpus.json")["order"] == "name"


def test_in_the_order_of_time_documents_and_sub_domains_come_by_their_date(base, tmp_path):
    r = random.Random(4)
    for folder in ("web", "d"):
        (tmp_path / folder).mkdir()
    (tmp_path / "web" / "a.jsonl").write_text("\n".join(json.dumps({"text": sentences(r, 50)}) for _ in range(150)))
    rows = [{"text": sentences(r, 50), "subdomain": "bca"[i % 3], "date": f"20{r.randrange(10, 20) + 5 * (i % 3)}-01"} for i in range(600)]
    (tmp_path / "d" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    make_corpus("--source", f"files:{tmp_path / 'web'}")
    (tmp_path / "news.json").write_text(json.dumps({"order": "time", "sources": [{"source": f"files:{tmp_path / 'd'}", "time": "date"}]}))
    run(str(tmp_path / "news.json"))
    date = {row["text"]: row["date"] for row in rows}
    dates = [date[d["text"]] for d in read(base / "corpora" / "news" / "train.parquet")]
    assert dates == sorted(dates) and len(set(dates)) > 15
    found = stream.Stream(base / "corpora" / "news", Words(), "sequential", 0, 2, T, 64)
    assert found.subdomains == ["b", "c", "a"], "of their first documents"
    (tmp_path / "old.json").write_text(json.dumps({"order": "time", "sources": [{"source": f"files:{tmp_path / 'd'}"}]}))
    with pytest.raises(UserError, match="needs one of every document, and 6.. have none.*which column"):
        run(str(tmp_path / "old.json"))


def test_what_cannot_be_examined_is_not_trained_on_and_the_overlap_is_that_of_training_documents(base, tmp_path):
    r = random.Random(5)
    for folder in ("d", "web"):
        (tmp_path / folder).mkdir()
    licence = sentences(r, 20)
    for name, n in (("big", 200), ("small", 3)):
        (tmp_path / "d" / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": f"{licence} {sentences(r, 50)}"}) for _ in range(n)))
    (tmp_path / "web" / "a.jsonl").write_text("\n".join(json.dumps({"text": sentences(r, 50)}) for _ in range(150)))
    make_corpus("--source", f"files:{tmp_path / 'web'}")
    run(f"files:{tmp_path / 'd'}/*.jsonl")
    text = {c: [d["text"] for d in read(base / f"corpora/d/{c}.parquet")] for c in ("train", "val", "test")}
    assert {d["subdomain"] for c in text for d in read(base / f"corpora/d/{c}.parquet")} == {"big"}
    shares = Overlap({"held": text["val"] + text["test"]}).of(text["train"])
    assert files.read_json(base / "corpora/d/corpus.json")["subdomains"]["big"]["mean_share"] == pytest.approx(shares.mean()) and shares.mean() > 0.1


def test_a_held_out_text_without_a_word_is_not_trained_on_under_another_key(base, tmp_path):
    """Such texts have nothing that could be near to anything."""
    r = random.Random(1)
    (tmp_path / "d").mkdir()
    rows = [{"text": sentences(r, 50), "key": f"{i}"} for i in range(200)]
    rows += [{"text": "∑∫∂ = ∇", "key": key} for key in ("7", *(k for k in map(str, range(200, 300)) if split_of(k) == "train"))]
    (tmp_path / "d" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.json").write_text(json.dumps({"sources": [{"source": f"files:{tmp_path / 'd'}", "value": "d", "key": "key"}]}))
    make_corpus("--source", f"files:{tmp_path / 'd'}")
    run(str(tmp_path / "mine.json"))
    held, trained = (["∑∫∂ = ∇" in [d["text"] for d in read(base / f"corpora/mine/{c}.parquet")] for c in names] for names in (("val", "test"), ("train",)))
    assert held == [True, False] and trained == [False]

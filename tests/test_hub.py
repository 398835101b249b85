"""Datasets of a hub: laid out on disk as it has them, and behind a server on this machine that answers as it does."""
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from planted import sentences
from test_corpus import read, run, use

from nanochat_cl import corpus, domain, exam, files, sources
from nanochat_cl.command import UserError
from nanochat_cl.upstream import REPO

CARD = """---
license: odc-by
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
- config_name: small
  data_files:
  - split: train
    path: small/*.parquet
---
# A dataset card
"""


def parquet_set(folder, shards=5, rows=60):
    """A dataset with a card, two configs and several shards; its texts in order."""
    r = random.Random(6)
    texts = [f"document {i} {sentences(r, 30)}" for i in range(shards * rows)]
    for name in ("data", "small"):
        (folder / name).mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    for i in range(shards):
        table = pa.table({"text": texts[i * rows:(i + 1) * rows], "id": range(rows)})
        pq.write_table(table, folder / "data" / f"train-{i:05d}-of-{shards:05d}.parquet", row_group_size=16)
    pq.write_table(pa.table({"text": ["of the other config"], "id": [0]}), folder / "small" / "train.parquet")
    return texts


LONG = "A long enough story of a patient, with all that a doctor may want to know of it."


def question_sets(folder):
    """One question each, as the sets that the medical recipe names have them."""
    def table(path, **row):
        (folder / path).parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist([row]), folder / path)
    (folder / "qiaojin").mkdir()
    table("qiaojin/PubMedQA/pqa_labeled/train-00000-of-00001.parquet", pubid=1, question="Does it help?", final_decision="maybe",
          context={"contexts": [LONG, "And its end."], "labels": ["A", "B"]})
    (folder / "qiaojin/PubMedQA/README.md").write_text(
        "---\nconfigs:\n- config_name: pqa_labeled\n  data_files:\n  - split: train\n    path: pqa_labeled/train-*\n---\n")
    (folder / "GBaker/MedQA-USMLE-4-options").mkdir(parents=True)
    (folder / "GBaker/MedQA-USMLE-4-options/phrases_no_exclude_test.jsonl").write_text(json.dumps(
        {"question": f"{LONG} Which of these?", "answer": "that one", "options": {"A": "this one", "B": "that one"}, "answer_idx": "B"}) + "\n")
    table("openlifescienceai/medmcqa/data/validation-00000-of-00001.parquet", question=f"{LONG} And which?", cop=3, opa="w", opb="x", opc="y", opd="z")


def texts_of(source, label=None, place=None, skipped=None):
    return [d.text for d in sources.read(source, {} if skipped is None else skipped, label, place)]


def test_the_shards_of_a_config_are_read_in_order(tmp_path):
    texts = parquet_set(tmp_path / "set")
    assert texts_of(f"hf:{tmp_path}/set") == texts
    assert texts_of(f"hf:{tmp_path}/set:small") == ["of the other config"]
    assert [d.subdomain for d in sources.read(f"hf:{tmp_path}/set:small", {})] == ["set"]
    assert texts_of(f"hf:{tmp_path}/set", {"data_files": "data/train-00003-*.parquet"}) == texts[180:240]


def test_rows_without_text_are_named_and_a_column_that_is_not_there_or_a_broken_shard_is_one_line(tmp_path):
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"content": ["one", None, "two"], "text": ["a", "b", "c"], "subdomain": ["s", "t", "u"]}),
                   tmp_path / "set" / "train.parquet")
    skipped = {}
    found = list(sources.read(f"hf:{tmp_path}/set::content", skipped))
    assert [(d.text, d.subdomain) for d in found] == [("one", "s"), ("two", "u")]
    assert skipped == {"without text": [f"{tmp_path}/set#2"]}
    for label in ({"column": "subdomian"}, {"key": "subdomian"}):
        with pytest.raises(UserError, match="no column 'subdomian' but content, subdomain, text"):
            texts_of(f"hf:{tmp_path}/set::content", label)
    cut = tmp_path / "cut"
    parquet_set(cut)
    whole = (cut / "data" / "train-00002-of-00005.parquet").read_bytes()
    (cut / "data" / "train-00002-of-00005.parquet").write_bytes(whole[:len(whole) // 2])
    for source, message in ((f"hf:{tmp_path}/set::body", "no column 'body' but content, subdomain, text; check name, config, column"),
                            (f"hf:{tmp_path}/set:absent", "absent.* not found.*check name, config"),
                            (f"hf:{tmp_path}/cut", "cannot read the dataset .*cut"), (f"hf:{tmp_path}/missing", "cannot read the dataset")):
        with pytest.raises(UserError, match=message) as e:
            texts_of(source)
        assert "\n" not in str(e.value) and "files:<folder>" in str(e.value)


def test_a_recipe_reads_jsonl_files_of_which_one_is_empty(tmp_path, monkeypatch):
    """As MedRAG/pubmed has them: chunk/pubmed23n0654.jsonl has no line."""
    base, r = use(tmp_path / "base", monkeypatch), random.Random(8)
    (tmp_path / "pubmed" / "chunk").mkdir(parents=True)
    for i in (600, 653, 654, 655, 700):
        rows = [{"id": f"{i}_{j}", "title": "A title", "content": f"file{i} {sentences(r, 40)}", "PMID": j} for j in range(90)]
        (tmp_path / "pubmed" / "chunk" / f"pubmed23n0{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if i != 654))
    label = {"data_files": "chunk/pubmed23n06*.jsonl", "value": "pubmed-06"}
    found = [text.split()[0] for text in texts_of(f"hf:{tmp_path}/pubmed::content", label)]
    assert found == ["file600"] * 90 + ["file653"] * 90 + ["file655"] * 90
    web = tmp_path / "web"
    web.mkdir()
    (web / "a.jsonl").write_text("".join(json.dumps({"text": sentences(r, 50)}) + "\n" for _ in range(150)))
    run("--source", f"files:{web}")
    medical = files.read_json(domain.RECIPES / "medical.json")
    ours = [{**s, "source": f"hf:{tmp_path}/pubmed::content"} for s in medical["sources"] if "06" in s.get("value", "")]
    asked = [{**q, "source": q["source"].replace("hf:", f"hf:{tmp_path}/")} for q in medical["questions"]]
    question_sets(tmp_path)
    files.write_json(tmp_path / "medical.json", {**medical, "sources": ours, "questions": asked})
    build = lambda: domain.build(domain.parse(["--domain", str(tmp_path / "medical.json"), "--workers", "1"]))
    build()
    made = files.read_json(base / "corpora" / "medical" / "corpus.json")
    assert set(made["subdomains"]) == {"pubmed-06"} and made["items"]["number"] == 3
    read = {path.stem: exam.read(path, 9)[0] for path in (base / "corpora/medical/questions").iterdir()}
    assert {name: (i.context, i.choices, i.gold) for name, i in read.items()} == {
        "pubmedqa": (f"{LONG} And its end. Does it help?", (" yes", " no", " maybe"), 2),
        "medqa": (f"{LONG} Which of these?", (" this one", " that one"), 1), "medmcqa": (f"{LONG} And which?", (" w", " x", " y", " z"), 3)}
    for q in asked:  # once they are there no hub is asked
        shutil.rmtree(tmp_path / q["source"].removeprefix(f"hf:{tmp_path}/").split(":")[0])
    build()
    with pytest.raises(UserError, match="cannot read the dataset"):
        list(sources.questions(asked[0]))


def test_a_question_that_is_none_is_one_line_with_what_there_is(tmp_path):
    question_sets(tmp_path)
    entry = {"name": "m", "source": f"hf:{tmp_path}/openlifescienceai/medmcqa", "split": "validation", "question": "question", "answer": "cop"}
    with pytest.raises(UserError, match="#1 is no question of the form .*KeyError.*it has cop, opa, opb, opc, opd, question") as e:
        list(sources.questions({**entry, "choices": ["opa", "opx"]}))
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="no column 'right' but cop"):
        list(sources.questions({**entry, "choices": ["opa"], "answer": "right"}))


def test_a_corpus_from_a_hub_that_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    parquet_set(tmp_path / "set")
    source = ["--source", f"hf:{tmp_path}/set"]
    whole = use(tmp_path / "whole", monkeypatch)
    run(*source)
    stopped, write = use(tmp_path / "stopped", monkeypatch), corpus.write_parquet
    eighth = stopped / "base_data_climbmix" / "shard_00007.parquet"

    def failing(path, documents):
        if path == eighth:
            raise KeyboardInterrupt
        return write(path, documents)

    monkeypatch.setattr(corpus, "write_parquet", failing)
    with pytest.raises(KeyboardInterrupt):
        run(*source)
    monkeypatch.setattr(corpus, "write_parquet", write)
    place = files.read_json(stopped / "base_data_climbmix" / "corpus.partial.json")["place"]
    assert place["row"] == 7 * 32
    for i in (1, 2):  # rows 60 to 179; the first file is looked at for its columns
        (tmp_path / "set" / "data" / f"train-0000{i}-of-00005.parquet").write_bytes(b"is not opened again")
    run(*source)
    made = [{p.relative_to(base): p.read_bytes() for p in base.rglob("*") if p.is_file()} for base in (whole, stopped)]
    assert made[0] == made[1] and len(made[0]) > 12, made[0].keys() ^ made[1].keys()


# --- a hub that answers ------------------------------------------------------------------------------------------------

SHA = "5" * 40


@pytest.fixture
def hub(tmp_path):
    """Serves the folders of tmp_path/hub/<owner>/<name> as a hub serves datasets; owner/gated wants terms to be accepted."""
    root = tmp_path / "hub"

    class Handler(BaseHTTPRequestHandler):
        asked = []
        protocol_version = "HTTP/1.1"

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in {"Content-Length": len(body), "X-Repo-Commit": SHA, **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            words = unquote(urlsplit(self.path).path).strip("/").split("/")
            if words[:2] == ["api", "datasets"]:
                self.api(words[2:])
            elif words[0] == "datasets" and words[3] == "resolve":
                path = root.joinpath(*words[1:3], *words[5:])
                if not path.is_file():
                    return self.answer(404, X_Error_Code="EntryNotFound")
                Handler.asked.append((self.command, path.name))
                data, (first, last) = path.read_bytes(), (0, 10**9)
                if ranged := self.headers.get("Range"):
                    first, last = (int(x or 10**9) for x in ranged.removeprefix("bytes=").split("-"))
                part = data[first:last + 1]
                self.answer(206 if ranged else 200, part, ETag='"0"', Accept_Ranges="bytes",
                            **({"Content_Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"} if ranged else {}))
            else:
                self.answer(404)

        do_HEAD = do_GET

        def api(self, words):
            name, rest = "/".join(words[:2]), words[2:]
            if name == "owner/gated":
                return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access to dataset owner/gated is restricted.")
            if not (root / name).is_dir():
                return self.answer(401, X_Error_Code="RepoNotFound")
            found = [{"type": "file", "path": p.relative_to(root / name).as_posix(), "size": p.stat().st_size, "oid": "0" * 40}
                     for p in sorted((root / name).rglob("*")) if p.is_file()]
            parents = sorted({str(Path(f["path"]).parent) for f in found} - {"."})
            folders = [{"type": "directory", "path": p, "oid": "1" * 40} for p in parents]
            if rest[:1] == ["paths-info"]:
                asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
                if self.headers["Content-Type"].startswith("application/json"):
                    wanted = json.loads(asked)["paths"]
                else:
                    wanted = [unquote(x.split("=")[1]) for x in asked.split("&") if x.startswith("paths=")]
                return self.json([f for f in found + folders if f["path"] in wanted])
            if rest[:1] == ["tree"]:
                below = "/".join(rest[2:])
                inside = [f for f in found + folders if not below or f["path"].startswith(below + "/")]
                if "recursive=true" not in self.path.lower():
                    inside = [f for f in inside if "/" not in f["path"][len(below) + 1 if below else 0:]]
                return self.json(inside) if inside else self.answer(404, X_Error_Code="EntryNotFound")
            return self.json({"id": name, "sha": SHA, "private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0,
                              "tags": [], "siblings": [{"rfilename": f["path"]} for f in found]})

        do_POST = do_GET

        def json(self, value):
            self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    Handler.url = f"http://127.0.0.1:{httpd.server_port}"
    yield Handler
    httpd.shutdown()
    httpd.server_close()


def make(tmp_path, url, source, *flags):
    """The command as a user calls it, but that the hub's library, which tries again half a minute long, does not sleep meanwhile."""
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "NANOCHAT_BASE_DIR": str(tmp_path / "base")}
    program = "import runpy, time; time.sleep = lambda s: None; runpy.run_module('nanochat_cl.corpus', run_name='__main__')"
    command = [sys.executable, "-c", program, "--source", source, "--docs-per-shard", "32", "--workers", "1", *flags]
    return subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)


def test_fineweb_edu_is_nanochats_shuffled_shards_read_from_the_hub_and_only_as_many_as_needed(tmp_path, hub):
    r, folder = random.Random(2), tmp_path / "hub" / "karpathy" / "fineweb-edu-100b-shuffle"
    folder.mkdir(parents=True)
    texts = [f"document {i} {sentences(r, 40)}" for i in range(400)]
    for i in range(4):  # no card and no config: shards and nothing else
        pq.write_table(pa.table({"text": texts[100 * i:100 * i + 100]}), folder / f"shard_{i:05d}.parquet", row_group_size=25)
    done = make(tmp_path, hub.url, "fineweb-edu", "--tokens", "1e4")
    assert done.returncode == 0, done.stderr
    data = tmp_path / "base" / "base_data_climbmix"
    trained = [d["text"] for path in sorted(data.glob("*.parquet"))[:-1] for d in read(path)]
    assert [t for t in texts if t in set(trained)] == trained and 100 < len(trained) < 300
    made = files.read_json(data / "corpus.json")
    assert made["source"] == "fineweb-edu" and 1e4 * corpus.BYTES_PER_TOKEN <= made["bytes"] < 1.3e4 * corpus.BYTES_PER_TOKEN
    assert ("GET", "shard_00001.parquet") in hub.asked


@pytest.mark.parametrize("name, message", [
    ("owner/gated", "restricted.*accept its terms and run hf auth login"), ("owner/absent", "owner/absent.*check name"),
    ("unreachable", "cannot read the dataset 'owner/set'.*network.*or use embedded or files:<folder>")])
def test_a_gated_an_absent_and_an_unreachable_dataset_are_one_line_with_the_remedy(tmp_path, hub, name, message):
    url, name = (hub.url, name) if name != "unreachable" else ("http://127.0.0.1:9", "owner/set")
    done = make(tmp_path, url, f"hf:{name}")
    assert done.returncode == 2 and re.search(message, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    assert not list((tmp_path / "base").rglob("*.parquet"))

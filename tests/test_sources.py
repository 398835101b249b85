import ast
import io
import json
import os
import tokenize
from pathlib import Path

import networkx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_cl import sources
from nanochat_cl.command import UserError

NASTY = {
    "a body that is only a docstring": 'def f():\n    """Only words."""\n\n\nclass A:\n    "one"\n    "two"\n\nx = 1\n',
    "on the line of its owner": 'def f(): "doc"\nclass A: "doc"  # why\ny = 2\n',
    "not in the first place": 'x = 1\n"""About x."""\nif x:\n    y = 2\n    "about y"\nelse:\n    "nothing"\n',
    "parentheses and joined pieces": 'def f():\n    ("one "\n     "two")\n    return (1,  # first\n            2)\n',
    "strings with hashes": 'x = "# no comment"  # comment\ny = """\n# still no comment\n\n\n"""\nz = f"{x!r:>{3}}#"\n',
    "letters beyond ASCII": 'é = "ü"  # ö ä\ndef f(ß="€"):  # 漢字\n    """漢字"""\n    return ß  # end\n',
    "handlers and matches": 'try:\n    "a"\nexcept ValueError:\n    "b"  # c\nfinally:\n    x = 1\n'
                            'match x:\n    case 1:\n        "d"\n    case _:\n        y = 3\n',
    "continued lines": 'x = 1 + \\\n    2  # three\n# gone\n\n# gone too\nasync def g():\n    r"""raw \\d"""\n    await h()\n',
}


class WithoutStrings(ast.NodeTransformer):
    """The independent way: drop string statements from the tree."""

    def generic_visit(self, node):
        super().generic_visit(node)
        for field in ("body", "orelse", "finalbody"):
            body = getattr(node, field, None)
            if isinstance(body, list) and body:
                kept = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(getattr(s.value, "value", None), str))]
                setattr(node, field, kept or ([] if isinstance(node, ast.Module) else [ast.Pass()]))
        return node


def check(source):
    filler = "\n" + "filler = [1, 2, 3]\n" * 30
    text = sources.code(source + filler)
    assert ast.dump(ast.parse(text)) == ast.dump(WithoutStrings().visit(ast.parse(source + filler))), text
    assert not [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT], text
    return text


@pytest.mark.parametrize("name", NASTY)
def test_stripping_leaves_the_tree_equal_apart_from_string_statements(name):
    check(NASTY[name])


def test_stripping_leaves_real_modules_equal_apart_from_string_statements():
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(networkx.__file__).parent.rglob("*.py"))[::12]]
    code = [check(text) for text in texts if sources.code(text)]
    assert len(code) > 15 and not any("Parameters\n" in text for text in code), len(code)


def test_tables_of_text_and_tiny_modules_are_no_code():
    assert sources.code("x = 1\n") is None
    assert sources.code(f"TEXT = {'words and words ' * 50!r}\n" + "y = 1\n" * 40) is None
    assert sources.code(f"COLORS = {[0.267004 + i / 1e6 for i in range(200)]}\n") is None


def test_prose_is_the_docstrings_in_order_without_doctests():
    source = ('"""The module says what it is for, at some length, so that it counts."""\n\n'
              'class A:\n    """\n    A class that is documented as well, with an indent.\n\n'
              '    >>> A().f()\n    3\n\n    And more words after the example.\n    """\n'
              '    def f(self):\n        """It returns three, and it takes many words to say so, does it not?"""\n'
              '        return "a string that is no documentation but is long enough to be one"\n')
    text = sources.prose(source)
    assert [text.index(w) for w in ("module says", "documented as well", "And more", "returns three")] == sorted(
        text.index(w) for w in ("module says", "documented as well", "And more", "returns three"))
    assert ">>>" not in text and "\n3\n" not in text and "no documentation" not in text and "\n    A class" not in text
    assert sources.prose('"""Short."""\n') is None


def test_bad_documents_are_counted_and_named(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "good.txt").write_text("good text")
    (tmp_path / "bytes.md").write_bytes(b"x\xff\xfe")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "rows.jsonl").write_text("\n".join(['{"text": "from a row", "subdomain": "named"}', '{"body": 1}', "", "[1]",
                                                    '{"text": "half\\ud800"}', '{"text": 7}', "not json", '{"text": "after it"}']))
    pq.write_table(pa.table({"content": ["a"]}), tmp_path / "column.parquet")
    pq.write_table(pa.table({"text": ["from parquet"]}), tmp_path / "fine.parquet")
    whole = (tmp_path / "fine.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:len(whole) // 2])
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "a.txt").write_text("not for us")
    skipped = {}
    found = list(sources.read(f"files:{tmp_path}", skipped))
    assert {(d.text, d.subdomain) for d in found} == {("good text", "sub"), ("from a row", "named"), ("half", "rows"), ("after it", "rows"),
                                                      ("from parquet", "fine")}
    assert skipped["without text"] == ["column.parquet:1", "empty.txt:1", "rows.jsonl:2", "rows.jsonl:3", "rows.jsonl:5", "rows.jsonl:6"]
    assert [name.split(":")[:2] for name in skipped["unreadable from there on"]] == [["bytes.md", "1"], ["cut.parquet", "1"]]
    assert "6 without text (column.parquet:1, empty.txt:1, rows.jsonl:2, ...)" in sources.said(skipped) and sources.said({}) == "none"


def test_a_document_beyond_the_largest_is_no_text(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGEST", 20)
    for n in (20, 21):
        (tmp_path / f"{n}.txt").write_text("x" * n)
    skipped = {}
    assert [len(d.text) for d in sources.read(f"files:{tmp_path}", skipped)] == [20] and skipped == {"longer than 20 characters": ["21.txt:1"]}


def test_other_files_are_refused_with_advice(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.docx").write_bytes(b"PK")
    with pytest.raises(UserError, match="b.docx.*convert it to text.*narrow the glob"):
        list(sources.read(f"files:{tmp_path}", {}))
    assert len(list(sources.read(f"files:{tmp_path}/*.txt", {}))) == 1
    for source in ("files:", "http://x", "nonsense", f"files:{tmp_path}/none/*"):
        with pytest.raises(UserError):
            list(sources.read(source, {}))


def test_a_label_names_the_subdomain_by_value_column_or_pattern(tmp_path):
    rows = [{"text": f"from {name} import x", "kind": name} for name in ("flask", "django", "other")]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    names = lambda **label: [d.subdomain for d in sources.read(f"files:{tmp_path}", {}, label)]
    assert names() == ["a"] * 3 and names(value="v") == ["v"] * 3 and names(column="kind") == ["flask", "django", "other"]
    assert names(column="text", pattern=r"^from (flask|django)\b") == ["flask", "django"]


def test_the_time_of_a_document_is_a_columns_or_the_last_change_of_its_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "first", "year": 1999}\n{"text": "second", "time": "2001-05-04"}\n{"text": "third"}\n')
    times = lambda **label: [d.time for d in sources.read(f"files:{tmp_path}", {}, label)]
    assert times() == ["", "2001-05-04", ""] and times(time="year") == ["1999", "", ""]
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "b.txt").write_text("text")
    os.utime(tmp_path / "b.txt", (0, 86400 * 365.25 * 30))
    assert times()[0].startswith(("1999-12-31", "2000-01-01"))


def test_a_key_or_a_sub_domain_of_0_is_a_name_like_any_other(tmp_path):
    rows = [{"text": f"letter {i} of patient 0", "patient": 0, "ward": 0} for i in range(3)]
    (tmp_path / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(sources.read(f"files:{tmp_path}/*.jsonl", {}, {"column": "ward", "key": "patient"}))
    assert [(d.subdomain, d.key) for d in found] == [("0", "0")] * 3


@pytest.mark.parametrize("label, message", [({"column": "wrad"}, "has the column wrad; there are: patient, text, ward$"),
                                            ({"value": "x", "key": "patiant"}, "has the column patiant; there are: patient, text, ward$")])
def test_a_column_that_no_row_has_is_one_line_with_those_that_there_are(tmp_path, label, message):
    rows = [{"text": "a letter", "patient": 1}, [1], {"text": "another", "patient": 2, "ward": "b"}]
    (tmp_path / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "not json\n")
    with pytest.raises(UserError, match=message) as e:
        next(sources.read(f"files:{tmp_path}/*.jsonl", {}, label))
    assert "\n" not in str(e.value)
    assert len(list(sources.read(f"files:{tmp_path}/*.jsonl", {}, {"column": "ward"}))) == 2, "some row has it"

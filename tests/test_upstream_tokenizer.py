"""nanochat.tokenizer: round trips, special tokens, conversations, and a tokenizer file that can't run code."""
import os
import pickle

import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import tokenizer as tokenizer_module
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer, get_token_bytes, get_tokenizer

VOCAB = 320
TEXT = ["the cat sat on the mat in 2024 and 2025, the other cat didn't; " * 20, "a theory of 1234 things: then, there, these.\n\n" * 20,
        "continual learning asks what a network keeps while it learns something new, and whether forgetting can be healthy. " * 20]


@pytest.fixture(scope="module")
def tok() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(iter(TEXT), VOCAB)


def specials(tok: RustBPETokenizer, *names: str) -> list[int]:
    return [tok.encode_special(f"<|{name}|>") for name in names]


def test_the_vocabulary_has_the_size_asked_for_and_ends_with_the_nine_specials_in_order(tok):
    assert tok.get_vocab_size() == VOCAB
    assert [tok.encode_special(name) for name in SPECIAL_TOKENS] == list(range(VOCAB - 9, VOCAB))
    assert tok.get_special_tokens() == set(SPECIAL_TOKENS)
    assert tok.get_bos_token_id() == VOCAB - 9
    assert [tok.decode_single_token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]


def test_a_vocabulary_too_small_for_bytes_and_specials_is_refused():
    with pytest.raises(AssertionError, match="at least 265.*got 264"):
        RustBPETokenizer.train_from_iterator(iter(TEXT), 264)


@given(text=st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back_and_its_tokens_have_its_bytes(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert b"".join(map(tok.decode_single_token_bytes, ids)) == text.encode("utf-8")
    assert all(i < VOCAB - 9 for i in ids), "plain text must never become a special token"


def test_special_strings_in_a_text_are_ordinary_characters(tok):
    ids = tok.encode("<|bos|>x<|assistant_end|>")
    assert tok.decode(ids) == "<|bos|>x<|assistant_end|>"
    assert not set(ids) & set(range(VOCAB - 9, VOCAB))


def test_frequent_words_become_one_token_and_runs_of_digits_are_cut_after_two(tok):
    assert len(tok.encode("the")) == 1
    pieces = [tok.id_to_token(i) for i in tok.encode("20242025123")]
    assert "".join(pieces) == "20242025123" and max(map(len, pieces)) == 2
    assert all(len(tok.decode_single_token_bytes(i)) <= 2 for i in range(256, VOCAB - 9) if tok.decode_single_token_bytes(i).isdigit())


def test_prepend_and_append_take_an_id_or_a_name(tok):
    plain, bos, end = tok.encode("a cat"), tok.get_bos_token_id(), tok.encode_special("<|user_end|>")
    assert tok.encode("a cat", prepend="<|bos|>", append=end) == [bos, *plain, end]
    assert tok.encode("a cat", prepend=0) == [0, *plain], "id 0 is an id, not a missing argument"
    assert tok("a cat", append="<|user_end|>") == [*plain, end]


def test_a_batch_equals_its_texts_one_by_one(tok):
    texts = ["the cat", "", "12345 \n x", "naïve 🦀"]
    assert tok.encode(texts, prepend="<|bos|>", num_threads=2) == [tok.encode(t, prepend="<|bos|>") for t in texts]
    with pytest.raises(ValueError, match="got int"):
        tok.encode(3)


# --- files ------------------------------------------------------------------------------------------------------------

def test_a_saved_tokenizer_is_a_plain_pickled_encoding_and_comes_back_equal(tok, tmp_path):
    tok.save(str(tmp_path / "t"))
    assert sorted(os.listdir(tmp_path / "t")) == ["tokenizer.json", "tokenizer.pkl"]
    with open(tmp_path / "t" / "tokenizer.pkl", "rb") as f:
        raw = pickle.load(f)  # as another implementation reads it
    assert isinstance(raw, tiktoken.Encoding)
    again = RustBPETokenizer.from_directory(str(tmp_path / "t"))
    text = "the other cat: 1999 <|bos|>"
    assert again.encode(text) == tok.encode(text) == raw.encode_ordinary(text)
    assert again.get_bos_token_id() == tok.get_bos_token_id()


@pytest.mark.parametrize("missing", ["tokenizer.pkl", "tokenizer.json"])
def test_either_of_the_two_files_is_enough(tok, tmp_path, missing):
    tok.save(str(tmp_path))
    (tmp_path / missing).unlink()
    again = RustBPETokenizer.from_directory(str(tmp_path))
    text = "the cat naïve 🦀 1999\n\n x"
    assert again.encode(text, prepend="<|bos|>") == tok.encode(text, prepend="<|bos|>")
    assert again.get_vocab_size() == tok.get_vocab_size() and again.get_special_tokens() == tok.get_special_tokens()
    assert [again.encode_special(name) for name in SPECIAL_TOKENS] == [tok.encode_special(name) for name in SPECIAL_TOKENS]


def test_the_plain_file_is_read_and_the_pickle_beside_it_is_not_opened(tok, tmp_path, monkeypatch):
    tok.save(str(tmp_path))
    monkeypatch.setattr(tokenizer_module, "_EncodingUnpickler", None)
    assert RustBPETokenizer.from_directory(str(tmp_path)).encode("the cat") == tok.encode("the cat")


def test_a_pickle_that_another_tree_put_there_later_wins_over_the_plain_file(tok, tmp_path):
    tok.save(str(tmp_path))
    other = RustBPETokenizer.train_from_iterator(["zebra zebra zebra zebra"] * 9, 256 + 9 + 4)
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(other.enc))
    assert RustBPETokenizer.from_directory(str(tmp_path)).encode("zebra") == other.encode("zebra") != tok.encode("zebra")
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(_Planted(str(tmp_path / "trap"))))
    with pytest.raises(pickle.UnpicklingError, match="posix.mkdir"):
        RustBPETokenizer.from_directory(str(tmp_path))
    assert not (tmp_path / "trap").exists()


def test_a_damaged_plain_file_is_named(tok, tmp_path):
    tok.save(str(tmp_path))
    path = tmp_path / "tokenizer.json"
    for damage in [lambda s: s[:-40], lambda s: s.replace('"ranks"', '"rank"'), lambda s: "[]", lambda s: s.replace('"AA=="', '"A?=="')]:
        tok.save(str(tmp_path))
        path.write_text(damage(path.read_text()))
        with pytest.raises(ValueError, match=r"tokenizer\.json was not loaded.*tok_train"):
            RustBPETokenizer.from_directory(str(tmp_path))


class _Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_tokenizer_file_that_would_run_code_is_refused_by_name_and_runs_nothing(tmp_path):
    trap = tmp_path / "trap"
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(_Planted(str(trap))))
    with pytest.raises(pickle.UnpicklingError, match=r"tokenizer\.pkl.*posix\.mkdir"):
        RustBPETokenizer.from_directory(str(tmp_path))
    assert not trap.exists()


def test_damaged_foreign_and_missing_tokenizer_files_are_named(tok, tmp_path):
    with pytest.raises(FileNotFoundError, match="tok_train"):
        RustBPETokenizer.from_directory(str(tmp_path))
    tok.save(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(pickle.UnpicklingError, match=r"tokenizer\.pkl was not loaded"):
        RustBPETokenizer.from_directory(str(tmp_path))
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(pickle.UnpicklingError, match="holds a dict"):
        RustBPETokenizer.from_directory(str(tmp_path))


def test_the_module_functions_read_the_base_directory(tok, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "get_base_dir", lambda: str(tmp_path))
    tok.save(str(tmp_path / "tokenizer"))
    assert get_tokenizer().encode("the cat") == tok.encode("the cat")
    with pytest.raises(AssertionError, match=r"token_bytes\.pt.*tok_train"):
        get_token_bytes()
    torch.save(torch.arange(5, dtype=torch.int32), tmp_path / "tokenizer" / "token_bytes.pt")
    assert get_token_bytes().tolist() == [0, 1, 2, 3, 4]


# --- conversations ----------------------------------------------------------------------------------------------------

def test_a_conversation_is_rendered_turn_by_turn_and_only_the_assistant_is_trained(tok):
    ids, mask = tok.render_conversation({"messages": [
        {"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "sat"},
        {"role": "user", "content": "mat"}, {"role": "assistant", "content": "on"}]})
    bos, us, ue, as_, ae = specials(tok, "bos", "user_start", "user_end", "assistant_start", "assistant_end")
    expected = [([bos], 0), ([us], 0), (tok.encode("the cat?"), 0), ([ue], 0), ([as_], 0), (tok.encode("sat"), 1), ([ae], 1),
                ([us], 0), (tok.encode("mat"), 0), ([ue], 0), ([as_], 0), (tok.encode("on"), 1), ([ae], 1)]
    assert ids == [i for part, _ in expected for i in part]
    assert mask == [m for part, m in expected for _ in part]


def test_calls_of_the_calculator_are_trained_and_its_answers_are_not(tok):
    ids, mask = tok.render_conversation({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [
        {"type": "text", "text": "then "}, {"type": "python", "text": "1+2"}, {"type": "python_output", "text": "3"}]}]})
    ps, pe, os_, oe, ae = specials(tok, "python_start", "python_end", "output_start", "output_end", "assistant_end")
    tail = [*tok.encode("then "), ps, *tok.encode("1+2"), pe, os_, *tok.encode("3"), oe, ae]
    assert ids[-len(tail):] == tail
    trained = [i for i, m in zip(ids, mask) if m]
    assert trained == [*tok.encode("then "), ps, *tok.encode("1+2"), pe, ae]


def test_a_system_message_is_folded_into_the_first_user_message_without_touching_the_caller(tok):
    conversation = {"messages": [{"role": "system", "content": "in"}, {"role": "user", "content": "the"},
                                 {"role": "assistant", "content": "a"}]}
    merged = {"messages": [{"role": "user", "content": "in\n\nthe"}, {"role": "assistant", "content": "a"}]}
    assert tok.render_conversation(conversation) == tok.render_conversation(merged)
    assert conversation["messages"][1]["content"] == "the"


@pytest.mark.parametrize("messages, error", [
    ([{"role": "assistant", "content": "a"}], AssertionError),
    ([{"role": "user", "content": "a"}, {"role": "user", "content": "a"}], AssertionError),
    ([{"role": "system", "content": "a"}], AssertionError),
    ([{"role": "system", "content": "a"}, {"role": "assistant", "content": "a"}], AssertionError),
    ([{"role": "user", "content": ["a"]}], AssertionError),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": 3}], ValueError),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "image", "text": "a"}]}], ValueError),
])
def test_a_malformed_conversation_is_refused(tok, messages, error):
    with pytest.raises(error):
        tok.render_conversation({"messages": messages})


def test_long_conversations_are_cut_and_completion_stops_where_the_assistant_speaks(tok):
    conversation = {"messages": [{"role": "user", "content": "cat " * 3000}, {"role": "assistant", "content": "mat"}]}
    ids, mask = tok.render_conversation(conversation, max_tokens=50)
    assert len(ids) == len(mask) == 50
    assert len(tok.render_for_completion(conversation)) == 2049
    short = {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "mat"}]}
    whole, _ = tok.render_conversation(short)
    primed = tok.render_for_completion(short)
    assert primed == whole[:len(primed)] and primed[-1] == tok.encode_special("<|assistant_start|>")
    assert len(short["messages"]) == 2
    with pytest.raises(AssertionError, match="got user"):
        tok.render_for_completion({"messages": [{"role": "user", "content": "the"}]})


def test_the_visualization_shows_every_token_coloured_by_its_mask(tok):
    shown = tok.visualize_tokenization([ord("a"), ord("b")], [1, 0], with_token_id=True).split("|")
    assert "\033[92ma" in shown[0] and "(97)" in shown[0]
    assert "\033[91mb" in shown[1] and "(98)" in shown[1]

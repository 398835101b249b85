"""nanochat.engine: the cache, sampling, the calculator, and generation against GPT.generate and against scripted models."""
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from nanochat import engine
from nanochat.engine import Engine, KVCache, RowState, sample_next_token, use_calculator
from nanochat.gpt import GPT, GPTConfig

SPECIAL = ["<|bos|>", "<|assistant_end|>", "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"]
BOS, END, PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = range(128, 134)


class AsciiTokenizer:
    """Ids 0 to 127 are characters, then come the special tokens."""

    def encode_special(self, text):
        return 128 + SPECIAL.index(text)

    def get_bos_token_id(self):
        return BOS

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(chr(i) if i < 128 else SPECIAL[i - 128] for i in ids)


class MockModel:
    """As much of a model as the engine needs: `next_logits(row, position)` gives the logits after that many positions."""

    def __init__(self, next_logits, vocab_size=134, sequence_len=64):
        self.config = SimpleNamespace(n_kv_head=1, n_head=2, n_embd=8, n_layer=1, sequence_len=sequence_len)
        self.next_logits, self.vocab_size, self.inputs = next_logits, vocab_size, []

    def get_device(self):
        return torch.device("cpu")

    def forward(self, ids, kv_cache=None):
        B, T = ids.shape
        self.inputs.append(ids.clone())
        pos = kv_cache.get_pos()
        kv_cache.advance(T)
        return torch.stack([torch.stack([self.next_logits(b, pos + t + 1) for t in range(T)]) for b in range(B)])


def uniform(vocab_size=134, sequence_len=64) -> MockModel:
    return MockModel(lambda row, position: torch.zeros(vocab_size), vocab_size, sequence_len)


def scripted(prompt_len: int, *rows: list[int]) -> MockModel:
    """
    Row b says rows[b], then dots; forced tokens take the place of what it would have said. The first token of every row is
    that of rows[0], since one prompt is read for all.
    """
    def next_logits(row, position):
        i = position - prompt_len
        script = rows[row]
        return torch.nn.functional.one_hot(torch.tensor(script[i] if 0 <= i < len(script) else ord(".")), 134) * 50.0
    return MockModel(next_logits)


@pytest.fixture(scope="module")
def model() -> GPT:
    """Every weight random, so that nothing is zero or flat."""
    with torch.device("meta"):
        model = GPT(GPTConfig(sequence_len=48, vocab_size=134, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SL"))
    model.to_empty(device="cpu")
    model.init_weights()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=rng)
    return model


def columns(stream):
    return [list(column) for column, _ in stream]


# --- the cache ---

def cache(batch_size=2, num_heads=3, seq_len=10, head_dim=4, num_layers=5) -> KVCache:
    return KVCache(batch_size, num_heads, seq_len, head_dim, num_layers, "cpu", torch.float32)


def test_a_new_cache_is_empty_and_has_the_promised_shapes():
    c = cache()
    assert c.k_cache.shape == c.v_cache.shape == (5, 2, 10, 3, 4) and not c.k_cache.any() and not c.v_cache.any()
    assert c.cache_seqlens.dtype == torch.int32 and c.cache_seqlens.tolist() == [0, 0]
    assert (c.batch_size, c.max_seq_len, c.n_layers, c.n_heads, c.head_dim) == (2, 10, 5, 3, 4)
    assert c.get_pos() == 0 and c.prev_embedding is None
    assert KVCache(1, 1, 2, 2, 1, torch.device("cpu"), torch.bfloat16).v_cache.dtype == torch.bfloat16


def test_layer_caches_are_views():
    c = cache()
    k, v = c.get_layer_cache(3)
    assert k.shape == v.shape == (2, 10, 3, 4)
    k.fill_(1)
    v.fill_(2)
    assert c.k_cache.sum() == k.numel() and c.v_cache.sum() == 2 * v.numel() and (c.k_cache[3] == 1).all()


def test_positions_advance_and_reset_keeps_the_contents():
    c = cache()
    c.advance(4)
    c.advance(1)
    assert c.get_pos() == 5 and c.cache_seqlens.tolist() == [5, 5]
    c.prev_embedding = torch.ones(2, 1, 8)
    c.k_cache.fill_(3)
    c.reset()
    assert c.get_pos() == 0 and c.prev_embedding is None and (c.k_cache == 3).all()


def test_a_full_cache_says_so():
    c = cache()
    c.advance(10)
    with pytest.raises(ValueError, match="holds 10 positions, 10 are taken and 1 more do not fit"):
        c.advance(1)
    assert c.get_pos() == 10


@torch.no_grad()
def test_a_model_that_outgrows_its_cache_says_so_before_anything_is_lost(model):
    c = KVCache(1, 2, 6, 16, 3, "cpu", torch.float32)
    model(torch.arange(6)[None], kv_cache=c)
    before = c.k_cache.clone()
    with pytest.raises(ValueError, match="holds 6 positions"):
        model(torch.tensor([[7]]), kv_cache=c)
    assert torch.equal(c.k_cache, before)


def test_prefill_copies_what_is_written_to_every_row():
    source, target = cache(batch_size=1, seq_len=6), cache(batch_size=3, seq_len=10)
    source.k_cache.copy_(torch.randn(source.k_cache.shape))
    source.v_cache.copy_(torch.randn(source.v_cache.shape))
    source.advance(4)
    source.prev_embedding = torch.randn(1, 1, 8)
    target.prefill(source)
    assert target.cache_seqlens.tolist() == [4, 4, 4]
    for row in range(3):
        assert torch.equal(target.k_cache[:, row, :4], source.k_cache[:, 0, :4]) and not target.k_cache[:, row, 4:].any()
        assert torch.equal(target.v_cache[:, row, :4], source.v_cache[:, 0, :4]) and not target.v_cache[:, row, 4:].any()
    assert target.prev_embedding.shape == (3, 1, 8) and (target.prev_embedding == source.prev_embedding).all()
    source.prev_embedding.zero_()
    assert target.prev_embedding.any(), "a copy, not a view"


@pytest.mark.parametrize("change", [dict(seq_len=5), dict(num_layers=4), dict(num_heads=1), dict(head_dim=8)])
def test_prefill_refuses_what_does_not_fit(change):
    source = cache(batch_size=1, seq_len=6)
    with pytest.raises(AssertionError):
        cache(**change).prefill(source)
    used = cache()
    used.advance(1)
    with pytest.raises(AssertionError, match="holds 1 positions"):
        used.prefill(source)


# --- sampling ---

def test_temperature_zero_takes_the_maximum_without_a_draw():
    logits = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    assert sample_next_token(logits, None, temperature=0.0).tolist() == logits.argmax(-1, keepdim=True).tolist()
    with pytest.raises(AssertionError, match="-1"):
        sample_next_token(logits, None, temperature=-1)


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.5, None), (2.0, 4), (1.0, 0), (1.0, 99)])
def test_samples_follow_the_softmax_of_the_k_best(temperature, top_k):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1))
    kept = logits if not top_k else torch.where(logits >= logits.topk(min(top_k, 12)).values[-1], logits, float("-inf"))
    p = torch.softmax(kept / temperature, dim=-1)
    draws = 40_000
    ids = sample_next_token(logits.expand(draws, -1), torch.Generator().manual_seed(2), temperature, top_k)
    assert ids.shape == (draws, 1)
    error = (torch.bincount(ids[:, 0], minlength=12) / draws - p).abs()
    assert (error <= 5 * (p * (1 - p) / draws).sqrt()).all(), f"largest deviation {error.max()}"


# --- the calculator ---

@pytest.mark.parametrize("expr, value", [
    ("1+2", 3), ("12*3-4", 32), ("(1 + 2) * 3.5", 10.5), ("1,234 + 1", 1235), ("7/2", 3.5), ("7//2", 3), ("-5", -5),
    ("'strawberry'.count('r')", 3), ('"a.b_c D".count("D")', 1), ("'x'.count('y')", 0)])
def test_calculator_evaluates_arithmetic_and_counting(expr, value):
    assert use_calculator(expr) == value and type(use_calculator(expr)) is type(value)


@pytest.mark.parametrize("expr", [
    "2**10", "9 ** 9", "1/0", "1+", "", "(", "2 2", "x", "abs(3)", "'a'.upper()", "'a'.count('a') + 1", "'a'.count('a')\n", "[1]",
    "1;2",
    "'a'.count(open('b'))", "'a'.__class__.count('a')", "'IMPORT'.count('I')", "'getattr'.count('g')", "'setattr'.count('s')",
    "'profile'.count('p')", "é.count('e')", "'é'.count('e')", "len.count('a')", "0x10", "1 if 1 else 2", "1<2", "'a'*9.count('a')"])
def test_calculator_refuses_everything_else(expr):
    assert use_calculator(expr) is None


def test_evaluation_has_no_builtins_a_time_limit_and_no_warnings(recwarn):
    assert engine.eval_with_timeout("print(1)") is None and engine.eval_with_timeout("[1, 2][1]") == 2
    assert engine.eval_with_timeout("1(2)") is None and not recwarn.list  # "int object is not callable" would be a SyntaxWarning
    for_a_month = "[0 for a in r for b in r for c in r for d in r for e in r if a]".replace("in r", "in ([0] * 1000)")
    assert engine.eval_with_timeout(for_a_month, max_time=0.2) is None


def test_the_alarm_is_put_back_as_it_was():
    import signal
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeoutError, match="'f' took longer than 0.01 s"):
        with engine.timeout(0.01, "f"):
            time.sleep(5)
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_in_another_thread_the_calculator_has_no_answer():
    answers = []
    thread = threading.Thread(target=lambda: answers.append(use_calculator("1+1")))
    thread.start()
    thread.join()
    assert answers == [None]


# --- generating with a real model ---

@pytest.mark.parametrize("prompt", [[5], [5, 17, 99, 3], list(range(30))])
def test_greedy_generation_equals_the_model_s_own(model, prompt):
    """30 + 40 tokens: past the training context of 48, where the windows of the last layers begin to matter."""
    expected = list(model.generate(prompt, 40, temperature=0))
    rows = list(zip(*columns(Engine(model, AsciiTokenizer()).generate(prompt, num_samples=3, max_tokens=40, temperature=0))))
    for row in rows:
        row = list(row)
        end = next((i for i, token in enumerate(expected) if token in (BOS, END, PYTHON)), 40)
        assert row[:end] == expected[:end] and len(row) >= min(end + 1, 40)
    assert len(rows) == 3


def test_without_max_tokens_generation_stops_when_the_context_is_full():
    assert len(columns(Engine(scripted(3, []), AsciiTokenizer()).generate([1, 2, 3]))) == 64 - 3
    assert len(columns(Engine(scripted(63, []), AsciiTokenizer()).generate([1] * 63))) == 1
    for length in (64, 65):
        with pytest.raises(ValueError, match=f"prompt of {length} tokens fills the context of 64"):
            next(Engine(scripted(length, []), AsciiTokenizer()).generate([1] * length))
        assert len(columns(Engine(scripted(length, []), AsciiTokenizer()).generate([1] * length, max_tokens=2))) == 2


def test_a_real_model_runs_to_the_end_of_its_context(model):
    assert 1 <= len(columns(Engine(model, AsciiTokenizer()).generate([1] * 40, num_samples=2))) <= 8


# --- generating with mocks ---

@pytest.mark.parametrize("tokens", [[], "text", (1, 2), ["a"]])
def test_the_prompt_must_be_a_list_of_ids(tokens):
    with pytest.raises(AssertionError, match="list of token ids"):
        next(Engine(uniform(), AsciiTokenizer()).generate(tokens))


def test_rows_draw_independently_and_seeds_decide():
    make = lambda seed, **kw: columns(Engine(uniform(), AsciiTokenizer()).generate([1, 2], num_samples=16, max_tokens=4, seed=seed, **kw))
    first = make(42)
    assert first == make(42) and first != make(43)
    assert len(set(first[0])) > 8, "sixteen first tokens out of 134"
    assert make(1, temperature=0) == make(2, temperature=0)
    assert all(len(column) == 16 for column in first) and len(first) == 4
    assert make(42, top_k=1) != first


@pytest.mark.parametrize("max_tokens", [0, 1, 7])
def test_max_tokens_is_the_number_of_columns(max_tokens):
    stream = Engine(scripted(2, [], []), AsciiTokenizer()).generate([1, 2], num_samples=2, max_tokens=max_tokens)
    assert columns(stream) == [[ord("."), ord(".")]] * max_tokens


def test_the_prompt_is_read_once_and_each_column_after_it_once():
    mock = scripted(3, [65, 66], [65, 68])
    list(Engine(mock, AsciiTokenizer()).generate([7, 8, 9], num_samples=2, max_tokens=2))
    assert [ids.tolist() for ids in mock.inputs] == [[[7, 8, 9]], [[65], [65]], [[66], [68]]]


def test_ended_rows_go_on_until_all_have_ended():
    a, b, c = map(ord, "abc")
    mock = scripted(1, [a, END, b, c], [a, b, b, BOS])
    assert columns(Engine(mock, AsciiTokenizer()).generate([1], num_samples=2, max_tokens=10)) == [[a, a], [END, b], [b, b], [c, BOS]]


def text(ids) -> str:
    return AsciiTokenizer().decode(ids)


def test_the_calculator_s_answer_is_forced_after_the_expression():
    script = [PYTHON, *b"12*3", PYTHON_END, *b"xxxxxx"]
    stream = list(Engine(scripted(1, script), AsciiTokenizer()).generate([1], max_tokens=12))
    assert text([column[0] for column, _ in stream]) == "<|python_start|>12*3<|python_end|><|output_start|>36<|output_end|>xx"
    assert [mask[0] for _, mask in stream] == [1] * 6 + [0] * 4 + [1] * 2


@pytest.mark.parametrize("script", [
    [PYTHON, *b"2**9", PYTHON_END], [PYTHON, PYTHON_END], [*b"1+1", PYTHON_END], [PYTHON, *b"1/0", PYTHON_END]])
def test_without_an_answer_nothing_is_forced(script):
    stream = list(Engine(scripted(1, script), AsciiTokenizer()).generate([1], max_tokens=12))
    assert [column[0] for column, _ in stream] == script + [ord(".")] * (12 - len(script))
    assert all(mask == [1] for _, mask in stream)


def test_a_second_block_starts_afresh_and_zero_is_an_answer():
    script = [PYTHON, *b"1", PYTHON, *b"7-7", PYTHON_END, 0, 0, 0, PYTHON, *b"5+6", PYTHON_END]
    out = columns(Engine(scripted(1, script), AsciiTokenizer()).generate([1], max_tokens=19))
    assert text(column[0] for column in out) == ("<|python_start|>1<|python_start|>7-7<|python_end|><|output_start|>0<|output_end|>"
                                                 "<|python_start|>5+6<|python_end|><|output_start|>11<|output_end|>")


def test_tool_use_in_one_row_changes_no_draw_anywhere(monkeypatch):
    """The same uniform draws with a calculator that answers everything and one that answers nothing."""
    class Small(AsciiTokenizer):
        """Six special tokens and two letters, so that blocks open and close all the time."""
        def encode_special(self, text):
            return SPECIAL.index(text) + 2 if text != "<|assistant_end|>" else 98  # never drawn

        def get_bos_token_id(self):
            return 99  # never drawn

        def encode(self, text):
            return [0, 1, 0]

        def decode(self, ids):
            return "?"

    def run(answer):
        monkeypatch.setattr(engine, "use_calculator", lambda expr: answer)
        mock = uniform(vocab_size=8)
        return list(Engine(mock, Small()).generate([1], num_samples=5, max_tokens=60, seed=3))

    plain, forced = run(None), run(4)
    assert len(plain) == len(forced) == 60 and all(mask == [1] * 5 for _, mask in plain)
    masks = torch.tensor([mask for _, mask in forced])
    assert 0.1 < (masks == 0).float().mean() < 0.9
    a, b = torch.tensor(columns(plain)), torch.tensor(columns(forced))
    assert torch.equal(a[masks == 1], b[masks == 1]) and not torch.equal(a, b)


def test_generate_batch_returns_whole_sequences_without_their_last_token():
    a, b = map(ord, "ab")
    mock = scripted(2, [a, END, b, b], [a, b, BOS, a], [a, PYTHON, *b"1+1", PYTHON_END, 0, 0, 0, END])
    results, masks = Engine(mock, AsciiTokenizer()).generate_batch([1, 2], num_samples=3, max_tokens=30)
    assert results == [[1, 2, a], [1, 2, a, b], [1, 2, a, PYTHON, *b"1+1", PYTHON_END, OUTPUT, ord("2"), OUTPUT_END]]
    assert masks == [[0, 0, 1], [0, 0, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0]]
    assert len(mock.inputs) == 1 + 9, "nothing is computed after the last row has ended"


def test_generate_batch_keeps_all_of_a_row_that_does_not_end():
    results, masks = Engine(scripted(1, []), AsciiTokenizer()).generate_batch([9], max_tokens=3)
    assert (results, masks) == ([[9, 46, 46, 46]], [[0, 1, 1, 1]])


def test_row_states_share_nothing():
    one, two = RowState(), RowState()
    one.current_tokens.append(1)
    one.forced_tokens.append(2)
    assert two.current_tokens == [] and not two.forced_tokens and not two.in_python_block and not two.completed
    assert RowState([4]).current_tokens == [4] and two.python_expr_tokens == []


def test_the_command_compares_both_ways(monkeypatch, model, capsys):
    class Prompting(AsciiTokenizer):
        def encode(self, text, prepend=None):
            return ([] if prepend is None else [prepend]) + super().encode(text)

    monkeypatch.setattr(engine, "load_model", lambda source, device, phase: (model, Prompting(), {}))
    monkeypatch.setattr(engine, "compute_init", lambda device_type: (False, 0, 0, 1, torch.device("cpu")))
    monkeypatch.setattr(engine, "autodetect_device_type", lambda: "cpu")
    engine.main(["--max-tokens", "6"])
    out = capsys.readouterr().out
    assert "GPT.generate" in out and "Engine.generate" in out and "The two agree: True" in out

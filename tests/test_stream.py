import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat_cl import files, stream
from nanochat_cl.command import UserError
from nanochat_cl.stream import SCHEDULES, Stream

T, ROWS = 16, 4
SIZES = {"small": 3, "large": 40, "middle": 12}


class Words:
    """A tokenizer of characters."""
    def get_bos_token_id(self): return 0
    def get_vocab_size(self): return 128
    def decode_single_token_bytes(self, token): return bytes([token])
    def encode(self, texts, prepend=None): return [[prepend, *text.encode()] for text in texts]


def table(path, documents):
    path.parent.mkdir(parents=True, exist_ok=True)
    texts, names = [t for t, _ in documents], [s for _, s in documents]
    pq.write_table(pa.table({"text": texts, "subdomain": names, "key": texts}), path)


@pytest.fixture
def folder(tmp_path):
    r = random.Random(0)
    text = lambda: "".join(r.choice("abcdefghij ") for _ in range(r.randint(5, 90)))
    documents = [(text(), name) for name, n in SIZES.items() for _ in range(n)]
    r.shuffle(documents)
    table(tmp_path / "base" / "corpora" / "toy" / "train.parquet", documents)
    return tmp_path / "base" / "corpora" / "toy"


def make(folder, schedule="cyclic", seed=1, order="seed", **kwargs):
    files.write_json(folder / "corpus.json", {"order": order})
    return Stream(folder, Words(), schedule, seed, **{"rows": ROWS, "seq_len": T, "visit_tokens": 2 * ROWS * T, **kwargs})


def sequences(folder):
    """The token sequence of each sub-domain, the obvious way."""
    rows = pq.read_table(folder / "train.parquet").to_pylist()
    return {name: [token for row in rows if row["subdomain"] == name for token in (0, *row["text"].encode())] for name in SIZES}


def steps_of_an_epoch(s):
    return s.total_tokens // (T * ROWS)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_token_is_a_target_exactly_once_an_epoch_and_rows_begin_with_bos(folder, schedule):
    s, expected = make(folder, schedule, repeat=True), sequences(folder)
    seen = {name: np.zeros(len(tokens) // T * T, int) for name, tokens in expected.items()}
    for step in range(s.total_tokens // T):  # ROWS epochs in whole batches
        batch = s.batch(step)
        assert batch.inputs.shape == batch.targets.shape == (ROWS, T) and batch.inputs.dtype == batch.targets.dtype == torch.int64
        for inputs, targets, name, (same, offset) in zip(batch.inputs, batch.targets, batch.subdomains, s.places(step)):
            assert name == same and targets.tolist() == expected[name][offset:offset + T]
            assert inputs[0] == 0 and inputs[1:].tolist() == targets[:-1].tolist()
            seen[name][offset:offset + T] += 1
        if (step + 1) * ROWS % (s.total_tokens // T) < ROWS:  # an epoch has just ended: no token is more than one visit ahead of another
            assert max(c.max() for c in seen.values()) - min(c.min() for c in seen.values()) <= 1
    assert all((counts == ROWS).all() for counts in seen.values())
    assert s.total_tokens == sum(len(counts) for counts in seen.values())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_batch_depends_on_nothing_but_its_step(folder, schedule):
    s = make(folder, schedule, repeat=True, replay=0)
    late, early = s.batch(3 * steps_of_an_epoch(s)), s.batch(2)
    fresh = make(folder, schedule, repeat=True)
    assert torch.equal(fresh.batch(2).inputs, early.inputs) and torch.equal(fresh.batch(3 * steps_of_an_epoch(s)).targets, late.targets)
    assert torch.equal(s.batch(2).targets, early.targets)


@pytest.fixture
def general(folder, monkeypatch):
    from nanochat import dataset
    data = folder.parent.parent / "shards"
    for i in range(3):
        table(data / f"shard_{i:05d}.parquet", [(f"{chr(65 + i)}" * 30, "") for _ in range(9)])
    monkeypatch.setattr(dataset, "DATA_DIR", str(data))
    return data


def test_replay_is_the_asked_share_of_general_training_text_and_leaves_the_domain_in_order(folder, general):
    s, plain = make(folder, "sequential", replay=0.15), make(folder, "sequential")
    names = [name for step in range(20) for name in s.batch(step).subdomains]
    assert abs(names.count("general") - 0.15 * len(names)) < 1
    domain = [row for step in range(20) for row in s.places(step) if row[0] != "general"]
    assert domain == [row for step in range(20) for row in plain.places(step)][:len(domain)]
    replayed = [t for step in range(40) for t, name in zip(s.batch(step).targets.tolist(), s.batch(step).subdomains) if name == "general"]
    text = {chr(c) for row in replayed for c in row if c}
    assert text == {"A", "B"}, f"the last shard is held out: {text}"
    first = [row for step in range(200) for row in make(folder, "iid", replay=0.15, repeat=True).places(step) if row[0] == "general"][:33]
    assert len(set(first)) == len(first) == 33 == 2 * 9 * 31 // T - 1, "33 of the 34 rows of general text before any comes again"
    assert s.unique_tokens(20) == len(domain) * T


def test_schedules_are_what_their_names_say(folder):
    rows = lambda s: [name for step in range(steps_of_an_epoch(s)) for name, _ in s.places(step)]
    runs = lambda names: [(name, 1) for i, name in enumerate(names) if i == 0 or names[i - 1] != name]
    sequential = make(folder, "sequential")
    assert [name for name, _ in runs(rows(sequential))] == sequential.subdomains
    cyclic = rows(make(folder, "cyclic"))
    assert 3 < len(runs(cyclic)) < len(runs(rows(make(folder, "iid"))))
    drift = np.array([make(folder, "drift", order="name").subdomains.index(name) for name in rows(make(folder, "drift", order="name"))])
    windows = [drift[i:i + 12] for i in range(0, len(drift) - 11, 12)]
    assert np.all(np.diff([w.mean() for w in windows]) > -0.35) and drift[:5].mean() < 0.5 < 1.5 < drift[-5:].mean()
    assert any(len(set(w)) > 1 for w in windows)


def test_a_visit_to_each_subdomain_comes_before_the_second_to_any(folder):
    s = make(folder, "cyclic", visit_tokens=ROWS * T, order="size")
    assert s.subdomains == ["large", "middle", "small"]
    assert [s.current(step) for step in range(4)] == ["large", "middle", "small", "large"]
    assert [s.seen(step) for step in (0, 1, 3)] == [[], ["large"], ["large", "middle", "small"]]
    assert [s.places(step)[0] for step in (0, 3)] == [("large", 0), ("large", ROWS * T)], "the second visit goes on where the first ended"


def test_the_order_of_subdomains_is_by_name_by_size_or_as_they_come(folder):
    table(folder / "train.parquet", [("y" * 90, "b"), ("x" * 80, "c"), ("x" * 100, "c"), ("z" * 99, "a")])
    assert [make(folder, order=order).subdomains for order in ("name", "size", "given")] == [["a", "b", "c"], ["c", "a", "b"], ["b", "c", "a"]]


def test_a_visit_is_whole_batches_with_replay_or_without(folder, general):
    visited = lambda **kwargs: [{*s.batch(step).subdomains} - {"general"} for s in [make(folder, order="size", **kwargs)] for step in range(4)]
    large, middle, small = {"large"}, {"middle"}, {"small"}
    assert visited(replay=0.25) == visited(replay=0.25, visit_tokens=100) == [large, large, middle, middle], "three rows a batch are the domain's"
    assert visited(visit_tokens=10) == visited(visit_tokens=90) == [large, middle, small, large], "at least one batch, and 1.4 are one"


def test_a_stream_of_any_length_knows_how_much_it_holds(folder, monkeypatch):
    monkeypatch.setattr(stream, "token_files", lambda *_: {"a": np.broadcast_to(np.uint16(1), 10**13)})
    assert make(folder, max_tokens=10**13 // (ROWS * T) * ROWS * T).total_tokens == 10**13
    with pytest.raises(UserError, match="holds 10,000,000,000,000 tokens"):
        make(folder, max_tokens=10**13 + 1)


def test_a_long_document_runs_through_consecutive_rows(folder):
    table(folder / "train.parquet", [("x" + "".join(chr(97 + i % 26) for i in range(500)), "only")])
    s = make(folder, "sequential")
    text = "".join(map(chr, (t for step in range(steps_of_an_epoch(s)) for row in s.batch(step).targets.tolist() for t in row)))
    assert text == ("\0x" + "".join(chr(97 + i % 26) for i in range(500)))[:len(text)] and len(text) >= 440


def test_the_same_seed_gives_the_same_batches_and_another_seed_another_order(folder):
    orders = {tuple(make(folder, "sequential", seed=seed).subdomains) for seed in range(12)}
    assert len(orders) > 2 and all(sorted(order) == sorted(SIZES) for order in orders)
    a, b, c = (make(folder, "iid", seed=seed) for seed in (1, 1, 2))
    assert all(a.places(i) == b.places(i) for i in range(5)) and any(a.places(i) != c.places(i) for i in range(5))
    again = make(folder, "iid", repeat=True)
    first, second = ([again.places(i + n) for i in range(5)] for n in (0, steps_of_an_epoch(again)))
    assert first != second, "each epoch has its own order"


def test_a_stream_that_is_too_short_is_refused_before_training_unless_it_may_repeat(folder):
    have = make(folder).total_tokens // (ROWS * T) * ROWS * T
    with pytest.raises(UserError, match=f"holds {have:,} tokens but --max-tokens asks for {have + 1:,}; add documents or pass --repeat"):
        make(folder, max_tokens=have + 1)
    assert make(folder, max_tokens=have).batch(have // (ROWS * T) - 1)
    s = make(folder, max_tokens=10 * have, repeat=True)
    step = 2 * s.total_tokens // (ROWS * T)
    assert s.unique_tokens(step) == s.total_tokens and 1.9 < s.epoch(step) <= 2
    with pytest.raises(UserError, match="has ended"):
        make(folder).batch(step)


def test_what_does_not_fit_is_said_in_one_line(folder):
    for kwargs, message in (({"schedule": "random"}, "--schedule must be one of"), ({"order": "age"}, "name, size, given, time, seed, got .age"),
                            ({"seq_len": 200}, "small .*add documents")):
        with pytest.raises(UserError, match=message) as e:
            make(folder, **kwargs)
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="nanochat_cl.domain"):
        make(folder.parent)
    with pytest.raises(UserError, match="row of 16 in general .0.; add documents"):
        make(folder, replay=0.5)


def test_tokens_are_made_once_and_again_when_the_text_or_the_tokenizer_changes(folder, monkeypatch):
    calls = []
    tokenize = stream._tokenize
    monkeypatch.setattr(stream, "_tokenize", lambda *a: calls.append(1) or tokenize(*a))
    before = make(folder).batch(0)
    assert torch.equal(make(folder).batch(0).inputs, before.inputs) and len(calls) == 1
    other = Words()
    other.get_vocab_size = lambda: 100_000
    other.decode_single_token_bytes = lambda token: b"%d" % token
    assert torch.equal(Stream(folder, other, "cyclic", 1, ROWS, T, 2 * ROWS * T).batch(0).inputs, before.inputs) and len(calls) == 2
    assert {files.read_json(p)["dtype"] for p in folder.glob("tokens/*/index.json")} == {"uint16", "uint32"}
    table(folder / "train.parquet", [("z" * 2000, "only")])
    assert make(folder).batch(0).targets[0, 1] == ord("z") and len(calls) == 3


def test_replay_lengthens_the_stream_to_exactly_the_last_batch_it_can_fill(folder, general):
    for replay in (0.05, 0.15, 0.3, 0.5):
        with pytest.raises(UserError) as e:
            make(folder, replay=replay, max_tokens=10**6)
        have = int(str(e.value).split("holds ")[1].split(" ")[0].replace(",", ""))
        s = make(folder, replay=replay, max_tokens=have)
        assert s.batch(have // (ROWS * T) - 1) and s.unique_tokens(have // (ROWS * T)) <= s.total_tokens
        with pytest.raises(UserError, match="has ended"):
            s.batch(have // (ROWS * T))


def test_replay_into_a_domain_with_a_subdomain_called_general_is_refused(folder, general):
    table(folder / "train.parquet", [("y" * 200, "general"), ("x" * 200, "law")])
    assert set(make(folder, "iid").subdomains) == {"general", "law"}
    with pytest.raises(UserError, match="--replay and a sub-domain called general cannot be told apart; rename it"):
        make(folder, "iid", replay=0.1)


def test_replay_takes_no_part_in_what_is_seen(folder, general):
    s = make(folder, "sequential", order="size", replay=0.5)
    for step in range(30):
        try:
            domain = [name for i in range(step) for name, _ in s.places(i) if name != "general"]
        except UserError:
            break
        assert s.seen(step) == list(dict.fromkeys(domain)), step


def test_every_pass_over_the_general_text_has_its_own_order(folder, general):
    s = make(folder, "iid", replay=0.5, repeat=True)
    rows = [row for step in range(40) for row in s.places(step) if row[0] == "general"]
    n = 2 * 9 * 31 // T
    assert sorted(rows[:n]) == sorted(rows[n:2 * n]) and rows[:n] != rows[n:2 * n]


def test_on_a_tie_the_current_sub_domain_is_the_later_one(folder):
    table(folder / "train.parquet", [("x" * (T * 6 - 1), "a"), ("y" * (T * 6 - 1), "b")])
    s = make(folder, "sequential", order="name")
    assert [s.current(step) for step in range(3)] == ["a", "b", "b"]


def test_drift_fades_in_and_out_over_the_neighbours_time(folder):
    table(folder / "train.parquet", [(c * (T * 40 - 1), c) for c in "abc"])
    s = make(folder, "drift", order="name")
    names = [name for step in range(30) for name, _ in s.places(step)]
    first, last = (lambda c: names.index(c)), (lambda c: 119 - names[::-1].index(c))
    # b begins where half of a is over and ends where half of c is; a and c meet in the middle of b
    assert first("b") < 32 and last("b") > 87 and last("a") > 45 and first("c") < 75, (first("b"), last("b"), last("a"), first("c"))


def test_each_epoch_of_iid_has_its_own_order(folder):
    s = make(folder, "iid", repeat=True)
    n = s.total_tokens // T
    first, second = ([s._place(epoch * n + row) for row in range(n)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) and first != second


def test_a_batch_of_replay_alone_is_where_the_one_before_it_was(folder, general):
    s = make(folder, "sequential", order="name", replay=0.9, repeat=True)
    rows = [[name for name, _ in s.places(step) if name != "general"] for step in range(20)]
    assert [] in rows
    now = next(mine for mine in rows if mine)[-1]
    for step, mine in enumerate(rows):
        now = max(reversed(mine), key=mine.count) if mine else now
        assert s.current(step) == now, step

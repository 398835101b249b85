"""
nanochat.dataloader against a slow best-fit packer, and resume at any batch.

Documents are strings of numbers that are unique in the corpus ("17 18 19"); the toy tokenizer reads them as those ids. So a
token in a batch says which document it is from and where in it.
"""
import json
import random
import threading
import time
from itertools import islice, takewhile
from queue import SimpleQueue

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat import dataloader
from nanochat.dataloader import (_ahead, _document_batches, exact_state, tokenizing_distributed_data_loader_bos_bestfit,
                                 tokenizing_distributed_data_loader_with_state_bos_bestfit)

BOS = 0


class NumberTokenizer:
    def get_bos_token_id(self) -> int:
        return BOS

    def encode(self, texts: list[str], prepend: int, num_threads: int) -> list[list[int]]:
        return [[prepend, *map(int, text.split())] for text in texts]


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """corpus(shards): write shards, each a list of row groups, each a list of document lengths; returns the documents likewise."""
    count = [0]

    def build(shards: list[list[list[int]]]) -> list[list[list[str]]]:
        count[0] += 1
        folder = tmp_path / str(count[0])
        folder.mkdir()
        number, texts = 1, []
        for i, row_groups in enumerate(shards):
            texts.append([])
            with pq.ParquetWriter(folder / f"shard_{i:05d}.parquet", pa.schema([("text", pa.string())])) as writer:
                for lengths in row_groups:
                    documents = []
                    for length in lengths:
                        documents.append(" ".join(map(str, range(number, number + length))))
                        number += length
                    writer.write_table(pa.table({"text": pa.array(documents, pa.string())}))
                    texts[-1].append(documents)
        paths = sorted(str(p) for p in folder.iterdir())
        monkeypatch.setattr(dataloader, "list_parquet_files", lambda data_dir=None, warn_on_legacy=False: paths)
        return texts
    return build


def as_rank(monkeypatch, rank: int, world_size: int) -> None:
    monkeypatch.setattr(dataloader, "get_dist_info", lambda: (world_size > 1, rank, rank, world_size))


def loader(B=2, T=8, split="train", resume=None, chunk=3, buffer=5):
    return tokenizing_distributed_data_loader_with_state_bos_bestfit(
        NumberTokenizer(), B, T, split, tokenizer_batch_size=chunk, device="cpu", resume_state_dict=resume, buffer_size=buffer)


def take(batches, n: int) -> list[tuple[list, list, dict]]:
    """The next n batches as plain data."""
    return [(x.tolist(), y.tolist(), json.loads(json.dumps(state))) for x, y, state in islice(batches, n)]


def random_shards(rng: random.Random, longest: int) -> list[list[list[int]]]:
    return [[[rng.randint(0, longest) for _ in range(rng.randint(1, 9))] for _ in range(rng.randint(1, 4))]
            for _ in range(rng.randint(2, 4))]


def slow_best_fit(chunks, capacity: int, buffer_size: int):
    """The obvious packer: rows of exactly `capacity` tokens from an endless iterator of lists of token lists."""
    waiting = []
    while True:
        row = []
        while len(row) < capacity:
            while len(waiting) < buffer_size:
                waiting = waiting + next(chunks)
            fitting = [doc for doc in waiting if len(doc) <= capacity - len(row)]
            if fitting:
                chosen = [doc for doc in fitting if len(doc) == max(map(len, fitting))][0]
            else:
                chosen = [doc for doc in waiting if len(doc) == min(map(len, waiting))][0]
            waiting = [doc for doc in waiting if doc is not chosen]
            row = (row + chosen)[:capacity]
        yield row


def endless_chunks(texts, size: int, rank: int = 0, world_size: int = 1):
    while True:
        for shard in texts:
            for documents in shard[rank::world_size]:
                for i in range(0, len(documents), size):
                    yield [[BOS, *map(int, d.split())] for d in documents[i:i + size]]


def test_rows_equal_those_of_a_slow_best_fit_packer(corpus, monkeypatch):
    rng = random.Random(1)
    for case in range(40):
        texts = corpus(random_shards(rng, longest=rng.choice([4, 12, 30])))
        B, T, chunk, buffer = rng.randint(1, 3), rng.randint(1, 16), rng.randint(1, 5), rng.randint(1, 12)
        world_size = rng.randint(1, min(len(shard) for shard in texts))
        rank = rng.randrange(world_size)
        as_rank(monkeypatch, rank, world_size)
        split = rng.choice(["train", "val"])
        shards = texts[:-1] if split == "train" else texts[-1:]
        oracle = slow_best_fit(endless_chunks(shards, chunk, rank, world_size), T + 1, buffer)
        for x, y, _ in take(loader(B, T, split, chunk=chunk, buffer=buffer), 12):
            for inputs, targets in zip(x, y):
                row = next(oracle)
                assert (inputs, targets) == (row[:-1], row[1:]), (
                    f"case {case}: B={B} T={T} chunk={chunk} buffer={buffer} rank {rank}/{world_size}")


def test_every_fetched_token_is_emitted_or_cropped_at_a_row_end_or_waits_in_the_buffer(corpus):
    texts = corpus([[[5, 1, 9, 14, 2, 7, 3], [4, 4, 30, 6]], [[3, 8, 11, 2, 2, 2]], [[1]]])
    length = {int(d.split()[0]): len(d.split()) for shard in texts[:-1] for group in shard for d in group}
    emitted, rows = set(), []
    for x, y, state in take(loader(B=3, T=10), 2):
        rows += [inputs + targets[-1:] for inputs, targets in zip(x, y)]
    for row in rows:
        assert row[0] == BOS and len(row) == 11
        starts = [i for i, token in enumerate(row) if token == BOS]
        for start, end in zip(starts, starts[1:] + [len(row)]):
            document = row[start + 1:end]
            if not document:  # a row may end with a lone BOS
                assert end == len(row)
                continue
            assert document == list(range(document[0], document[0] + len(document)))
            assert len(document) == length[document[0]] or end == len(row), "only the last document of a row may be cropped"
            assert document[0] not in emitted, "no document twice within an epoch"
            emitted.add(document[0])
    assert state["epoch"] == 1, "the case is made to end within the first epoch"
    waiting = set()
    for key, numbers in state["buffer"].items():
        pq_idx, rg_idx, epoch, chunk = map(int, key.split("/"))
        for number in map(int, numbers.split()):
            waiting.add(int(texts[pq_idx][rg_idx][3 * chunk + number].split()[0]))
    fetched = {int(d.split()[0]) for pq_idx, shard in enumerate(texts) for rg_idx, group in enumerate(shard) for i, d in enumerate(group)
               if (pq_idx, rg_idx, i // 3) <= (state["pq_idx"], state["rg_idx"], state["chunk"])}
    assert not emitted & waiting and emitted | waiting <= fetched
    assert len(fetched - emitted - waiting) == sum(row[-1] == BOS for row in rows), "the rest was cropped to its BOS"


def test_resume_at_any_batch_gives_the_very_next_batches_and_states(corpus, monkeypatch):
    rng = random.Random(2)
    for case in range(30):
        corpus(random_shards(rng, longest=rng.choice([4, 12, 30])))
        size = dict(B=rng.randint(1, 3), T=rng.randint(2, 16), chunk=rng.randint(1, 5), buffer=rng.randint(1, 12))
        whole = take(loader(**size), 16)
        stop = rng.randint(1, 12)
        resumed = take(loader(**size, resume=whole[stop - 1][2]), 16 - stop)
        assert resumed == whole[stop:], f"case {case}: {size}, stopped after {stop}"


def permuted(original, calls: list):
    """What a patch does: permute the documents of each yielded list, depending on nothing but the place and the list."""
    def document_batches(split, resume_state_dict, tokenizer_batch_size):
        calls.append(resume_state_dict)
        for documents, position in original(split, resume_state_dict, tokenizer_batch_size):
            documents = list(documents)
            random.Random(repr((position, documents))).shuffle(documents)
            yield documents, position
    return document_batches


def test_resume_is_exact_when_the_document_generator_is_replaced_by_one_that_permutes_each_list(corpus, monkeypatch):
    rng = random.Random(3)
    calls = []
    original = dataloader._document_batches
    for case in range(10):
        corpus([[[rng.randint(3, 4) for _ in range(9)] for _ in range(3)] for _ in range(3)])
        plain = take(loader(), 14)
        monkeypatch.setattr(dataloader, "_document_batches", permuted(original, calls))
        whole = take(loader(), 14)
        assert calls, "the generator must be looked up when it is called"
        assert [b[0] for b in whole] != [b[0] for b in plain]
        stop = rng.randint(1, 10)
        assert take(loader(resume=whole[stop - 1][2]), 14 - stop) == whole[stop:]
        monkeypatch.setattr(dataloader, "_document_batches", original)


def test_resume_is_exact_on_every_rank_from_one_state_that_holds_all(corpus, monkeypatch):
    corpus([[[3, 9, 2, 7, 5, 5, 1]] * 5, [[4, 4, 6, 10]] * 4, [[1]] * 3])
    whole = {}
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        whole[rank] = take(loader(), 9)
    saved = {**whole[0][3][2], "other_ranks": [whole[r][3][2] for r in (1, 2)]}
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        assert take(loader(resume=saved), 5) == whole[rank][4:]
    as_rank(monkeypatch, 0, 2)
    assert exact_state(saved) is None, "another number of ranks reads other row groups"


def test_a_state_is_small_plain_data(corpus):
    corpus([[[3] * 200] * 6, [[1]]])
    x, y, state = next(loader(chunk=128, buffer=1000))
    assert json.loads(json.dumps(state)) == state
    assert len(json.dumps(state)) < 8_000
    assert {"pq_idx", "rg_idx", "epoch"} <= set(state)


def test_a_plain_position_continues_at_the_row_group_behind_it(corpus, monkeypatch):
    texts = corpus([[[2]] * 5, [[2]] * 5, [[1]]])
    as_rank(monkeypatch, 1, 2)
    first = lambda pq_idx, rg_idx: next(_document_batches("train", {"pq_idx": pq_idx, "rg_idx": rg_idx, "epoch": 4}, 10))
    assert first(0, 1) == (texts[0][3], (0, 3, 4))
    assert first(0, 0) == (texts[0][3], (0, 3, 4)), "rank 0's position serves the others too"
    assert first(0, 3) == (texts[1][1], (1, 1, 4)), "past the end of a file: the next one, from the rank's first row group"
    assert first(1, 3) == (texts[0][1], (0, 1, 5)), "past the last file: the next epoch"
    x, y, state = next(loader(T=2, B=1, chunk=10, buffer=1, resume={"pq_idx": 0, "rg_idx": 1, "epoch": 1}))
    assert x.tolist()[0][1] == int(texts[0][3][0].split()[0])


def test_epochs_count_from_one_and_ranks_share_the_row_groups(corpus, monkeypatch):
    texts = corpus([[[1, 1, 1], [1, 1]], [[1], [1], [1]], [[1]]])
    seen = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        for documents, position in _document_batches("train", None, 2):
            if position[2] == 2:
                break
            seen += documents
    assert sorted(seen) == sorted(d for shard in texts[:-1] for group in shard for d in group)


@pytest.mark.parametrize("shards, world_size", [([[[5, 5]]], 1), ([[[5], [5]], [[5]]], 3), ([[[]], [[5]]], 1)])
def test_a_rank_without_documents_says_so_instead_of_spinning(corpus, monkeypatch, shards, world_size):
    corpus(shards)
    as_rank(monkeypatch, world_size - 1, world_size)
    with pytest.raises(ValueError, match=f"rank {world_size - 1} of {world_size} finds no document in the train split.*two shards"):
        next(loader())
    with pytest.raises(ValueError, match="finds no document"):
        next(loader(resume={"pq_idx": 0, "rg_idx": 0, "epoch": 1}))


def test_an_empty_folder_an_unknown_split_and_a_cut_shard_are_refused(corpus, monkeypatch, tmp_path):
    corpus([[[5] * 50], [[5]]])
    with pytest.raises(AssertionError, match="'test'"):
        next(loader(split="test"))
    path = dataloader.list_parquet_files()[0]
    with open(path, "r+b") as f:
        f.truncate(100)
    with pytest.raises(ValueError, match=r"shard_00000\.parquet"):
        next(loader())
    monkeypatch.setattr(dataloader, "list_parquet_files", lambda warn_on_legacy: [])
    with pytest.raises(AssertionError, match="no parquet files"):
        next(loader())


def test_exact_resume_on_other_text_is_refused(corpus):
    corpus([[[5] * 9] * 3, [[5]]])
    state = take(loader(), 3)[-1][2]
    corpus([[[5] * 2] * 3, [[5]]])
    with pytest.raises(ValueError, match="not the one this run was trained on"):
        next(loader(resume=state))


def test_a_batch_stays_as_it_was_while_later_ones_come(corpus):
    corpus([[[3, 4, 5, 6, 7]] * 4, [[5]]])
    batches = loader()
    x1, y1, _ = next(batches)
    before = x1.clone(), y1.clone()
    x2, y2, _ = next(batches)
    assert torch.equal(x1, before[0]) and torch.equal(y1, before[1]) and not torch.equal(x1, x2)
    assert x2.dtype == y2.dtype == torch.int64 and x2.shape == y2.shape == (2, 8) and x2.is_contiguous() and y2.is_contiguous()


def test_two_ranks_see_the_documents_that_one_rank_sees(corpus, monkeypatch):
    texts = corpus([[[1, 2, 3], [2, 2], [5], [1, 1]], [[3], [1, 4]], [[1]]])
    seen = {}
    for rank, world_size in [(0, 1), (0, 2), (1, 2)]:
        as_rank(monkeypatch, rank, world_size)
        first_epoch = takewhile(lambda batch: batch[1][2] == 1, _document_batches("train", None, 2))
        seen[rank, world_size] = [document for documents, _ in first_epoch for document in documents]
    assert not set(seen[0, 2]) & set(seen[1, 2])
    assert sorted(seen[0, 2] + seen[1, 2]) == sorted(seen[0, 1]) == sorted(d for shard in texts[:-1] for group in shard for d in group)


# --- running ahead ----------------------------------------------------------------------------------------------------

def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.002)


def packing_threads(besides: set = frozenset()) -> set:
    return {thread for thread in threading.enumerate() if thread.name == "packing"} - besides


def test_packing_runs_ahead_by_the_bound_and_no_further_and_keeps_the_order():
    made = []

    def numbers():
        for i in range(50):
            made.append(i)
            yield i
    ahead, got = _ahead(numbers(), 4), []
    for i in range(46):
        got.append(next(ahead))
        wait_for(lambda: len(made) == i + 1 + 4)  # four wait while the consumer works on this one
        time.sleep(0.001)
        assert len(made) == i + 1 + 4
    assert got + list(ahead) == list(range(50))


def test_a_consumer_that_works_longer_than_packing_takes_never_finds_the_queue_empty(corpus, monkeypatch):
    corpus([[[3, 4, 5, 6, 7] * 20] * 4, [[5]]])
    waiting = []

    class Counting(SimpleQueue):
        def get(self):
            waiting.append(self.qsize())
            return super().get()
    monkeypatch.setattr(dataloader, "SimpleQueue", Counting)
    batches = loader(B=4, T=64)
    next(batches)
    for _ in range(20):
        time.sleep(0.03)  # a step; packing 4 rows takes about a millisecond
        next(batches)
    assert len(waiting) == 21 and sum(n == 0 for n in waiting[1:]) <= 1, waiting  # one, lest a busy machine fail the test


def test_an_error_while_packing_reaches_the_consumer_after_the_batches_before_it(corpus, monkeypatch):
    corpus([[[3] * 4] * 4, [[5]]])
    original = dataloader._document_batches

    def breaking(*args):
        yield from islice(original(*args), 4)
        raise RuntimeError("the disk is gone")
    expected = take(loader(B=1, T=3, buffer=1), 3)
    monkeypatch.setattr(dataloader, "_document_batches", breaking)
    batches = loader(B=1, T=3, buffer=1)
    assert take(batches, 3) == expected
    with pytest.raises(RuntimeError, match="the disk is gone"):
        for _ in range(1000):
            next(batches)


def test_the_thread_ends_with_its_loader(corpus):
    corpus([[[3, 4, 5]] * 4, [[5]]])
    others = packing_threads()  # of tests before
    batches = loader()
    next(batches)
    assert [thread.daemon for thread in packing_threads(others)] == [True]
    batches.close()
    wait_for(lambda: not packing_threads(others))
    plain = tokenizing_distributed_data_loader_bos_bestfit(NumberTokenizer(), 2, 8, "train", device="cpu", buffer_size=4)
    next(plain)
    assert len(packing_threads(others)) == 1
    del plain
    wait_for(lambda: not packing_threads(others))


def test_the_loader_without_states_gives_the_same_batches_each_time_it_is_built(corpus):
    corpus([[[5]], [[3, 9, 2, 7, 5, 5, 1, 12]] * 3])
    build = lambda: tokenizing_distributed_data_loader_bos_bestfit(
        NumberTokenizer(), 2, 8, "val", device=torch.device("cpu"), buffer_size=4)
    first = [(x.tolist(), y.tolist()) for x, y in islice(build(), 6)]
    assert first == [(x.tolist(), y.tolist()) for x, y in islice(build(), 6)]

"""
Text to batches: rows of T+1 tokens, each beginning with BOS, filled by best fit, without padding.

1. `_document_batches` walks the shards: rank r of W reads row groups r, r+W, ... and hands out chunks of documents.
2. Chunks are tokenized, BOS first, into a buffer of about `buffer_size` documents.
3. Each row takes the longest buffered document that still fits, again and again; when none fits, the shortest one is
   cropped to close the row, and its rest is dropped.
4. A row is inputs `row[:-1]` and targets `row[1:]`. With every batch comes the state that continues right behind it.
5. All this happens in a thread up to AHEAD batches before they are asked for, in the same order.

The state names the last chunk fetched (pq_idx, rg_idx, epoch, chunk) and the documents still in the buffer, as places in
the chunks that `_document_batches` yielded: {"pq/rg/epoch/chunk": "doc doc ..."}. They are read and tokenized again on
resume, so a resumed run sees the very next batch. A state with only pq_idx, rg_idx and epoch is accepted as well: reading
then restarts at the row group behind that place and what was buffered is lost.
"""
import atexit
from bisect import bisect_right, insort
from collections.abc import Generator, Iterator
from itertools import count, groupby
from queue import SimpleQueue
from threading import Event, Semaphore, Thread

import torch

from nanochat.command import UserError
from nanochat.common import get_dist_info
from nanochat.dataset import list_parquet_files, open_shard, read_documents

AHEAD = 4  # batches that may wait for the device
Place = tuple[int, int, int, int]  # pq_idx, rg_idx, epoch, and the number of the chunk in its row group


def _document_batches(split: str, resume_state_dict: dict | None, tokenizer_batch_size: int) -> Iterator[tuple[list[str], tuple]]:
    """
    Endless (documents, (pq_idx, rg_idx, epoch)) of this rank. Resumes at its first row group behind the given place.
    """
    _, rank, _, world_size = get_dist_info()
    paths = list_parquet_files(warn_on_legacy=rank == 0 and split == "train")
    assert paths, "the data folder holds no parquet files; download some with: python -m nanochat.dataset -n 8"
    paths = paths[:-1] if split == "train" else paths[-1:]
    first_file, first_group, epoch = 0, rank, 1
    if resume_state_dict is not None:
        first_file, epoch = resume_state_dict["pq_idx"], resume_state_dict["epoch"]
        first_group = (resume_state_dict["rg_idx"] // world_size + 1) * world_size + rank
    while True:
        whole_pass, served = (first_file, first_group) == (0, rank), False
        for pq_idx in range(first_file, len(paths)):
            with open_shard(paths[pq_idx]) as shard:
                for rg_idx in range(first_group, shard.num_row_groups, world_size):
                    documents = read_documents(shard, rg_idx, paths[pq_idx])
                    for start in range(0, len(documents), tokenizer_batch_size):
                        served = True
                        yield documents[start:start + tokenizer_batch_size], (pq_idx, rg_idx, epoch)
            first_group = rank
        if whole_pass and not served:
            raise UserError(
                f"rank {rank} of {world_size} finds no document in the {split} split ({len(paths)} shard(s)): training needs at least two "
                f"shards, the last in sorted order being validation, and each split as many row groups as there are ranks; "
                f"add shards (python -m nanochat.dataset -n 8) or use fewer ranks")
        first_file, first_group, epoch = 0, rank, epoch + 1


def _chunks(split: str, resume_state_dict: dict | None, tokenizer_batch_size: int) -> Iterator[tuple[list[str], Place]]:
    """`_document_batches` with the chunks of each row group numbered."""
    batches = _document_batches(split, resume_state_dict, tokenizer_batch_size)
    for position, row_group in groupby(batches, key=lambda batch: tuple(batch[1])):
        for number, (documents, _) in enumerate(row_group):
            yield documents, (*position, number)


def _open_at(split: str, place: Place, tokenizer_batch_size: int) -> Iterator[tuple[list[str], Place]]:
    """Chunks from the first one of the row group of `place` on: resume behind this rank's previous row group."""
    pq_idx, rg_idx, epoch, _ = place
    before = {"pq_idx": pq_idx, "rg_idx": rg_idx - get_dist_info()[3], "epoch": epoch}
    return _chunks(split, before, tokenizer_batch_size)


def _seek(chunks: Iterator[tuple[list[str], Place]], place: Place) -> list[str]:
    """The documents at `place`; `chunks` is left right behind it."""
    for documents, here in chunks:
        if here == place:
            return documents
        if here[:3] != place[:3]:
            break
    raise UserError(f"the text is not the one this run was trained on: shard {place[0]}, row group {place[1]} has no chunk {place[3]}; "
                     f"put the shards back, or start again without --resume-from-step")


def exact_state(resume_state_dict: dict | None, tokenizer_batch_size: int = 128) -> dict | None:
    """The part of a saved state that lets this rank continue with the very next batch; None if it holds no such part."""
    _, rank, _, world_size = get_dist_info()
    for state in [resume_state_dict or {}, *(resume_state_dict or {}).get("other_ranks", [])]:
        if [state.get(key) for key in ("rank", "world_size", "tokenizer_batch_size")] == [rank, world_size, tokenizer_batch_size]:
            return state
    return None


def _ahead(items: Generator, depth: int) -> Iterator:
    """
    The items of a generator, in order, produced by a thread up to `depth` before they are asked for. What the generator raises
    is raised here in its place. Closing this iterator ends the thread.
    """
    ready, room, stop = SimpleQueue(), Semaphore(depth), Event()

    def produce() -> None:
        try:
            while room.acquire() and not stop.is_set():
                ready.put((next(items), None))
        except BaseException as error:
            ready.put((None, error))
        finally:
            items.close()

    thread = Thread(target=produce, name="packing", daemon=True)

    def finish() -> None:
        stop.set()
        room.release()
        thread.join()

    thread.start()
    atexit.register(finish)  # an interpreter that ends while the tokenizer's native code runs in a thread aborts
    try:
        while True:
            item, error = ready.get()
            room.release()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        atexit.unregister(finish)
        finish()


def _packed(tokenizer, B: int, T: int, split: str, tokenizer_threads: int, tokenizer_batch_size: int, resume_state_dict: dict | None,
            buffer_size: int) -> Generator[tuple[torch.Tensor, dict], None, None]:
    """Endless (rows, state): a new int64 tensor (B, T + 1) each time."""
    _, rank, _, world_size = get_dist_info()
    bos = tokenizer.get_bos_token_id()
    # The buffer: what waits, in the order of arrival, and by length. Of equal lengths the first to arrive is the last in `by_length`.
    arrivals = count()
    waiting: dict[int, tuple[list[int], Place, int]] = {}  # arrival: tokens, and where the document is from: chunk, number in it
    by_length: list[tuple[int, int]] = []  # sorted (length, -arrival)

    def add(documents: list[str], place: Place, numbers: list[int]) -> None:
        for tokens, number in zip(tokenizer.encode(documents, prepend=bos, num_threads=tokenizer_threads), numbers):
            arrival = next(arrivals)
            waiting[arrival] = (tokens, place, number)
            insort(by_length, (len(tokens), -arrival))

    def take(free: int) -> list[int]:
        """The longest that fits into `free` tokens, else the beginning of the shortest."""
        first_of = lambda length: bisect_right(by_length, (length, 1)) - 1
        best = first_of(free)
        _, arrival = by_length.pop(best if best >= 0 else first_of(by_length[0][0]))
        return waiting.pop(-arrival)[0][:free]

    exact = exact_state(resume_state_dict, tokenizer_batch_size)
    if exact is None:
        chunks, place = _chunks(split, resume_state_dict, tokenizer_batch_size), None
    else:
        place = (exact["pq_idx"], exact["rg_idx"], exact["epoch"], exact["chunk"])
        chunks = _open_at(split, place, tokenizer_batch_size)
        _seek(chunks, place)
        shelf, row_group = None, None
        for key, numbers in exact["buffer"].items():
            source, numbers = tuple(map(int, key.split("/"))), list(map(int, numbers.split()))
            if source[:3] != row_group:
                shelf, row_group = _open_at(split, source, tokenizer_batch_size), source[:3]
            documents = _seek(shelf, source)
            add([documents[number] for number in numbers], source, numbers)

    while True:
        rows = torch.empty((B, T + 1), dtype=torch.long)
        for row in rows:
            filled = 0
            while filled < T + 1:
                while len(waiting) < buffer_size:
                    documents, place = next(chunks)
                    add(documents, place, list(range(len(documents))))
                tokens = take(T + 1 - filled)
                row[filled:filled + len(tokens)] = torch.tensor(tokens)
                filled += len(tokens)

        buffer: dict[str, str] = {}  # in the order of arrival, which breaks ties
        for _, source, number in waiting.values():
            key = "/".join(map(str, source))
            buffer[key] = f"{buffer[key]} {number}" if key in buffer else str(number)
        pq_idx, rg_idx, epoch, chunk = place
        yield rows, {"pq_idx": pq_idx, "rg_idx": rg_idx, "epoch": epoch, "chunk": chunk, "buffer": buffer,
                     "tokenizer_batch_size": tokenizer_batch_size, "rank": rank, "world_size": world_size}


def tokenizing_distributed_data_loader_with_state_bos_bestfit(
    tokenizer, B: int, T: int, split: str, tokenizer_threads: int = 4, tokenizer_batch_size: int = 128,
    device: str | torch.device = "cuda", resume_state_dict: dict | None = None, buffer_size: int = 1000,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict]]:
    """
    Endless (inputs, targets, state): two int64 tensors (B, T) on `device`, and what `resume_state_dict` takes to go on
    behind this batch. The tensors are new each time (the original's are overwritten by the next batch).
    """
    assert split in ("train", "val"), f"split must be train or val, got {split!r}"
    packed = _packed(tokenizer, B, T, split, tokenizer_threads, tokenizer_batch_size, resume_state_dict, buffer_size)
    batches = _ahead(packed, AHEAD)
    try:
        for rows, state in batches:
            if torch.device(device).type == "cuda":
                rows = rows.pin_memory()  # so that the copy waits for nothing; the allocator keeps it until the copy is done
            rows = rows.to(device, non_blocking=True)
            yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), state
    finally:
        batches.close()


def tokenizing_distributed_data_loader_bos_bestfit(*args, **kwargs) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same without the state."""
    for inputs, targets, _ in tokenizing_distributed_data_loader_with_state_bos_bestfit(*args, **kwargs):
        yield inputs, targets

"""
Bits per byte of held-out documents: which documents, in which batches, scored by any nanochat GPT, on any number of ranks.

n sequences of a panel.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from nanochat_cl import routing, runs
from nanochat_cl.command import UserError
from nanochat_cl.holdout import digest
from nanochat_cl.sources import read_parquet

MAX_TOKENS = 16_384  # of a batch: eagerly scored, its logits are in memory several times, in float32
MIN_CHARS = 1024  # such documents are preferred: of a short one, a large share is in the first chunk


@dataclass(frozen=True)
class Panel:
    """Token sequences, each begun by BOS, of which the tokens from index `first` on are scored; all tuples but `batches` have length n."""
    subdomains: tuple[str, ...]
    sequences: tuple[np.ndarray, ...]       # int64 (L,), L >= 2
    first: tuple[int, ...]                  # >= 1; 1 scores everything after BOS
    batches: tuple[tuple[int, ...], ...]    # planned once, the longest sequences first; what a rank gets never changes a batch


def plan(subdomains: Sequence[str], sequences: Sequence[Sequence[int]], rows: int, first: Sequence[int] | None = None) -> Panel:
    """A panel with batches of at most `rows` sequences, and MAX_TOKENS where one alone has not more."""
    assert min(map(len, sequences), default=2) >= 2, "a sequence needs BOS and one token to score"
    longest_first = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    batches = []
    while longest_first:
        n = max(1, min(rows, MAX_TOKENS // len(sequences[longest_first[0]])))
        batches.append(tuple(longest_first[:n]))
        longest_first = longest_first[n:]
    return Panel(tuple(subdomains), tuple(np.asarray(s, dtype=np.int64) for s in sequences),
                 tuple(first) if first is not None else (1,) * len(sequences), tuple(batches))


def load_panel(path: Path, tokenizer, docs_per_subdomain: int, seq_len: int, rows: int) -> Panel:
    """
    At most `docs_per_subdomain` held-out documents of each sub-domain, one row each: BOS and the document's first `seq_len` tokens.
    The order of a hash of the key chooses, MIN_CHARS first, so every arm, seed and milestone gets the same ones.
    """
    try:
        found = read_parquet(path)
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"expected held-out documents with text, subdomain and key in {path}, got {type(e).__name__} "
                        f"{str(e).splitlines()[0]}; make the corpora with nanochat_cl.corpus and nanochat_cl.domain") from e
    documents = sorted((d.subdomain, len(d.text) < MIN_CHARS, digest(d.key), d.text) for d in found if d.text)
    if not documents:
        raise UserError(f"expected held-out documents in {path}, found none with any text; add documents and make the corpus again")
    chosen = [document for _, group in groupby(documents, lambda d: d[0]) for document in islice(group, docs_per_subdomain)]
    bos = tokenizer.get_bos_token_id()  # below, 16 characters a token are plenty: the rest of a book is not encoded
    sequences = [tokenizer.encode(text[:16 * seq_len], prepend=bos)[:seq_len + 1] for *_, text in chosen]
    return plan([subdomain for subdomain, *_ in chosen], sequences, rows)


@torch.no_grad()
def score(model: torch.nn.Module, panel: Panel, token_bytes: torch.Tensor, greedy: bool = False) -> np.ndarray:
    """
    (n, 2) float64: nats and bytes of the scored tokens of each sequence, the same on every rank; bpb = nats / (ln 2 * bytes). With
    `greedy` a third column: how many of them are not the likeliest token.

    `model(x, y, loss_reduction="none")` gives nats per position. Targets of no bytes (special tokens) count in neither, as in
    nanochat.loss_eval. Batches are dealt out to the ranks whole, so the number of ranks does not change a bit of the result.
    The model is left in eval mode.
    """
    rank, world_size = runs.ranks()
    device, size = model.get_device(), token_bytes.cpu().to(torch.int64)
    result = torch.zeros(len(panel.sequences), 2 + greedy, dtype=torch.float64)
    model.eval()
    for batch in panel.batches[rank::world_size]:
        width = max(len(panel.sequences[batch[0]]) - 1, 2)  # upstream's forward needs two positions
        x, y = torch.zeros(len(batch), width, dtype=torch.int64), torch.full((len(batch), width), -1, dtype=torch.int64)
        for b, i in enumerate(batch):
            row, first = torch.from_numpy(panel.sequences[i]), panel.first[i]
            x[b, :len(row) - 1] = row[:-1]
            y[b, first - 1:len(row) - 1] = row[first:]
        y[size[y.clamp(min=0)] == 0] = -1
        loss = model(x.to(device), y.to(device), loss_reduction="none").view(y.shape)
        result[list(batch), 0] = loss.cpu().double().sum(1)
        result[list(batch), 1] = size[y.clamp(min=0)].masked_fill(y < 0, 0).sum(1).double()
        if greedy:
            result[list(batch), 2] = ((model(x.to(device)).argmax(-1).cpu() != y) & (y >= 0)).sum(1).double()
    return runs.over_ranks(result, "sum").cpu().numpy()


def bpb(nats: float, num_bytes: float) -> float:
    """Bits per byte; infinite when there are no bytes."""
    return float(nats / (math.log(2) * num_bytes)) if num_bytes else math.inf


def pooled(scores: np.ndarray) -> dict:
    """{"bpb", "docs": [[nats, bytes], ...]} of the documents' scores (n, 2): the sum of all nats over the sum of all bytes."""
    return {"bpb": bpb(*scores.sum(0)), "docs": [[float(nats), int(num_bytes)] for nats, num_bytes in scores]}


def summary(panel: Panel, scores: np.ndarray) -> dict:
    """{"bpb": mean over sub-domains, "subdomains": {name: pooled}}: every sub-domain weighs the same, whatever its size."""
    labels = np.array(panel.subdomains)
    subdomains = {name: pooled(scores[labels == name]) for name in dict.fromkeys(panel.subdomains)}
    return {"bpb": float(np.mean([s["bpb"] for s in subdomains.values()])), "subdomains": subdomains}


def constant_share(panel: Panel, cl: dict[str, Any]) -> float:
    """Share of the scored tokens that a Model-CL of this `cl` predicts under its constant choice; the panel is not empty."""
    ids = torch.full((1, max(map(len, panel.sequences)) - 1), -1)
    ids[0, 0] = cl["bos"]
    constant = routing.coverage(ids, cl)[0][0]  # of a shorter sequence it is the beginning
    return torch.cat([constant[first - 1:len(s) - 1] for s, first in zip(panel.sequences, panel.first)]).float().mean().item()

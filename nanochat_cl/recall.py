"""
Recall: what the stream taught, and what is left of it later. A few passages of every window of the stream are scored again and again.

    recall = bpb gained on a passage since Phase A  -  bpb gained since Phase A on held-out passages of the same sub-domain

Positive: the model remembers more of what it read than it knows of its kind. The stream is a function of the step, so its passages are
known before Phase B: `sample` them all, score them once with the Phase A model (`nats_and_bytes`), then at each milestone `score` those
trained by then. Of a passage that the stream repeats, the age is too high.
"""
import hashlib
from collections.abc import Iterable

import numpy as np
import torch

from nanochat_cl import evaluate

Passage = tuple[int, str, np.ndarray]  # end of its window in trained tokens, sub-domain, row (T+1,)


def sample(tokens_at: int, rows: Iterable[tuple[str, torch.Tensor]], count: int, seed: int) -> list[Passage]:
    """Of (sub-domain, row (T+1,)) in the window that ends at `tokens_at` trained tokens, the `count` with the lowest hash."""
    found = {}
    for subdomain, row in rows:
        row = np.asarray(row, dtype="<i8")
        found[hashlib.sha256(f"{seed}/{tokens_at}/{subdomain}/".encode() + row.tobytes()).hexdigest()] = (tokens_at, subdomain, row)
    return [found[key] for key in sorted(found)[:count]]


def nats_and_bytes(model: torch.nn.Module, passages: list[Passage], token_bytes: torch.Tensor) -> np.ndarray:
    """(n, 2) of all passages; with the Phase A model it is what `score` takes as `before`."""
    return evaluate.score(model, evaluate.plan([p[1] for p in passages], [p[2] for p in passages], rows=16), token_bytes)


def score(model: torch.nn.Module, passages: list[Passage], before: list[list[float]], tokens_now: int, heldout_gains: dict[str, float],
          token_bytes: torch.Tensor) -> dict:
    """
    {"mean": of recall_bpb, or None, "windows": [{"tokens", "age_tokens", "subdomain", "gain_bpb", "heldout_gain_bpb", "recall_bpb"}]}
    of the passages trained by `tokens_now`, pooled by window and sub-domain. A gain is Phase A's bpb minus today's.
    """
    trained = [i for i, p in enumerate(passages) if p[0] <= tokens_now]
    now, windows = dict(zip(trained, nats_and_bytes(model, [passages[i] for i in trained], token_bytes))), []
    for tokens, subdomain in dict.fromkeys(passages[i][:2] for i in trained):
        mine = [i for i in trained if passages[i][:2] == (tokens, subdomain)]
        gain = evaluate.bpb(*np.sum([before[i] for i in mine], 0)) - evaluate.bpb(*np.sum([now[i] for i in mine], 0))
        heldout = heldout_gains[subdomain]
        windows.append({"tokens": tokens, "age_tokens": tokens_now - tokens, "subdomain": subdomain, "gain_bpb": gain,
                        "heldout_gain_bpb": heldout, "recall_bpb": gain - heldout})
    return {"mean": float(np.mean([w["recall_bpb"] for w in windows])) if windows else None, "windows": windows}

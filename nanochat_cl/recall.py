"""
Recall: what the stream taught, and what is left of it later. A few passages of every window of the stream are scored again and again.

    recall = bpb gained on a passage since Phase A  -  bpb gained since Phase A on held-out passages of the same sub-domain

Positive: the model remembers more of what it read than it knows of its kind. The stream is a function of the step, so its passages are
known before Phase B: add them all, score them once with the Phase A model (`baseline`), then at each milestone those trained by then.
Of a passage that the stream repeats, the age is too high.
"""
import hashlib

import numpy as np
import torch

from nanochat_cl import evaluate


class Recall:
    """At most `sample_per_window` passages for each `tokens_at`: those with the lowest hash, in whatever order they are added."""

    def __init__(self, sample_per_window: int, seed: int):
        self.sample_per_window, self.seed = sample_per_window, seed
        self.passages: list[tuple[int, str, str, np.ndarray]] = []  # tokens_at, hash, sub-domain, row (T+1,); sorted
        self.before: list[list[float]] = []                         # nats and bytes of each with the Phase A model

    def add(self, tokens_at: int, subdomain: str, rows: np.ndarray | torch.Tensor) -> None:
        """Passages `rows` (n, T+1), int64, of the window that ends at `tokens_at` trained tokens."""
        window = {passage[1]: passage for passage in self.passages if passage[0] == tokens_at}
        for row in np.asarray(rows, dtype="<i8"):
            key = hashlib.sha256(f"{self.seed}/{tokens_at}/{subdomain}/".encode() + row.tobytes()).hexdigest()
            window[key] = (tokens_at, key, subdomain, row)
        kept = [window[key] for key in sorted(window)[:self.sample_per_window]]
        self.passages = sorted([p for p in self.passages if p[0] != tokens_at] + kept, key=lambda p: p[:2])

    def baseline(self, model: torch.nn.Module, token_bytes: torch.Tensor) -> None:
        """Score every passage with the Phase A model."""
        self.before = evaluate.score(model, panel(self.passages), token_bytes).tolist()

    def score(self, model: torch.nn.Module, tokens_now: int, heldout_gains: dict[str, float], token_bytes: torch.Tensor) -> dict:
        """
        {"mean": of recall_bpb, or None, "windows": [{"tokens", "age_tokens", "subdomain", "gain_bpb", "heldout_gain_bpb", "recall_bpb"}]}
        of the passages trained by `tokens_now`, pooled by window and sub-domain. A gain is Phase A's bpb minus today's.
        """
        if len(self.before) != len(self.passages):
            raise RuntimeError("recall needs the Phase A model's score of every passage: call baseline() before Phase B trains on them")
        trained = [p for p in self.passages if p[0] <= tokens_now]
        now, windows = evaluate.score(model, panel(trained), token_bytes), []
        for tokens, subdomain in dict.fromkeys((p[0], p[2]) for p in trained):
            mine = [i for i, p in enumerate(trained) if (p[0], p[2]) == (tokens, subdomain)]
            gain = evaluate.bpb(*np.sum([self.before[i] for i in mine], 0)) - evaluate.bpb(*now[mine].sum(0))
            heldout = heldout_gains[subdomain]
            windows.append({"tokens": tokens, "age_tokens": tokens_now - tokens, "subdomain": subdomain, "gain_bpb": gain,
                            "heldout_gain_bpb": heldout, "recall_bpb": gain - heldout})
        return {"mean": float(np.mean([w["recall_bpb"] for w in windows])) if windows else None, "windows": windows}

    def state_dict(self) -> dict:
        """JSON values; the passages are not among them, since whoever continues adds them again."""
        return {"before": self.before}

    def load_state_dict(self, state: dict) -> None:
        self.before = state["before"]


def panel(passages: list[tuple]) -> evaluate.Panel:
    return evaluate.plan([p[2] for p in passages], [p[3] for p in passages], rows=16)

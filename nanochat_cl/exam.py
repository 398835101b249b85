"""
What every arm is asked at every milestone of Phase B: the same held-out documents, probes and prompts, planned once.

Whoever has choice tests puts them into <base>/eval/{floor,facts,questions}/*.jsonl (formats: `read`) before the run: what should not be
lost, what may be, and questions about the domain. Each file is a probe of its own, in the record under the folder's name.
"""
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat_cl import evaluate, files, metrics, probes
from nanochat_cl.command import UserError

GENERAL_DOCS = 16  # at least, on test
PROMPTS, PROMPT_TOKENS, SAMPLE_TOKENS = 2, 24, 48  # so many prompts of general text and as many of domain text
ROUTED_ROWS = 8  # of general text, whose routing is compared to Phase A's


def read(path: Path, limit: int) -> list[probes.Item]:
    """
    At most `limit` lines of a jsonl file, the first in the order of a hash: sentences {"good", "bad"} (BLiMP), or {"context" and/or
    "question", "choices", "answer": index}, where one gap "_" makes sentences of it (Winogrande).
    """
    def item(row: dict) -> probes.Item:
        if "good" in row:
            return probes.Item(path.stem, "", (row["bad"], row["good"]), 1)  # in this order, for the first wins a tie
        context, choices, gold = " ".join(row[part] for part in ("context", "question") if part in row), row["choices"], int(row["answer"])
        if context.count("_") == 1:
            return probes.Item(path.stem, "", tuple(context.replace("_", choice) for choice in choices), gold)
        return probes.Item(path.stem, context, tuple(f" {choice.strip()}" for choice in choices), gold, per_byte=True)
    try:
        rows = sorted(files.read_jsonl(path), key=lambda row: hashlib.sha256(repr(row).encode()).digest())
        return [item(row) for row in rows[:limit]]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: expected lines with good and bad, or context, choices and answer, got {e!r}; convert the file") from e


class Exam:
    def __init__(self, domain_dir: Path, tokenizer, token_bytes: torch.Tensor, seq_len: int, rows: int, docs: int, probe_items: int):
        """
        `docs` test documents of every sub-domain, as many general ones, and `probe_items` of each probe. On val, where recipes are chosen
        but nothing is claimed, half as many documents do.
        """
        def panels(place: Path, docs: int) -> dict[str, evaluate.Panel]:
            return {split: evaluate.load_panel(place / f"{split}.parquet", tokenizer, count, seq_len, rows)
                    for split, count in (("val", (docs + 1) // 2), ("test", docs))}
        self.domain, self.general = panels(domain_dir, docs), panels(domain_dir.parent / "general", max(docs, GENERAL_DOCS))
        self.tokenizer, self.token_bytes, self.rows = tokenizer, token_bytes, rows
        self.subdomains = sorted(set(self.domain["val"].subdomains))
        self.items = {"floor": probes.items(probe_items), "facts": [], "questions": []}
        for group, items in self.items.items():
            for path in sorted((domain_dir.parent.parent / "eval" / group).glob("*.jsonl")):
                items += read(path, probe_items)
        tests = {"domain": self.domain["test"], "general": self.general["test"]}
        self.constant_share = {name: evaluate.constant_share(panel) for name, panel in tests.items()}
        general, one_each = self.general["val"].sequences, [self.domain["val"].subdomains.index(name) for name in self.subdomains]
        prompts = *general[:PROMPTS], *(self.domain["val"].sequences[i] for i in one_each[:PROMPTS])
        self.prompts = [sequence[:PROMPT_TOKENS].tolist() for sequence in prompts]
        longest = max(map(len, general))
        self.routed = torch.from_numpy(np.stack([sequence for sequence in general if len(sequence) == longest][:ROUTED_ROWS]))

    def scores(self, model: torch.nn.Module, pause: Callable[[], None]) -> dict[str, Any]:
        """The entries domain, general, floor, facts, questions and plasticity of a record; `pause` is called wherever one may stop."""
        result: dict[str, Any] = {"domain": {}, "general": {}}
        for split in ("val", "test"):
            result["domain"][split] = evaluate.summary(self.domain[split], evaluate.score(model, self.domain[split], self.token_bytes))
            pause()
            result["general"][split] = evaluate.pooled(evaluate.score(model, self.general[split], self.token_bytes))
            pause()
        for group, items in self.items.items():  # short texts, so more of them at once
            result[group] = probes.score_probes(model, self.tokenizer, self.token_bytes, items, 4 * self.rows)
            pause()
        return {**result, "plasticity": metrics.plasticity(model, self.routed[:2, :-1].to(model.get_device()))}

    def samples(self, model: torch.nn.Module, arm: str, when: str) -> list[dict[str, str]]:
        """How the model goes on from the prompts, greedily."""
        from nanochat.engine import Engine
        model.eval()
        engine, decode = Engine(model, self.tokenizer), self.tokenizer.decode
        texts = [engine.generate_batch(prompt, max_tokens=SAMPLE_TOKENS, temperature=0.0)[0][0] for prompt in self.prompts]
        return [{"arm": arm, "when": when, "prompt": decode(prompt[1:]), "text": decode(text[len(prompt):])}
                for prompt, text in zip(self.prompts, texts)]

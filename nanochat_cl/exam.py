"""
What every arm is asked at every milestone of Phase B: the same held-out documents (planned once), probes and prompts.

Whoever has choice tests puts them into <base>/eval/{floor,facts,questions}/*.jsonl (formats: `read`) before the domain is made: what
should not be lost, what may be, and questions about the domain; a domain's recipe can name more of the last. Each file is a probe of its
own, in the record under the folder's name. CORE's tasks join them when nanochat's eval_bundle is in the base directory, and cloze
questions from the general training text are facts in any case.

    tier    at milestones               asked
    light   all                         domain and general text, the procedural floor; evolve adds recall and the use of blocks
    full    0, 1, 2, 4, 8 .., the last  all that and choice tests of the floor, facts, questions, plasticity, drift since Phase A
"""
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat_cl import evaluate, files, metrics, probes
from nanochat_cl.command import UserError
from nanochat_cl.holdout import digest
from nanochat_cl.sources import read_rows

GENERAL_DOCS = 16  # at least, on test
PROMPTS, PROMPT_TOKENS, SAMPLE_TOKENS = 2, 24, 48  # so many prompts of general text and as many of domain text
ROUTED_ROWS = 8  # of general text, whose routing is compared to Phase A's

NAMES = {"query": "context", "ctx": "context", "endings": "choices", "gold": "answer", "label": "answer", "target": "continuation",
         "sentence_good": "good", "sentence_bad": "bad"}  # what CORE, HellaSwag, LAMBADA and BLiMP call it
CORE = {"floor": ("hellaswag_zeroshot", "lambada_openai", "winograd", "winogrande", "piqa", "copa"),
        "facts": ("jeopardy", "bigbench_qa_wikidata", "arc_easy", "arc_challenge", "openbook_qa")}  # of its 22, asked without examples
CLOZE_DOCS, RARE = 4096, 50  # so many training texts are read for cloze questions, whose answers occur there at most so often
GAP = re.compile(r"(?<!\w)_(?!\w)")  # not the one in max_size
SENTENCE = re.compile(r"(?<=[.!?]\s)([A-Z][^.!?]{40,240})\s([A-Z][a-z]{2,}|\d{2,4})\.(?=\s|$)")


def read(path: Path, limit: int, delimiter: str = " ") -> list[probes.Item]:
    """
    At most `limit` lines of a jsonl file, the first in the order of a hash: sentences {"good", "bad"} (BLiMP); {"context" and/or
    "question", "choices", "answer": index}, whose context may have one gap "_" (Winogrande: scored is what follows it) and whose question
    may be cause or effect (COPA); {"context", "continuation"} (LAMBADA); {"context_options", "continuation", "answer"}; or in NAMES.
    """
    lead = delimiter.rstrip(" ")
    space = delimiter[len(lead):]  # of "\nAnswer: " only the blank belongs to the answer

    def item(row: dict) -> probes.Item:
        row = {NAMES.get(key, key): value for key, value in row.items()}
        if "good" in row:
            return probes.Item(path.stem, "", (row["bad"], row["good"]), 1)  # in this order, for the first wins a tie
        if "context_options" in row:
            contexts = tuple(option + lead for option in row["context_options"])
            return probes.Item(path.stem, contexts, (space + row["continuation"],) * len(contexts), int(row["answer"]))
        context = " ".join(row[part] for part in ("context", "question") if part in row)
        if "choices" not in row:
            return probes.Item(path.stem, context.strip() + lead, (space + row["continuation"].strip(),), 0)
        choices, gold = [choice.strip() for choice in row["choices"]], int(row["answer"])
        if link := {"cause": "because", "effect": "so"}.get(row.get("question")):
            context, choices = f"{row['context'].rstrip('. ')} {link}", [choice[0].lower() + choice[1:] for choice in choices]
        before, *after = GAP.split(context)
        if len(after) == 1 and re.search(r"\w", after[0]):
            return probes.Item(path.stem, tuple(before + choice for choice in choices), (after[0],) * len(choices), gold)
        return probes.Item(path.stem, context + lead, tuple(space + choice for choice in choices), gold, per_byte=True)
    try:
        rows = sorted(files.read_jsonl(path), key=lambda row: digest(repr(row)))
        items = [item(row) for row in rows[:limit]]
        if bad := [i for i in items if not 0 <= i.gold < len(i.choices) or not all(choice.strip() for choice in i.choices)]:
            raise ValueError(f"answer {bad[0].gold} of the choices {bad[0].choices}, counted from 0 and none of them empty")
        return items
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        raise UserError(f"{path}: expected lines with good and bad, or context, choices and answer, got {e!r}; convert the file") from e


def core(bundle: Path, group: str, limit: int) -> list[probes.Item]:
    """Items of the group's CORE tasks from nanochat's eval_bundle, where it is."""
    import yaml
    tasks = yaml.safe_load((bundle / "core.yaml").read_text())["icl_tasks"] if (bundle / "core.yaml").is_file() else []
    return [item for task in tasks if task["label"] in CORE.get(group, ())
            for item in read(bundle / "eval_data" / task["dataset_uri"], limit, task.get("continuation_delimiter", " "))]


def training_texts(base: Path) -> Iterator[str]:
    """The first CLOZE_DOCS general training texts; the last shard is nanochat's held-out one."""
    from nanochat import dataset
    shards = sorted((base / Path(dataset.DATA_DIR).name).glob("*.parquet"))[:-1]
    return islice((row["text"] for path in shards for row in read_rows(path)), CLOZE_DOCS)


def cloze(texts: Iterable[str], limit: int) -> list[probes.Item]:
    """
    At most `limit` questions of fact from texts: the rare name or number that ends a sentence, against three of its kind that end others.
    A name has a capital and stands nowhere in lower case. The order of a hash chooses; nothing is asked for twice.
    """
    words, sentences, kinds, made = Counter(), {}, {}, []
    for text in texts:
        words.update(re.findall(r"\w+", text))
        sentences.update((word, " ".join(context.split())) for context, word in SENTENCE.findall(text))
    for word in sorted(sentences, key=digest):
        if words[word] <= RARE and (word.isdigit() or not words[word.lower()]) and word not in sentences[word]:
            kinds.setdefault(len(word) if word.isdigit() else 0, []).append(word)  # names, and numbers of as many digits
    for kind in kinds.values():
        for i, word in enumerate(kind[:limit]):
            choices = [other for other in kind[i + 1:] + kind[:i] if other not in sentences[word]][:3]
            if len(choices) == 3:
                choices.insert(i % 4, word)
                made.append(probes.Item("cloze", sentences[word], tuple(f" {choice}" for choice in choices), i % 4, per_byte=True))
    return sorted(made, key=lambda item: digest(item.context))[:limit]


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
        base, self.light, self.full = domain_dir.parent.parent, probes.items(probe_items), {}
        for group in ("floor", "facts", "questions"):
            own = sorted((base / "eval" / group).glob("*.jsonl")) + sorted(domain_dir.glob(f"{group}/*.jsonl"))  # the recipe's questions
            self.full[group] = core(base / "eval_bundle", group, probe_items)
            taken = {"cloze", *probes.KINDS, *(item.kind for item in self.full[group])}
            for path in own:
                if path.stem in taken:
                    raise UserError(f"{path}: there is a probe called {path.stem} already; rename the file")
                taken.add(path.stem)
                self.full[group] += read(path, probe_items)
        self.full["facts"] += cloze(training_texts(base), probe_items)
        asked = {**self.full, "floor": self.light + self.full["floor"]}
        self.panels = {"domain": self.domain["test"], "general": self.general["test"],
                       **{group: probes.panel(tokenizer, items, seq_len, rows) for group, items in asked.items() if items}}
        general, domain = self.general["val"].sequences, self.domain["val"]
        prompts = *general[:PROMPTS], *(domain.sequences[domain.subdomains.index(name)] for name in self.subdomains[:PROMPTS])
        self.prompts = [sequence[:PROMPT_TOKENS].tolist() for sequence in prompts]
        longest = max(map(len, general))
        self.routed = torch.from_numpy(np.stack([sequence for sequence in general if len(sequence) == longest][:ROUTED_ROWS]))

    def constant_share(self, cl: dict[str, Any]) -> dict[str, float]:
        """For each panel, whatever the tier, the share of what is scored that a Model-CL of this `cl` predicts under its constant choice."""
        return {name: evaluate.constant_share(panel, cl) for name, panel in self.panels.items()}

    def scores(self, model: torch.nn.Module, pause: Callable[[], None], full: bool = True) -> dict[str, Any]:
        """The entries domain, general and floor of a record, if full facts, questions and plasticity too; pause() where one may stop."""
        result: dict[str, Any] = {"domain": {}, "general": {}}
        for split in ("val", "test"):
            result["domain"][split] = evaluate.summary(self.domain[split], evaluate.score(model, self.domain[split], self.token_bytes))
            pause()
            result["general"][split] = evaluate.pooled(evaluate.score(model, self.general[split], self.token_bytes))
            pause()
        for group, items in [("floor", self.light), *(self.full.items() if full else ())]:  # short texts, so more of them at once
            result[group] = result.get(group, {}) | probes.score_probes(model, self.tokenizer, self.token_bytes, items, 4 * self.rows)
            pause()
        if full:
            result["plasticity"] = metrics.plasticity(model, self.routed[:2, :-1].to(model.get_device()))
        return result

    def samples(self, model: torch.nn.Module, arm: str, when: str) -> list[dict[str, str]]:
        """How the model goes on from the prompts, greedily."""
        from nanochat.engine import Engine
        model.eval()
        engine, decode = Engine(model, self.tokenizer), self.tokenizer.decode
        texts = [engine.generate_batch(prompt, max_tokens=SAMPLE_TOKENS, temperature=0.0)[0][0] for prompt in self.prompts]
        return [{"arm": arm, "when": when, "prompt": decode(prompt[1:]), "text": decode(text[len(prompt):])}
                for prompt, text in zip(self.prompts, texts)]

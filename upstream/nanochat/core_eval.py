"""
In-context-learning tasks as in CORE (Li et al. 2024, arXiv 2406.11794): multiple choice, schema (several contexts, one
continuation) and language modeling (the continuation must be the greedy one). Used by `scripts.base_eval`.
"""
import random

import torch
import torch.distributed as dist
import torch.nn.functional as F

# --- prompts: the few-shot examples, a blank line after each, then the question ---------------------------------------

def render_prompts_mc(item: dict, continuation_delimiter: str, fewshot_examples: list[dict] | None = None) -> list[str]:
    """One prompt per choice."""
    shots = "".join(f"{e['query']}{continuation_delimiter}{e['choices'][e['gold']]}\n\n" for e in fewshot_examples or [])
    return [f"{shots}{item['query']}{continuation_delimiter}{choice}" for choice in item["choices"]]


def render_prompts_schema(item: dict, continuation_delimiter: str, fewshot_examples: list[dict] | None = None) -> list[str]:
    """One prompt per context."""
    shots = "".join(f"{e['context_options'][e['gold']]}{continuation_delimiter}{e['continuation']}\n\n" for e in fewshot_examples or [])
    return [f"{shots}{context}{continuation_delimiter}{item['continuation']}" for context in item["context_options"]]


def render_prompts_lm(item: dict, continuation_delimiter: str, fewshot_examples: list[dict] | None = None) -> list[str]:
    """
    Two prompts, without and with the continuation. The first is stripped: a trailing space would be a token of its own,
    while in the second it belongs to the token of the next word.
    """
    shots = "".join(f"{e['context'].strip()}{continuation_delimiter}{e['continuation']}\n\n" for e in fewshot_examples or [])
    question = f"{shots}{item['context'].strip()}{continuation_delimiter}"
    return [question.strip(), question + item["continuation"]]


# --- tokens, and the span [start, end) of each row that is scored -----------------------------------------------------

Spans = tuple[list[list[int]], list[int], list[int]]


def find_common_length(token_sequences: list[list[int]], direction: str = "left") -> int:
    """How many tokens all sequences share at their beginning ("left") or at their end ("right")."""
    rows = token_sequences if direction == "left" else [row[::-1] for row in token_sequences]
    shortest = min(map(len, rows))
    return next((i for i in range(shortest) if any(row[i] != rows[0][i] for row in rows)), shortest)


def batch_sequences_mc(tokenizer, prompts: list[str]) -> Spans:
    """The prompts differ in what follows the common beginning."""
    tokens = tokenizer(prompts, prepend=tokenizer.get_bos_token_id())
    start = find_common_length(tokens, direction="left")
    return tokens, [start] * len(tokens), [len(row) for row in tokens]


def batch_sequences_schema(tokenizer, prompts: list[str]) -> Spans:
    """The prompts agree in the end, which is scored."""
    tokens = tokenizer(prompts, prepend=tokenizer.get_bos_token_id())
    common = find_common_length(tokens, direction="right")
    ends = [len(row) for row in tokens]
    return tokens, [end - common for end in ends], ends


def batch_sequences_lm(tokenizer, prompts: list[str]) -> Spans:
    """One row: the prompt with the continuation, of which what is new is scored."""
    without, whole = tokenizer(prompts, prepend=tokenizer.get_bos_token_id())
    assert len(without) < len(whole) and whole[:len(without)] == without, (
        "the prompt without its continuation must be a strict token prefix of the prompt with it")
    return [whole], [len(without)], [len(whole)]


def stack_sequences(tokens: list[list[int]], pad_token_id: int) -> torch.Tensor:
    """int64 (N, longest), padded on the right."""
    out = torch.full((len(tokens), max(map(len, tokens))), pad_token_id, dtype=torch.long)
    for row, ids in zip(out, tokens):
        row[:len(ids)] = torch.tensor(ids)
    return out


# --- scores -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def forward_model(model, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    For ids (N, S): losses (N, S), where [n, s] is the cross entropy of token s+1 (the last column is NaN), and the argmax
    predictions (N, S).
    """
    logits = model(input_ids)
    targets = input_ids.roll(-1, dims=1)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(input_ids)
    losses[:, -1] = float("nan")
    return losses, logits.argmax(dim=-1)


def evaluate_example(idx: int, model, tokenizer, data: list[dict], device: torch.device, task_meta: dict) -> bool:
    """Is the model right on example `idx`? The few-shot examples are drawn from the others, the same for every model."""
    task_type, delimiter, num_fewshot = task_meta["task_type"], task_meta["continuation_delimiter"], task_meta["num_fewshot"]
    item, fewshot = data[idx], []
    if num_fewshot > 0:
        others = [i for i in range(len(data)) if i != idx]
        fewshot = [data[i] for i in random.Random(1234 + idx).sample(others, num_fewshot)]

    if task_type == "multiple_choice":
        tokens, starts, ends = batch_sequences_mc(tokenizer, render_prompts_mc(item, delimiter, fewshot))
    elif task_type == "schema":
        tokens, starts, ends = batch_sequences_schema(tokenizer, render_prompts_schema(item, delimiter, fewshot))
    elif task_type == "language_modeling":
        tokens, starts, ends = batch_sequences_lm(tokenizer, render_prompts_lm(item, delimiter, fewshot))
    else:
        raise ValueError(f"unknown task type {task_type!r}: expected multiple_choice, schema or language_modeling")

    limit = getattr(model, "max_seq_len", None)  # models with learned positions; GPT has no such limit
    if limit is not None:
        for i, row in enumerate(tokens):
            cut = max(0, len(row) - limit)
            tokens[i], starts[i], ends[i] = row[cut:], starts[i] - cut, ends[i] - cut
            assert starts[i] >= 0, f"the scored span of example {idx} does not fit into {limit} tokens"

    input_ids = stack_sequences(tokens, tokenizer.get_bos_token_id()).to(device)
    losses, predictions = forward_model(model, input_ids)
    if task_type == "language_modeling":
        start, end = starts[0], ends[0]
        return torch.equal(predictions[0, start - 1:end - 1], input_ids[0, start:end])
    means = [losses[i, start - 1:end - 1].mean().item() for i, (start, end) in enumerate(zip(starts, ends))]
    return means.index(min(means)) == item["gold"]


def evaluate_task(model, tokenizer, data: list[dict], device: torch.device, task_meta: dict) -> float:
    """Accuracy over all examples; each rank takes every W-th."""
    distributed = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    correct = torch.zeros(len(data), dtype=torch.float32, device=device)
    for idx in range(rank, len(data), world_size):
        correct[idx] = float(evaluate_example(idx, model, tokenizer, data, device, task_meta))
    if world_size > 1:
        dist.all_reduce(correct, op=dist.ReduceOp.SUM)
    return correct.mean().item()

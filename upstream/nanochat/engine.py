"""
Fast generation: a KV cache, many samples of one prompt at a time, and a calculator that the model can call.

    python -m nanochat.engine            # compares Engine.generate with the plain GPT.generate on the latest base checkpoint
"""
import argparse
import signal
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from nanochat.checkpoint_manager import load_model
from nanochat.command import UserError, run
from nanochat.common import COMPUTE_DTYPE, autodetect_device_type, compute_init

FORBIDDEN = ("__", "import", "exec", "eval", "compile", "open", "file", "input", "raw_input", "globals", "locals", "vars", "dir",
             "getattr", "setattr", "delattr", "hasattr")


@contextmanager
def timeout(duration: float, formula: str) -> Iterator[None]:
    """TimeoutError after `duration` seconds; by SIGALRM, so only in the main thread of a POSIX system."""
    def expired(signum, frame):
        raise TimeoutError(f"{formula!r} took longer than {duration} s")

    previous = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, duration)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def eval_with_timeout(formula: str, max_time: float = 3):
    """Value of a Python expression without builtins, None when anything goes wrong. The caller decides which expressions are safe."""
    try:
        with timeout(max_time, formula), warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return eval(formula, {"__builtins__": {}}, {})
    except Exception:
        return None


def use_calculator(expr: str):
    """Value of an arithmetic expression (commas in numbers are fine, powers are not) or of `"text".count("t")`; else None."""
    expr = expr.replace(",", "")
    if all(c in "0123456789*+-/.() " for c in expr):
        return None if "**" in expr else eval_with_timeout(expr)
    if not all(c.isascii() and c.isalnum() or c in "'\"()._ " for c in expr):
        return None
    if any(word in expr.lower() for word in FORBIDDEN) or ".count(" not in expr:
        return None
    return eval_with_timeout(expr)


class KVCache:
    """
    Keys and values of all layers, each (num_layers, batch_size, seq_len, num_heads, head_dim) with key/value heads; all rows are at
    the same position. Attention writes into the layer views, the last layer's attention calls `advance`.
    """

    def __init__(self, batch_size: int, num_heads: int, seq_len: int, head_dim: int, num_layers: int,
                 device: torch.device | str, dtype: torch.dtype):
        self.batch_size, self.max_seq_len = batch_size, seq_len
        self.n_layers, self.n_heads, self.head_dim = num_layers, num_heads, head_dim
        self.k_cache = torch.zeros(num_layers, batch_size, seq_len, num_heads, head_dim, device=device, dtype=dtype)
        self.v_cache = torch.zeros_like(self.k_cache)
        self.cache_seqlens = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.prev_embedding: torch.Tensor | None = None  # (B, 1, n): what the smear of the next token looks back at

    def get_pos(self) -> int:
        return self.cache_seqlens[0].item()

    def get_layer_cache(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k_cache[layer_idx], self.v_cache[layer_idx]

    def advance(self, num_tokens: int) -> None:
        """ValueError when the cache has no room for that many (upstream goes on with tokens missing)."""
        if self.get_pos() + num_tokens > self.max_seq_len:
            raise ValueError(f"the KV cache holds {self.max_seq_len} positions, {self.get_pos()} are taken "
                             f"and {num_tokens} more do not fit; make it longer")
        self.cache_seqlens += num_tokens

    def reset(self) -> None:
        self.cache_seqlens.zero_()
        self.prev_embedding = None

    def prefill(self, other: "KVCache") -> None:
        """Takes over the contents of another cache with one row, for every row of this one, which must be empty and no shorter."""
        assert self.get_pos() == 0, f"cannot prefill a cache that holds {self.get_pos()} positions; reset it first"
        mine, its = (self.n_layers, self.n_heads, self.head_dim), (other.n_layers, other.n_heads, other.head_dim)
        assert mine == its, f"(layers, heads, head_dim) must agree: {mine} here, {its} there"
        assert self.max_seq_len >= other.max_seq_len, f"this cache holds {self.max_seq_len} positions, the other {other.max_seq_len}"
        pos = other.get_pos()
        self.k_cache[:, :, :pos] = other.k_cache[:, :, :pos]
        self.v_cache[:, :, :pos] = other.v_cache[:, :, :pos]
        self.cache_seqlens.fill_(pos)
        if other.prev_embedding is not None:
            self.prev_embedding = other.prev_embedding.expand(self.batch_size, -1, -1).clone()


@torch.inference_mode()
def sample_next_token(logits: torch.Tensor, rng: torch.Generator, temperature: float = 1.0, top_k: int | None = None) -> torch.Tensor:
    """logits (B,V) -> one id per row (B,1); temperature 0 takes the most likely one."""
    assert temperature >= 0.0, f"temperature must not be negative, got {temperature}"
    if temperature == 0.0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None and top_k > 0:
        values, ids = torch.topk(logits, min(top_k, logits.size(-1)), dim=-1)
        choice = torch.multinomial(F.softmax(values / temperature, dim=-1), num_samples=1, generator=rng)
        return ids.gather(1, choice)
    return torch.multinomial(F.softmax(logits / temperature, dim=-1), num_samples=1, generator=rng)


class RowState:
    """One sample while it is generated."""

    def __init__(self, current_tokens: list[int] | None = None):
        self.current_tokens = current_tokens or []
        self.forced_tokens: deque[int] = deque()  # the calculator's answer, to be read before the model goes on
        self.in_python_block = False
        self.python_expr_tokens: list[int] = []
        self.completed = False


class Engine:
    """
    Needs of the model `get_device()`, `config` and `forward(ids, kv_cache=...)`, of the tokenizer `encode_special`,
    `get_bos_token_id`, `encode` and `decode`.
    """

    def __init__(self, model, tokenizer):
        self.model = model
        self.tokenizer = tokenizer

    def _advance_row(self, row: RowState, token: int, special: dict[str, int]) -> None:
        """Appends a token and does what it asks for: end the row, open a calculator block, run the calculator."""
        row.current_tokens.append(token)
        if token in (special["<|assistant_end|>"], special["<|bos|>"]):
            row.completed = True
        elif token == special["<|python_start|>"]:
            row.in_python_block = True
            row.python_expr_tokens = []
        elif token == special["<|python_end|>"] and row.in_python_block:
            row.in_python_block = False
            result = use_calculator(self.tokenizer.decode(row.python_expr_tokens)) if row.python_expr_tokens else None
            if result is not None:
                answer = self.tokenizer.encode(str(result))
                row.forced_tokens.extend([special["<|output_start|>"], *answer, special["<|output_end|>"]])
            row.python_expr_tokens = []
        elif row.in_python_block:
            row.python_expr_tokens.append(token)

    def _special(self) -> dict[str, int]:
        names = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>", "<|assistant_end|>")
        return {**{name: self.tokenizer.encode_special(name) for name in names}, "<|bos|>": self.tokenizer.get_bos_token_id()}

    @torch.inference_mode()
    def generate(self, tokens: list[int], num_samples: int = 1, max_tokens: int | None = None, temperature: float = 1.0,
                 top_k: int | None = None, seed: int = 42) -> Iterator[tuple[list[int], list[int]]]:
        """
        Yields columns (one token per sample, one mask per sample: 1 sampled, 0 forced) until every sample has ended or `max_tokens`
        columns are out; None: until the training context is full. A sample that has ended goes on until the others have.
        """
        assert isinstance(tokens, list) and tokens and isinstance(tokens[0], int), "expected a non-empty list of token ids"
        device, config = self.model.get_device(), self.model.config
        if max_tokens is None:  # upstream runs past the end of the cache here
            max_tokens = config.sequence_len - len(tokens)
            if max_tokens <= 0:
                raise UserError(f"the prompt of {len(tokens)} tokens fills the context of {config.sequence_len}; "
                                f"shorten it or pass max_tokens")
        rng = torch.Generator(device=device).manual_seed(seed)
        shape = dict(num_heads=config.n_kv_head, head_dim=config.n_embd // config.n_head, num_layers=config.n_layer,
                     device=device, dtype=COMPUTE_DTYPE)

        prompt_cache = KVCache(batch_size=1, seq_len=len(tokens), **shape)
        logits = self.model.forward(torch.tensor([tokens], dtype=torch.long, device=device), kv_cache=prompt_cache)
        logits = logits[:, -1, :].expand(num_samples, -1)  # (num_samples, V)
        cache = KVCache(batch_size=num_samples, seq_len=len(tokens) + max_tokens, **shape)
        cache.prefill(prompt_cache)
        del prompt_cache

        special = self._special()
        rows = [RowState(tokens.copy()) for _ in range(num_samples)]
        for _ in range(max_tokens):
            if all(row.completed for row in rows):
                break
            sampled = sample_next_token(logits, rng, temperature, top_k)[:, 0].tolist()  # every row, so that all draw the same numbers
            masks = [0 if row.forced_tokens else 1 for row in rows]
            column = [row.forced_tokens.popleft() if row.forced_tokens else token for row, token in zip(rows, sampled)]
            for row, token in zip(rows, column):
                self._advance_row(row, token, special)
            yield column, masks
            ids = torch.tensor(column, dtype=torch.long, device=device).unsqueeze(1)
            logits = self.model.forward(ids, kv_cache=cache)[:, -1, :]

    def generate_batch(self, tokens: list[int], num_samples: int = 1, **kwargs) -> tuple[list[list[int]], list[list[int]]]:
        """`generate`, collected: per sample the whole sequence with the prompt (mask 0) and without the token that ended it."""
        ends = (self.tokenizer.encode_special("<|assistant_end|>"), self.tokenizer.get_bos_token_id())
        results = [tokens.copy() for _ in range(num_samples)]
        masks = [[0] * len(tokens) for _ in range(num_samples)]
        completed = [False] * num_samples
        for column, column_masks in self.generate(tokens, num_samples, **kwargs):
            for i, (token, mask) in enumerate(zip(column, column_masks)):
                completed[i] = completed[i] or token in ends
                if not completed[i]:
                    results[i].append(token)
                    masks[i].append(mask)
            if all(completed):
                break
        return results, masks


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare the engine with the plain generation of the latest base checkpoint")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens to generate greedily (default: %(default)s)")
    return parser.parse_args(argv)


def compare(model, tokenizer, max_tokens: int) -> bool:
    """Generates greedily in both ways, prints both with their times; True when they agree."""
    prompt = tokenizer.encode("The chemical formula of water is", prepend=tokenizer.get_bos_token_id())
    ways = {"GPT.generate": lambda: model.generate(prompt, max_tokens, temperature=0),
            "Engine.generate": lambda: (column[0] for column, _ in Engine(model, tokenizer).generate(prompt, 1, max_tokens, temperature=0))}
    generated = {}
    for name, start in ways.items():
        began = time.perf_counter()
        generated[name] = list(start())  # ids arrive as Python ints: the device is done
        print(f"{name} ({time.perf_counter() - began:.2f} s): {tokenizer.decode(generated[name])!r}")
    plain, fast = generated.values()
    agree = plain[:len(fast)] == fast
    print(f"The two agree: {agree}")
    return agree


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    *_, device = compute_init(autodetect_device_type())
    model, tokenizer, _ = load_model("base", device, phase="eval")
    compare(model, tokenizer, args.max_tokens)


if __name__ == "__main__":
    run(main)

"""
Train the tokenizer on the training shards and write it, with the byte length of every token, to `<base>/tokenizer`.

python -m scripts.tok_train --max-chars=2000000000
"""
import argparse
import os
import time
from collections.abc import Iterator

import torch

from nanochat.command import UserError, run
from nanochat.common import get_base_dir
from nanochat.dataset import parquets_iter_batched
from nanochat.files import replacing
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer

SELF_CHECK = """A line with numbers: 7, 42, 1984 and 3.14159.
\tIt's tabs, "quotes", {braces}; don't we'll they'VE?
Accents: naïve café, 你好, мир, emoji: 🦀🚀, and <|bos|> as text.

"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the BPE tokenizer", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--max-chars", type=int, default=2_000_000_000, help="stop reading after this many characters")
    parser.add_argument("--doc-cap", type=int, default=10_000, help="characters kept of each document")
    parser.add_argument("--vocab-size", type=int, default=32768, help="entries, bytes and the nine specials included")
    return parser.parse_args(argv)


def training_text(max_chars: int, doc_cap: int) -> Iterator[str]:
    """Documents cut to `doc_cap`; the one that takes the total beyond `max_chars` is the last."""
    total = 0
    for documents in parquets_iter_batched("train"):
        for document in documents:
            document = document[:doc_cap]
            total += len(document)
            yield document
            if total > max_chars:
                return


def byte_lengths(tokenizer: RustBPETokenizer) -> torch.Tensor:
    """int32 (V,): raw bytes of every token, 0 for specials."""
    specials = {tokenizer.encode_special(name) for name in tokenizer.get_special_tokens()}
    return torch.tensor([0 if i in specials else len(tokenizer.decode_single_token_bytes(i)) for i in range(tokenizer.get_vocab_size())],
                        dtype=torch.int32)


def train(args: argparse.Namespace) -> None:
    least = 256 + len(SPECIAL_TOKENS)
    if args.vocab_size < least:
        raise UserError(f"--vocab-size must be at least {least} (every byte and the special tokens), got {args.vocab_size}")
    print(f"max_chars: {args.max_chars:,}")
    print(f"doc_cap: {args.doc_cap:,}")
    print(f"vocab_size: {args.vocab_size:,}")
    t0 = time.time()
    tokenizer = RustBPETokenizer.train_from_iterator(training_text(args.max_chars, args.doc_cap), args.vocab_size)
    print(f"Training time: {time.time() - t0:.2f}s")
    assert tokenizer.decode(tokenizer.encode(SELF_CHECK)) == SELF_CHECK, "the tokenizer does not give back the text it encoded"

    tokenizer_dir = os.path.join(get_base_dir(), "tokenizer")
    tokenizer.save(tokenizer_dir)
    path = os.path.join(tokenizer_dir, "token_bytes.pt")
    with replacing(path) as f:
        torch.save(byte_lengths(tokenizer), f)
    print(f"Saved token byte lengths to {path}")


def main(argv: list[str] | None = None) -> None:
    train(parse(argv))


if __name__ == "__main__":
    run(main)

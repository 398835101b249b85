"""
The byte-level BPE tokenizer: trained by rustbpe, run by tiktoken, and the renderer of chat conversations.

Trained by `python -m scripts.tok_train`, which leaves in `<base>/tokenizer`
    tokenizer.json   pattern, ranks in base64, specials: plain data, what is read
    tokenizer.pkl    the same as a pickled `tiktoken.Encoding`, for other nanochat trees; read, through an allow-list, only if it
                     is not the one that tokenizer.json was written with
    token_bytes.pt   int32, the raw byte length of every token id, 0 for specials
"""
import base64
import copy
import hashlib
import io
import json
import os
import pickle
from functools import lru_cache

import rustbpe
import tiktoken
import torch

from nanochat.command import UserError
from nanochat.common import get_base_dir
from nanochat.files import replacing

# The order fixes the ids: specials come right after the mergeable ranks.
SPECIAL_TOKENS = [
    "<|bos|>",              # begins every document and every conversation
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",     # the assistant calls the calculator ...
    "<|python_end|>",
    "<|output_start|>",     # ... and reads its answer
    "<|output_end|>",
]

# GPT-4's pattern, with runs of digits cut after 2 instead of 3: at 32K entries three-digit numbers cost too much vocabulary.
SPLIT_PATTERN = (r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"""
                 r"""| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+""")


class UnreadableTokenizer(UserError, pickle.UnpicklingError):
    """A tokenizer file is damaged, or holds something other than an encoding."""


class _EncodingUnpickler(pickle.Unpickler):
    """Reads a pickled tiktoken.Encoding and nothing else: a tokenizer from a stranger can't run code."""

    def find_class(self, module: str, name: str):
        if (module, name) == ("tiktoken.core", "Encoding"):
            return tiktoken.Encoding
        raise pickle.UnpicklingError(f"a tokenizer file may hold a tiktoken.core.Encoding only, this one asks for {module}.{name}")


def _read(path: str) -> bytes | None:
    if not os.path.exists(path):
        return None
    with open(path, "rb") as f:
        return f.read()


def _plain(enc: tiktoken.Encoding, pickled: bytes) -> dict:
    """The encoding as plain values. The bytes of rank i are the i-th entry of `ranks`."""
    pieces = sorted(enc._mergeable_ranks, key=enc._mergeable_ranks.get)
    assert [enc._mergeable_ranks[piece] for piece in pieces] == list(range(len(pieces))), "ranks must count from 0 without a gap"
    return {"name": enc.name, "sha256_of_pkl": hashlib.sha256(pickled).hexdigest(), "pattern": enc._pat_str,
            "specials": enc._special_tokens, "ranks": [base64.b64encode(piece).decode("ascii") for piece in pieces]}


def _encoding_from_plain(stored: dict) -> tiktoken.Encoding:
    ranks = {base64.b64decode(piece, validate=True): rank for rank, piece in enumerate(stored["ranks"])}
    return tiktoken.Encoding(name=stored["name"], pat_str=stored["pattern"], mergeable_ranks=ranks, special_tokens=stored["specials"])


class RustBPETokenizer:
    """A `tiktoken.Encoding` together with its begin-of-sequence token."""

    def __init__(self, enc: tiktoken.Encoding, bos_token: str):
        self.enc = enc
        self.bos_token_id = self.encode_special(bos_token)

    @classmethod
    def train_from_iterator(cls, text_iterator, vocab_size: int) -> "RustBPETokenizer":
        """Train on an iterator of strings; `vocab_size` counts the 256 bytes and the nine specials."""
        num_mergeable = vocab_size - len(SPECIAL_TOKENS)
        assert num_mergeable >= 256, f"vocab_size must be at least {256 + len(SPECIAL_TOKENS)} (bytes and specials), got {vocab_size}"
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(text_iterator, num_mergeable, pattern=SPLIT_PATTERN)
        ranks = {bytes(piece): rank for piece, rank in trainer.get_mergeable_ranks()}
        specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        enc = tiktoken.Encoding(name="rustbpe", pat_str=trainer.get_pattern(), mergeable_ranks=ranks, special_tokens=specials)
        return cls(enc, "<|bos|>")

    @classmethod
    def from_directory(cls, tokenizer_dir: str) -> "RustBPETokenizer":
        """
        Read a folder that `save`, or another nanochat tree, wrote. Executes nothing that is in the files. Raises FileNotFoundError
        without a tokenizer, UnreadableTokenizer (a pickle.UnpicklingError) on any other content.
        """
        path = os.path.join(tokenizer_dir, "tokenizer.pkl")
        plain_path = os.path.join(tokenizer_dir, "tokenizer.json")
        pickled = _read(path)
        plain = _read(plain_path)
        if pickled is None and plain is None:
            raise FileNotFoundError(f"no tokenizer at {path}; train one with: python -m scripts.tok_train")
        try:
            if plain is not None:
                stored = json.loads(plain)
                if pickled is None or hashlib.sha256(pickled).hexdigest() == stored["sha256_of_pkl"]:
                    return cls(_encoding_from_plain(stored), "<|bos|>")
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UnreadableTokenizer(f"{plain_path} was not loaded: {e!r}; delete it to use tokenizer.pkl, "
                                      f"or train again with: python -m scripts.tok_train") from e
        try:
            enc = _EncodingUnpickler(io.BytesIO(pickled)).load()
        except Exception as e:  # a damaged pickle can raise nearly anything
            raise UnreadableTokenizer(f"{path} was not loaded: {e}; train again with: python -m scripts.tok_train") from e
        if not isinstance(enc, tiktoken.Encoding):
            raise UnreadableTokenizer(f"{path} holds a {type(enc).__name__}, not a tiktoken.core.Encoding")
        return cls(enc, "<|bos|>")

    @classmethod
    def from_pretrained(cls, tiktoken_name: str) -> "RustBPETokenizer":
        """A published tokenizer, for comparison (`gpt2`, `cl100k_base`). Fetched from the network the first time."""
        return cls(tiktoken.get_encoding(tiktoken_name), "<|endoftext|>")

    def save(self, tokenizer_dir: str) -> None:
        os.makedirs(tokenizer_dir, exist_ok=True)
        path = os.path.join(tokenizer_dir, "tokenizer.pkl")
        pickled = pickle.dumps(self.enc)
        with replacing(path) as f:
            f.write(pickled)
        with replacing(os.path.join(tokenizer_dir, "tokenizer.json")) as f:
            f.write(json.dumps(_plain(self.enc, pickled), indent=0).encode("utf-8"))
        print(f"Saved tokenizer to {path}")

    # --- vocabulary -----------------------------------------------------------------------------------------------

    def get_vocab_size(self) -> int:
        return self.enc.n_vocab

    def get_special_tokens(self) -> set[str]:
        return self.enc.special_tokens_set

    def get_bos_token_id(self) -> int:
        return self.bos_token_id

    @lru_cache(maxsize=32)
    def encode_special(self, text: str) -> int:
        return self.enc.encode_single_token(text)

    def id_to_token(self, id: int) -> str:
        return self.enc.decode([id])

    def decode_single_token_bytes(self, token_id: int) -> bytes:
        return self.enc.decode_single_token_bytes(token_id)

    # --- text to ids and back -------------------------------------------------------------------------------------

    def encode(self, text: str | list[str], prepend: int | str | None = None, append: int | str | None = None,
               num_threads: int = 8) -> list[int] | list[list[int]]:
        """
        Ids of one text, or of each text of a list. Special strings inside a text are ordinary characters: only
        `prepend` and `append` (an id, or the name of a special token) put special ids into the result.
        """
        if isinstance(text, str):
            rows = [self.enc.encode_ordinary(text)]
        elif isinstance(text, list):
            rows = self.enc.encode_ordinary_batch(text, num_threads=num_threads)
        else:
            raise ValueError(f"encode takes a str or a list of str, got {type(text).__name__}")
        as_ids = lambda token: [] if token is None else [token if isinstance(token, int) else self.encode_special(token)]
        first, last = as_ids(prepend), as_ids(append)
        if first or last:
            rows = [first + row + last for row in rows]
        return rows[0] if isinstance(text, str) else rows

    def __call__(self, *args, **kwargs) -> list[int] | list[list[int]]:
        return self.encode(*args, **kwargs)

    def decode(self, ids: list[int]) -> str:
        return self.enc.decode(ids)

    # --- conversations --------------------------------------------------------------------------------------------

    def render_conversation(self, conversation: dict, max_tokens: int = 2048) -> tuple[list[int], list[int]]:
        """
        Ids of a conversation and a mask of equal length: 1 where the assistant is to be trained, 0 elsewhere.

        `conversation["messages"]` is a list of {"role", "content"}, user first, then in turns. A leading system
        message is folded into the first user message. Assistant content is a string, or a list of parts
        {"type": "text" | "python" | "python_output", "text"}; what Python printed is read, not learned.
        """
        messages = conversation["messages"]
        if messages[0]["role"] == "system":
            messages = copy.deepcopy(messages)
            system = messages.pop(0)
            assert messages and messages[0]["role"] == "user", "a system message must be followed by a user message"
            messages[0]["content"] = system["content"] + "\n\n" + messages[0]["content"]
        assert messages, "a conversation needs at least one message"

        ids, mask = [], []

        def add(tokens: str | list[int], train: int) -> None:
            tokens = [self.encode_special(tokens)] if isinstance(tokens, str) else tokens
            ids.extend(tokens)
            mask.extend([train] * len(tokens))

        add([self.bos_token_id], 0)
        for i, message in enumerate(messages):
            role, content = ("user", "assistant")[i % 2], message["content"]
            assert message["role"] == role, f"message {i} is from {message['role']}, expected {role}: turns must alternate"
            add(f"<|{role}_start|>", 0)
            if role == "user":
                assert isinstance(content, str), f"user content must be a string, got {type(content).__name__}"
                add(self.encode(content), 0)
                add("<|user_end|>", 0)
                continue
            if isinstance(content, str):
                add(self.encode(content), 1)
            elif isinstance(content, list):
                for part in content:
                    kind, tokens = part["type"], self.encode(part["text"])
                    if kind == "text":
                        add(tokens, 1)
                    elif kind == "python":
                        add("<|python_start|>", 1)
                        add(tokens, 1)
                        add("<|python_end|>", 1)
                    elif kind == "python_output":
                        add("<|output_start|>", 0)
                        add(tokens, 0)
                        add("<|output_end|>", 0)
                    else:
                        raise ValueError(f"unknown part type {kind!r} in message {i}: expected text, python or python_output")
            else:
                raise ValueError(f"assistant content must be a string or a list of parts, got {type(content).__name__}")
            add("<|assistant_end|>", 1)
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: dict) -> list[int]:
        """Ids of a conversation whose last, assistant, message is cut off, up to where the assistant is to speak."""
        conversation = copy.deepcopy(conversation)
        last = conversation["messages"].pop()
        assert last["role"] == "assistant", f"the last message must be the assistant's, got {last['role']}"
        ids, _ = self.render_conversation(conversation)
        return ids + [self.encode_special("<|assistant_start|>")]

    def visualize_tokenization(self, ids: list[int], mask: list[int], with_token_id: bool = False) -> str:
        """For the terminal: tokens between bars, trained ones green, the others red."""
        red, green, grey, reset = "\033[91m", "\033[92m", "\033[90m", "\033[0m"
        pieces = []
        for token_id, train in zip(ids, mask):
            piece = f"{green if train else red}{self.decode([token_id])}{reset}"
            pieces.append(piece + (f"{grey}({token_id}){reset}" if with_token_id else ""))
        return "|".join(pieces)


def get_tokenizer() -> RustBPETokenizer:
    return RustBPETokenizer.from_directory(os.path.join(get_base_dir(), "tokenizer"))


def get_token_bytes(device: str | torch.device = "cpu") -> torch.Tensor:
    """int32 (V,): raw bytes of each token, 0 for specials. What bits per byte divides by."""
    path = os.path.join(get_base_dir(), "tokenizer", "token_bytes.pt")
    assert os.path.exists(path), f"no token byte lengths at {path}; write them with: python -m scripts.tok_train"
    with open(path, "rb") as f:
        return torch.load(f, map_location=device, weights_only=True)

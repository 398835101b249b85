"""
The tokenizer of a run: upstream's `scripts.tok_train` on the general text, once.

python -m nanochat_cl.tokenizer --profile cpu
"""
import argparse
import hashlib
import logging
from pathlib import Path

from nanochat_cl import command, corpus, files, upstream
from nanochat_cl.profiles import PROFILES


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nanochat_cl.tokenizer", description="Train the tokenizer on the general text")
    parser.add_argument("--profile", choices=PROFILES, default="cpu", help="sizes of the run (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, help="entries, bytes and specials included (default: the profile's)")
    parser.add_argument("--max-chars", type=int, default=2_000_000_000, help="text to train on (default: %(default)s)")
    args = parser.parse_args(argv)
    args.vocab_size = args.vocab_size or PROFILES[args.profile].vocab_size
    return args


def train(args: argparse.Namespace) -> None:
    from nanochat.common import get_base_dir
    folder = Path(get_base_dir()) / "tokenizer"
    asked = {"vocab_size": args.vocab_size, "max_chars": args.max_chars}  # not the text: every domain takes near duplicates out of it
    text = corpus.complete(args.profile)["files"]
    if made := corpus.manifest(folder, asked, "made_with.json"):
        changed = "; the general text has changed since it was trained" if made["corpus_files"] != text else ""
        print(f"tokenizer | complete: {args.vocab_size:,} entries in {folder}{changed}")
        return
    logging.getLogger("rustbpe").setLevel(logging.WARNING)  # one line per percent otherwise
    upstream.run_script("scripts.tok_train", [f"--vocab-size={args.vocab_size}", f"--max-chars={args.max_chars}"])
    files.write_json(folder / "made_with.json", {**asked, "corpus_files": text})
    print(f"tokenizer | {args.vocab_size:,} entries in {folder}; next: python -m nanochat_cl.pretrain --profile {args.profile}")


def load(profile: str) -> tuple:
    """nanochat's tokenizer, and the bytes of each of its tokens."""
    from nanochat.tokenizer import get_token_bytes, get_tokenizer
    try:
        return get_tokenizer(), get_token_bytes()
    except Exception as e:  # a damaged pickle raises what it likes
        raise command.UserError(f"no usable tokenizer ({' '.join(str(e).split()) or type(e).__name__}); train one with: "
                                f"python -m nanochat_cl.tokenizer --profile {profile}") from e


def fingerprint(token_bytes) -> str:
    """16 hex digits for a vocabulary with these numbers of bytes of each token."""
    return hashlib.sha256(token_bytes.numpy().tobytes()).hexdigest()[:16]


def main(argv: list[str] | None = None) -> None:
    train(parse(argv))


if __name__ == "__main__":
    command.run(main)

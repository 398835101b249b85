"""A whole base directory at toy size, made in a second: tokenizer, corpora and Phase A checkpoints that learned a few steps."""
import os
import random
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nanochat_cl import accounting, arms, files, machine, patching

T, ROWS = 32, 4
WORDS = {"alpha": "river stone moss fern brook water trout bank reed shade",
         "beta": "def return self class import lambda yield while range list",
         "gamma": "ledger profit margin audit asset credit bond yield share tax"}
FLAGS = dict(unembedding_lr=0.032, embedding_lr=1.6, matrix_lr=0.16, scalar_lr=2.0, weight_decay=0.0)
# What a test of `evolve` hands over, so that a run takes seconds.
ARGS = ["--domain", "toy", "--depth", "2", "--device-batch-size", "4", "--total-batch-size", "256", "--max-tokens", "2560", "--milestone-tokens", "1024",
        "--visit-tokens", "512", "--eval-docs", "2", "--probe-items", "2", "--device-type", "cpu"]


def text(r: random.Random, words: str, n: int) -> str:
    return " ".join(r.choice(words.split()) for _ in range(n)) + "."


def table(path: Path, subdomains: list[str], documents: int, length: int) -> None:
    r = random.Random(str(path.name))
    rows = [(text(r, WORDS.get(name, " ".join(WORDS.values())), length), name, f"{path.stem}/{name}/{i}") for name in subdomains for i in range(documents)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({k: list(v) for k, v in zip(("text", "subdomain", "key"), zip(*rows))}), path)


def make(base: Path, names=("dense", "cl"), seed: int = 42) -> Path:
    """Call with NANOCHAT_BASE_DIR = base."""
    from nanochat.tokenizer import RustBPETokenizer
    corpus = " ".join(text(random.Random(1), " ".join(WORDS.values()), 3000).split())
    tokenizer = RustBPETokenizer.train_from_iterator(iter([corpus]), 300)
    tokenizer.save(str(base / "tokenizer"))
    special = {tokenizer.encode_special(t) for t in tokenizer.get_special_tokens()}
    sizes = [0 if i in special else len(tokenizer.decode_single_token_bytes(i)) for i in range(tokenizer.get_vocab_size())]
    torch.save(torch.tensor(sizes, dtype=torch.int32), base / "tokenizer" / "token_bytes.pt")
    for split, documents in (("train", 12), ("val", 3), ("test", 3)):
        table(base / "corpora" / "toy" / f"{split}.parquet", list(WORDS), documents, 120)
        table(base / "corpora" / "general" / f"{split}.parquet", ["general"], 6, 60)
    for name in names:
        checkpoint(base, name, tokenizer, seed)
    return base


def checkpoint(base: Path, name: str, tokenizer, seed: int = 42, steps: int = 3) -> Path:
    """What base_train leaves behind, after so many steps on random tokens."""
    from nanochat import checkpoint_manager, gpt
    from nanochat_cl import recipes
    torch.manual_seed(seed)
    batch_tokens = ROWS * T
    with patching.applied(), torch.compiler.set_stance("force_eager"):
        cl = arms.cl(64, 4, tokenizer.get_bos_token_id(), name)
        with torch.device("meta"):
            model = gpt.GPT(gpt.GPTConfig(sequence_len=T, vocab_size=tokenizer.get_vocab_size(), n_layer=2, n_head=4, n_kv_head=4, n_embd=64,
                                          **({"cl": cl} if cl else {})))
        model.to_empty(device="cpu")
        model.init_weights()
        optimizer = model.setup_optimizer(**recipes.phase_a_lrs(FLAGS, batch_tokens))
        for _ in range(steps):
            tokens = torch.randint(0, 256, (ROWS, T + 1))
            model(tokens[:, :-1], tokens[:, 1:]).backward()
            optimizer.step()
            model.zero_grad(set_to_none=True)
        place = base / "base_checkpoints" / f"d2_{name}_s{seed}"
        config = asdict(model.config)
        meta = {"step": steps, "val_bpb": None, "model_config": config, "user_config": FLAGS, "device_batch_size": ROWS, "max_seq_len": T,
                "total_batch_size": batch_tokens}
        checkpoint_manager.save_checkpoint(str(place), steps, model.state_dict(), optimizer.state_dict(), meta)
    files.write_json(place / "phase_a.json", {"arm": name, "seed": seed, "step": steps, "tokens": steps * batch_tokens,
                                              "flops": steps * batch_tokens * accounting.flops_per_token(config), "seconds": 1.0})
    return place


def comparable(base: Path, name: str) -> list[dict]:
    """The records of a run without what may differ: its name, times and memory."""
    return [{k: v for k, v in r.items() if k not in ("run", "tok_per_s", *machine.LOAD) and not k.endswith("_s")}
            for r in files.read_jsonl(base / "evolve" / name / "records.jsonl")]


@contextmanager
def base_directory(place: Path):
    """A toy base directory, for this process and those forked from it."""
    before = os.environ.get("NANOCHAT_BASE_DIR")
    os.environ["NANOCHAT_BASE_DIR"] = str(place)
    torch.compiler.set_stance("force_eager")
    yield make(place)
    torch.compiler.set_stance("default")
    os.environ.pop("NANOCHAT_BASE_DIR") if before is None else os.environ.update(NANOCHAT_BASE_DIR=before)

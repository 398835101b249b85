"""
Checkpoints: `model_<step>.pt`, `meta_<step>.json` and, per rank, `optim_<step>_rank<r>.pt` in `<base>/<stage>/<tag>`.

Every file is written under a temporary name, flushed to the disk and then renamed; the model comes last, so a step that is
listed is complete on rank 0. Loading checks the checksums inside the file and runs no code from it.
"""
import json
import logging
import os
import re
import zipfile

import torch

from nanochat.command import UserError
from nanochat.common import get_base_dir, setup_default_logging
from nanochat.files import replacing
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import get_tokenizer

setup_default_logging()
logger = logging.getLogger(__name__)

SOURCES = {"base": "base_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}


class UnreadableCheckpoint(UserError):
    """A checkpoint file is cut short, damaged, or holds something other than tensors and plain values."""


def log0(message: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        logger.info(message)


def _file(checkpoint_dir: str, step: int, kind: str, rank: int = 0) -> str:
    name = {"model": f"model_{step:06d}.pt", "meta": f"meta_{step:06d}.json", "optim": f"optim_{step:06d}_rank{rank:d}.pt"}[kind]
    return os.path.join(checkpoint_dir, name)


def _write(path: str, data: dict) -> None:
    with replacing(path) as f:
        if path.endswith(".json"):
            f.write(json.dumps(data, indent=2).encode("utf-8"))
        else:
            torch.save(data, f)
    log0(f"Saved {path}")


def save_checkpoint(checkpoint_dir: str, step: int, model_data: dict, optimizer_data: dict | None, meta_data: dict, rank: int = 0) -> None:
    """Rank 0 writes model and metadata; each rank with optimizer data (it is sharded) writes its own."""
    os.makedirs(checkpoint_dir, exist_ok=True)
    if optimizer_data is not None:
        _write(_file(checkpoint_dir, step, "optim", rank), optimizer_data)
    if rank == 0:
        _write(_file(checkpoint_dir, step, "meta"), meta_data)
        _write(_file(checkpoint_dir, step, "model"), model_data)


def _check_sums(path: str) -> None:
    """torch files are zip archives with a checksum per tensor, which torch itself does not look at."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"checksum mismatch in {damaged}")


def _read(path: str, device: str | torch.device) -> dict:
    if path.endswith(".json"):
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    _check_sums(path)
    return torch.load(path, map_location=device, weights_only=True)


def _newest_readable_before(checkpoint_dir: str, step: int, with_optimizer: bool, rank: int) -> int | None:
    for earlier in sorted((s for s in _steps(checkpoint_dir) if s < step), reverse=True):
        try:
            for kind in ["model", "meta", "optim"] if with_optimizer else ["model", "meta"]:
                _read(_file(checkpoint_dir, earlier, kind, rank), "meta")
            return earlier
        except Exception:
            continue
    return None


def load_checkpoint(checkpoint_dir: str, step: int, device: str | torch.device, load_optimizer: bool = False,
                    rank: int = 0) -> tuple[dict, dict | None, dict]:
    """
    (model state, this rank's optimizer state or None, metadata) of one step. FileNotFoundError when a file is missing;
    UnreadableCheckpoint, naming the file and the newest older step that can be read, when one is damaged.
    """
    def read(kind: str) -> dict:
        path = _file(checkpoint_dir, step, kind, rank)
        try:
            return _read(path, device)
        except FileNotFoundError as e:
            there = ", ".join(map(str, sorted(_steps(checkpoint_dir)))) or "none"
            raise FileNotFoundError(f"there is no {path}; steps with a model there: {there}") from e
        except Exception as e:  # what a damaged archive raises is anyone's guess
            earlier = _newest_readable_before(checkpoint_dir, step, load_optimizer, rank)
            way_out = "no older step is readable" if earlier is None else f"the newest older step that is readable is {earlier}"
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise UnreadableCheckpoint(f"{path} cannot be read ({reason}); {way_out}") from e

    return read("model"), read("optim") if load_optimizer else None, read("meta")


def _patch_missing_config_keys(kwargs: dict) -> None:
    """Configs from before sliding windows mean full attention."""
    kwargs.setdefault("window_pattern", "L")


def _patch_missing_keys(model_data: dict, model_config: GPTConfig) -> None:
    """Models from before the residual scalars behave as if those were 1 and 0."""
    device = next(iter(model_data.values())).device
    model_data.setdefault("resid_lambdas", torch.ones(model_config.n_layer, device=device))
    model_data.setdefault("x0_lambdas", torch.zeros(model_config.n_layer, device=device))


def build_model(checkpoint_dir: str, step: int, device: torch.device, phase: str):
    """(model in train or eval mode, tokenizer, metadata) of one checkpoint."""
    assert phase in ("train", "eval"), f"phase must be train or eval, got {phase!r}"
    model_data, _, meta_data = load_checkpoint(checkpoint_dir, step, device)
    if device.type in ("cpu", "mps"):
        model_data = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in model_data.items()}
    model_data = {k.removeprefix("_orig_mod."): v for k, v in model_data.items()}
    config_kwargs = meta_data["model_config"]
    _patch_missing_config_keys(config_kwargs)
    log0(f"Building model with config: {config_kwargs}")
    model_config = GPTConfig(**config_kwargs)
    _patch_missing_keys(model_data, model_config)
    with torch.device("meta"):
        model = GPT(model_config)
    model.to_empty(device=device)
    model.init_weights()  # for the rotary tables, which no checkpoint holds
    model.load_state_dict(model_data, strict=True, assign=True)
    model.train(phase == "train")
    tokenizer = get_tokenizer()
    assert tokenizer.get_vocab_size() == config_kwargs["vocab_size"], (
        f"the tokenizer has {tokenizer.get_vocab_size()} entries, "
        f"the model in {checkpoint_dir} was trained with {config_kwargs['vocab_size']}")
    return model, tokenizer, meta_data


def find_largest_model(checkpoints_dir: str) -> str:
    """The tag d<number> with the largest number, else the most recently modified one."""
    tags = sorted(e.name for e in os.scandir(checkpoints_dir) if e.is_dir()) if os.path.isdir(checkpoints_dir) else []
    if not tags:
        raise FileNotFoundError(f"no checkpoints in {checkpoints_dir}; train a model first: python -m scripts.base_train")
    depths = {tag: int(match.group(1)) for tag in tags if (match := re.match(r"d(\d+)", tag))}
    if depths:
        return max(depths, key=depths.get)
    return max(tags, key=lambda tag: os.path.getmtime(os.path.join(checkpoints_dir, tag)))


def _steps(checkpoint_dir: str) -> list[int]:
    names = os.listdir(checkpoint_dir) if os.path.isdir(checkpoint_dir) else []
    return [int(match.group(1)) for name in names if (match := re.fullmatch(r"model_(\d+)\.pt", name))]


def find_last_step(checkpoint_dir: str) -> int:
    steps = _steps(checkpoint_dir)
    if not steps:
        raise FileNotFoundError(f"no model_<step>.pt in {checkpoint_dir}")
    return max(steps)


def _resolve(checkpoints_dir: str, model_tag: str | None, step: int | None) -> tuple[str, int]:
    if model_tag is None:
        model_tag = find_largest_model(checkpoints_dir)
        log0(f"No model tag given, taking {model_tag}")
    checkpoint_dir = os.path.join(checkpoints_dir, model_tag)
    return checkpoint_dir, find_last_step(checkpoint_dir) if step is None else step


def load_model_from_dir(checkpoints_dir: str, device: torch.device, phase: str, model_tag: str | None = None, step: int | None = None):
    """`build_model` on the given tag and step, by default the largest model and its last step."""
    checkpoint_dir, step = _resolve(checkpoints_dir, model_tag, step)
    log0(f"Loading model from {checkpoint_dir} at step {step}")
    return build_model(checkpoint_dir, step, device, phase)


def load_model(source: str, *args, **kwargs):
    """`load_model_from_dir` of a stage: base, sft or rl."""
    return load_model_from_dir(os.path.join(get_base_dir(), SOURCES[source]), *args, **kwargs)


def load_optimizer_state(source: str, device: str | torch.device, rank: int, model_tag: str | None = None,
                         step: int | None = None) -> dict | None:
    """This rank's shard of the optimizer state, or None when the checkpoint has none."""
    checkpoint_dir, step = _resolve(os.path.join(get_base_dir(), SOURCES[source]), model_tag, step)
    path = _file(checkpoint_dir, step, "optim", rank)
    if not os.path.exists(path):
        log0(f"No optimizer state at {path}")
        return None
    try:
        return _read(path, device)
    except Exception as e:
        raise UnreadableCheckpoint(f"{path} cannot be read: {e}") from e

"""
What this machine has, and what follows from it.

python -m nanochat_cl.machine profile    # the one that fits: cpu | gpu1 | h100x8
python -m nanochat_cl.machine dtype      # NANOCHAT_DTYPE worth setting: bfloat16 on a processor that computes in it, else nothing
"""
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from nanochat_cl import upstream
from nanochat_cl.command import UserError

RECOMPILES = 64  # a kernel of the optimizer is compiled once per shape and dtype; torch's limit of 8 is meant for one model


def say(line: str) -> None:
    """One line to the terminal, from rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def short(count: float) -> str:
    """412k, 31.5M."""
    size, letter = next(((size, letter) for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if count >= size), (1, ""))
    return f"{count / size:.1f}".removesuffix(".0") + letter


def prepare(device_type: str = "") -> None:
    """What torch and nanochat read only once: call it before nanochat is imported, and CUDA begun."""
    if device_type == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nanochat chooses number format and attention kernel by what it sees, not by what is asked
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # names of collectives that upstream uses have younger ones
    compiler = next((name for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name and shutil.which(name)), None)
    if compiler is None:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        say("no C++ compiler: compiled steps run eagerly, which is slower; install g++, or set CXX")
    elif compiler != os.environ.get("CXX", "g++"):
        os.environ["CXX"] = compiler  # torch itself takes $CXX, else g++, and looks no further
    import torch._dynamo
    torch._dynamo.config.recompile_limit = max(RECOMPILES, torch._dynamo.config.recompile_limit)


@contextmanager
def fixed_sums(on: bool) -> Iterator[None]:
    """
    While on, sums over repeated indices are made in a fixed order: on a CPU, compiled for several threads, the gradient of an embedding
    otherwise depends on which of them comes first. Off for dense in Phase A, which stays what upstream's own script makes of it.
    """
    import torch
    torch.use_deterministic_algorithms(on, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _cpuinfo(field: str, path: str | Path = "/proc/cpuinfo") -> str:
    text = Path(path).read_text() if Path(path).is_file() else ""
    found = re.search(rf"^{field}\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1) if found else ""


def compute_dtype(cpuinfo: str | Path = "/proc/cpuinfo") -> str:
    """bfloat16 where the processor computes in it; "" where upstream's own choice is right, as on GPUs."""
    import torch
    found = {"amx_bf16", "avx512_bf16"} & set(_cpuinfo("flags", cpuinfo).split())
    return "bfloat16" if found and not torch.cuda.is_available() else ""


def describe() -> dict:
    """For the record of a run: what it ran on, hardware and software."""
    import torch
    gpus, tree = torch.cuda.device_count(), upstream.tree()
    tree = tree.relative_to(upstream.REPO) if tree.is_relative_to(upstream.REPO) else tree
    git = subprocess.run("git describe --always --dirty", shell=True, cwd=upstream.REPO, capture_output=True, text=True)
    return {"platform": platform.platform(), "cpu": _cpuinfo("model name") or platform.processor(), "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name() if gpus else "cpu", "gpus": gpus, "python": platform.python_version(),
            "torch": str(torch.__version__), **{name: metadata.version(name) for name in ("numpy", "tiktoken", "pyarrow")},
            "commit": git.stdout.strip() or None, "upstream": {"path": str(tree), "sha256": upstream.tree_hash()}}


def detect_profile() -> str:
    import torch
    gpus = torch.cuda.device_count()
    return "h100x8" if gpus >= 8 else "gpu1" if gpus else "cpu"


LOAD = ("peak_memory_bytes", "mfu")


def load(device_type: str, flops_per_s: float) -> dict[str, float]:
    """Peak memory in bytes, of a GPU by tensors, of a CPU by this process; share of a GPU's bfloat16 peak that `flops_per_s` of it are."""
    if device_type != "cuda":
        return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    import torch
    from nanochat.common import get_peak_flops  # infinite for a GPU that nanochat doesn't know
    return {"peak_memory_bytes": torch.cuda.max_memory_allocated(), "mfu": flops_per_s / get_peak_flops(torch.cuda.get_device_name())}


def check_disk(path: Path, needed: int) -> None:
    """UserError when fewer than `needed` bytes are free where `path` is or will be."""
    free = shutil.disk_usage(next(place for place in (path, *path.absolute().parents) if place.exists())).free
    if free < needed:
        raise UserError(f"{path} needs {needed:,} bytes, the disk has {free:,} free; make room, or set NANOCHAT_BASE_DIR to another disk")


if __name__ == "__main__":
    print({"profile": detect_profile, "dtype": compute_dtype}[sys.argv[1]]())

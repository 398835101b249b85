"""
What every other module needs: the compute dtype, logging, the base directory, ranks and devices, peak speeds of accelerators.

At import: decides the compute dtype (which touches CUDA where there is one) and sets up the root logger.
"""
import logging
import os
import re
import urllib.request
from collections.abc import Callable

import torch
import torch.distributed as dist
from filelock import FileLock

from nanochat.files import replacing


def _choose_compute_dtype() -> tuple[torch.dtype, str]:
    if "NANOCHAT_DTYPE" in os.environ:
        name = os.environ["NANOCHAT_DTYPE"]
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name], f"NANOCHAT_DTYPE={name}"
    if not torch.cuda.is_available():
        return torch.float32, "no CUDA"
    capability = torch.cuda.get_device_capability()
    return (torch.bfloat16 if capability >= (8, 0) else torch.float32), "CUDA compute capability {}.{}".format(*capability)


COMPUTE_DTYPE, COMPUTE_DTYPE_REASON = _choose_compute_dtype()  # activations; there is no autocast, linears cast their weights to it


class ColoredFormatter(logging.Formatter):
    """Level names in colour; in INFO messages sizes, percentages and shard numbers stand out."""

    RESET, BOLD = "\033[0m", "\033[1m"
    COLORS = {"DEBUG": "\033[36m", "INFO": "\033[32m", "WARNING": "\033[33m", "ERROR": "\033[31m", "CRITICAL": "\033[35m"}

    def format(self, record: logging.LogRecord) -> str:
        level = record.levelname
        if level in self.COLORS:
            record.levelname = f"{self.COLORS[level]}{self.BOLD}{level}{self.RESET}"
        message = super().format(record)
        if level == "INFO":
            message = re.sub(r"(\d+(?:\.\d+)?\s*(?:GB|MB|%|docs))", rf"{self.BOLD}\1{self.RESET}", message)
            message = re.sub(r"(Shard \d+)", rf"{self.COLORS['INFO']}{self.BOLD}\1{self.RESET}", message)
        return message


def setup_default_logging() -> None:
    """One coloured stream handler on the root logger; does nothing when the root logger has handlers already."""
    handler = logging.StreamHandler()
    handler.setFormatter(ColoredFormatter("%(asctime)s - %(name)s - %(levelname)s - %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


setup_default_logging()
logger = logging.getLogger(__name__)


def get_base_dir() -> str:
    """Where all artefacts go: NANOCHAT_BASE_DIR, else ~/.cache/nanochat. Created on the first call."""
    base_dir = os.environ.get("NANOCHAT_BASE_DIR") or os.path.expanduser("~/.cache/nanochat")
    os.makedirs(base_dir, exist_ok=True)
    return base_dir


def download_file_with_lock(url: str, filename: str, postprocess_fn: Callable[[str], object] | None = None) -> str:
    """
    Path of `filename` in the base directory, fetched from `url` when it is not there yet, by one process only.

    `postprocess_fn(path)` runs once, before any other process gets the path. What fails leaves no file, so the next call starts again.
    """
    path = os.path.join(get_base_dir(), filename)
    if os.path.exists(path):
        return path
    with FileLock(path + ".lock"):
        if os.path.exists(path):
            return path
        print(f"Downloading {url}")
        with urllib.request.urlopen(url, timeout=60) as response, replacing(path) as f:  # 60 s without a byte
            f.write(response.read())
        if postprocess_fn is not None:
            try:
                postprocess_fn(path)
            except BaseException:
                os.remove(path)
                raise
    return path


def print0(s: str = "", **kwargs) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(s, **kwargs)


def print_banner() -> None:
    print0("\n" + "  ".join("nanochat") + "\n" + "=" * 22)


def is_ddp_requested() -> bool:
    """Launched under torchrun, going by the environment."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def is_ddp_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_dist_info() -> tuple[bool, int, int, int]:
    """(requested, rank, local rank, world size), from the environment, whether or not there is a process group."""
    if not is_ddp_requested():
        return False, 0, 0, 1
    return True, int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])


def autodetect_device_type() -> str:
    device_type = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    print0(f"Autodetected device type: {device_type}")
    return device_type


def compute_init(device_type: str = "cuda") -> tuple[bool, int, int, int, torch.device]:
    """
    Seeds torch, sets the matmul precision and, on CUDA under torchrun, joins the NCCL process group.

    Returns (launched under torchrun, rank, local rank, world size, device). On CPU and MPS there is never a process group.
    """
    assert device_type in ("cuda", "mps", "cpu"), f"device type must be cuda, mps or cpu, got {device_type!r}"
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}[device_type]()
    assert available, f"this PyTorch has no {device_type}; pass --device-type cpu"
    torch.manual_seed(42)
    if device_type == "cuda":
        torch.cuda.manual_seed(42)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    ddp, rank, local_rank, world_size = get_dist_info()
    device = torch.device(device_type)
    if ddp and device_type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
        dist.barrier()
    if rank == 0:
        logger.info(f"Distributed world size: {world_size}")
    return ddp, rank, local_rank, world_size, device


def compute_cleanup() -> None:
    if is_ddp_initialized():
        dist.destroy_process_group()


class DummyWandb:
    """Stands in for a wandb run when nothing is to be logged."""

    def log(self, *args, **kwargs) -> None: ...
    def finish(self) -> None: ...


# Parts of the lower-cased device name (all must occur; the first row with a value wins), dense bf16 FLOP/s, memory bytes/s.
PEAKS = [
    (("gb200",), 2.5e15, 8.0e12), (("grace blackwell",), 2.5e15, None), (("b200",), 2.25e15, 8.0e12), (("b100",), 1.8e15, 8.0e12),
    (("h200", "nvl"), 836e12, 4.8e12), (("h200", "pcie"), 836e12, 4.8e12), (("h200",), 989e12, 4.8e12),
    (("h100", "nvl"), 835e12, 3.9e12), (("h100", "pcie"), 756e12, 2.0e12), (("h100",), 989e12, 3.35e12),
    (("h800", "nvl"), 989e12, None), (("h800", "pcie"), None, 2.0e12), (("h800",), 756e12, 3.35e12),
    (("a100",), 312e12, 2.0e12), (("a800",), 312e12, 2.0e12), (("a40",), 149.7e12, 696e9), (("a30",), 165e12, 933e9),
    (("l40s",), 362e12, 864e9), (("l40-s",), 362e12, 864e9), (("l40 s",), 362e12, 864e9), (("l4",), 121e12, 300e9),
    (("mi355",), 2.5e15, 8.0e12), (("mi325",), 1.3074e15, 6.0e12), (("mi300x",), 1.3074e15, 5.3e12), (("mi300a",), 980.6e12, 5.3e12),
    (("mi250x",), 383e12, 3.28e12), (("mi250",), 362.1e12, 3.28e12),
    (("5090",), 209.5e12, 1.79e12), (("4090",), 165.2e12, 1.01e12), (("3090",), 71e12, 936e9),
]


def _peak(device_name: str, column: int, what: str) -> float:
    for row in PEAKS:
        if row[column] is not None and all(part in device_name.lower() for part in row[0]):
            return row[column]
    logger.warning(f"Peak {what} of {device_name!r} is not known; utilisation will show as 0%")
    return float("inf")


def get_peak_flops(device_name: str) -> float:
    """Dense bf16 FLOP/s; inf when the device is not known."""
    if "data center gpu max 1550" in device_name.lower():
        return 512 * torch.xpu.get_device_properties("xpu").max_compute_units * 1300e6
    return _peak(device_name, 1, "FLOP/s")


def get_peak_bandwidth(device_name: str) -> float:
    """Memory bytes/s; inf when the device is not known."""
    return _peak(device_name, 2, "bandwidth")

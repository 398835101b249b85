"""
The pretraining text: a folder of parquet shards with one string column, `text`. The last shard in sorted order is the
validation split. Download the first 8 training shards and the validation shard with:

python -m nanochat.dataset -n 8
"""
import argparse
import os
import time
from collections.abc import Iterator
from multiprocessing import Pool

import pyarrow
import pyarrow.parquet as pq
import requests

from nanochat.command import UserError, run
from nanochat.common import get_base_dir
from nanochat.files import replacing

BASE_URL = "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main"
MAX_SHARD = 6542  # the last shard: validation
base_dir = get_base_dir()
DATA_DIR = os.path.join(base_dir, "base_data_climbmix")


def index_to_filename(index: int) -> str:
    return f"shard_{index:05d}.parquet"


def list_parquet_files(data_dir: str | None = None, warn_on_legacy: bool = False) -> list[str]:
    """Full paths of the shards, sorted by name. Without the current folder the one of earlier releases is used."""
    data_dir = DATA_DIR if data_dir is None else data_dir
    if not os.path.isdir(data_dir):
        legacy_dir = os.path.join(base_dir, "base_data")
        if not os.path.isdir(legacy_dir):
            raise FileNotFoundError(f"no training data at {data_dir}; download some with: python -m nanochat.dataset -n 8")
        if warn_on_legacy:
            print(f"WARNING: {data_dir} does not exist.\n"
                  f"WARNING: Training reads the FinewebEdu shards of an earlier release in {legacy_dir} instead; "
                  f"their bits per byte cannot be compared with current results.\n"
                  f"WARNING: Upgrade with: python -m nanochat.dataset -n 170")
        data_dir = legacy_dir
    return [os.path.join(data_dir, name) for name in sorted(os.listdir(data_dir)) if name.endswith(".parquet")]


def open_shard(path: str) -> pq.ParquetFile:
    """A shard, open for `read_documents`. A file that is no complete parquet raises a UserError with its path."""
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(_unreadable(path, e)) from e


def read_documents(shard: pq.ParquetFile, rg_idx: int, path: str) -> list[str]:
    """All documents of one row group."""
    try:
        return shard.read_row_group(rg_idx, columns=["text"]).column("text").to_pylist()
    except (pyarrow.ArrowException, OSError, KeyError) as e:
        raise UserError(_unreadable(f"{path} (row group {rg_idx})", e)) from e


def _unreadable(path: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (f"cannot read the text of {path}: {reason}; a complete parquet file with a `text` column was expected. "
            f"Delete it and make or download it again (python -m nanochat.dataset)")


def parquets_iter_batched(split: str, start: int = 0, step: int = 1) -> Iterator[list[str]]:
    """Once through a split, one row group at a time; `start` and `step` stride over the row groups of each file."""
    assert split in ("train", "val"), f"split must be train or val, got {split!r}"
    paths = list_parquet_files()
    for path in paths[:-1] if split == "train" else paths[-1:]:
        with open_shard(path) as shard:
            for rg_idx in range(start, shard.num_row_groups, step):
                yield read_documents(shard, rg_idx, path)


def download_single_file(index: int, attempts: int = 5) -> bool:
    """Fetch one shard unless it is there; under a temporary name until complete. False when every attempt failed."""
    name = index_to_filename(index)
    path = os.path.join(DATA_DIR, name)
    if os.path.exists(path):
        print(f"Skipping {name}: already there")
        return True
    for attempt in range(1, attempts + 1):
        try:
            with requests.get(f"{BASE_URL}/{name}", stream=True, timeout=30) as response:
                response.raise_for_status()
                with replacing(path) as f:
                    for piece in response.iter_content(chunk_size=1024 * 1024):
                        f.write(piece)
            print(f"Downloaded {name}")
            return True
        except (requests.RequestException, OSError) as e:
            print(f"Attempt {attempt}/{attempts} for {name} failed: {e}")
            if attempt < attempts:
                time.sleep(2 ** attempt)
    return False


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Download shards of the pretraining text")
    parser.add_argument("-n", "--num-files", type=int, default=-1, help="training shards to download, -1 = all (default: %(default)s)")
    parser.add_argument("-w", "--num-workers", type=int, default=4, help="parallel downloads (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.num_files < -1 or args.num_workers < 1:
        raise UserError(f"expected --num-files >= 0 (-1 = all) and --num-workers >= 1, got {args.num_files} and {args.num_workers}")
    num_train = MAX_SHARD if args.num_files == -1 else min(args.num_files, MAX_SHARD)
    indices = [*range(num_train), MAX_SHARD]
    os.makedirs(DATA_DIR, exist_ok=True)
    print(f"Downloading {len(indices)} shards ({num_train} training, 1 validation) to {DATA_DIR}")
    with Pool(processes=args.num_workers) as pool:
        done = sum(pool.map(download_single_file, indices))
    print(f"Done: {done}/{len(indices)} shards are in {DATA_DIR}")
    if done < len(indices):
        raise UserError(f"{len(indices) - done} of {len(indices)} shards could not be downloaded from {BASE_URL}; check the network "
                         f"and run the same command again: what is complete is kept")


if __name__ == "__main__":
    run(main)

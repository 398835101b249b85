"""runs/bench_data.py at a small size: every table is there, and what it says beside the speeds is right."""
import os
import re
import subprocess
import sys

import pytest

from nanochat_cl import upstream
from nanochat_cl.command import UserError

sys.path.insert(0, str(upstream.REPO / "runs"))
import bench_data  # noqa: E402


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    flags = ["data", "--rounds", "1", "--documents", "300", "--vocab-size", "320", "--tokens", "3e4", "--out", str(out)]
    done = subprocess.run([sys.executable, str(upstream.REPO / "runs" / "bench_data.py"), *flags], capture_output=True, text=True,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    text = (out / "bench_data_cpu.md").read_text()
    assert "    bash runs/bench.sh data --rounds 1" in text and str(out) not in text
    found = {title: body.strip().splitlines() for title, body in re.findall(r"^## (.+)\n\n((?:\|.*\n)+)", text, re.MULTILINE)}
    assert all(len({line.count("|") for line in lines}) == 1 for lines in found.values())
    return {title: [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]] for title, lines in found.items()}


def test_every_part_is_measured(tables):
    assert {title: len(rows) for title, rows in tables.items()} == {
        "Tokenizing": 1, "Batches": 4, "Memory": 4, "Resume": 2, "Near duplicates": 2}
    for rows in tables.values():
        assert all(float(number.replace(",", "")) > 0 for row in rows for number in re.findall(r"\(([\d.,]+)-", " ".join(row[1:]))), rows


def test_memory_is_read_after_1_10_and_100_times_the_tokens_asked_for_in_whole_batches(tables):
    assert [row[0] for row in tables["Memory"]] == ["0", *(f"{-(-n * 30_000 // 65_536) * 65_536:,}" for n in (1, 10, 100))]
    peaks = [float(row[1].replace(",", "")) for row in tables["Memory"]]
    assert peaks == sorted(peaks) and all(float(row[2].replace(",", "")) < float(row[1].replace(",", "")) for row in tables["Memory"])


def test_two_workers_find_the_same_and_what_is_held_out_is_near_itself(tables):
    for row in tables["Near duplicates"]:
        assert row[3] == "yes" and 15 <= int(row[2].split(" of ")[0]) <= 300, row


def test_sizes_that_measure_nothing_are_refused():
    with pytest.raises(UserError, match="--rounds must be at least 1 and --documents 128, got 0 and 8192"):
        bench_data.parse(["data", "--rounds", "0"])

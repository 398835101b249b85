"""nanochat_cl.machine: what it finds and what it sets. `prepare` runs in its own process: it has to come before torch."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat_cl import machine, upstream
from nanochat_cl.command import UserError

PREPARE = """
import os, sys
from nanochat_cl import machine
assert "torch" not in sys.modules
machine.prepare({arguments})
import torch._dynamo
print(os.environ.get("TORCHDYNAMO_DISABLE"), os.environ.get("CXX"), torch._dynamo.config.recompile_limit)
{then}
"""


def prepare(path: Path, arguments: str = "", then: str = "", **environment: str) -> list[str]:
    """Lines printed by a process whose PATH is `path` alone."""
    clean = {key: value for key, value in os.environ.items() if key not in ("CXX", "TORCHDYNAMO_DISABLE", "NANOCHAT_DTYPE")}
    done = subprocess.run([sys.executable, "-c", PREPARE.format(arguments=arguments, then=then)], cwd=upstream.REPO, capture_output=True,
                          text=True, env={**clean, "PATH": str(path), **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def executable(path: Path) -> Path:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_without_a_compiler_steps_run_eagerly_and_one_line_says_so(tmp_path):
    lines = prepare(tmp_path, then="from nanochat import optim; print(hasattr(optim.adamw_step_fused, '_torchdynamo_orig_callable'))")
    assert lines[0].startswith("no C++ compiler: compiled steps run eagerly") and lines[1:] == ["1 None 64", "False"]


def test_with_gcc_nothing_changes_but_the_recompile_limit(tmp_path):
    executable(tmp_path / "g++")
    lines = prepare(tmp_path, then="from nanochat import optim; print(hasattr(optim.adamw_step_fused, '_torchdynamo_orig_callable'))")
    assert lines == ["None None 64", "True"]


def test_a_compiler_that_torch_would_not_look_for_is_named_to_it(tmp_path):
    executable(tmp_path / "clang++")
    assert prepare(tmp_path) == ["None clang++ 64"]
    executable(tmp_path / "g++")
    assert prepare(tmp_path, CXX="gone++") == ["None g++ 64"]
    assert prepare(tmp_path, CXX=str(executable(tmp_path / "mine"))) == [f"None {tmp_path / 'mine'} 64"]


@pytest.mark.parametrize("flags, expected", [("fpu sse avx512f", None), ("fpu avx512_bf16 sse", "avx512_bf16"),
                                             ("fpu amx_bf16 avx512_bf16", "amx_bf16"), ("fpu avx512_bf16x sse", None)])
def test_bfloat16_is_proposed_where_the_processor_computes_in_it(tmp_path, monkeypatch, flags, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\nbugs\t: avx512_bf16\n")
    assert machine.compute_dtype(cpuinfo) == ("bfloat16" if expected else "")
    assert machine.compute_dtype(tmp_path / "none") == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.compute_dtype(cpuinfo) == ""


@pytest.mark.parametrize("gpus, profile", [(0, "cpu"), (1, "gpu1"), (4, "gpu1"), (8, "h100x8"), (16, "h100x8")])
def test_the_profile_follows_the_number_of_gpus(monkeypatch, gpus, profile):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert machine.detect_profile() == profile


def test_a_full_disk_is_refused_by_name_where_the_path_will_be(tmp_path):
    place = tmp_path / "not" / "there" / "yet"
    machine.check_disk(place, 1)
    assert not (tmp_path / "not").exists()
    with pytest.raises(UserError, match=f"{place} needs 1,000,000,000,000,000,000 bytes, the disk has"):
        machine.check_disk(place, 10 ** 18)


def test_the_description_is_plain_json_with_this_machines_versions():
    import json
    described = json.loads(json.dumps(machine.describe()))
    assert described["torch"] == torch.__version__ and described["python"] == ".".join(map(str, sys.version_info[:3]))
    assert described["cores"] >= 1 and described["cpu"] and described["device"]
    assert described["upstream"] == {"path": "upstream", "sha256": upstream.tree_hash()}


def test_only_rank_0_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    machine.say("hidden")
    monkeypatch.setenv("RANK", "0")
    machine.say("shown")
    assert capsys.readouterr().out == "shown\n"


def test_sums_have_a_fixed_order_inside_and_are_left_alone_outside():
    for on in (True, False):
        with machine.fixed_sums(on):
            assert torch.are_deterministic_algorithms_enabled() is on
        assert not torch.are_deterministic_algorithms_enabled()


def test_the_load_of_a_cpu_is_this_process_peak_and_of_a_gpu_the_share_of_its_peak_flops(monkeypatch):
    import torch
    from nanochat import common
    from nanochat_cl import machine
    found = machine.load("cpu", 1e12)
    assert set(found) == {"peak_memory_bytes"} and 5e7 < found["peak_memory_bytes"] < 1e12
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert machine.load("cuda", 0.4 * common.get_peak_flops("NVIDIA H100 80GB HBM3")) == {"peak_memory_bytes": 123, "mfu": 0.4}

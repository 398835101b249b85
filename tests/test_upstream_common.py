"""nanochat.common: dtype choice, logging, base directory, downloads, ranks, peak speeds."""
import io
import logging
import math
import os
import subprocess
import sys
import threading

import pytest
import torch

from nanochat import common

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in (*TORCHRUN, "NANOCHAT_DTYPE"):
        monkeypatch.delenv(name, raising=False)


def pretend_cuda(monkeypatch, capability=(9, 0)):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: capability)


# --- compute dtype ---

@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_the_environment_decides_the_dtype_whatever_the_hardware(monkeypatch, name):
    monkeypatch.setenv("NANOCHAT_DTYPE", name)
    for cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        dtype, reason = common._choose_compute_dtype()
        assert dtype is getattr(torch, name) and name in reason


def test_an_unknown_dtype_stops_the_import():
    result = subprocess.run([sys.executable, "-c", "import nanochat.common"], capture_output=True, text=True,
                            env={**os.environ, "NANOCHAT_DTYPE": "int8", "PYTHONPATH": os.path.dirname(os.path.dirname(common.__file__))})
    assert result.returncode != 0 and "KeyError: 'int8'" in result.stderr


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((8, 9), torch.bfloat16),
                                               ((10, 0), torch.bfloat16), (None, torch.float32)])
def test_without_it_ampere_and_newer_compute_in_bfloat16_and_all_else_in_float32(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: capability)
    assert common._choose_compute_dtype()[0] is dtype


# --- logging ---

def record(level: int, message: str) -> logging.LogRecord:
    return logging.LogRecord("nanochat.x", level, __file__, 1, message, None, None)


@pytest.mark.parametrize("level, color", [("DEBUG", 36), ("INFO", 32), ("WARNING", 33), ("ERROR", 31), ("CRITICAL", 35)])
def test_level_names_are_coloured_and_bold(level, color):
    text = common.ColoredFormatter("%(name)s - %(levelname)s - %(message)s").format(record(getattr(logging, level), "hello"))
    assert text == f"nanochat.x - \033[{color}m\033[1m{level}\033[0m - hello"


def test_sizes_percentages_and_shards_stand_out_in_info_messages_only():
    formatter = common.ColoredFormatter("%(message)s")
    message = "Shard 12: 3.5 GB, 40% of 7 docs, 9 files"
    bold = "\033[1m"
    text = formatter.format(record(logging.INFO, message))
    for part in ("3.5 GB", "40%", "7 docs", "Shard 12"):
        assert f"{bold}{part}\033[0m" in text
    assert "9 files" in text and f"{bold}9" not in text
    assert formatter.format(record(logging.WARNING, message)) == message


def test_setting_up_logging_twice_adds_one_handler(monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.WARNING)
    common.setup_default_logging()
    common.setup_default_logging()
    assert len(root.handlers) == 1 and isinstance(root.handlers[0].formatter, common.ColoredFormatter)
    assert root.level == logging.INFO and common.logger.name == "nanochat.common"


# --- files ---

def test_the_base_directory_follows_the_environment_and_is_created(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "a" / "b"))
    assert common.get_base_dir() == str(tmp_path / "a" / "b") and (tmp_path / "a" / "b").is_dir()
    monkeypatch.setenv("HOME", str(tmp_path))
    for empty in (lambda: monkeypatch.setenv("NANOCHAT_BASE_DIR", ""), lambda: monkeypatch.delenv("NANOCHAT_BASE_DIR")):
        empty()
        assert common.get_base_dir() == str(tmp_path / ".cache" / "nanochat") and (tmp_path / ".cache" / "nanochat").is_dir()


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Serves b"content" to everyone; the list of what was asked for."""
    asked = []
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))

    def urlopen(url, timeout=None):
        asked.append(url)
        return io.BytesIO(b"content")

    monkeypatch.setattr(common.urllib.request, "urlopen", urlopen)
    return asked


def test_many_callers_download_and_postprocess_once(server, tmp_path):
    processed, paths = [], []

    def fetch():
        paths.append(common.download_file_with_lock("http://x/file", "file.zip", processed.append))

    threads = [threading.Thread(target=fetch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    path = str(tmp_path / "file.zip")
    assert paths == [path] * 6 and server == ["http://x/file"] and processed == [path]
    assert open(path, "rb").read() == b"content"


def test_a_file_that_is_there_is_neither_fetched_nor_postprocessed(server, tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    again = common.download_file_with_lock("http://x/file", "file", lambda path: pytest.fail("postprocessed again"))
    assert again == str(tmp_path / "file")
    assert server == [] and (tmp_path / "file").read_bytes() == b"mine"


def test_after_failed_postprocessing_the_next_call_starts_again(server, tmp_path):
    def fail(path):
        assert os.path.exists(path)
        raise RuntimeError("no space")

    with pytest.raises(RuntimeError, match="no space"):
        common.download_file_with_lock("http://x/file", "file", fail)
    done = []
    common.download_file_with_lock("http://x/file", "file", done.append)
    assert len(server) == 2 and done == [str(tmp_path / "file")]


# --- ranks and devices ---

@pytest.mark.parametrize("rank, printed", [(None, "hello;"), ("0", "hello;"), ("1", "")])
def test_only_rank_zero_prints(monkeypatch, capsys, rank, printed):
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    common.print0("hello", end=";")
    assert capsys.readouterr().out == printed
    common.print_banner()
    assert bool(capsys.readouterr().out) == bool(printed)


def test_torchrun_is_recognised_by_all_three_variables(monkeypatch):
    assert common.get_dist_info() == (False, 0, 0, 1)
    for i, (name, value) in enumerate(TORCHRUN.items()):
        assert not common.is_ddp_requested()
        monkeypatch.setenv(name, value)
    assert common.is_ddp_requested() and not common.is_ddp_initialized()
    assert common.get_dist_info() == (True, 1, 1, 4)


@pytest.mark.parametrize("cuda, mps, expected", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_best_device_is_found_and_announced(monkeypatch, capsys, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert common.autodetect_device_type() == expected
    assert expected in capsys.readouterr().out


def test_cpu_init_seeds_and_has_no_process_group_even_under_torchrun(monkeypatch, caplog):
    with caplog.at_level(logging.INFO, logger="nanochat.common"):
        assert common.compute_init("cpu") == (False, 0, 0, 1, torch.device("cpu"))
    assert "world size: 1" in caplog.text
    drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(42)))
    caplog.clear()
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert common.compute_init("cpu") == (True, 1, 1, 4, torch.device("cpu"))
    assert not common.is_ddp_initialized() and caplog.text == ""
    common.compute_cleanup()  # nothing to do, no error


def test_cuda_init_under_torchrun_joins_the_process_group_on_its_own_device(monkeypatch):
    calls = []
    pretend_cuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: calls.append(("seed", seed)))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("set_device", device)))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: calls.append(("precision", name)))
    monkeypatch.setattr(common.dist, "init_process_group", lambda backend, device_id: calls.append((backend, device_id)))
    monkeypatch.setattr(common.dist, "barrier", lambda: calls.append(("barrier",)))
    assert common.compute_init("cuda")[4] == torch.device("cuda")
    assert calls == [("seed", 42), ("precision", "high")]
    calls.clear()
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    device = torch.device("cuda", 1)
    assert common.compute_init("cuda") == (True, 1, 1, 4, device)
    assert calls == [("seed", 42), ("precision", "high"), ("set_device", device), ("nccl", device), ("barrier",)]


def test_a_device_that_is_unknown_or_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device_type in ("tpu", "cuda", "mps"):
        with pytest.raises(AssertionError, match=device_type):
            common.compute_init(device_type)


def test_the_dummy_run_takes_everything():
    run = common.DummyWandb()
    assert run.log({"loss": 1.0}, step=3) is None and run.finish() is None


# --- peak speeds: device name, bf16 FLOP/s, bytes/s ---

@pytest.mark.parametrize("name, flops, bandwidth", [
    ("NVIDIA GB200", 2.5e15, 8.0e12), ("NVIDIA Grace Blackwell", 2.5e15, math.inf), ("NVIDIA B200", 2.25e15, 8.0e12),
    ("NVIDIA B100", 1.8e15, 8.0e12), ("NVIDIA H200 NVL", 836e12, 4.8e12), ("NVIDIA H200 PCIe", 836e12, 4.8e12),
    ("NVIDIA H200", 989e12, 4.8e12), ("NVIDIA H100 NVL", 835e12, 3.9e12), ("NVIDIA H100 PCIe", 756e12, 2.0e12),
    ("NVIDIA H100 80GB HBM3", 989e12, 3.35e12), ("NVIDIA H800 NVL", 989e12, 3.35e12), ("NVIDIA H800 PCIe", 756e12, 2.0e12),
    ("NVIDIA H800", 756e12, 3.35e12), ("NVIDIA A100-SXM4-80GB", 312e12, 2.0e12), ("NVIDIA A800 80GB PCIe", 312e12, 2.0e12),
    ("NVIDIA A40", 149.7e12, 696e9), ("NVIDIA A30", 165e12, 933e9), ("NVIDIA L40S", 362e12, 864e9), ("NVIDIA L40-S", 362e12, 864e9),
    ("NVIDIA L40 S", 362e12, 864e9), ("NVIDIA L4", 121e12, 300e9), ("AMD Instinct MI355X", 2.5e15, 8.0e12),
    ("AMD Instinct MI325X", 1.3074e15, 6.0e12), ("AMD Instinct MI300X", 1.3074e15, 5.3e12), ("AMD Instinct MI300A", 980.6e12, 5.3e12),
    ("AMD Instinct MI250X", 383e12, 3.28e12), ("AMD Instinct MI250", 362.1e12, 3.28e12), ("NVIDIA GeForce RTX 5090", 209.5e12, 1.79e12),
    ("NVIDIA GeForce RTX 4090", 165.2e12, 1.01e12), ("NVIDIA GeForce RTX 3090", 71e12, 936e9)])
def test_peak_speeds_of_known_devices(name, flops, bandwidth):
    assert (common.get_peak_flops(name), common.get_peak_bandwidth(name)) == (flops, bandwidth)


def test_an_unknown_device_has_infinite_peaks_and_a_warning(caplog):
    for peak in (common.get_peak_flops, common.get_peak_bandwidth):
        caplog.clear()
        assert peak("Abacus 3000") == math.inf
        assert [r.levelname.count("WARNING") for r in caplog.records] == [1] and "Abacus 3000" in caplog.text


def test_the_intel_gpu_is_computed_from_its_units(monkeypatch):
    class Properties:
        max_compute_units = 448
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: Properties)
    assert common.get_peak_flops("Intel(R) Data Center GPU Max 1550") == 512 * 448 * 1300e6

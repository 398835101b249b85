import os
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job that a shell started with &: the programs under test would ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models: more threads only get in each other's way
os.environ.setdefault("NANOCHAT_DTYPE", "float32")  # the recorded numbers are, and a GPU would choose bfloat16

import pytest

import nanochat_cl  # noqa: F401  puts the nanochat tree on the import path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A toy base directory, unless a test file makes one of its own."""
    import toy_phase_a
    with toy_phase_a.base_directory(tmp_path_factory.mktemp("base")) as place:
        yield place


@pytest.fixture(scope="module")
def tokenizer(base):
    from nanochat.tokenizer import get_tokenizer
    return get_tokenizer()


@pytest.fixture(autouse=True)
def same_gpus():
    """What a test hides from CUDA (`--device-type cpu`) is there again for the next one."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    yield
    os.environ.pop("CUDA_VISIBLE_DEVICES", None) if before is None else os.environ.update(CUDA_VISIBLE_DEVICES=before)

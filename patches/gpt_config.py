"""
A model config that can ask for Model-CL.

Target:   nanochat.gpt:GPTConfig
Why:      block sizes and routing options have to travel with the checkpoint's metadata, and build_model restores a config from it.
Keeps:    without `cl` (and without an arm in patches/settings.py) the original class: dense metadata has no new key.
Verified: tests/test_model_cl.py, and `python -m nanochat_cl.patching verify`.
"""
from dataclasses import dataclass, field

from nanochat_cl import arms
from patches import settings

SIGNATURE = ("self", "sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")


def wrap(original):
    @dataclass
    class ConfigCL(original):
        cl: dict = field(default_factory=dict)  # see arms.cl; plain JSON values

    def GPTConfig(*args, cl=None, **kwargs):
        cl = settings.arm if cl is None else cl
        if cl is None:
            return original(*args, **kwargs)
        config = ConfigCL(*args, **kwargs)
        config.cl = arms.fit(cl, config.n_embd, config.n_head)
        return config
    return GPTConfig

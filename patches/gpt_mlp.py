"""
The MLP in blocks.

Target:   nanochat.gpt:MLP
Why:      only part of the hidden layer serves a passage, and the rest can be left untouched by it.
Keeps:    the original class where the config has no `cl`; the number of weights, and the names that init_weights fills.
Verified: tests/test_blocks.py, tests/test_model_cl.py.
"""
from nanochat_cl.blocks import BlockSparseMLP

SIGNATURE = ("self", "config")


def wrap(original):
    def MLP(config):
        return original(config) if getattr(config, "cl", None) is None else BlockSparseMLP(config)
    return MLP

"""
Initial values of routers and counters.

Target:   nanochat.gpt:GPT.init_weights
Why:      parameters that upstream doesn't know would stay uninitialised memory.
Keeps:    every weight that the dense model of the same size and seed has, block for block; the state of the random generators after it.
Verified: tests/test_model_cl.py.
"""
from nanochat_cl import routing

SIGNATURE = ("self",)


def wrap(original):
    def init_weights(self):
        original(self)
        if getattr(self.config, "cl", None) is not None:
            routing.init(self)
    return init_weights

"""
One routing decision per forward.

Target:   nanochat.gpt:GPT.forward
Why:      the blocks of all layers are chosen from token embeddings, before the first layer runs.
Keeps:    the call as it is where the config has no `cl`; one graph under torch.compile.
Verified: tests/test_routing.py, tests/test_model_cl.py.
"""
import torch

from nanochat_cl import routing

SIGNATURE = ("self", "idx", "targets", "kv_cache", "loss_reduction")


def wrap(original):
    def forward(self, idx, targets=None, kv_cache=None, loss_reduction="mean"):
        if getattr(self.config, "cl", None) is None:
            return original(self, idx, targets, kv_cache, loss_reduction)
        # Not by the mode: a script may score or sample without a word to the model. Who trains wants a loss and its gradient.
        state = routing.decide(self, idx, kv_cache, learning=targets is not None and torch.is_grad_enabled())
        out = original(self, idx, targets, kv_cache, loss_reduction)
        if kv_cache is not None:
            kv_cache.routing = state  # only now: a call that the cache has no room for leaves it as it was
        routing.forget(self)
        return out
    return forward

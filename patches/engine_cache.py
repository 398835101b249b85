"""
The routing state in the KV cache.

Target:   nanochat.engine:KVCache.prefill
Why:      cached decoding has to choose the blocks that training would: the cache carries what the decision needs, from cache to cache, too.
Keeps:    the original; for a dense model nothing is added. What a reset cache still carries is not looked at: it holds no token.
Verified: tests/test_routing.py.
"""

SIGNATURE = ("self", "other")


def wrap(original):
    def prefill(self, other):
        original(self, other)
        if state := getattr(other, "routing", None):  # routing.State, kept by gpt_forward
            self.routing = state.expand(self.batch_size)
    return prefill

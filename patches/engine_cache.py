"""
The routing state in the KV cache.

Target:   nanochat.engine:KVCache
Why:      cached decoding has to choose the blocks that training would: the cache carries what the decision needs.
Keeps:    everything of the original class; for a dense model the new attribute stays None.
Verified: tests/test_routing.py.
"""

SIGNATURE = ("self", "batch_size", "num_heads", "seq_len", "head_dim", "num_layers", "device", "dtype")


def wrap(original):
    class KVCache(original):
        routing = None  # routing.State, written by routing.decide

        def reset(self):
            super().reset()
            self.routing = None

        def prefill(self, other):
            super().prefill(other)
            state = getattr(other, "routing", None)
            self.routing = None if state is None else state.expand(self.batch_size)
    return KVCache

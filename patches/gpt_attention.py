"""
Attention by heads.

Target:   nanochat.gpt:CausalSelfAttention
Why:      a head that no passage of the batch chose is left untouched, as a block of the MLP is.
Keeps:    the original class where the config has no `cl`, or routes no heads; its forward, the KV cache, the number of weights and the
          names that init_weights fills. Every head is computed: this isolates, and saves nothing.
Verified: tests/test_heads.py, tests/test_model_cl.py.
"""
from nanochat_cl.blocks import by_head

SIGNATURE = ("self", "config", "layer_idx")


def wrap(original):
    def CausalSelfAttention(config, layer_idx):
        attention, cl = original(config, layer_idx), getattr(config, "cl", None)
        return attention if cl is None or cl["shared_heads"] == config.n_head else by_head(attention, config)
    return CausalSelfAttention

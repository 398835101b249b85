"""
Scaling rules of the dense model for every arm.

Target:   nanochat.gpt:GPT.num_scaling_params
Why:      horizon, batch size and weight decay follow from these counts, and the arms must not differ in them.
Keeps:    the original's figures where the config has no `cl`; else those of the dense model of the same depth, width and vocabulary.
Verified: tests/test_model_cl.py.
"""
from nanochat_cl import accounting

SIGNATURE = ("self",)


def wrap(original):
    def num_scaling_params(self):
        counts = original(self)
        if getattr(self.config, "cl", None) is None:
            return counts
        more = accounting.additional(self.config)
        return {key: value - (more if key in ("transformer_matrices", "total") else 0) for key, value in counts.items()}
    return num_scaling_params

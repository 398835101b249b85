"""
Every change to the behaviour of upstream, one file each. `python -m nanochat_cl.patching list | verify | diff` shows them.

A patch is a module with the header lines Target, Why, Keeps and Verified in its docstring, and a function `wrap(original)` that
returns what takes the target's place. `SIGNATURE` names the parameters that the target (of a class: its `__init__`) is expected to have.
`settings.py` holds the two values that a patch can't be handed as an argument. Nothing here acts on plain upstream behaviour:
the model patches look for `cl` in the model's config, the process-wide ones for settings other than the default.
"""

# In this order they are applied, and in the reverse order undone.
ORDER = (
    "common_seed", "common_gloo", "dataset_order",                                      # the process: inert at seed 42 and on one rank
    "gpt_config", "gpt_mlp", "gpt_attention", "gpt_forward", "gpt_init", "gpt_optimizer", "gpt_scaling", "gpt_flops",    # the model
    "optim_gloo", "optim_blocks", "optim_rows",                                         # its optimizer
    "engine_cache",                                                                     # decoding
)

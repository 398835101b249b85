"""nanochat_cl: does a model built for continual learning overtake a dense one? See README.md."""
import os

from nanochat_cl import upstream

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as base_train does, which comes after we imported torch
upstream.activate()

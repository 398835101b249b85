"""nanochat_cl: does a model built for continual learning overtake a dense one? See README.md."""
from nanochat_cl import upstream

upstream.activate()

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models: more threads only get in each other's way
os.environ.setdefault("NANOCHAT_DTYPE", "float32")  # the recorded numbers are, and a GPU would choose bfloat16

import nanochat_cl  # noqa: F401  puts the nanochat tree on the import path

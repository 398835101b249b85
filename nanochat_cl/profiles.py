"""
Sizes of a run, one frozen record per kind of machine. A flag given by hand wins over its profile.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    # data
    general: str                    # source of the general corpus, as `nanochat_cl.corpus --source` takes it
    domain: str                     # domain of Phase B, as `nanochat_cl.domain --domain` takes it
    vocab_size: int
    # Phase A: flags of upstream's scripts.base_train; whatever is not named here keeps upstream's default
    pretrain: tuple[str, ...]
    # Phase B
    schedule: str                   # sequential | cyclic | iid | drift
    visit_tokens: int               # tokens of one visit to a sub-domain
    milestone_tokens: int           # trained tokens between two evaluations
    max_tokens: int                 # trained tokens of Phase B
    device_batch_size: int          # rows per rank and micro-step
    total_batch_size: int           # tokens per optimizer step
    # evaluation: documents per held-out panel and split, items per probe
    eval_docs: int
    probe_items: int


PROFILES = {
    "cpu": Profile(  # the whole experiment at toy size on 2 cores, about 10 minutes
        general="embedded", domain="python", vocab_size=2048,
        # The learning rates are explicit: upstream scales them by sqrt(batch / 524,288), which at 8,192 tokens is 1/8.
        pretrain=("--depth=4", "--aspect-ratio=32", "--head-dim=32", "--max-seq-len=512", "--window-pattern=L",
                  "--num-iterations=128", "--device-batch-size=16", "--total-batch-size=8192",
                  "--embedding-lr=1.6", "--unembedding-lr=0.032", "--matrix-lr=0.16", "--scalar-lr=2.0", "--weight-decay=0.0",
                  "--warmup-steps=8", "--warmdown-ratio=0.5", "--eval-every=32", "--eval-tokens=16384", "--core-metric-every=-1",
                  "--sample-every=-1", "--save-every=32"),
        schedule="cyclic", visit_tokens=65_536, milestone_tokens=131_072, max_tokens=1_048_576,
        device_batch_size=16, total_batch_size=8_192, eval_docs=4, probe_items=12),
    "gpu1": Profile(  # d12 on one A100, H100 or H200
        general="fineweb-edu", domain="medical", vocab_size=32_768,
        pretrain=("--depth=12", "--device-batch-size=32", "--core-metric-every=-1", "--sample-every=-1", "--save-every=500"),
        schedule="cyclic", visit_tokens=5_000_000, milestone_tokens=10_000_000, max_tokens=200_000_000,
        device_batch_size=32, total_batch_size=65_536, eval_docs=64, probe_items=200),
    "h100x8": Profile(  # d20 on eight H100
        general="fineweb-edu", domain="medical", vocab_size=32_768,
        pretrain=("--depth=20", "--device-batch-size=16", "--core-metric-every=-1", "--sample-every=-1", "--save-every=500"),
        schedule="cyclic", visit_tokens=20_000_000, milestone_tokens=10_000_000, max_tokens=1_000_000_000,
        device_batch_size=4, total_batch_size=65_536, eval_docs=128, probe_items=400),
}

"""Phase B records as evolve writes them, from a seeded generator: for the tests of the certificate and the report."""
import json

import numpy as np

from nanochat_cl import crossover
from nanochat_cl.seeds import seed_for

SUBDOMAINS = ("numpy", "torch", "pandas", "scipy", "django", "sympy", "flask", "attrs")
CROSS = {("dense", "lr_mult=0.5"): (0.5, lambda t: -0.01 * t, 0.20), ("dense", "default"): (1.0, lambda t: 0.0, 0.25),
         ("dense", "lr_mult=2.0"): (2.0, lambda t: -0.03 * t, 0.40), ("dense-rows", "default"): (1.0, lambda t: -0.02 * t, 0.25),
         ("dense-frozen", "plasticity=frozen-shared"): (1.0, lambda t: -0.2 * t, 0.05), ("cl", "default"): (1.0, lambda t: -0.03 + 0.08 * t, 0.15)}
RATES = [key for key in CROSS if key[0] == "dense"]
CLAIM = dict(seeds=(1, 2, 3), confirmatory=True, profile="gpu1", cooled=True)
PROBES = ("agreement", "order", "negation", "anaphora", "transitivity", "copying", "brackets")


def records(arms=None, seeds=(42,), milestones=9, docs=6, sd=0.002, confirmatory=False, profile="cpu", idle=0.35, final=True,
            cooled=False, gap=None):
    """
    arms: {(arm, recipe): (lr_mult, advantage over time 0..1 -> bpb, general bpb lost per run)}. The advantage is what the arm's domain bpb
    is below the common curve. Documents differ in difficulty, equally for all arms.
    """
    arms = arms or {("dense", "default"): (1.0, lambda t: 0.0, 0.25), ("cl", "default"): (1.0, gap or (lambda t: -0.08 + 0.02 * t), 0.20)}
    rows = []
    for (arm, recipe), (lr, advantage, lost) in arms.items():
        for seed in seeds:
            r = np.random.default_rng(seed_for(seed, f"{arm}/{recipe}"))
            shared = np.random.default_rng(seed_for(seed, "shared")).normal(0, sd, milestones)
            panel = np.random.default_rng(7)
            size = {(split, s): panel.integers(1500, 4000, docs) for split in ("val", "test") for s in (*SUBDOMAINS, "general")}
            hard = {key: panel.normal(0, 0.15, docs) for key in size}
            own = np.cumsum(r.normal(0, sd, milestones)) * 0.3
            cl = not arm.startswith("dense")
            for m in range(milestones):
                t = m / (milestones - 1)

                def scored(split, s, level):
                    nats = (level + hard[split, s] + r.normal(0, 0.01, docs)) * size[split, s] * np.log(2)
                    return dict(bpb=float(nats.sum() / np.log(2) / size[split, s].sum()), 
                                docs=[[float(n), int(b)] for n, b in zip(nats, size[split, s])])

                level = {s: 1.9 - 0.05 * j - 0.5 * (1 - np.exp(-3 * t)) - 0.08 * (m % len(SUBDOMAINS) == j)
                         - advantage(t) + shared[m] + own[m]
                         for j, s in enumerate(SUBDOMAINS)}
                domain = {}
                for split in ("val", "test"):
                    subs = {s: scored(split, s, level[s]) for s in SUBDOMAINS}
                    domain[split] = dict(bpb=float(np.mean([v["bpb"] for v in subs.values()])), subdomains=subs)
                tokens = m * 131072
                probe = lambda p, j: dict(accuracy=float(np.clip(0.75 - 0.06 * j + 0.03 * cl - lost * 0.3 * t + r.normal(0, 0.02), 0, 1)),
                                          gold_bpb=1.1 + lost * t, chance=0.5,
                                          items=[[float(1.1 + 0.1 * k + lost * t + (m > 0) * r.normal(0, 0.02)), 1] for k in range(6)])
                full = m == milestones - 1 or m & (m - 1) == 0
                answers = np.random.default_rng(9).normal(1.6, 0.3, 12)      # bpb of the items at the start
                recalled = answers + (0.7 * lost * t + r.normal(0, 0.02, 12)) * (m > 0)
                group = {"wte": 0.9, "attn": 0.5, "mlp": 0.7, "lm_head": 0.4, "scalars": 0.2, "value_embeds": 0.3}
                windows = [dict(tokens=k * 131072, age_tokens=(m - k) * 131072, subdomain=SUBDOMAINS[k % 8],
                                gain_bpb=0.5, heldout_gain_bpb=0.45,
                                recall_bpb=float(0.09 * np.exp(-(m - k) / (4 + 3 * cl)) + r.normal(0, 0.003))) for k in range(1, m + 1)]
                rows.append(dict(
                    run="synthetic", arm=arm, seed=seed, recipe=recipe, milestone=m, step=m * 16, tokens=tokens,
                    unique_tokens=min(tokens, 700_000),
                    epoch=max(1.0, tokens / 700_000) if m else 0.0, flops=tokens * (4.1e6 if cl else 5.4e6),
                    flops_per_token=4.1e6 if cl else 5.4e6,
                    params_total=1_180_000 + 2000 * cl, params_active=840_000 if cl else 1_180_000, phase_a_tokens=1_048_576, phase_a_text="a text",
                    setting=dict(dtype="torch.float32", domain_text="a domain"),
                    phase_a_flops=1_048_576 * (4.1e6 if cl else 5.4e6), train_s=9.0 * m * (1.3 if cl else 1),
                    eval_s=2.0 * m, checkpoint_s=0.1 * m, update_s=2.5 * m, data_s=0.2 * m,
                    tier="full" if full else "light", update_ratio={k: 0.01 * v for k, v in group.items()} if m else None,
                    **(dict(plasticity={"dormant_0.025": 0.1, "effective_rank": 40.0, "drift": {k: v * t * lr**0.5 for k, v in group.items()}},
                            facts=dict(cloze=dict(accuracy=float(0.4 - 0.1 * t * lost), gold_bpb=float(recalled.mean()), chance=0.25,
                                                  items=[[float(x), 1] for x in recalled]))) if full else {}),
                    tok_per_s=14000.0 / (1.3 if cl else 1), subdomain=SUBDOMAINS[m % 8] if m else None, seen=list(SUBDOMAINS[:m]),
                    train_loss=3.0 - t if m else None, lr_mult=lr * ((1 - t) if cooled else 1.0), stream_hash=f"{seed:x}{m:06x}",
                    final=final and m == milestones - 1, confirmatory=confirmatory, schedule="cyclic", profile=profile, domain=domain,
                    general={split: scored(split, "general", 2.1 + lost * t + own[m]) for split in ("val", "test")},
                    floor={p: probe(p, j) for j, p in enumerate(PROBES)},
                    recall=dict(mean=float(np.mean([w["recall_bpb"] for w in windows])) if windows else None, windows=windows),
                    blocks=dict(idle_share=idle, entropy=2.1 - 0.2 * t, agreement=0.93, **(dict(unmoved=idle * (1 - 0.8 * t)) if full else {}),
                                use=(r.dirichlet(np.ones(14) * 2, 4)).tolist()) if cl else None,
                    constant_share=dict(domain=0.04, general=0.06)))
    return rows


def claimed(arms=CROSS, harm=lambda r: None, gone=(), **changed):
    """The certificate of a claim with every condition met but for what `harm` does to each record."""
    rows = records(arms, **CLAIM | changed)
    for r in rows:
        harm(r)
    return crossover.assess(rows, gone=gone)


def write(folder, rows, **extra):
    """A run directory with these records; config= and samples= are written when given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for name, value in extra.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder

"""
Parameter groups of Model-CL.

Target:   nanochat.gpt:GPT.setup_optimizer
Why:      upstream would put routers into Muon and step the two matrices of a block alike.
Keeps:    the original's optimizer where the config has no `cl`; else its groups 0 to 5 and its Muon groups of dense matrices, in order.
          Step sizes per unit are the dense model's: there a row of the (4n, n) up-projection moves by 2 lr / sqrt(4) = lr and a column
          of the (n, 4n) down-projection by lr / sqrt(4); the rows of a block are orthonormal, so they move by what lr says: 1 and 1/2.
          Attention's matrices are square, rows and columns move by lr there and here. Decay follows the dense lr, so per lr of ours it
          is 2, 2 and 1 times as much.
Verified: tests/test_isolation.py, tests/test_model_cl.py.
"""
from nanochat_cl import routing

SIGNATURE = ("self", "unembedding_lr", "embedding_lr", "matrix_lr", "weight_decay", "scalar_lr")
BALANCE_STEP = 0.01  # per step, for a block that is always above (or below) its share; scores have a spread of 0.2 to 0.7
ROUTER_LR = 0.1      # times the output head's. At 1 a few blocks run ahead: after 20 steps entropy of use is 0.96, not 0.99


def wrap(original):
    def setup_optimizer(self, *args, **kwargs):
        optimizer = original(self, *args, **kwargs)
        cl = getattr(self.config, "cl", None)
        if cl is None:
            return optimizer
        routed = [part for kind in routing.parts(self) for part in kind]
        mlps = [block.mlp for block in self.transformer.h]
        fc, proj = [mlp.c_fc.weight for mlp in mlps], [mlp.c_proj.weight for mlp in mlps]
        heads = [p for block in self.transformer.h for p in block.attn.parameters() if p.ndim == 3]
        ours = {id(p) for p in (*fc, *proj, *heads, *(p for part in routed for p in (part.router, part.balance)))}
        tables = {id(self.transformer.wte.weight): 1, **{id(ve.weight): self.config.n_kv_head if heads else 1
                                                         for ve in self.value_embeds.values()}}
        muon = next(g for g in optimizer.param_groups if any(p is fc[0] for p in g["params"]))
        adamw = optimizer.param_groups[0]  # the output head's: a router, too, scores features by rows

        learns = not cl.get("frozen")  # routing stays as it was when such a checkpoint was made, in nanochat's own scripts, too
        groups = []
        for group in optimizer.param_groups:
            if kept := [p for p in group["params"] if id(p) not in ours]:
                groups.append({**group, "params": kept})
                if cl["isolate"] and id(kept[0]) in tables:
                    groups[-1]["rows"] = tables[id(kept[0])]
        def more(base, params, **changed):
            groups.append({**base, "params": params, **changed})
            groups[-1]["initial_lr"] = groups[-1]["lr"]
        more(muon, fc, isolate=cl["isolate"], decay=2.0)
        more(muon, proj, isolate=cl["isolate"], decay=2.0, lr=0.5 * muon["lr"])
        for shape in sorted({p.shape for p in heads}):
            more(muon, [p for p in heads if p.shape == shape], isolate=cl["isolate"], decay=1.0)
        for shape in sorted({part.router.shape for part in routed}):
            more(adamw, [part.router for part in routed if part.router.shape == shape], routing=True, rows=int(cl["isolate"]),
                 lr=learns * ROUTER_LR * adamw["lr"], weight_decay=0.0)
        more(adamw, [part.balance for part in routed], routing=True, lr=learns * BALANCE_STEP, betas=(0.9, 0.95), weight_decay=0.0)
        return type(optimizer)(groups)
    return setup_optimizer

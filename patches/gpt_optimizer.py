"""
Parameter groups of Model-CL.

Target:   nanochat.gpt:GPT.setup_optimizer
Why:      upstream would put routers into Muon and step the two matrices of a block alike.
Keeps:    the original's optimizer where the config has no `cl`; else its groups 0 to 5 and its Muon groups of attention, in order. Step
          sizes per hidden unit are the dense model's: there a row of the (4n, n) up-projection moves by 2 lr / sqrt(4) = lr and a column
          of the (n, 4n) down-projection by lr / sqrt(4); the rows of a block are orthonormal, so they move by what lr says: 1 and 1/2.
Verified: tests/test_isolation.py, tests/test_model_cl.py.
"""
import functools

SIGNATURE = ("self", "unembedding_lr", "embedding_lr", "matrix_lr", "weight_decay", "scalar_lr")
BALANCE_STEP = 0.01  # per step, for a block that is always above (or below) its share; scores have a spread of 0.2 to 0.7
ROUTER_LR = 0.1      # times the output head's. At 1 a few blocks run ahead: after 20 steps entropy of use is 0.96, not 0.99


def wrap(original):
    @functools.wraps(original)
    def setup_optimizer(self, *args, **kwargs):
        optimizer = original(self, *args, **kwargs)
        cl = getattr(self.config, "cl", None)
        if cl is None:
            return optimizer
        mlps = [block.mlp for block in self.transformer.h]
        fc, proj = [mlp.c_fc.weight for mlp in mlps], [mlp.c_proj.weight for mlp in mlps]
        ours = {id(p) for mlp in mlps for p in mlp.parameters()}
        tables = {id(self.transformer.wte.weight), *(id(ve.weight) for ve in self.value_embeds.values())}
        muon = next(g for g in optimizer.param_groups if any(p is fc[0] for p in g["params"]))
        adamw = optimizer.param_groups[0]  # the output head's: a router, too, scores features by rows

        groups = []
        for group in optimizer.param_groups:
            if kept := [p for p in group["params"] if id(p) not in ours]:
                groups.append({**group, "params": kept})
                if cl["isolate"] and id(kept[0]) in tables:
                    groups[-1]["rows"] = True
        def more(base, params, **changed):
            groups.append({**base, "params": params, **changed})
            groups[-1]["initial_lr"] = groups[-1]["lr"]
        more(muon, fc, isolate=cl["isolate"])
        more(muon, proj, isolate=cl["isolate"], lr=0.5 * muon["lr"])
        more(adamw, [mlp.router for mlp in mlps], routing=True, rows=cl["isolate"], lr=ROUTER_LR * adamw["lr"], weight_decay=0.0)
        more(adamw, [mlp.balance for mlp in mlps], routing=True, lr=BALANCE_STEP, betas=(0.9, 0.95), weight_decay=0.0)
        return type(optimizer)(groups)
    return setup_optimizer

"""A Model-CL small enough for a test, with weights at which every path through it matters."""
import torch

from nanochat_cl import arms

BOS = 0
SIZES = dict(sequence_len=64, vocab_size=64, n_layer=2, n_head=4, n_kv_head=4, n_embd=32, window_pattern="SL")  # 14 routed blocks of width 8, 4 active


def build(arm="cl", seed=1, lively=True, sizes=None, **changed):
    """A model of that arm under the patches. lively: projections that nanochat starts at zero are random, so that blocks differ."""
    from nanochat import gpt
    sizes = {**SIZES, **(sizes or {})}
    cl = arms.cl(sizes["n_embd"], sizes["n_head"], BOS, arm, **changed)
    with torch.device("meta"):
        model = gpt.GPT(gpt.GPTConfig(**sizes, **({} if cl is None else {"cl": cl})))
    model.to_empty(device="cpu")
    torch.manual_seed(seed)
    model.init_weights()
    if lively:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("c_proj.weight") or name == "lm_head.weight":
                    p.normal_(0, 0.1, generator=generator)
                if name.endswith("router"):
                    p.normal_(0, 0.3, generator=generator)
    return model


def tokens(rows, length, seed=0, bos_every=None):
    """Rows that begin with BOS and hold more of it every `bos_every` tokens."""
    idx = torch.randint(1, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))
    idx[:, 0] = BOS
    if bos_every:
        idx[:, ::bos_every] = BOS
    return idx


def train(model, optimizer, steps, seed=0, rows=4, length=33):
    """`steps` real steps on a text with a pattern (a token tells much about the next one); the losses."""
    losses = []
    for step in range(steps):
        idx = tokens(rows, length, seed=1000 * seed + step)
        idx[:, 2::2] = (idx[:, 1:-1:2] * 3) % (SIZES["vocab_size"] - 1) + 1
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses

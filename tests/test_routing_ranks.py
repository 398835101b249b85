"""nanochat_cl.routing on two ranks, compiled: both count the same and go on choosing alike, as one process with all rows would."""
import torch

from nanochat_cl import patching, routing
from tests.tiny_cl import build, tokens

ROWS, LENGTH, STEPS = 2, 41, 3
SIZES = dict(n_layer=1)


def batch(step, rank):
    idx = tokens(ROWS, LENGTH, seed=10 * step + rank)
    return idx[:, :-1], idx[:, 1:]


def seen(model, probe):
    """Counters, choices for a text that both ranks look at, and what balance is told."""
    return {"token_count": model.token_count.clone(), "usage": routing.usage(model), "choices": routing.choices(model, probe)[0],
            "balance": [torch.stack([part.balance.detach() for part in kind]) for kind in routing.parts(model)]}


def trained(forward, model, batches):
    """What is seen after each batch. The first two are compared with one process to the bit, so no step is made between them."""
    optimizer, probe, found = model.setup_optimizer(weight_decay=0.1), tokens(3, 60, seed=99), []
    for step, (x, y) in enumerate(batches):
        forward(x, y).backward()
        excess = [torch.stack([part.balance.grad for part in kind]) for kind in routing.parts(model)]
        if step >= 2:
            with torch.compiler.set_stance("force_eager"):
                optimizer.step()
        model.zero_grad(set_to_none=True)
        found.append({**seen(model, probe), "excess": excess})
    return found


def run_rank(rank, address, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    patching.apply()
    model = build(sizes=SIZES)
    forward = torch.compile(model, dynamic=False, fullgraph=True, backend="aot_eager")
    torch.save(trained(forward, model, [batch(step, rank) for step in range(STEPS)]), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def equal(a, b):
    return torch.equal(a, b) if torch.is_tensor(a) else len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))


def test_two_compiled_ranks_count_and_choose_alike_and_as_one_process_with_all_rows(tmp_path):
    """Traced in one graph, collectives included, which is where they could break it, and not turned into machine code."""
    torch.multiprocessing.spawn(run_rank, args=(str(tmp_path / "meet"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    with patching.applied():
        model = build(sizes=SIZES)
        alone = trained(model, model, [tuple(torch.cat(both) for both in zip(batch(step, 0), batch(step, 1))) for step in range(2)])
    for step in range(STEPS):
        for key in first[step]:
            assert equal(first[step][key], second[step][key]), f"step {step}: {key} differs between the ranks"
    for step in range(2):  # before the first optimizer step
        for key in ("token_count", "usage", "choices"):
            assert equal(first[step][key], alone[step][key]), f"step {step}: {key} is not that of one process with all rows"
        for ours, one in zip(first[step]["excess"], alone[step]["excess"], strict=True):
            torch.testing.assert_close(ours, one)
    counts = sum(torch.bincount(batch(0, rank)[0].flatten(), minlength=64) for rank in range(2)).float()
    assert torch.equal(first[0]["token_count"], counts)
    served = ROWS * 2 * (LENGTH - 1)
    assert [used.sum(1).tolist() for used in first[0]["usage"]] == [[served * 4.0], [served * 2.0]], "of all ranks"
    assert any(b.any() for b in first[-1]["balance"]) and not any(b.any() for b in first[1]["balance"])

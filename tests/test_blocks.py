"""nanochat_cl.blocks: the layer against a loop over single tokens, its two backends against each other, gradients included."""
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from nanochat_cl import arms, blocks
from nanochat_cl.routing import Decision


def layer(n=32, seed=0, **changed):
    config = SimpleNamespace(n_embd=n, cl=arms.cl(n, 0, "cl", **changed))
    mlp = blocks.BlockSparseMLP(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (mlp.c_fc.weight, mlp.c_proj.weight):
            p.normal_(0, n ** -0.5, generator=generator)
    return mlp


def decision(rows, lengths, routed, k, seed=0, choice=None):
    generator = torch.Generator().manual_seed(seed)
    if choice is None:
        choice = torch.rand(rows, len(lengths), routed, generator=generator).topk(k).indices
    return Decision(choice, (0.5 + torch.rand(choice.shape, generator=generator)).requires_grad_(), tuple(lengths))


def run(mlp, x, made, backend, dtype=torch.float32):
    """Output and the gradients of x, both weights and the gate, for a fixed gradient of the output."""
    mlp.backend, mlp.decision = backend, Decision(made.choice, made.gate.detach().clone().requires_grad_(), made.lengths)
    x = x.detach().to(dtype).requires_grad_()
    mlp.zero_grad()
    out = mlp(x)
    out.backward(torch.sin(torch.arange(out.numel())).view_as(out).to(dtype))
    return out, x.grad, mlp.c_fc.weight.grad.clone(), mlp.c_proj.weight.grad.clone(), mlp.decision.gate.grad


@pytest.mark.parametrize("backend", ["masked", "bmm"])
def test_every_token_passes_through_the_shared_blocks_and_those_of_its_chunk(backend):
    mlp, x = layer(), torch.randn(2, 23, 32, generator=torch.Generator().manual_seed(5))
    made = decision(2, [3, 4, 4, 12], mlp.routed, 4)
    mlp.backend, mlp.decision = backend, made
    found = mlp(x)
    for row in range(2):
        for t in range(23):
            chunk = 0 if t < 3 else 1 if t < 7 else 2 if t < 11 else 3
            expected = torch.zeros(32, dtype=torch.float64)
            chosen = dict(zip((made.choice[row, chunk] + mlp.shared).tolist(), made.gate[row, chunk].tolist()))
            for g, gate in {**{g: 1.0 for g in range(mlp.shared)}, **chosen}.items():
                for unit in range(8):
                    h = torch.dot(mlp.c_fc.weight[g, unit].double(), x[row, t].double()).clamp(min=0) ** 2
                    expected += gate * h * mlp.c_proj.weight[g, unit].double()
            torch.testing.assert_close(found[row, t].double(), expected, atol=1e-5, rtol=1e-5)


@given(st.integers(1, 3), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 14), st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_gathered_blocks_agree_with_the_masked_reference_forward_and_backward(rows, lengths, k, seed):
    mlp = layer(seed=seed)
    made = decision(rows, lengths, mlp.routed, k, seed)
    x = torch.randn(rows, sum(lengths), 32, generator=torch.Generator().manual_seed(seed))
    reference = run(mlp, x, made, "masked")
    for found, expected in zip(run(mlp, x, made, "bmm"), reference):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    scale = [t.abs().max() for t in reference]
    for found, expected, size in zip(run(mlp, x, made, "bmm", torch.bfloat16), reference, scale):
        # bfloat16 has 8 bits; a gate's gradient is a sum that may cancel to nearly nothing, so it has a tolerance of its own
        assert (found.float() - expected).abs().max() <= max(0.05 * size, 0.1 * (found.ndim == 3 and found.shape[-1] == k))
    unused = torch.ones(mlp.routed, dtype=torch.bool)
    unused[made.choice.unique()] = False
    for backend in ("masked", "bmm"):
        _, _, fc, proj, _ = run(mlp, x, made, backend)
        assert not fc[mlp.shared:][unused].any() and not proj[mlp.shared:][unused].any()
        assert fc[mlp.shared:][~unused].flatten(1).any(1).all(), "a block that was chosen has a gradient"


def test_all_chunks_on_the_same_blocks_and_chunks_of_one_token_work():
    mlp = layer()
    same = torch.tensor([2, 9, 5, 13]).expand(3, 4, 4).contiguous()
    made = decision(3, [1, 1, 1, 20], mlp.routed, 4, choice=same)
    x = torch.randn(3, 23, 32, generator=torch.Generator().manual_seed(1))
    for found, expected in zip(run(mlp, x, made, "bmm"), run(mlp, x, made, "masked")):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_gradient_of_the_gather_is_the_numerical_one():
    weight = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    choice = torch.tensor([[0, 2], [2, 0], [2, 2]])
    assert torch.autograd.gradcheck(lambda w: blocks.Gather.apply(w, choice).sin(), weight)


def test_no_module_is_a_linear_that_a_conversion_could_replace():
    assert not [name for name, m in layer().named_modules() if isinstance(m, nn.Linear)]


def test_a_layer_without_a_decision_says_what_is_missing():
    with pytest.raises(RuntimeError, match="apply the patches"):
        layer()(torch.randn(1, 4, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_and_its_gradient_are_one_graph_each(dtype):
    """Traced, not generated: tests/test_model_cl.py compiles a whole model."""
    mlp, x = layer(), torch.randn(2, 19, 32, generator=torch.Generator().manual_seed(2))
    made = decision(2, [2, 2, 15], mlp.routed, 4)
    eager = run(mlp, x, made, "bmm", dtype)

    @torch.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    def forward(x, choice, gate):
        mlp.decision = Decision(choice, gate, made.lengths)
        out = mlp(x)
        mlp.decision = None
        return out

    mlp.zero_grad()
    x = x.to(dtype).requires_grad_()
    out = forward(x, made.choice, made.gate)
    out.backward(torch.sin(torch.arange(out.numel())).view_as(out).to(dtype))
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    for found, expected in zip((out, x.grad, mlp.c_fc.weight.grad, mlp.c_proj.weight.grad, made.gate.grad), eager):
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()

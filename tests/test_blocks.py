"""nanochat_cl.blocks: the layer against a loop over single tokens, its backends against each other, gradients included."""
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import nn

from nanochat_cl import arms, blocks
from nanochat_cl.accounting import boundaries
from nanochat_cl.routing import Decision


def layer(n=32, seed=0, **changed):
    config = SimpleNamespace(n_embd=n, cl=arms.cl(n, 4, 0, "cl", **changed))
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


@pytest.mark.parametrize("backend", ["masked", "bmm", "auto"])
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


def assert_agrees(found, reference, k, dtype=torch.float32):
    """Output and gradients, to rounding: bfloat16 has 8 bits; a gate's gradient is a sum that may cancel, so it has a tolerance of its own."""
    for name, now, expected in zip(("out", "x", "c_fc", "c_proj", "gate"), found, reference):
        error = (now.float() - expected).abs().max()
        coarse = max(0.1 * expected.abs().max(), 0.3) if name == "gate" else 0.05 * expected.abs().max()
        allowed = 2e-5 * max(1.0, expected.abs().max()) if dtype is torch.float32 else coarse
        assert error <= allowed, f"{name} differs by {error}, allowed {allowed}"


def compared(mlp, x, made, backends):
    """Every backend against `masked` in float32, in both dtypes; blocks that nobody chose have no gradient, the others have one."""
    reference, k = run(mlp, x, made, "masked"), made.choice.shape[-1]
    unused = torch.ones(mlp.routed, dtype=torch.bool)
    unused[made.choice.unique()] = False
    for backend in ("masked", *backends):
        for dtype in (torch.float32, torch.bfloat16):
            found = run(mlp, x, made, backend, dtype)
            assert found[0].dtype == dtype and found[0].shape == x.shape
            assert_agrees(found, reference, k, dtype)
            for weight, expected in zip(found[2:4], reference[2:4]):
                assert not weight[mlp.shared:][unused].any(), f"{backend}: a block that nobody chose has a gradient"
                lively = expected[mlp.shared:].flatten(1).any(1)  # relu can be 0 on the one token of a block
                assert weight[mlp.shared:][lively].flatten(1).any(1).all(), f"{backend}: a block that was chosen has none"


@given(st.integers(1, 3), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 14), st.integers(0, 10_000))
@example(1, [3, 70], 14, 0)  # k = G, a batch of one: every routed block is chosen
@example(2, [9], 4, 1)       # one chunk a row, shorter than the first boundary
@example(1, [2, 64], 1, 2)   # two chunks, a block each: twelve that nobody chose
@settings(max_examples=12, deadline=None)
def test_every_backend_agrees_with_the_masked_reference_forward_and_backward(rows, lengths, k, seed):
    mlp = layer(seed=seed)
    made = decision(rows, lengths, mlp.routed, k, seed)
    compared(mlp, torch.randn(rows, sum(lengths), 32, generator=torch.Generator().manual_seed(seed)), made, ("bmm", "auto"))


@given(st.integers(1, 2), st.integers(1, 150), st.sampled_from([1, 4, 16, 63, 64, 65, 96]), st.integers(0, 10_000))
@example(1, 7, 64, 0)        # T below the first boundary, a batch of one
@example(2, 149, 64, 1)      # T no multiple of the chunk
@example(1, 130, 65, 2)      # and a multiple, of a chunk that bmm computes
@settings(max_examples=9, deadline=None)
def test_chunks_as_routing_cuts_them_agree_whatever_the_length(rows, T, chunk, seed):
    """Real boundaries: T below the first one, T no multiple of the chunk, token-level ones, short and long chunks around `blocks.SHORT`."""
    mlp, starts = layer(seed=seed), boundaries(T, chunk)
    made = decision(rows, [b - a for a, b in zip(starts, [*starts[1:], T])], mlp.routed, 4, seed)
    compared(mlp, torch.randn(rows, T, 32, generator=torch.Generator().manual_seed(seed)), made, ("bmm", "auto"))


@given(st.lists(st.sampled_from([1, 3, blocks.SHORT - 1, blocks.SHORT, blocks.SHORT + 1]), min_size=1, max_size=6), st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_short_and_long_chunks_may_alternate(lengths, seed):
    mlp = layer(seed=seed)
    compared(mlp, torch.randn(2, sum(lengths), 32, generator=torch.Generator().manual_seed(seed)), decision(2, lengths, mlp.routed, 3, seed), ("bmm", "auto"))


@given(st.integers(1, 3), st.lists(st.integers(1, 70), min_size=1, max_size=4), st.integers(1, 14), st.integers(0, 10_000))
@example(2, [16, 70], 1, 0)  # all chunks of all rows on one block
@example(1, [5], 14, 1)      # k = G, one short chunk
@settings(max_examples=12, deadline=None)
def test_where_all_chunks_made_one_choice_a_slice_computes_what_masked_does(rows, lengths, k, seed):
    mlp = layer(seed=seed)
    same = torch.randperm(14, generator=torch.Generator().manual_seed(seed))[:k].expand(rows, len(lengths), k).contiguous()
    made = decision(rows, lengths, mlp.routed, k, seed, choice=same)  # gates of each chunk's own
    compared(mlp, torch.randn(rows, sum(lengths), 32, generator=torch.Generator().manual_seed(seed)), made, ("slice", "bmm", "auto"))


def test_all_chunks_on_the_same_block_and_one_that_nobody_chose():
    mlp = layer()
    made = decision(3, [1, 1, 1, 20, 70], mlp.routed, 1, choice=torch.full((3, 5, 1), 7))
    compared(mlp, torch.randn(3, 93, 32, generator=torch.Generator().manual_seed(1)), made, ("slice", "bmm", "auto"))


@pytest.mark.parametrize("again", [set(), {"cpu"}])
@pytest.mark.parametrize("up", [True, False])
def test_the_gradients_of_chosen_blocks_are_the_numerical_ones(up, again, monkeypatch):
    monkeypatch.setattr(blocks, "COPY_AGAIN", again)
    weight, x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True), torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    choice = torch.tensor([[0, 2], [2, 0], [2, 2]])
    assert torch.autograd.gradcheck(lambda x, w: blocks.Chosen.apply(x, w, choice, up).sin(), (x, weight))


def test_where_memory_is_dear_a_compiled_layer_does_not_keep_the_copies_and_computes_the_same_bits(monkeypatch):
    mlp, x, kept, found = layer(n=64), torch.randn(2, 256, 64, generator=torch.Generator().manual_seed(2)), {}, {}
    made = decision(2, [64, 64, 128], mlp.routed, 4)
    for again in ((), ("cpu",)):
        monkeypatch.setattr(blocks, "COPY_AGAIN", again)
        torch._dynamo.reset()
        mlp.backend, mlp.decision = "bmm", Decision(made.choice, made.gate.detach().clone().requires_grad_(), made.lengths)
        saved, inputs = {}, x.clone().requires_grad_()
        count = lambda t: saved.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            out = torch.compile(lambda x: mlp(x), backend="aot_eager_decomp_partition", fullgraph=True)(inputs)
        mlp.zero_grad()
        out.sin().sum().backward()
        kept[again], found[again] = sum(saved.values()), (out, inputs.grad, mlp.c_fc.weight.grad.clone(), mlp.decision.gate.grad)
    copies = 2 * 2 * 3 * 4 * mlp.c_fc.weight[0].nbytes  # of both matrices, 2 rows, 3 chunks, 4 blocks each
    assert kept[()] - kept["cpu",] > 0.9 * copies, (kept, copies)
    assert all(torch.equal(a, b) for a, b in zip(found[()], found["cpu",]))


def test_no_module_is_a_linear_that_a_conversion_could_replace():
    assert not [name for name, m in layer().named_modules() if isinstance(m, nn.Linear)]


def test_a_layer_without_a_decision_says_what_is_missing():
    with pytest.raises(RuntimeError, match="apply the patches"):
        layer()(torch.randn(1, 4, 32))


@pytest.mark.parametrize("backend, dtype", [("auto", torch.float32), ("auto", torch.bfloat16), ("slice", torch.float32)])
def test_the_layer_and_its_gradient_are_one_graph_each(backend, dtype):
    """Traced, not generated: tests/test_model_cl.py compiles a whole model. Here `auto` is masked for three chunks and bmm for one."""
    mlp, x = layer(), torch.randn(2, 89, 32, generator=torch.Generator().manual_seed(2))
    made = decision(2, [2, 2, 15, 70], mlp.routed, 4, choice=torch.tensor([3, 1, 7, 12]).expand(2, 4, 4).contiguous() if backend == "slice" else None)
    eager = run(mlp, x, made, backend, dtype)

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

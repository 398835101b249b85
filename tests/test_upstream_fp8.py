"""nanochat.fp8: quantisation, the three products (torch emulates FP8 matmuls on the CPU; the GPU kernels are not run here), conversion."""
import pytest
import torch
import torch.nn as nn

from nanochat.fp8 import EPS, Float8Linear, Float8LinearConfig, _to_col_major, _to_fp8, convert_to_float8_training


@pytest.mark.parametrize("dtype, largest, mantissa_bits", [(torch.float8_e4m3fn, 448.0, 3), (torch.float8_e5m2, 57344.0, 2)])
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e6])
def test_quantisation_uses_the_whole_range_and_keeps_the_mantissa(dtype, largest, mantissa_bits, magnitude):
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)) * magnitude
    q, inverse_scale = _to_fp8(x, dtype)
    assert q.dtype == dtype and inverse_scale.dtype == torch.float32 and inverse_scale.ndim == 0
    assert q.float().abs().max() == largest and torch.isfinite(q.float()).all()
    back = q.float() * inverse_scale
    large = x.abs() > x.abs().max() / 64  # far from the denormals: half a unit in the last place
    assert ((back - x).abs()[large] <= 2.0 ** -(mantissa_bits + 1) * 1.001 * x.abs()[large]).all()


def test_zeros_and_bf16_quantise_to_finite_numbers_without_a_graph():
    q, inverse_scale = _to_fp8(torch.zeros(4, 4), torch.float8_e4m3fn)
    assert not q.float().any() and inverse_scale.item() == pytest.approx(EPS / 448, rel=1e-6)
    q, inverse_scale = _to_fp8(torch.full((2, 2), 3.0, dtype=torch.bfloat16, requires_grad=True), torch.float8_e4m3fn)
    assert (q.float() * inverse_scale - 3.0).abs().max() < 1e-6 and not inverse_scale.requires_grad


def test_column_major_is_the_same_matrix_with_contiguous_columns():
    x = torch.arange(6.0).reshape(2, 3)
    y = _to_col_major(x)
    assert torch.equal(x, y) and y.stride() == (1, 2)


def reference(x, weight, grad):
    """The three products in float64 from values that are quantised first: what FP8 hardware computes, up to summation."""
    back = lambda t, dtype: (lambda q, s: q.double() * s.double())(*_to_fp8(t, dtype))
    x, weight, grad = back(x, torch.float8_e4m3fn), back(weight, torch.float8_e4m3fn), back(grad, torch.float8_e5m2)
    return x @ weight.T, grad @ weight, grad.T @ x


def test_output_and_both_gradients_are_products_of_the_quantised_tensors():
    generator = torch.Generator().manual_seed(1)
    layer = Float8Linear(32, 48, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(48, 32, generator=generator))
    x = torch.randn(2, 16, 32, generator=generator, requires_grad=True)
    grad = torch.randn(2, 16, 48, generator=generator) * 1e-3
    out = layer(x)
    out.backward(grad)
    expected = reference(x.detach().reshape(32, 32), layer.weight.detach(), grad.reshape(32, 48))
    for got, want in zip([out.reshape(32, 48), x.grad.reshape(32, 32), layer.weight.grad], expected):
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5 * want.abs().max().item())
    exact = x.detach() @ layer.weight.detach().T
    assert 1e-4 < (out - exact).norm() / exact.norm() < 0.05, "close to the exact product, but not it"


def test_a_bias_is_added_and_receives_its_gradient():
    plain = nn.Linear(16, 32)
    layer = Float8Linear.from_float(plain)
    assert layer.weight is plain.weight and layer.bias is plain.bias
    x = torch.zeros(16, 16)
    torch.testing.assert_close(layer(x), plain.bias.expand(16, 32))
    layer(x).sum().backward()
    torch.testing.assert_close(plain.bias.grad, torch.full((32,), 16.0))


def test_conversion_replaces_what_the_filter_wants_by_full_name_once_and_keeps_the_parameters():
    model = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)))
    model[1].eval()
    before = dict(model.named_parameters())
    names = []
    result = convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name("tensorwise"),
                                        module_filter_fn=lambda module, name: names.append(name) or name != "1.2")
    assert result is model and names == ["0", "1.0", "1.2"]
    assert [type(m).__name__ for m in (model[0], *model[1])] == ["Float8Linear", "Float8Linear", "ReLU", "Linear"]
    assert all(p is before[name] for name, p in model.named_parameters()) and not model[1][0].training
    first = model[0]
    convert_to_float8_training(model)
    assert model[0] is first and type(model[1][2]) is Float8Linear
    assert type(convert_to_float8_training(nn.Linear(16, 16))) is Float8Linear


@pytest.mark.parametrize("name", ["rowwise", "", "Tensorwise"])
def test_other_recipes_are_refused(name):
    with pytest.raises(ValueError, match="tensorwise"):
        Float8LinearConfig.from_recipe_name(name)

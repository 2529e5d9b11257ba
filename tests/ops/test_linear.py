import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from twotower.ops import linear as layouts
from twotower.ops.linear import (
    FP16_MAX,
    Fp16Weight,
    OneDnnWeight,
    PackedWeight,
    WeightLayout,
    activation_dtype,
    cpu_has_bf16_matmul,
    linear,
    pack,
    weight_layout,
)

ROWS = (0, 1, 2, 5, 16, 17, 63, 64, 65, 130)
# One below and one above the size from which FBGEMM's threaded entry point is used.
SHAPES = ((24, 40), (640, 640))

onednn = pytest.mark.skipif(
    weight_layout("cpu", torch.float32) is not WeightLayout.ONEDNN, reason="this torch has no oneDNN"
)
fbgemm = pytest.mark.skipif(
    weight_layout("cpu", torch.float16) is not WeightLayout.FBGEMM_FP16, reason="this torch has no FBGEMM"
)


def operands(rows: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Activations (rows, i), a weight (o, i), a bias (o,), all float64."""
    generator = torch.Generator().manual_seed(rows)
    o, i = shape
    sizes = ((rows, i), (o, i), (o,))
    x, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes)
    return x, weight, bias


def packed(weight: Tensor) -> PackedWeight:
    found = pack(weight)
    assert found is not None
    return found


def assert_close(actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Against the float64 product, within 1e-6 of Σ|x·w|: float32 sums in some order."""
    exact = x.double() @ weight.double().t()
    size = x.double().abs() @ weight.double().abs().t()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    assert actual.shape == exact.shape
    assert bool(((actual.double() - exact).abs() <= 1e-6 * size).all())


@onednn
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_packed_float32_is_the_plain_product(rows: int, shape: tuple[int, int]) -> None:
    x, weight, bias = (v.float() for v in operands(rows, shape))
    weight_packed = packed(weight)
    assert isinstance(weight_packed, OneDnnWeight)
    assert_close(linear(x, weight_packed, bias), x, weight, bias)
    assert_close(linear(x, weight_packed), x, weight, None)
    assert_close(linear(x, weight, bias), x, weight, bias)


@fbgemm
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_packed_fp16_is_the_float32_product_of_its_values(rows: int, shape: tuple[int, int]) -> None:
    x, weight, bias = operands(rows, shape)
    x, weight, bias = x.float(), weight.half(), bias.float()
    weight_packed = packed(weight)
    assert isinstance(weight_packed, Fp16Weight)
    assert_close(linear(x, weight_packed, bias), x, weight, bias)
    assert_close(linear(x, weight_packed), x, weight, None)


@pytest.mark.skipif(cpu_has_bf16_matmul(), reason="this CPU multiplies bf16 natively")
@fbgemm
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_bf16_keeps_values_within_fp16s_normal_range(shape: tuple[int, int]) -> None:
    x, weight, bias = operands(5, shape)
    x, weight, bias = x.float(), weight.bfloat16(), bias.float()
    weight[weight.abs() < 2**-14] = 0
    assert_close(linear(x, packed(weight), bias), x, weight, bias)


@pytest.mark.skipif(cpu_has_bf16_matmul(), reason="this CPU multiplies bf16 natively")
@fbgemm
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("magnitude", [2.0**-13, 2.0**-16, 2.0**-20, 2.0**-24, 2.0**-30, 2.0**-100])
def test_packed_bf16_below_fp16s_normal_range_rounds_to_its_grid(shape: tuple[int, int], magnitude: float) -> None:
    x, weight, _ = operands(5, shape)
    x, weight = x.float(), (weight * magnitude).bfloat16()
    error = (linear(x, packed(weight)).double() - x.double() @ weight.double().t()).abs()
    # fp16's subnormals are 2^-24 apart: each weight moves by at most 2^-25
    allowed = x.double().abs().sum(-1, keepdim=True) * 2.0**-25
    assert bool((error <= allowed * (1 + 1e-6) + 1e-6 * (x.double().abs() @ weight.double().abs().t())).all())


@pytest.mark.skipif(not cpu_has_bf16_matmul(), reason="this CPU has no bf16 matrix product")
@pytest.mark.parametrize("rows", ROWS)
def test_native_bf16_is_close_to_the_float32_product(rows: int) -> None:
    x, weight, bias = (v.bfloat16() for v in operands(rows, (24, 40)))
    exact = x.float() @ weight.float().t() + bias.float()
    # one rounding to bf16 of a float32 sum
    torch.testing.assert_close(linear(x, packed(weight), bias).float(), exact, rtol=2**-8, atol=2**-8)


@fbgemm
@pytest.mark.parametrize("largest", [65536.0, -1e6, float("inf")])
def test_a_weight_beyond_fp16_raises(largest: float) -> None:
    dtype = torch.float16 if cpu_has_bf16_matmul() else torch.bfloat16
    if dtype == torch.float16 and largest != float("inf"):
        pytest.skip("fp16 can't hold it")
    weight = torch.zeros(8, 8, dtype=dtype)
    weight[3, 2] = largest
    with pytest.raises(ValueError, match=rf"beyond fp16's {FP16_MAX}.*dtype=torch.float32"):
        pack(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_may_have_any_leading_shape_and_strides(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, weight, bias = operands(12, shape)
    x, weight, bias = x.float(), weight.to(dtype), bias.float()
    weight_packed = pack(weight)
    if weight_packed is None:
        pytest.skip("this torch packs nothing")
    cube = x.view(3, 4, -1)
    assert torch.equal(linear(cube, weight_packed, bias), linear(x, weight_packed, bias).view(3, 4, -1))
    strided = torch.stack((x, x), dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(linear(strided, weight_packed, bias), linear(x, weight_packed, bias))
    transposed = cube.transpose(0, 1)
    assert_close(linear(transposed, weight_packed).reshape(12, -1), transposed.reshape(12, -1), weight, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_strided_weight_packs_as_its_values(dtype: torch.dtype) -> None:
    x, weight, _ = operands(5, (24, 40))
    x, weight = x.float(), weight.to(dtype).t().contiguous().t()
    weight_packed = pack(weight)
    if weight_packed is None:
        pytest.skip("this torch packs nothing")
    assert_close(linear(x, weight_packed), x, weight, None)


def test_float64_is_not_packed() -> None:
    assert pack(torch.zeros(4, 4, dtype=torch.float64)) is None


def test_the_layout_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    weight_layout.cache_clear()
    with caplog.at_level(logging.INFO, logger=layouts.__name__):
        first = weight_layout("cpu", torch.float32)
        assert weight_layout("cpu", torch.float32) is first
    assert [record.getMessage() for record in caplog.records] == [
        f"linear layers of torch.float32 on cpu: {first.value}"
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_other_devices_use_plain_products(dtype: torch.dtype) -> None:
    assert weight_layout("cuda", dtype) is WeightLayout.TORCH
    assert activation_dtype("cuda", dtype) == dtype


@pytest.fixture
def _fresh_layouts() -> Iterator[None]:
    weight_layout.cache_clear()
    cpu_has_bf16_matmul.cache_clear()
    yield
    weight_layout.cache_clear()
    cpu_has_bf16_matmul.cache_clear()


@pytest.mark.usefixtures("_fresh_layouts")
def test_bf16_follows_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "cpu_has_bf16_matmul", lambda: True)
    if torch.backends.mkldnn.is_available():
        assert weight_layout("cpu", torch.bfloat16) is WeightLayout.ONEDNN
        assert activation_dtype("cpu", torch.bfloat16) == torch.bfloat16
    weight_layout.cache_clear()
    monkeypatch.setattr(layouts, "cpu_has_bf16_matmul", lambda: False)
    if torch.backends.mkldnn.is_available() and "fbgemm" in torch.backends.quantized.supported_engines:
        assert weight_layout("cpu", torch.bfloat16) is WeightLayout.FBGEMM_FP16
        assert activation_dtype("cpu", torch.bfloat16) == torch.float32


@pytest.mark.usefixtures("_fresh_layouts")
def test_without_onednn_every_weight_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert weight_layout("cpu", dtype) is WeightLayout.TORCH

import math

import pytest
import torch

from twotower.ops.norm import gated_group_rms_norm, rms_norm

LENGTHS = (1, 2, 5, 16, 17, 63, 64, 65, 130)


def naive(row: list[float], weight: list[float], eps: float) -> list[float]:
    mean = sum(v * v for v in row) / len(row)
    return [v / math.sqrt(mean + eps) * w for v, w in zip(row, weight, strict=True)]


def naive_gated(y: list[float], z: list[float], weight: list[float], num_groups: int, eps: float) -> list[float]:
    gated = [a * b / (1 + math.exp(-b)) for a, b in zip(y, z, strict=True)]
    size = len(y) // num_groups
    out: list[float] = []
    for g in range(0, len(y), size):
        out += naive(gated[g : g + size], weight[g : g + size], eps)
    return out


@pytest.mark.parametrize("tokens", LENGTHS)
def test_rms_norm_is_the_loop(tokens: int) -> None:
    torch.manual_seed(tokens)
    x, weight = torch.randn(2, tokens, 12, dtype=torch.float64) * 3, torch.randn(12, dtype=torch.float64)
    expected = [[naive(row, weight.tolist(), 1e-2) for row in rows] for rows in x.tolist()]
    out = rms_norm(x, weight, 1e-2, torch.float64)
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_computes_in_float32_and_casts_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(7, 64).mul(100).to(dtype), torch.randn(64).to(dtype)
    expected = torch.tensor([naive(row, weight.tolist(), 1e-5) for row in x.tolist()], dtype=torch.float64)
    out = rms_norm(x, weight, 1e-5, dtype)
    assert out.dtype == dtype
    # half an ulp of the output's dtype from the one cast, and a few float32 roundings before it
    torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps / 2 + 1e-6, atol=0)


def test_rms_norm_of_a_float32_residual_gives_the_asked_dtype() -> None:
    out = rms_norm(torch.randn(3, 8), torch.ones(8, dtype=torch.bfloat16), 1e-5, torch.bfloat16)
    assert out.dtype == torch.bfloat16


def test_rms_norm_uses_eps() -> None:
    x = torch.full((1, 4), 1e-3, dtype=torch.float64)
    out = rms_norm(x, torch.ones(4, dtype=torch.float64), 1e-6, torch.float64)
    torch.testing.assert_close(out, torch.full_like(out, 1 / math.sqrt(2)), rtol=1e-12, atol=0)


def test_rms_norm_has_the_right_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, w: rms_norm(a, w, 1e-3, torch.float64), (x, weight))
    constant = x.detach()
    assert torch.autograd.gradcheck(lambda w: rms_norm(constant, w, 1e-3, torch.float64), (weight,))


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("num_groups", [1, 3])
def test_gated_group_rms_norm_is_the_loop(tokens: int, num_groups: int) -> None:
    torch.manual_seed(tokens)
    y, z = torch.randn(2, tokens, 12, dtype=torch.float64).unbind()
    weight = torch.randn(12, dtype=torch.float64)
    pairs = zip(y.tolist(), z.tolist(), strict=True)
    expected = [naive_gated(a, b, weight.tolist(), num_groups, 1e-3) for a, b in pairs]
    out = gated_group_rms_norm(y, z, weight, num_groups, 1e-3)
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_gated_group_rms_norm_norms_before_or_behind_the_gate() -> None:
    y, z = torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), torch.tensor([3.0, -1.0, 2.0, 0.5]).double()
    weight = torch.tensor([1.0, 2.0, 0.5, 1.5]).double()
    normed = torch.tensor([naive(y.tolist(), weight.tolist(), 1e-5)], dtype=torch.float64)
    gate = torch.nn.functional.silu(z)
    before = gated_group_rms_norm(y[None], z[None], weight, 1, 1e-5, norm_first=True)
    torch.testing.assert_close(before, normed * gate, rtol=1e-12, atol=1e-12)
    behind = gated_group_rms_norm(y[None], z[None], weight, 1, 1e-5)
    assert (before - behind).abs().max() > 0.1


def test_gated_group_rms_norm_without_a_weight_is_the_gate_alone() -> None:
    y, z = torch.randn(2, 3, 12, dtype=torch.float64).unbind()
    assert torch.equal(gated_group_rms_norm(y, z, None, 3, 1e-5), y * torch.nn.functional.silu(z))


def test_gated_group_rms_norm_widens_a_bf16_gate() -> None:
    out = gated_group_rms_norm(torch.randn(1, 3, 8), torch.randn(1, 3, 8).bfloat16(), torch.ones(8), 2, 1e-5)
    assert out.dtype == torch.float32

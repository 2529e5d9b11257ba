import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from twotower.ops.mlp import Activation, activate, mlp

ALPHAS = torch.tensor([0.3, -1.2], dtype=torch.float64)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def tanh_gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def xielu(x: float) -> float:
    above, below = (softplus(a) for a in ALPHAS.tolist())
    return above * x * x + 0.5 * x if x > 0 else (math.expm1(x) - x) * (0.5 + below) + 0.5 * x


FORMULAS: dict[str, Callable[[float], float]] = {
    "relu2": lambda x: max(x, 0.0) ** 2,
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": tanh_gelu,
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "xielu": xielu,
}
VALUES = torch.cat((torch.linspace(-12, 12, 241, dtype=torch.float64), torch.tensor([0.0, 1e-4, -1e-4, 30.0, -30.0])))


def each(formula: Callable[[float], float], x: Tensor) -> Tensor:
    return torch.tensor([formula(v) for v in x.flatten().tolist()], dtype=torch.float64).view_as(x)


@pytest.mark.parametrize("kind", FORMULAS)
def test_each_activation_is_its_formula(kind: str) -> None:
    expected = each(FORMULAS[kind], VALUES)
    torch.testing.assert_close(activate(VALUES, Activation(kind, alphas=ALPHAS)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", FORMULAS)
def test_a_gate_multiplies_the_second_half(kind: str) -> None:
    gate, value = VALUES[:120], VALUES[120:240]
    found = activate(torch.cat((gate, value)), Activation(kind, gated=True, alphas=ALPHAS))
    torch.testing.assert_close(found, each(FORMULAS[kind], gate) * value, rtol=1e-12, atol=1e-12)


def test_a_limit_clamps_the_gate_from_above_and_the_value_from_both_sides() -> None:
    """What gpt-oss computes: (clamp(v, -7, 7) + 1) · g · sigmoid(1.702 g) with g at most 7."""
    hidden = torch.tensor([-9.0, 9.0, 2.0, -8.0, 8.0, 3.0], dtype=torch.float64)
    found = activate(hidden, Activation("quick_gelu", gated=True, limit=7.0, offset=1.0))
    gates, values = [-9.0, 7.0, 2.0], [-7.0, 7.0, 3.0]
    expected = [FORMULAS["quick_gelu"](g) * (v + 1) for g, v in zip(gates, values, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_network_is_two_products_around_the_activation() -> None:
    generator = torch.Generator().manual_seed(0)
    x, up, down, up_bias, down_bias = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((3, 4), (10, 4), (4, 5), (10,), (4,))
    )
    by = Activation("gelu", gated=True)
    expected = activate(x @ up.t() + up_bias, by) @ down.t() + down_bias
    torch.testing.assert_close(mlp(x, up, down, up_bias, down_bias, by), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", FORMULAS)
def test_gradients_reach_inputs_and_learned_numbers(kind: str) -> None:
    x = torch.tensor([-2.0, -0.3, 0.4, 1.7], dtype=torch.float64, requires_grad=True)
    alphas = ALPHAS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, alphas: activate(x, Activation(kind, alphas=alphas)), (x, alphas))

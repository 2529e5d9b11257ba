"""A head rules the mask token out, in decoding and in training."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from twotower.backends.native.build import library
from twotower.backends.native.pack import pack_weight
from twotower.config import TwoTowerConfig
from twotower.model.head import Head

WIDTH, SIZE = 32, 40


@pytest.fixture
def make(sizes: dict[str, Any]) -> Callable[..., Head]:
    def made(dtype: torch.dtype = torch.float32, **config: Any) -> Head:
        head = Head(TwoTowerConfig(**sizes | {"pattern": "-"} | config), dtype)
        torch.manual_seed(0)
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter)
        return head

    return made


@pytest.mark.parametrize("mask", [0, 3, SIZE - 1])
@pytest.mark.parametrize("config", [{}, {"logit_scale": 0.25, "logit_softcap": 5.0, "head_bias": True}])
def test_the_mask_has_no_probability_whatever_its_row_holds(
    mask: int, config: dict[str, Any], make: Callable[..., Head]
) -> None:
    head, x = make(mask_token_id=mask, **config), torch.randn(2, 5, WIDTH)
    logits = head(x)
    if head.linear.bias is not None:
        assert not torch.equal(logits, F.linear(x, head.weight)), "a head without its bias would agree"
    others = [i for i in range(SIZE) if i != mask]
    for row in (torch.full((WIDTH,), torch.nan), x[0, 0] * 1e30, torch.zeros(WIDTH)):
        with torch.no_grad():
            head.weight[mask] = row
        again = head(x)
        assert bool((again[..., mask] == -torch.inf).all())
        assert torch.equal(again[..., others], logits[..., others])
    probabilities = logits.softmax(-1)
    assert bool((probabilities[..., mask] == 0).all())
    torch.testing.assert_close(probabilities[..., others], logits[..., others].softmax(-1))


@pytest.mark.skipif(library() is None, reason="this machine has no C compiler")
@pytest.mark.parametrize("config", [{}, {"head_bias": True}, {"logit_scale": 0.25}, {"logit_softcap": 5.0}])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e29, 3e38, torch.inf, torch.nan])
def test_a_packed_head_rules_it_out_whatever_its_row_holds(
    value: float, config: dict[str, Any], make: Callable[..., Head]
) -> None:
    head, x = make(mask_token_id=3, **config), torch.randn(2, 5, WIDTH) * 40
    with torch.no_grad():
        head.weight[3] = value * head.weight[4].sign()
    expected = head(x)
    head.pack_(torch.float32, pack_weight)
    logits = head(x)
    assert bool((logits[..., 3] == -torch.inf).all())
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_logits_are_float32_or_wider(dtype: torch.dtype, expected: torch.dtype, make: Callable[..., Head]) -> None:
    assert make(dtype)(torch.randn(3, WIDTH, dtype=dtype)).dtype == expected


@pytest.mark.parametrize("config", [{}, {"logit_scale": 0.25, "logit_softcap": 5.0}])
def test_gradients_are_those_of_a_vocabulary_without_the_mask(
    config: dict[str, Any], make: Callable[..., Head]
) -> None:
    head, x = make(torch.float64, **config), torch.randn(7, WIDTH, dtype=torch.float64, requires_grad=True)
    targets, kept = torch.arange(7) + 4, [i for i in range(SIZE) if i != 3]
    F.cross_entropy(head(x), targets).backward()
    weight, y = head.weight.detach()[kept].requires_grad_(), x.detach().clone().requires_grad_()
    logits = y @ weight.t() * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    F.cross_entropy(logits, targets - 1).backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert head.weight.grad is not None
    torch.testing.assert_close(head.weight.grad[kept], weight.grad)
    assert not bool(head.weight.grad[3].any())

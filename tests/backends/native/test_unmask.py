"""The operations on logits and blocks in C against those in PyTorch."""

import pytest
import torch
from torch import Tensor

from twotower.backends.native import build
from twotower.backends.native import unmask as native
from twotower.ops import unmask as reference

pytestmark = pytest.mark.skipif(build.library() is None, reason="this machine has no C compiler")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize("shape", [(1,), (2, 7), (3, 5, 64), (1, 16, 1030), (2, 131_072)])
def test_best(shape: tuple[int, ...]) -> None:
    logits = (normal(*shape) * 4).round(decimals=1)  # with equal values, of which the first counts
    logits[..., -1] = -torch.inf if shape[-1] > 1 else 3.0
    found, expected = native.best(logits), reference.best(logits)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(native.argmax(logits), reference.argmax(logits))
    torch.testing.assert_close(found.probability, logits.double().softmax(-1).amax(-1).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(expected.probability, found.probability, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.log_sum, logits.double().logsumexp(-1).float(), rtol=1e-6, atol=1e-6)
    rows = logits.flatten(0, -2) if len(shape) > 1 else logits[None]
    for row, log_sum in zip(rows, found.log_sum.reshape(-1), strict=True):
        assert torch.equal(native.best(row).log_sum, log_sum)


@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
def test_best_of_what_is_no_distribution(strange: float) -> None:
    logits = normal(3, 40)
    logits[1] = strange
    logits[2, 35] = max(strange, 0.0) if strange == strange else strange
    found, expected = native.best(logits), reference.best(logits)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert torch.equal(native.argmax(logits), reference.argmax(logits))


@pytest.mark.parametrize("s", [1, 4, 16, 300])
@pytest.mark.parametrize("leftmost", [True, False])
@pytest.mark.parametrize("limits", ["", "threshold", "bound", "threshold and bound"])
def test_commit(s: int, leftmost: bool, limits: str) -> None:
    for seed in range(20):
        sure = normal(5, s, seed=seed).sigmoid().mul(20).round() / 20  # with equal ones
        sure[:, ::7] = torch.nan if seed % 4 == 3 else 0.5
        masked = normal(5, s, seed=seed + 100) > torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])[:, None]
        left = torch.tensor([3, 1, 16, 0, 4]) + seed % 3
        threshold = torch.tensor([0.5, 0.9, 0.0, 1.0, 0.7]) if "threshold" in limits else None
        bound = torch.tensor([0.5, 2.3, 0.0, 1e9, 0.1]) if "bound" in limits else None
        sure = sure - 1 if "bound" in limits else sure  # doubts are not negative
        found = native.commit(sure, masked, left, threshold, bound, leftmost=leftmost)
        assert torch.equal(found, reference.commit(sure, masked, left, threshold, bound, leftmost=leftmost))


@pytest.mark.parametrize("shape", [(1,), (2, 7), (3, 5, 64), (1, 16, 1030), (2, 131_072)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_entropy(shape: tuple[int, ...], scale: float) -> None:
    logits = normal(*shape) * scale
    if shape[-1] > 1:
        logits[..., -1] = -torch.inf
    log_p = logits.double().log_softmax(-1)
    expected = -(log_p.exp() * log_p.clamp(min=-1e30)).sum(-1).float()
    for ops in (native, reference):
        found = ops.entropy(logits)
        assert found.dtype == torch.float32
        assert (found >= 0).all()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    rows = logits.flatten(0, -2) if len(shape) > 1 else logits[None]
    for row, own in zip(rows, native.entropy(logits).reshape(-1), strict=True):
        assert torch.equal(native.entropy(row), own)


def test_entropy_of_what_is_no_distribution_is_nan() -> None:
    logits = normal(4, 40)
    logits[0], logits[1, 3], logits[2, 3] = -torch.inf, torch.inf, torch.nan
    assert native.entropy(logits).isnan().tolist() == [True, True, True, False]
    assert reference.entropy(logits).isnan().tolist() == [True, True, True, False]


def test_fix() -> None:
    def coins(seed: int) -> Tensor:
        return normal(4, 17, seed=seed) > 0

    ids = [normal(4, 17, seed=seed).mul(9).long() for seed in range(3)]
    places = reference.BlockPlaces(ids[0], coins(3), normal(4, 17, seed=4), ids[1])
    step = torch.tensor([3, 0, 5, 1])
    arguments = (places, coins(5), coins(6), ids[2], normal(4, 17, seed=7), step, 39)
    for ours, theirs in zip(native.fix(*arguments), reference.fix(*arguments), strict=True):
        assert torch.equal(ours, theirs)

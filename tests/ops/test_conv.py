import pytest
import torch
from torch import Tensor

from twotower.ops.conv import causal_conv, next_past

LENGTHS = (1, 2, 5, 16, 17, 63, 64, 65, 130)


def naive(x: Tensor, past: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """Token by token with a queue of the last w rows."""
    queue = list(past.unbind(1))
    out = []
    for row in x.unbind(1):
        queue.append(row)
        y = torch.zeros_like(row) if bias is None else bias.expand_as(row).clone()
        for tap, value in zip(taps, queue[-len(taps) :], strict=True):
            y += tap * value
        out.append(y)
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("width", [2, 4])
def test_causal_conv_is_the_loop(tokens: int, width: int) -> None:
    torch.manual_seed(tokens)
    sizes = ((2, tokens, 6), (2, width - 1, 6), (width, 6), (6,))
    x, seed, taps, bias = (torch.randn(size, dtype=torch.float64) for size in sizes)
    for past in (seed, torch.zeros_like(seed)):
        for b in (bias, None):
            torch.testing.assert_close(causal_conv(x, past, taps, b), naive(x, past, taps, b), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_a_split_gives_what_one_call_gives(tokens: int) -> None:
    torch.manual_seed(tokens)
    x, taps, past = torch.randn(2, tokens, 6), torch.randn(4, 6), torch.randn(2, 3, 6)
    whole = causal_conv(x, past, taps, None)
    for cut in {1, tokens // 2, tokens - 1} - {0, tokens}:
        left, right = x[:, :cut], x[:, cut:]
        joined = torch.cat(
            (causal_conv(left, past, taps, None), causal_conv(right, next_past(left, past, None), taps, None)), 1
        )
        # the same multiply-adds in the same order: not a bit may differ
        assert torch.equal(joined, whole)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 17])
def test_next_past_is_the_end_of_what_counts(tokens: int) -> None:
    x, past = torch.arange(3 * tokens * 2.0).view(3, tokens, 2), -torch.arange(3 * 3 * 2.0).view(3, 3, 2) - 1
    assert torch.equal(next_past(x, past, None), torch.cat((past, x), 1)[:, -3:])
    for counts in ([0, 1, tokens], [tokens, 0, tokens // 2]):
        rows = next_past(x, past, torch.tensor(counts))
        for row, count in enumerate(counts):
            assert torch.equal(rows[row], torch.cat((past[row], x[row, :count]))[-3:])


def test_next_past_does_not_alias_its_inputs() -> None:
    x, past = torch.ones(1, 5, 2), torch.zeros(1, 3, 2)
    after = next_past(x, past, None)
    x.fill_(7)
    assert torch.equal(after, torch.ones(1, 3, 2))

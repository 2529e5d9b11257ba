from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from twotower.ops import seeded_conv as module
from twotower.ops.seeded_conv import make_reach, seeded_conv

TOKENS, CHANNELS = 13, 3
# first positions of each token's document and block
DOCUMENT = torch.tensor([[0] * 5 + [5] * 8, [0] * 13])
BLOCK = torch.tensor([[0, 0, 0, 3, 3, 5, 5, 7, 7, 7, 7, 11, 11], [0, 1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 12]])


def naive(x: Tensor, context: Tensor | None, block: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.zeros_like(x)
    width = taps.shape[0]
    for row in range(2):
        for i in range(TOKENS):
            y[row, i] = 0 if bias is None else bias
            for back in range(width):
                j = i - back
                source = x if j >= block[row, i] else context
                if j >= DOCUMENT[row, i] and source is not None:
                    y[row, i] += taps[width - 1 - back] * source[row, j]
    return y


@pytest.mark.parametrize("width", [1, 2, 4, 6])
@pytest.mark.parametrize("biased", [True, False])
def test_blocks_see_the_context_before_them_and_documents_nothing(width: int, biased: bool, close: Callable) -> None:
    torch.manual_seed(0)
    x, context = torch.randn(2, 2, TOKENS, CHANNELS, dtype=torch.float64)
    taps, bias = torch.randn(width, CHANNELS).double(), torch.randn(CHANNELS).double() if biased else None
    seeded = seeded_conv(x, context, make_reach(DOCUMENT, BLOCK, width), taps, bias)
    close(seeded, naive(x, context, BLOCK, taps, bias), 1e-14)
    alone = seeded_conv(context, None, make_reach(DOCUMENT, DOCUMENT, width), taps, bias)
    close(alone, naive(context, None, DOCUMENT, taps, bias), 1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("piece", [1, 5 * 2 * 2, module.PIECE])  # one token at a time, five, and the whole row
def test_gradients_reach_everything(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", piece)
    torch.manual_seed(0)
    reach = make_reach(DOCUMENT, BLOCK, 4)
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 13, 2), (2, 13, 2), (4, 2), (2,))]
    assert torch.autograd.gradcheck(lambda x, context, taps, bias: seeded_conv(x, context, reach, taps, bias), inputs)


@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("biased", [True, False])
def test_rows_shorter_than_the_kernel_have_gradients(tokens: int, biased: bool) -> None:
    torch.manual_seed(0)
    reach = make_reach(torch.zeros(1, tokens).long(), torch.arange(tokens)[None], 4)
    shapes = ((2, tokens, 2), (2, tokens, 2), (4, 2), (2,))
    x, context, taps, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes)
    assert torch.autograd.gradcheck(
        lambda *i: seeded_conv(*i[:2], reach, i[2], i[3] if biased else None), (x, context, taps, bias)
    )


def test_a_frozen_context_gets_no_gradient_and_changes_no_other() -> None:
    torch.manual_seed(0)
    reach = make_reach(DOCUMENT, BLOCK, 4)
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 13, 2), (2, 13, 2), (4, 2), (2,))]
    x, context, taps, bias = inputs
    weight = torch.randn(2, 13, 2).double()
    both = torch.autograd.grad((seeded_conv(x, context, reach, taps, bias) * weight).sum(), inputs)
    frozen = (seeded_conv(x, context.detach(), reach, taps, bias) * weight).sum()
    for a, b in zip(torch.autograd.grad(frozen, (x, taps, bias)), (both[0], both[2], both[3]), strict=True):
        assert torch.equal(a, b)


def test_it_keeps_its_inputs_and_nothing_of_their_size() -> None:
    reach = make_reach(DOCUMENT, BLOCK, 4)
    x, context = torch.randn(2, 2, TOKENS, CHANNELS)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: (saved.append(v), v)[1], lambda v: v):
        seeded_conv(x.requires_grad_(), context, reach, torch.randn(4, CHANNELS), None)
    large = [v.data_ptr() for v in saved if v.numel() == x.numel() and v.is_floating_point()]
    assert sorted(large) == sorted([x.data_ptr(), context.data_ptr()])


@pytest.mark.slow
@pytest.mark.usefixtures("cxx_compiler")
def test_compiled_without_a_break_it_has_the_same_values_and_gradients() -> None:
    torch.manual_seed(0)
    reach = make_reach(DOCUMENT, BLOCK, 4)
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 13, 2), (2, 13, 2), (4, 2), (2,))]
    weight = torch.randn(2, 13, 2).double()

    def run(x: Tensor, context: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
        return seeded_conv(x, context, reach, taps, bias)

    def results(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        y = function(*inputs)
        return (y, *torch.autograd.grad((y * weight).sum(), inputs))

    for compiled, plain in zip(results(torch.compile(run, fullgraph=True)), results(run), strict=True):
        torch.testing.assert_close(compiled, plain)

from collections.abc import Callable

import pytest
import torch

from twotower.backends.native.build import library
from twotower.backends.native.pack import pack_weight
from twotower.model.linear import Linear, Pack
from twotower.ops.linear import pack

# A machine without a C compiler has one of them.
PACKS = [pack] if library() is None else [pack, pack_weight]


def made(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> Linear:
    torch.manual_seed(0)
    layer = Linear(24, 40, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return layer


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("bias", [False, True])
def test_packing_keeps_the_product(bias: bool, pack: Pack, close: Callable) -> None:
    layer, x = made(bias=bias), torch.randn(3, 5, 24)
    with torch.no_grad():
        before = layer(x)
        layer.pack_(torch.float32, pack)
        close(layer(x), before, 1e-6)  # the same float32 products in another order


def test_float64_packs_to_itself() -> None:
    layer, x = made(torch.float64), torch.randn(3, 24, dtype=torch.float64)
    before = layer(x)
    layer.pack_(torch.float64, pack)
    assert torch.equal(layer(x), before)
    assert set(layer.released_tensors(("a",), (40,))) == {"a.weight", "a.bias"}


def test_released_tensors_are_rows_of_the_fused_weight() -> None:
    layer = made()
    tensors = layer.released_tensors(("q", "k"), (24, 16))
    assert torch.equal(torch.cat((tensors["q.weight"], tensors["k.weight"])), layer.weight)
    assert torch.equal(torch.cat((tensors["q.bias"], tensors["k.bias"])), layer.bias)
    tensors["k.weight"].fill_(7)
    assert bool((layer.weight[24:] == 7).all())


@pytest.mark.skipif(pack(torch.zeros(8, 8)) is None, reason="this torch packs nothing")
@pytest.mark.parametrize("pack", PACKS)
def test_packed_weights_cannot_be_released(pack: Pack) -> None:
    layer = made()
    layer.pack_(torch.float32, pack)
    with pytest.raises(ValueError, match="pack=False"):
        layer.released_tensors(("a",), (40,))

"""A whole MLP in one call, see `twotower.ops.mlp`. Letters: d width, f up's outputs."""

import torch
from torch import Tensor

from twotower.ops.linear import PackedWeight
from twotower.ops.native.call import function, threads


def mlp(
    x: Tensor,
    up: Tensor | PackedWeight,
    down: Tensor | PackedWeight,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    *,
    gated: bool,
) -> Tensor:
    assert isinstance(up, PackedWeight)
    assert isinstance(down, PackedWeight)
    x = x.contiguous()
    d = x.shape[-1]
    r = x.numel() // d
    hidden, y = x.new_empty(r, up.outputs), torch.empty_like(x)
    call = function("tt_mlp", "pl pilp pilp i ppi")
    call(
        *(x.data_ptr(), r),
        *(up.data.data_ptr(), up.data.dtype == torch.bfloat16, up.outputs),
        None if up_bias is None else up_bias.data_ptr(),
        *(down.data.data_ptr(), down.data.dtype == torch.bfloat16, d),
        None if down_bias is None else down_bias.data_ptr(),
        *(gated, hidden.data_ptr(), y.data_ptr(), threads()),
    )
    return y

"""A product with a weight, plain or packed: stored as is fastest for a weight that no longer changes.

The packed layouts here are PyTorch's own, so they belong to the reference path. Letters: i inputs, o outputs, r rows.
"""

import dataclasses
import functools
import logging
import warnings
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

# x (…, i) and a bias (o,) or None to (…, o). The weight inside has no gradient and can't be read back exactly.
PackedWeight = Callable[[Tensor, Tensor | None], Tensor]

FP16_MAX = 65504.0
# The row count that oneDNN's layout is chosen for; measured equal for 1 to 64 rows.
_ROWS_HINT = 16
# From this many elements on, several threads pay for FBGEMM's threaded entry point, which costs 35 us more a call.
_THREADED_SIZE = 400_000


class WeightLayout(Enum):
    """How the reference path stores a weight that no longer changes."""

    TORCH = "torch"  # the plain tensor, for F.linear
    ONEDNN = "onednn"  # oneDNN's blocked layout
    FBGEMM_FP16 = "fbgemm-fp16"  # rounded to fp16 in FBGEMM's layout, products in float32


@functools.cache
def cpu_has_bf16_matmul() -> bool:
    """True where the CPU multiplies bf16 matrices in hardware (AMX, AVX512-BF16)."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def weight_layout(device_type: str, dtype: torch.dtype) -> WeightLayout:
    """The layout of constant weights of `dtype` on a device; each choice is logged once.

    float32: MKL repacks the weight at every call of F.linear with few rows; oneDNN's layout is 2-3 times faster for 1
    to 64 rows. bf16 without bf16 hardware: PyTorch's bf16 products run at 1 GFLOP/s; FBGEMM reads 2 bytes per weight as
    well and multiplies in float32. fp16 has more mantissa bits than bf16, so only magnitudes under 6e-5 are rounded,
    by at most 3e-8.
    """
    layout = WeightLayout.TORCH
    if device_type == "cpu" and torch.backends.mkldnn.is_available():
        if dtype == torch.float32 or (dtype == torch.bfloat16 and cpu_has_bf16_matmul()):
            layout = WeightLayout.ONEDNN
        elif dtype in (torch.bfloat16, torch.float16) and "fbgemm" in torch.backends.quantized.supported_engines:
            layout = WeightLayout.FBGEMM_FP16
    logger.info("linear layers of %s on %s: %s", dtype, device_type, layout.value)
    return layout


def activation_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of activations beside packed weights of `dtype`: float32 where the layout multiplies in float32, else
    the weights' own."""
    return torch.float32 if weight_layout(device_type, dtype) is WeightLayout.FBGEMM_FP16 else dtype


@dataclasses.dataclass(frozen=True)
class OneDnnWeight:
    """A weight in oneDNN's blocked layout."""

    data: Tensor

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.data, bias, "none", [], "")
        return y


@dataclasses.dataclass(frozen=True)
class Fp16Weight:
    """A weight in FBGEMM's layout; x is float32."""

    data: Any
    threaded: bool

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor
        if self.threaded:
            y = torch.ops.quantized.linear_dynamic_fp16(x, self.data)
            return y if bias is None else y + bias
        rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])  # (r, i)
        y = torch.fbgemm_linear_fp16_weight_fp32_activation(rows, self.data, bias)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], -1)


def pack(weight: Tensor) -> PackedWeight | None:
    """Packs a constant weight (o, i); None where the plain tensor is the fastest form.

    Raises ValueError for a weight that the layout can't hold.
    """
    layout = weight_layout(weight.device.type, weight.dtype)
    if layout is WeightLayout.ONEDNN:
        return OneDnnWeight(torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS_HINT))
    if layout is WeightLayout.FBGEMM_FP16:
        return _fp16_weight(weight.detach().float().contiguous())
    return None


def _fp16_weight(wide: Tensor) -> Fp16Weight:
    largest = wide.abs().max().item()
    if largest > FP16_MAX:
        raise ValueError(f"a weight is {largest:.3g}, beyond fp16's {FP16_MAX}; load with dtype=torch.float32")
    if wide.numel() >= _THREADED_SIZE:
        return Fp16Weight(torch.ops.quantized.linear_prepack_fp16(wide, None), threaded=True)
    with warnings.catch_warnings():
        # Deprecated in name only: its successors need AVX512 or have the threaded entry point's overhead.
        warnings.simplefilter("ignore", UserWarning)
        packed = torch.fbgemm_pack_gemm_matrix_fp16(wide)
        torch.fbgemm_linear_fp16_weight_fp32_activation(wide[:1], packed, None)  # its warning comes once, here
    return Fp16Weight(packed, threaded=False)


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x (…, i) times weight (o, i) transposed plus bias (o,), in x's dtype: (…, o)."""
    return F.linear(x, weight, bias) if isinstance(weight, Tensor) else weight(x, bias)

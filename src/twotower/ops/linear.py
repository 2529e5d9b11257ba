"""Matrix product with a weight, plain or packed. Letters: i inputs, o outputs, r rows."""

import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.ops.backend import Backend, LinearBackend, linear_backend
from twotower.ops.native import linear as native

FP16_MAX = 65504.0


class PackedWeight(NamedTuple):
    """A constant (o, i) weight in a backend's own layout; it has no gradient and can't be read back exactly.

    `threaded` chooses FBGEMM's entry point: one splits the work over threads but costs 35 us more a call.
    """

    backend: LinearBackend
    data: Any
    outputs: int
    threaded: bool = False


# The row count that oneDNN's layout is chosen for; measured equal for 1 to 64 rows.
_ROWS_HINT = 16
# Weights of at least this many elements are worth several threads.
_THREADED_SIZE = 400_000


def pack(weight: Tensor, ops: Backend = Backend.REFERENCE) -> PackedWeight | None:
    """Packs a constant weight (o, i) for `linear` beside the other ops of backend `ops`; None where the plain tensor is
    the fastest form."""
    backend = linear_backend(weight.device.type, weight.dtype, ops)
    outputs = weight.shape[0]
    if backend is LinearBackend.NATIVE:
        return PackedWeight(backend, native.pack_panels(weight), outputs)
    if backend is LinearBackend.ONEDNN:
        return PackedWeight(backend, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS_HINT), outputs)
    if backend is LinearBackend.FBGEMM_FP16:
        wide = weight.detach().float().contiguous()
        largest = wide.abs().max().item()
        if largest > FP16_MAX:
            raise ValueError(f"a weight is {largest:.3g}, beyond fp16's {FP16_MAX}; load with dtype=torch.float32")
        if wide.numel() >= _THREADED_SIZE:
            return PackedWeight(backend, torch.ops.quantized.linear_prepack_fp16(wide, None), outputs, threaded=True)
        with warnings.catch_warnings():
            # Deprecated in name only: its successors need AVX512 or have the threaded entry point's overhead.
            warnings.simplefilter("ignore", UserWarning)
            packed = torch.fbgemm_pack_gemm_matrix_fp16(wide)
            torch.fbgemm_linear_fp16_weight_fp32_activation(wide[:1], packed, None)  # warns once a process: here
        return PackedWeight(backend, packed, outputs)
    return None


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x (…, i) times weight (o, i) transposed plus bias (o,), in x's dtype: (…, o)."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    if weight.backend is LinearBackend.NATIVE:
        return native.linear(x, weight.data, weight.outputs, bias)
    if weight.backend is LinearBackend.ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight.data, bias, "none", [], "")
    if weight.threaded:
        y = torch.ops.quantized.linear_dynamic_fp16(x, weight.data)
        return y if bias is None else y + bias
    if x.ndim == 2:
        return torch.fbgemm_linear_fp16_weight_fp32_activation(x, weight.data, bias)
    rows = x.reshape(-1, x.shape[-1])  # (r, i)
    y = torch.fbgemm_linear_fp16_weight_fp32_activation(rows, weight.data, bias)
    return y.view(*x.shape[:-1], -1)

"""The one place that picks which ops run and how a product with a constant weight is computed."""

import functools
import logging
from enum import Enum

import torch

from twotower.ops.native.build import library

logger = logging.getLogger(__name__)


class Backend(Enum):
    """Which implementation of the ops a model calls."""

    REFERENCE = "reference"  # PyTorch, any device and dtype
    NATIVE = "native"  # C on a CPU, float32 activations beside bf16 or float32 weights


def choose_backend(device_type: str, dtype: torch.dtype, wanted: Backend | None = None) -> Backend:
    """`wanted`, or the fastest that is there; raises ValueError where `wanted` can't run."""
    fits = device_type == "cpu" and dtype in (torch.bfloat16, torch.float32)
    if wanted is Backend.NATIVE:
        if not fits:
            raise ValueError(f"backend is 'native' with {dtype} on {device_type}, must be bfloat16 or float32 on cpu")
        if library() is None:
            raise ValueError("backend is 'native', which needs a C compiler (cc, gcc or clang); install one or drop it")
    if wanted is not None:
        return wanted
    chosen = Backend.NATIVE if fits and library() is not None else Backend.REFERENCE
    _log_choice(device_type, dtype, chosen)
    return chosen


@functools.cache
def _log_choice(device_type: str, dtype: torch.dtype, chosen: Backend) -> None:
    logger.info("ops for %s on %s: %s", dtype, device_type, chosen.value)


class LinearBackend(Enum):
    """How `ops.linear.linear` multiplies by a weight that no longer changes."""

    NATIVE = "native"  # panels for the C kernels: bf16 times bf16 where the CPU has that, else widened as they are read
    TORCH = "torch"  # F.linear on the plain tensor
    ONEDNN = "onednn"  # weight reordered once into oneDNN's blocked layout
    FBGEMM_FP16 = "fbgemm-fp16"  # weight rounded to fp16 in FBGEMM's packed layout, products in float32


@functools.cache
def cpu_has_bf16_matmul() -> bool:
    """True where the CPU multiplies bf16 matrices in hardware (AMX, AVX512-BF16)."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def linear_backend(device_type: str, dtype: torch.dtype, ops: Backend = Backend.REFERENCE) -> LinearBackend:
    """Chooses the packing for constant weights of `dtype` on `device_type` beside backend `ops`; each choice is logged
    once.

    float32: MKL repacks the weight at every call of F.linear with few rows; oneDNN's packed weight is 2-3 times
    faster for 1 to 64 rows. bf16 without bf16 hardware: native bf16 products run at 1 GFLOP/s; FBGEMM reads 2 bytes
    per weight as well and multiplies in float32. bf16 fits fp16's mantissa; only magnitudes under 6e-5 round, by at
    most 3e-8.
    """
    if ops is Backend.NATIVE:
        return LinearBackend.NATIVE
    backend = LinearBackend.TORCH
    if device_type == "cpu" and torch.backends.mkldnn.is_available():
        if dtype == torch.float32 or (dtype == torch.bfloat16 and cpu_has_bf16_matmul()):
            backend = LinearBackend.ONEDNN
        elif dtype in (torch.bfloat16, torch.float16) and "fbgemm" in torch.backends.quantized.supported_engines:
            backend = LinearBackend.FBGEMM_FP16
    logger.info("linear layers of %s on %s: %s", dtype, device_type, backend.value)
    return backend


def activation_dtype(device_type: str, dtype: torch.dtype, ops: Backend = Backend.REFERENCE) -> torch.dtype:
    """The dtype that activations take beside weights of `dtype`: float32 where products are float32 anyway, or round
    them as they need."""
    if linear_backend(device_type, dtype, ops) in (LinearBackend.FBGEMM_FP16, LinearBackend.NATIVE):
        return torch.float32
    return dtype

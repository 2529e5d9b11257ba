"""The values of a GGUF file's tensors, one at a time: stored floats as they are, quantised ones as float32."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from twotower.checkpoints.gguf.reader import StoredTensor
from twotower.checkpoints.hf.tensor_files import TensorSpec

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def spec_of(tensor: StoredTensor) -> TensorSpec:
    """The dtype and shape that `values_of` gives the tensor. Raises ValueError for a type that the `gguf` package does
    not dequantise."""
    name = tensor.kind.name
    if name not in _STORED and not _dequantised(tensor.kind):
        raise ValueError(
            f"tensor {tensor.name} of {tensor.path} is stored as {name}, which the installed gguf package does not "
            "dequantise; use another quantisation of the model"
        )
    return TensorSpec(_STORED.get(name, torch.float32), tensor.shape)


def values_of(tensor: StoredTensor) -> Tensor:
    """A copy of the tensor: in its own dtype, or in float32 if it was quantised. No other tensor is in memory."""
    from gguf import dequantize

    dtype, shape = spec_of(tensor)
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        content = np.fromfile(file, np.uint8, tensor.num_bytes)
    if tensor.kind.name in _STORED:
        return torch.from_numpy(content).view(dtype).reshape(shape)
    return torch.from_numpy(dequantize(content.reshape(*shape[:-1], -1), tensor.kind)).reshape(shape)


@functools.cache
def _dequantised(kind: GGMLQuantizationType) -> bool:
    """Whether the `gguf` package dequantises the type, which it only says by trying."""
    from gguf import GGML_QUANT_SIZES, dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True

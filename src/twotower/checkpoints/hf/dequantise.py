"""Quantised weights to floats: the formulas of the forms in which checkpoints store them.

Letters: r rows, c columns, g columns of one scale, b bits of a packed integer. Leading dimensions are experts.
"""

import math

import torch
from torch import Tensor

# The 16 values of E2M1, which 4-bit float formats store as the index here: a sign bit, then the magnitude.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Where AWQ's words have rows 0 to 7 of 8
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
_PACKED_BITS = (1, 2, 4, 8)


def scaled(values: Tensor, scale: Tensor, block: tuple[int, int] | None, zero_point: Tensor | None = None) -> Tensor:
    """(values − zero_point) · scale in float32, for 8-bit values (…, r, c).

    The scale is one number, one per row (r,) or (r, 1), or one per block: (⌈r / m⌉, ⌈c / n⌉) for a `block` of m times n
    values, of which the last ones may be cut off by the tensor's edge, or else a whole number of equal blocks. Raises
    ValueError for another shape.
    """
    rows, columns = values.shape[-2:]
    full = _spread(power_of_two(scale), rows, columns, block)
    shift = 0.0 if zero_point is None else _spread(zero_point.float(), rows, columns, block)
    return (values.float() - shift) * full


def packed_integers(
    packed: Tensor,
    scale: Tensor,
    shape: tuple[int, int],
    zero_point: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """The weight (r, c) = `shape` of compressed-tensors' "pack-quantized": int32 words of 32 / b unsigned integers.

    `packed` (r, ⌈c·b / 32⌉) packs along columns, `zero_point` (⌈r·b / 32⌉, c / g) along rows; both are shifted by
    2^(b − 1). `groups` (c,) is the group of each column where these are not in order. Raises ValueError for b other
    than 1, 2, 4 and 8, which would cross the bounds of words.
    """
    rows, columns = shape
    fitting = [b for b in _PACKED_BITS if math.ceil(columns * b / 32) == packed.shape[-1]]
    if len(fitting) != 1:
        raise ValueError(f"{packed.shape[-1]} words for {columns} columns, must be of 1, 2, 4 or 8 bits a value")
    bits = fitting[0]
    values = _unpacked(packed, bits, columns).float()
    if groups is None:
        groups = _groups(columns, scale.shape[-1] if scale.dim() > 1 else 1)
    of_column = groups.long()
    scales = scale.float().reshape(-1, scale.shape[-1] if scale.dim() > 1 else 1)
    if zero_point is not None:
        values -= _unpacked(zero_point.t(), bits, rows).t().float()[:, of_column]
    return values * scales[:, of_column]


def packed_e2m1(packed: Tensor, scale: Tensor, over: Tensor | None = None, times: Tensor | None = None) -> Tensor:
    """4-bit floats (…, r, c) of bytes (…, r, c / 2) that hold two each, the low half first, in groups of columns with a
    scale (…, r, c / g), which is divided by `over` or multiplied by `times`, numbers of the whole tensor."""
    values = e2m1(packed)
    group = values.shape[-1] // scale.shape[-1]
    scales = power_of_two(scale)
    if over is not None:
        scales = scales / over.float()
    if times is not None:
        scales = scales * times.float()
    return values * scales.repeat_interleave(group, -1)


def blocks_of_e2m1(blocks: Tensor, scales: Tensor) -> Tensor:
    """The experts (e, c, r) of gpt-oss: `blocks` (e, r, c / 32, 16) of 4-bit floats, `scales` (e, r, c / 32) of their
    exponents. As in transformers, the stored rows become columns."""
    experts, rows, groups, half = blocks.shape
    weights = torch.empty(experts, groups * half * 2, rows)
    for weight, block, scale in zip(
        weights, blocks, scales, strict=True
    ):  # one at a time: indices take 16 times the bytes
        weight.copy_((e2m1(block) * power_of_two(scale).unsqueeze(-1)).flatten(1).t())
    return weights


def gptq(
    packed: Tensor, zero_point: Tensor, scale: Tensor, bits: int, *, shift: int, groups: Tensor | None = None
) -> Tensor:
    """The weight (r, c) of GPTQ: `packed` (c·b / 32, r) packs along columns, `zero_point` (c / g, r·b / 32) along rows,
    with `scale` (c / g, r). `shift` is what the format takes off stored zero points, 1 in its first version. `groups`
    (c,) is the group of each column where these are not in order."""
    rows, columns = scale.shape[1], packed.shape[0] * 32 // bits
    values = _unsigned(packed.t(), bits, columns)
    zeros = (_unsigned(zero_point, bits, rows) + shift) & ((1 << bits) - 1)
    of_column = _groups(columns, scale.shape[0]) if groups is None else groups.long()
    return (values - zeros.t()[:, of_column]) * scale.float().t()[:, of_column]


def awq(packed: Tensor, zero_point: Tensor, scale: Tensor) -> Tensor:
    """The weight (r, c) of AWQ: `packed` (c, r / 8) and `zero_point` (c / g, r / 8) hold 4-bit integers in the order of
    `_AWQ_ORDER` within each word, with `scale` (c / g, r)."""
    of_column = _groups(packed.shape[0], scale.shape[0])
    values, zeros = (
        _unsigned(words, 4, words.shape[1] * 8).unflatten(1, (-1, 8))[..., _AWQ_ORDER].flatten(1)
        for words in (packed, zero_point)
    )
    return ((values - zeros[of_column]) * scale.float()[of_column]).t()


def e2m1(packed: Tensor) -> Tensor:
    """The 4-bit floats of bytes (…, n) as float32 (…, 2n), the low half of each byte first."""
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    low, high = (packed & 0xF).int(), (packed >> 4).int()
    return table[torch.stack((low, high), -1).flatten(-2)]


def power_of_two(scale: Tensor) -> Tensor:
    """A scale in float32; bytes are exponents, 2^(byte − 127) (E8M0)."""
    if scale.dtype == torch.uint8:
        return torch.exp2(scale.float() - 127)
    return scale.float()


def _spread(scale: Tensor, rows: int, columns: int, block: tuple[int, int] | None) -> Tensor:
    """A scale repeated over what it belongs to, so that it can be multiplied with values (…, r, c)."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.shape[-1:] == (rows,) and scale.dim() == 1:
        return scale.unsqueeze(-1)
    if scale.shape[-2:] == (rows, 1):
        return scale
    counts = tuple(scale.shape[-2:])
    height, width = block or (0, 0)
    if block is None or (math.ceil(rows / height), math.ceil(columns / width)) != counts:
        height, width = rows // counts[0], columns // counts[1]
        if (height * counts[0], width * counts[1]) != (rows, columns):
            raise ValueError(f"scales {tuple(scale.shape)} do not divide values ({rows}, {columns}) into equal blocks")
    return scale.repeat_interleave(height, -2).repeat_interleave(width, -1)[..., :rows, :columns]


def _groups(columns: int, count: int) -> Tensor:
    """The group of each column, of `count` that are equally wide. Raises ValueError where they can't be."""
    if columns % count:
        raise ValueError(f"{count} scales do not divide {columns} columns into equal groups")
    return torch.arange(columns) // (columns // count)


def _unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """The signed integers (n, count) in int32 words (n, ⌈count·bits / 32⌉), lowest bits first."""
    return _unsigned(words, bits, count) - (1 << (bits - 1))


def _unsigned(words: Tensor, bits: int, count: int) -> Tensor:
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return values.flatten(1)[:, :count]

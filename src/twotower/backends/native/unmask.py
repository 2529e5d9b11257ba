"""From logits to a block's next state: the same functions as in `twotower.ops.unmask`. Letters: b rows, s positions,
v vocabulary."""

import torch
from torch import Tensor

from twotower.backends.native.call import function, threads
from twotower.ops.unmask import Best, BlockPlaces


def best(logits: Tensor) -> Best:
    logits = logits.contiguous()
    shape, v = logits.shape[:-1], logits.shape[-1]
    found = Best(logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape), logits.new_empty(shape))
    function("tt_best")(logits.data_ptr(), shape.numel(), v, *(x.data_ptr() for x in found), threads())
    return found


def argmax(logits: Tensor) -> Tensor:
    logits = logits.contiguous()
    tokens = logits.new_empty(logits.shape[:-1], dtype=torch.int64)
    function("tt_best")(logits.data_ptr(), tokens.numel(), logits.shape[-1], tokens.data_ptr(), None, None, threads())
    return tokens


def entropy(logits: Tensor) -> Tensor:
    logits = logits.contiguous()
    shape, v = logits.shape[:-1], logits.shape[-1]
    found = logits.new_empty(shape)
    function("tt_entropy")(logits.data_ptr(), shape.numel(), v, found.data_ptr(), threads())
    return found


def commit(
    sure: Tensor,
    masked: Tensor,
    left: Tensor,
    threshold: Tensor | None,
    bound: Tensor | None = None,
    *,
    leftmost: bool,
) -> Tensor:
    sure, masked = sure.contiguous(), masked.contiguous()
    b, s = masked.shape
    out = torch.empty_like(masked)
    limits = [None if limit is None else limit.data_ptr() for limit in (threshold, bound)]
    read = (sure.data_ptr(), masked.data_ptr(), left.data_ptr())
    function("tt_commit")(*read, *limits, leftmost, b, s, out.data_ptr())
    return out


def fix(
    places: BlockPlaces,
    valid: Tensor,
    fixed: Tensor,
    tokens: Tensor,
    confidence: Tensor,
    step: Tensor,
    mask_token_id: int,
) -> BlockPlaces:
    after = BlockPlaces(*(torch.empty(x.shape, dtype=x.dtype) for x in places))
    read = [x.contiguous() for x in (*places, valid, fixed, tokens, confidence, step)]
    pointers = (x.data_ptr() for x in after)
    function("tt_fix")(*(x.data_ptr() for x in read), mask_token_id, *fixed.shape, *pointers)
    return after

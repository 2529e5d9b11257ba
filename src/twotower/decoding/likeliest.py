"""The likeliest tokens at each place, beside the one that was chosen. Letters: b rows, s places, k of the likeliest
tokens, v vocabulary."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.backends.protocol import LogitOps
from twotower.decoding.step import Request
from twotower.ops.transfer import to_device

# Tokens that are put into order to find the likeliest. Only where more are equally likely may others than the first of
# them be given.
_CANDIDATES = 64


class TopTokens(NamedTuple):
    """The largest of logits: ids (…, k) int64, and the logits (…, k), in descending order."""

    ids: Tensor
    logits: Tensor


def top_tokens(logits: Tensor, num: int) -> TopTokens:
    """The `num` largest of logits (…, v), or all if v is less; of equal ones the lower id comes first, as in argmax, so
    that the greedy token is the first of them."""
    # topk has an order of its own for equal values, which depends on k: it gives some more, always as many
    k = min(max(num, _CANDIDATES), logits.shape[-1]) if num else 0
    ids = logits.topk(k, dim=-1).indices.sort(dim=-1).values
    best = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return TopTokens(ids.gather(-1, best.indices)[..., :num], best.values[..., :num])


def most_asked(requests: Sequence[Request], vocab_size: int) -> int:
    """How many of the likeliest tokens some request asks for, k."""
    return min(max(r.params.logprobs for r in requests), vocab_size)


def likeliest(requests: Sequence[Request], logits: Tensor, ops: LogitOps) -> Tensor:
    """The likeliest tokens (b, s, k, 2) float64, each an id and its log-probability under logits (b, s, v), where k is
    the most that a request asks for; zeros in rows whose requests ask for none."""
    k = most_asked(requests, logits.shape[-1])
    found = torch.zeros(*logits.shape[:2], k, 2, dtype=torch.float64, device=logits.device)
    if k:
        rows = to_device([row for row, r in enumerate(requests) if r.params.logprobs], logits.device)
        theirs = logits[rows]
        top = top_tokens(theirs, k)
        logprobs = top.logits - ops.best(theirs).log_sum.unsqueeze(-1)
        found[rows] = torch.stack((top.ids.double(), logprobs.double()), dim=-1)
    return found


def resized(tops: Tensor, size: int, k: int) -> Tensor:
    """The likeliest tokens (b, s, k, 2) of `size` places, `k` of each; what is added is padding."""
    return F.pad(tops, (0, 0, 0, k - tops.shape[2], 0, size - tops.shape[1]))


def with_tops(results: Tensor, tops: Tensor) -> Tensor:
    """A step's results (n, b, s) with the likeliest tokens (b, s, k, 2) behind them, (n + 2k, b, s)."""
    return torch.cat((results, tops.flatten(2).permute(2, 0, 1))) if tops.shape[2] else results


def read_top(tops: Sequence[Any], row: int, place: int, num: int) -> tuple[tuple[int, float], ...]:
    """The `num` likeliest tokens at a place, each an id and its log-probability, of what `with_tops` put behind a
    step's results; fewer where the vocabulary has fewer."""
    pairs = zip(tops[0 : 2 * num : 2], tops[1 : 2 * num : 2], strict=True)
    return tuple((int(ids[row][place]), logprobs[row][place]) for ids, logprobs in pairs)

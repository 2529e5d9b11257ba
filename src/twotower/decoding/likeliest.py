"""The likeliest tokens at each place, beside the one that was chosen. Letters: b rows, s places, k of the likeliest
tokens, v vocabulary, m numbers of a place: the rank of the chosen token, then an id and a log-probability of each of
the likeliest, 1 + 2k in all; none where no request asks for any."""

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


class Top(NamedTuple):
    """The likeliest tokens at a place, each an id and its log-probability, and the rank of the chosen one, as `Token`
    has them."""

    tokens: tuple[tuple[int, float], ...]
    rank: int


def top_tokens(logits: Tensor, num: int) -> TopTokens:
    """The `num` largest of logits (…, v), or all if v is less; of equal ones the lower id comes first, as in argmax, so
    that the greedy token is the first of them."""
    # topk has an order of its own for equal values, which depends on k: it gives some more, always as many
    k = min(max(num, _CANDIDATES), logits.shape[-1]) if num else 0
    ids = logits.topk(k, dim=-1).indices.sort(dim=-1).values
    best = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return TopTokens(ids.gather(-1, best.indices)[..., :num], best.values[..., :num])


def numbers_asked(requests: Sequence[Request], vocab_size: int) -> int:
    """How many numbers of a place the requests need together, m, where k is the most that one of them asks for."""
    k = min(max(r.params.logprobs for r in requests), vocab_size)
    return 1 + 2 * k if k else 0


def likeliest(requests: Sequence[Request], logits: Tensor, chosen: Tensor, ops: LogitOps) -> Tensor:
    """The numbers (b, s, m) float64 of each place, where tokens `chosen` (b, s) were chosen from logits (b, s, v);
    zeros in rows whose requests ask for none."""
    m = numbers_asked(requests, logits.shape[-1])
    found = torch.zeros(*logits.shape[:2], m, dtype=torch.float64, device=logits.device)
    if m:
        rows = to_device([row for row, r in enumerate(requests) if r.params.logprobs], logits.device)
        theirs = logits[rows]
        rank = (theirs >= theirs.gather(-1, chosen[rows].unsqueeze(-1))).sum(-1, keepdim=True)
        top = top_tokens(theirs, m // 2)
        logprobs = top.logits - ops.best(theirs).log_sum.unsqueeze(-1)
        pairs = torch.stack((top.ids.double(), logprobs.double()), dim=-1)
        found[rows] = torch.cat((rank.double(), pairs.flatten(2)), dim=-1)
    return found


def resized(tops: Tensor, size: int, m: int) -> Tensor:
    """The numbers (b, s, m) of `size` places, `m` of each; what is added is padding."""
    return F.pad(tops, (0, m - tops.shape[2], 0, size - tops.shape[1]))


def with_tops(results: Tensor, tops: Tensor) -> Tensor:
    """A step's results (r, b, s) with the numbers of its places (b, s, m) behind them, (r + m, b, s)."""
    return torch.cat((results, tops.permute(2, 0, 1))) if tops.shape[2] else results


def read_top(tops: Sequence[Any], row: int, place: int, num: int) -> Top:
    """The `num` likeliest tokens at a place, fewer where the vocabulary has fewer, of what `with_tops` put behind a
    step's results."""
    if not num:
        return Top((), 0)
    pairs = zip(tops[1 : 2 * num : 2], tops[2 : 2 * num + 1 : 2], strict=True)
    return Top(tuple((int(ids[row][place]), logprobs[row][place]) for ids, logprobs in pairs), int(tops[0][row][place]))

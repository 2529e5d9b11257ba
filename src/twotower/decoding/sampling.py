"""Samples tokens from logits. Letters: b rows, s positions, v vocabulary."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from twotower.backends.protocol import LogitOps
from twotower.decoding.params import SamplingParams
from twotower.ops.transfer import to_device
from twotower.ops.unmask import from_log


class Proposal(NamedTuple):
    """tokens (b, s) int64 and their probabilities without temperature and filters, (b, s) float32."""

    tokens: Tensor
    confidence: Tensor


class Temper(NamedTuple):
    """The rows' sampling settings as tensors (b,), and flags: all rows greedy, any row greedy, any row with a filter,
    any with `typical_p`.

    temperature float32 (1 where greedy), greedy bool, top_k int64 (v for none), top_p and typical_p float32 (inf for
    none, because sums of rounded probabilities may reach 1 before the last token), log_min_p float32 (-inf for none).
    """

    temperature: Tensor
    greedy: Tensor
    top_k: Tensor
    top_p: Tensor
    log_min_p: Tensor
    typical_p: Tensor
    all_greedy: bool
    any_greedy: bool
    filtered: bool
    typical: bool

    def select(self, rows: list[int]) -> "Temper":
        """The settings of some rows; the flags stay those of the whole batch, which changes no result."""
        index = to_device(rows, self.greedy.device)
        return self._with([v[index] for v in self[:6]])

    def join(self, others: "Temper") -> "Temper":
        """The settings of both batches' rows."""
        joined = self._with([torch.cat(pair) for pair in zip(self[:6], others[:6], strict=True)])
        return joined._replace(
            all_greedy=self.all_greedy and others.all_greedy,
            any_greedy=self.any_greedy or others.any_greedy,
            filtered=self.filtered or others.filtered,
            typical=self.typical or others.typical,
        )

    def _with(self, tensors: Sequence[Tensor]) -> "Temper":
        temperature, greedy, top_k, top_p, log_min_p, typical_p = tensors
        return self._replace(
            temperature=temperature,
            greedy=greedy,
            top_k=top_k,
            top_p=top_p,
            log_min_p=log_min_p,
            typical_p=typical_p,
        )


def temper(params: tuple[SamplingParams, ...], vocab_size: int, device: torch.device) -> Temper:
    """Collects the sampling settings of a batch."""
    temperatures = [p.temperature or 1.0 for p in params]
    top_ps = [torch.inf if p.top_p in (None, 1) else p.top_p for p in params]
    typical_ps = [torch.inf if p.typical_p in (None, 1) else p.typical_p for p in params]
    floats = (temperatures, top_ps, [math.log(p.min_p) if p.min_p else -torch.inf for p in params], typical_ps)
    temperature, top_p, log_min_p, typical_p = to_device(torch.tensor(floats, dtype=torch.float32), device).unbind()
    filters = [p for p in params if p.top_k is not None or p.top_p is not None or p.min_p]
    typical = any(p.typical_p not in (None, 1) for p in params)
    return Temper(
        temperature,
        to_device([not p.temperature for p in params], device),
        to_device([min(p.top_k or vocab_size, vocab_size) for p in params], device),
        top_p,
        log_min_p,
        typical_p,
        all(not p.temperature for p in params),
        any(not p.temperature for p in params),
        bool(filters) or typical,
        typical,
    )


class Shaped(NamedTuple):
    """The logits (r, s - first, v) of some `rows` of a batch, which `at` (r) has as a tensor, from place `first` on,
    after the settings that change them."""

    rows: list[int]
    at: Tensor
    first: int
    logits: Tensor


def propose(
    logits: Tensor, settings: Temper, uniforms: Tensor | None, ops: LogitOps, shaped: Shaped | None = None
) -> Proposal:
    """The argmax in greedy rows, else a sample from softmax(logits/temperature) after the filters; in `shaped` rows
    from their own logits.

    logits (b, s, v) float32; uniforms (b, s) in [0, 1), needed unless all rows are greedy. The confidence is the
    probability under `logits`, without temperature and filters.
    """
    best = ops.best(logits)
    greedy = greedy_tokens(best.tokens, shaped, ops)
    if settings.all_greedy:
        if shaped is None:
            return Proposal(greedy, best.probability)
        return Proposal(greedy, probability(logits, greedy, best.log_sum))
    assert uniforms is not None
    tokens = inverse_sample(distribution(logits, settings, shaped), uniforms)
    tokens = torch.where(settings.greedy[:, None], greedy, tokens)
    return Proposal(tokens, probability(logits, tokens, best.log_sum))


def greedy_tokens(tokens: Tensor, shaped: Shaped | None, ops: LogitOps) -> Tensor:
    """The likeliest tokens (b, s) of all rows, from those without shaping."""
    if shaped is None:
        return tokens
    own = torch.cat((tokens[shaped.at, : shaped.first], ops.argmax(shaped.logits)), dim=1)
    return tokens.index_copy(0, shaped.at, own)


def probability(logits: Tensor, tokens: Tensor, log_sum: Tensor) -> Tensor:
    """softmax(logits) of given tokens (b, s), from logits (b, s, v), tokens and log Σ exp(logits), both (b, s)."""
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return from_log(chosen - log_sum)


def distribution(logits: Tensor, settings: Temper, shaped: Shaped | None = None) -> Tensor:
    """The distribution to sample from: (b, s, v) float32, one-hot in greedy rows; in `shaped` rows from their logits,
    with any values before `shaped.first`.

    min-p keeps the tokens with p ≥ min_p · max p, top-k the k largest logits; top-p then keeps the smallest set of
    likeliest tokens whose total probability reaches p, and typical-p (Meister et al. 2023) of what is left the smallest
    set with the smallest |−log p − H| whose total probability reaches it, where H = −Σ p log p.
    """
    if shaped is not None:
        own = distribution(shaped.logits, settings.select(shaped.rows))
        if len(own) == len(logits) and shaped.first == 0:
            return own
        found = distribution(logits, settings) if len(own) < len(logits) else torch.zeros_like(logits)
        found[shaped.at, shaped.first :] = own
        return found
    scaled = logits / settings.temperature[:, None, None]
    if settings.filtered:
        ordered = scaled.sort(dim=-1, descending=True)
        ranks = torch.arange(logits.shape[-1], device=logits.device)
        least = ordered.values[..., :1] + settings.log_min_p[:, None, None]
        cut = (ranks >= settings.top_k[:, None, None]) | (ordered.values < least)
        values = ordered.values.masked_fill(cut, -torch.inf)
        probabilities = values.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        values = values.masked_fill((before >= settings.top_p[:, None, None]) & (ranks > 0), -torch.inf)
        if settings.typical:
            values = _typical(values, settings.typical_p)
        scaled = torch.full_like(scaled, -torch.inf).scatter_(-1, ordered.indices, values)
    probabilities = scaled.softmax(-1)
    if settings.any_greedy:
        one_hot = torch.zeros_like(probabilities).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        probabilities = torch.where(settings.greedy[:, None, None], one_hot, probabilities)
    return probabilities


def _typical(values: Tensor, mass: Tensor) -> Tensor:
    """Logits (b, s, v) with -inf outside the typical sets of the given masses (b,)."""
    log_p = values.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p.clamp(min=-1e30)).sum(-1, keepdim=True)  # 0·log 0 = 0 for tokens that are out
    surprise = (log_p + entropy).abs()
    order = surprise.argsort(dim=-1, stable=True)  # of equally typical tokens the likelier first
    sums = p.gather(-1, order)
    before = sums.cumsum(-1) - sums
    outside = (before >= mass[:, None, None]) & (torch.arange(values.shape[-1], device=values.device) > 0)
    return values.masked_fill(torch.zeros_like(outside).scatter_(-1, order, outside), -torch.inf)


def inverse_sample(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The token where the cumulative probability exceeds each uniform: (b, s, v), (b, s) to (b, s) int64.

    Weights need not add up to 1. One uniform per position makes a row's draws independent of its batch.
    """
    cumulative = probabilities.double().cumsum(-1)  # fp64: a float32 sum over 131k tokens loses the tail
    target = uniforms.double().unsqueeze(-1) * cumulative[..., -1:]
    index = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return index.clamp_(max=probabilities.shape[-1] - 1)


def results(ids: Tensor, confidences: Tensor) -> Tensor:
    """Stacks two tensors of one shape as a step's results for the host, (2, …) float64."""
    return torch.stack((ids.double(), confidences.double()))


_MASK64 = (1 << 64) - 1


def uniforms(seed: int, position: int, step: int, count: int) -> Tensor:
    """`count` float32 uniforms in [0, 1) that depend only on the arguments: (count,) on the CPU.

    A counter-based generator: a draw depends on where it is used and not on earlier draws, so a row gets the same ones
    in any batch and schedule, and after a restart.
    """
    key = seed & _MASK64
    for value in (position, step):
        key = (key + 0x9E3779B97F4A7C15 * (value + 1)) & _MASK64  # splitmix64
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & _MASK64
        key ^= key >> 31
    return torch.rand(count, dtype=torch.float32, generator=torch.Generator().manual_seed(key >> 1))


def uniform_table(
    seeds: Sequence[int], places: Sequence[int], steps: Sequence[int], widths: Sequence[int], size: int
) -> Tensor:
    """`uniforms` of many rows on the CPU, (b, size): widths[r] draws for row r, then zeros."""
    table = torch.zeros(len(seeds), size, dtype=torch.float32)
    for row, (seed, place, step, width) in enumerate(zip(seeds, places, steps, widths, strict=True)):
        table[row, :width] = uniforms(seed, place, step, width)
    return table

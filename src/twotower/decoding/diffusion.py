"""Modes `diffusion` and `simulated_ar`: block-wise mask diffusion. Letters: b rows, s positions of the block."""

import dataclasses
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.backends.protocol import LogitOps
from twotower.decoding import unmasking
from twotower.decoding.held_blocks import Proposed, hold
from twotower.decoding.likeliest import likeliest, numbers_asked, read_top, resized, with_tops
from twotower.decoding.output import BlockView, Token
from twotower.decoding.sampling import Proposal, propose, temper, uniform_table
from twotower.decoding.shaping import Shaping, shaping
from twotower.decoding.step import BatchStep, Request, RowBatch, join_rows, select_rows
from twotower.decoding.unmasking import CommitSchedule
from twotower.model.state import ContextState
from twotower.model.two_tower import TwoTower
from twotower.ops.transfer import to_device
from twotower.ops.unmask import BlockPlaces

# Offset of the step number that keeps `posterior` coins apart from token draws in the counter-based generator.
_COIN_STEP = 1 << 20


@dataclasses.dataclass(frozen=True)
class Block:
    """The rows' blocks: token ids `xt` with masks, (b, s) int64; `valid` (b, s) bool, false at padding; `masked` (b, s)
    bool; for fixed positions the probability and the step of their commit, `confidence` and `committed_at`, (b, s), and
    which tokens were likeliest then, `tops` (b, s, m), as in `likeliest`.

    Each row is at its own step: `steps` counts the steps of its block so far, `left` its masked positions.
    """

    xt: Tensor
    valid: Tensor
    masked: Tensor
    confidence: Tensor
    committed_at: Tensor
    tops: Tensor
    widths: tuple[int, ...]
    steps: tuple[int, ...]
    left: tuple[int, ...]
    mask_token_id: int

    def select(self, rows: list[int]) -> Self:
        """The blocks of some rows."""
        return select_rows(self, rows)

    def join(self, others: Self) -> Self:
        """The blocks of both batches' rows, padded to the width of the wider batch."""
        size, m = (max(self.tops.shape[dim], others.tops.shape[dim]) for dim in (1, 2))
        return join_rows(self.resized(size, m), others.resized(size, m))

    def resized(self, size: int, m: int) -> Self:
        """The same blocks in `size` columns, each with `m` numbers of `tops`; what is added or removed is padding."""
        if (size, m) == self.tops.shape[1:]:
            return self
        extra = (0, size - self.xt.shape[1])
        return dataclasses.replace(
            self,
            xt=F.pad(self.xt, extra, value=self.mask_token_id),
            valid=F.pad(self.valid, extra),
            masked=F.pad(self.masked, extra),
            confidence=F.pad(self.confidence, extra),
            committed_at=F.pad(self.committed_at, extra),
            tops=resized(self.tops, size, m),
        )


@dataclasses.dataclass(frozen=True)
class DiffusionRows(RowBatch):
    """Rows whose context holds everything before `block`; `produced` (b) counts each row's new tokens before it.

    `seed` is a copy of the context on the denoiser's device, or None if both towers are on one device.
    """

    schedule: CommitSchedule
    produced: tuple[int, ...]
    block: Block
    seed: ContextState | None
    shaping: Shaping

    @property
    def rests(self) -> tuple[bool, ...]:
        return tuple(n == 0 for n in self.block.left)

    def view(self, row: int) -> BlockView | None:
        width = self.block.widths[row]
        return BlockView(
            tuple(self.block.xt[row, :width].tolist()),
            tuple(self.block.confidence[row, :width].tolist()),
            self.block.steps[row],
            self.block.left[row] / width,
        )


def context_ids(request: Request) -> tuple[int, ...]:
    """The ids that the context must hold when the request starts."""
    return request.prompt_ids + request.produced


def start(model: TwoTower, requests: tuple[Request, ...], context: ContextState) -> DiffusionRows:
    """Rows whose `context_ids` are absorbed."""
    params, device = tuple(r.params for r in requests), model.denoiser_device
    settings = temper(params, model.config.vocab_size, device)
    produced = tuple(len(r.produced) for r in requests)
    block = _masks(model, _widths(requests, produced), requests)
    seed = _seed(model, context)
    schedule, shape = unmasking.schedule(params, device, model.calibration), shaping(model, requests, device)
    return DiffusionRows(requests, context, settings, schedule, produced, block, seed, shape)


def with_context(model: TwoTower, rows: DiffusionRows, context: ContextState) -> DiffusionRows:
    """The rows with another copy of the context tower's state behind the same text of each."""
    assert context.lengths == rows.context.lengths
    return dataclasses.replace(rows, context=context, seed=_seed(model, context))


def _seed(model: TwoTower, context: ContextState) -> ContextState | None:
    """A copy of the context as the denoiser reads it, or None where it reads the context itself."""
    seed = model.seed(context)
    return None if seed is context else seed


class _DiffusionStep(NamedTuple):
    """A step before its results are read: `rows` after it, with the old `left`; `results` (4 + m, b, s), the blocks'
    ids, commit steps, confidences, masks and the numbers of `likeliest`; `absorbed`, each row's context calls."""

    rows: DiffusionRows
    results: Tensor
    absorbed: tuple[int, ...]

    def finish(self, values: list[Any]) -> BatchStep:
        block = self.rows.block
        xt, committed_at, confidence, masked, *tops = values
        left = tuple(int(sum(row)) for row in masked)
        tokens = tuple(
            ()
            if count
            else tuple(
                Token(
                    int(xt[row][n]),
                    int(committed_at[row][n]),
                    confidence[row][n],
                    *read_top(tops, row, n, self.rows.requests[row].params.logprobs),
                )
                for n in range(width)
            )
            for row, (count, width) in enumerate(zip(left, block.widths, strict=True))
        )
        shape = self.rows.shaping
        if shape.rows:
            shape = shape.within(
                [
                    [None if m else int(i) for i, m in zip(xt[row][:width], masked[row][:width], strict=True)]
                    for row, width in enumerate(block.widths)
                ]
            )
        rows = dataclasses.replace(self.rows, block=dataclasses.replace(block, left=left), shaping=shape)
        return BatchStep(rows, tokens, (1,) * len(left), self.absorbed)


def launch(model: TwoTower, rows: DiffusionRows) -> _DiffusionStep:
    """One NFE: proposes tokens for every masked position, and commits some. A finished block gives its tokens.

    Every row goes through its blocks at its own pace. The context tower absorbs a finished block at the start of the
    row's next step, so the last block of a request costs no context call.
    """
    absorbed = tuple(int(left == 0) for left in rows.block.left)
    rows = _begin_blocks(model, rows)
    block = rows.block
    level = tuple(left / width for left, width in zip(block.left, block.widths, strict=True))
    ragged = block.widths if min(block.widths) < block.xt.shape[1] else None
    logits = model.denoiser_logits(block.xt, rows.seed or rows.context, level, ragged)
    draws = None if rows.settings.all_greedy else _uniforms(rows, 0)
    ops = model.denoiser_tower.logit_ops
    opens = [width - left for left, width in zip(block.left, block.widths, strict=True)]
    proposal = propose(logits, rows.settings, draws, ops, rows.shaping.apply_to_blocks(logits, opens=opens))
    fixed = _fixed(rows, proposal, logits, ops)
    if rows.shaping.guides.any:
        held = hold(rows.shaping, opens, block.widths, Proposed(logits, proposal, fixed), ops)
        rows, proposal, fixed = dataclasses.replace(rows, shaping=held.shaping), held.proposal, held.fixed
    after = _unmask(rows, fixed, proposal, logits, ops)
    columns = (after.xt, after.committed_at, after.confidence, after.masked)
    found = with_tops(torch.stack([c.double() for c in columns]), after.tops)
    return _DiffusionStep(dataclasses.replace(rows, block=after), found, absorbed)


def _begin_blocks(model: TwoTower, rows: DiffusionRows) -> DiffusionRows:
    """Absorbs every finished block and begins that row's next one, all masks; other rows stay as they are."""
    block = rows.block
    full = [row for row, left in enumerate(block.left) if left == 0]
    if not full:
        return rows
    every = len(full) == len(block.left)
    done = tuple(block.widths[row] for row in full)
    ids = block.xt if every else block.xt[to_device(full, block.xt.device)]
    if max(done) < ids.shape[1]:
        ids = ids[:, : max(done)]
    ids = ids.to(model.context_device, non_blocking=True)
    context = model.absorb(ids, rows.context, done, with_logits=False, rows=full)
    produced = tuple(n + (0 if left else w) for n, w, left in zip(rows.produced, block.widths, block.left, strict=True))
    next_widths = _widths(rows.requests, produced)
    widths = tuple(w if left else n for n, w, left in zip(next_widths, block.widths, block.left, strict=True))
    begun = _masks(model, widths, rows.requests)
    if not every:
        old = block.resized(max(widths), begun.tops.shape[2])
        goes_on = to_device([left > 0 for left in block.left], block.xt.device)[:, None]
        begun = dataclasses.replace(
            begun,
            xt=torch.where(goes_on, old.xt, begun.xt),
            masked=torch.where(goes_on, old.masked, begun.masked),
            confidence=torch.where(goes_on, old.confidence, begun.confidence),
            committed_at=torch.where(goes_on, old.committed_at, begun.committed_at),
            tops=torch.where(goes_on[..., None], old.tops, begun.tops),
            steps=tuple(n if left else 0 for n, left in zip(block.steps, block.left, strict=True)),
            left=tuple(left or w for left, w in zip(block.left, widths, strict=True)),
        )
    seed, shape = _seed(model, context), rows.shaping.past_blocks(full)
    return dataclasses.replace(rows, context=context, produced=produced, block=begun, seed=seed, shaping=shape)


def _widths(requests: tuple[Request, ...], produced: tuple[int, ...]) -> tuple[int, ...]:
    """The width of each row's next block after `produced` new tokens; 0 for a row that has all its tokens."""
    return tuple(min(r.block_size, r.max_new_tokens - n) for r, n in zip(requests, produced, strict=True))


def _masks(model: TwoTower, widths: tuple[int, ...], requests: tuple[Request, ...]) -> Block:
    """Blocks of the given widths with every position masked."""
    assert min(widths) > 0, "a finished row was not removed from its batch"
    shape, device = (len(widths), max(widths)), model.denoiser_device
    valid = torch.ones(shape, dtype=torch.bool, device=device)
    if min(widths) < max(widths):
        valid = torch.arange(max(widths), device=device) < to_device(widths, device)[:, None]  # (b, s)
    return Block(
        xt=torch.full(shape, model.config.mask_token_id, device=device),
        valid=valid,
        masked=valid,
        confidence=torch.zeros(shape, dtype=torch.float32, device=device),
        committed_at=torch.zeros(shape, dtype=torch.long, device=device),
        tops=torch.zeros(*shape, numbers_asked(requests, model.config.vocab_size), dtype=torch.float64, device=device),
        widths=widths,
        steps=(0,) * len(widths),
        left=widths,
        mask_token_id=model.config.mask_token_id,
    )


def _fixed(rows: DiffusionRows, proposal: Proposal, logits: Tensor, ops: LogitOps) -> Tensor:
    """The places (b, s) bool that are fixed after this step by each row's commit rule."""
    block = rows.block
    at = rows.schedule.at(to_device(block.steps, block.xt.device))
    rules = [unmasking.rule_and_steps(r.params)[0] for r in rows.requests]
    fixed: Tensor | None = None  # positions fixed after this step
    for rule in sorted(set(rules)):
        if rule == "remask":
            sure = torch.where(block.masked, proposal.confidence, block.confidence)
            kept = unmasking.remask(sure, block.valid, at)
        else:
            coins = _uniforms(rows, _COIN_STEP) if rule == "posterior" else None
            ranked = unmasking.certainty(rule, logits, proposal, ops)
            if rule == "calibrated":
                ranked = ranked - unmasking.table_thresholds(at.tables, block.left, block.xt)
            new = unmasking.commit(rule, ranked, block.masked, at, coins, ops)
            kept = block.valid & (new | ~block.masked)
        if fixed is None:
            fixed = kept
        else:
            ours = to_device([r == rule for r in rules], block.xt.device)[:, None]
            fixed = torch.where(ours, kept, fixed)
    assert fixed is not None, "a batch has rows"
    return fixed


def _unmask(rows: DiffusionRows, fixed: Tensor, proposal: Proposal, logits: Tensor, ops: LogitOps) -> Block:
    """The blocks after this step, except for `left`, which still counts the masks before it."""
    block = rows.block
    steps = to_device(block.steps, block.xt.device)
    before = BlockPlaces(block.xt, block.masked, block.confidence, block.committed_at)
    after = ops.fix(before, block.valid, fixed, *proposal, steps, block.mask_token_id)
    tops = block.tops
    if tops.shape[2]:
        now = resized(likeliest(rows.requests, logits, proposal.tokens, ops), *tops.shape[1:])
        tops = torch.where((fixed & block.masked)[..., None], now, tops)
    return dataclasses.replace(
        block,
        xt=after.xt,
        masked=after.masked,
        confidence=after.confidence,
        committed_at=after.committed_at,
        tops=tops,
        steps=tuple(n + 1 for n in block.steps),
    )


def _uniforms(rows: DiffusionRows, first_step: int) -> Tensor:
    """Uniforms (b, s) keyed by each row's step; a row draws as many as its own block is wide, whatever the batch."""
    block, seeds = rows.block, [r.seed for r in rows.requests]
    steps = [first_step + n for n in block.steps]
    table = uniform_table(seeds, rows.context.lengths, steps, block.widths, block.xt.shape[1])
    return to_device(table, block.xt.device)

"""Modes `diffusion` and `simulated_ar`: block-wise mask diffusion. Letters: b rows, s positions of the block."""

from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.backends.protocol import LogitOps
from twotower.decoding import unmasking
from twotower.decoding.output import BlockView, Token
from twotower.decoding.sampling import Proposal, Temper, propose, temper, uniforms
from twotower.decoding.step import BatchStep, Request
from twotower.decoding.unmasking import CommitSchedule
from twotower.model.state import ContextState, join
from twotower.model.two_tower import TwoTower
from twotower.ops.transfer import to_device
from twotower.ops.unmask import BlockPlaces

# Steps of `posterior` coins are kept apart from steps of token draws in the counter-based generator.
_COIN_STEP = 1 << 20


class Block(NamedTuple):
    """The rows' blocks: xt (b, s) int64 with masks, `valid` (b, s) bool false at padding, and for fixed positions the
    probability and the step of their commit, (b, s) each. `seed` is the context state on the denoiser's device.

    Each row is at its own step: `steps` counts those its block has seen, `left` the positions still masked.
    """

    xt: Tensor
    valid: Tensor
    masked: Tensor
    confidence: Tensor
    committed_at: Tensor
    widths: tuple[int, ...]
    steps: tuple[int, ...]
    left: tuple[int, ...]
    seed: ContextState
    mask_token_id: int

    def select(self, rows: list[int]) -> "Block":
        index = to_device(rows, self.xt.device)
        return self._replace(
            xt=self.xt[index],
            valid=self.valid[index],
            masked=self.masked[index],
            confidence=self.confidence[index],
            committed_at=self.committed_at[index],
            widths=tuple(self.widths[r] for r in rows),
            steps=tuple(self.steps[r] for r in rows),
            left=tuple(self.left[r] for r in rows),
            seed=self.seed.select(rows),
        )

    def join(self, others: "Block", context: ContextState) -> "Block":
        """Both, over the joined rows' `context`, or the copies that the denoiser's device has of it."""
        here = context.device == self.seed.device
        size = max(self.xt.shape[1], others.xt.shape[1])
        ours, theirs = self.resized(size), others.resized(size)
        return Block(
            xt=torch.cat((ours.xt, theirs.xt)),
            valid=torch.cat((ours.valid, theirs.valid)),
            masked=torch.cat((ours.masked, theirs.masked)),
            confidence=torch.cat((ours.confidence, theirs.confidence)),
            committed_at=torch.cat((ours.committed_at, theirs.committed_at)),
            widths=self.widths + others.widths,
            steps=self.steps + others.steps,
            left=self.left + others.left,
            seed=context if here else join((self.seed, others.seed)),
            mask_token_id=self.mask_token_id,
        )

    def resized(self, size: int) -> "Block":
        """With `size` columns; those that come or go are padding."""
        if size == self.xt.shape[1]:
            return self
        extra = (0, size - self.xt.shape[1])
        return self._replace(
            xt=F.pad(self.xt, extra, value=self.mask_token_id),
            valid=F.pad(self.valid, extra),
            masked=F.pad(self.masked, extra),
            confidence=F.pad(self.confidence, extra),
            committed_at=F.pad(self.committed_at, extra),
        )


class DiffusionRows(NamedTuple):
    """Rows whose context holds everything before `block`."""

    requests: tuple[Request, ...]
    context: ContextState
    settings: Temper
    schedule: CommitSchedule
    produced: tuple[int, ...]  # new tokens of each row before the block
    block: Block

    @property
    def rests(self) -> tuple[bool, ...]:
        return tuple(n == 0 for n in self.block.left)

    @property
    def joins(self) -> bool:
        return True

    def select(self, rows: list[int]) -> Self:
        return self._replace(
            requests=tuple(self.requests[r] for r in rows),
            context=self.context.select(rows),
            settings=self.settings.select(rows),
            schedule=self.schedule.select(rows),
            produced=tuple(self.produced[r] for r in rows),
            block=self.block.select(rows),
        )

    def join(self, others: Self) -> Self:
        context = join((self.context, others.context))
        return self._replace(
            requests=self.requests + others.requests,
            context=context,
            settings=self.settings.join(others.settings),
            schedule=self.schedule.join(others.schedule),
            produced=self.produced + others.produced,
            block=self.block.join(others.block, context),
        )

    def view(self, row: int) -> BlockView | None:
        width = self.block.widths[row]
        return BlockView(
            tuple(self.block.xt[row, :width].tolist()),
            tuple(self.block.confidence[row, :width].tolist()),
            self.block.steps[row],
            self.block.left[row] / width,
        )


def context_ids(request: Request) -> tuple[int, ...]:
    """What the context tower holds when the request starts."""
    return request.prompt_ids + request.produced


def start(model: TwoTower, requests: tuple[Request, ...], context: ContextState) -> DiffusionRows:
    """Rows whose `context_ids` are absorbed."""
    params, device = tuple(r.params for r in requests), model.denoiser_device
    settings = temper(params, model.config.vocab_size, device)
    produced = tuple(len(r.produced) for r in requests)
    block = _masks(model, _widths(requests, produced), context.to(device))
    return DiffusionRows(requests, context, settings, unmasking.schedule(params, device), produced, block)


class _DiffusionStep(NamedTuple):
    """`rows` after the step, but for each block's `left`; `results` (4, b, s) are the blocks' ids, steps, confidences
    and masks, and `absorbed` says which rows took a context call."""

    rows: DiffusionRows
    results: Tensor
    absorbed: tuple[int, ...]

    def finish(self, values: list[Any]) -> BatchStep:
        block = self.rows.block
        xt, committed_at, confidence, masked = values
        left = tuple(int(sum(row)) for row in masked)
        tokens = tuple(
            ()
            if count
            else tuple(
                Token(int(i), int(j), p)
                for i, j, p in zip(xt[row][:width], committed_at[row][:width], confidence[row][:width], strict=True)
            )
            for row, (count, width) in enumerate(zip(left, block.widths, strict=True))
        )
        return BatchStep(self.rows._replace(block=block._replace(left=left)), tokens, (1,) * len(left), self.absorbed)


def launch(model: TwoTower, rows: DiffusionRows) -> _DiffusionStep:
    """One NFE: proposals for every masked position, of which some commit. A finished block gives its tokens.

    Every row walks through its blocks at its own pace. The context tower absorbs a finished block at the start of the
    row's next step, so the last block of a request costs no context call.
    """
    absorbed = tuple(int(left == 0) for left in rows.block.left)
    rows = _begin_blocks(model, rows)
    block = rows.block
    level = tuple(left / width for left, width in zip(block.left, block.widths, strict=True))
    ragged = block.widths if min(block.widths) < block.xt.shape[1] else None
    logits = model.denoiser_logits(block.xt, block.seed, level, ragged)
    logits.select(-1, model.config.mask_token_id).fill_(-torch.inf)
    draws = None if rows.settings.all_greedy else _uniforms(rows.requests, block, 0)
    ops = model.denoiser_tower.logit_ops
    proposal = propose(logits, rows.settings, draws, ops)
    after = _unmask(rows, proposal, logits, ops)
    columns = (after.xt, after.committed_at, after.confidence, after.masked)
    found = torch.stack([c.double() for c in columns])
    return _DiffusionStep(rows._replace(block=after), found, absorbed)


def _begin_blocks(model: TwoTower, rows: DiffusionRows) -> DiffusionRows:
    """Absorbs every finished block and masks that row's next one; rows in the middle of a block stay as they are."""
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
    seed = context.to(model.denoiser_device)
    next_widths = _widths(rows.requests, produced)
    widths = tuple(w if left else n for n, w, left in zip(next_widths, block.widths, block.left, strict=True))
    begun = _masks(model, widths, seed)
    if not every:
        old = block.resized(max(widths))
        goes_on = to_device([left > 0 for left in block.left], block.xt.device)[:, None]
        begun = begun._replace(
            xt=torch.where(goes_on, old.xt, begun.xt),
            masked=torch.where(goes_on, old.masked, begun.masked),
            confidence=torch.where(goes_on, old.confidence, begun.confidence),
            committed_at=torch.where(goes_on, old.committed_at, begun.committed_at),
            steps=tuple(n if left else 0 for n, left in zip(block.steps, block.left, strict=True)),
            left=tuple(left or w for left, w in zip(block.left, widths, strict=True)),
        )
    return rows._replace(context=context, produced=produced, block=begun)


def _widths(requests: tuple[Request, ...], produced: tuple[int, ...]) -> tuple[int, ...]:
    """How long each row's next block is after `produced` new tokens, 0 for a row that has them all."""
    return tuple(min(r.params.block_size, r.params.max_new_tokens - n) for r, n in zip(requests, produced, strict=True))


def _masks(model: TwoTower, widths: tuple[int, ...], seed: ContextState) -> Block:
    """Blocks of `widths`, all masks."""
    assert min(widths) > 0, "a row that is done was not taken out"
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
        widths=widths,
        steps=(0,) * len(widths),
        left=widths,
        seed=seed,
        mask_token_id=model.config.mask_token_id,
    )


def _unmask(rows: DiffusionRows, proposal: Proposal, logits: Tensor, ops: LogitOps) -> Block:
    """The blocks after this step; `left` is still the count before it."""
    block = rows.block
    steps = to_device(block.steps, block.xt.device)
    at = rows.schedule.at(steps)
    rules = [unmasking.rule_and_steps(r.params)[0] for r in rows.requests]
    fixed: Tensor | None = None  # positions fixed after this step
    for rule in sorted(set(rules)):
        if rule == "remask":
            sure = torch.where(block.masked, proposal.confidence, block.confidence)
            kept = unmasking.remask(sure, block.valid, at)
        else:
            coins = _uniforms(rows.requests, block, _COIN_STEP) if rule == "posterior" else None
            ranked = unmasking.certainty(rule, logits, proposal)
            new = unmasking.commit(rule, ranked, block.masked, at, coins, ops)
            kept = block.valid & (new | ~block.masked)
        if fixed is None:
            fixed = kept
        else:
            ours = to_device([r == rule for r in rules], block.xt.device)[:, None]
            fixed = torch.where(ours, kept, fixed)
    assert fixed is not None, "a batch has rows"
    before = BlockPlaces(block.xt, block.masked, block.confidence, block.committed_at)
    after = ops.fix(before, block.valid, fixed, *proposal, steps, block.mask_token_id)
    return block._replace(
        xt=after.xt,
        masked=after.masked,
        confidence=after.confidence,
        committed_at=after.committed_at,
        steps=tuple(n + 1 for n in block.steps),
    )


def _uniforms(requests: tuple[Request, ...], block: Block, first_step: int) -> Tensor:
    """(b, s) uniforms named by each row's step: as many per row as its block is wide, whatever the batch's width."""
    table = torch.zeros(block.valid.shape, dtype=torch.float32)
    for row, (request, start) in enumerate(zip(requests, block.seed.lengths, strict=True)):
        width = block.widths[row]
        table[row, :width] = uniforms(request.seed, start, first_step + block.steps[row], width)
    return to_device(table, block.xt.device)

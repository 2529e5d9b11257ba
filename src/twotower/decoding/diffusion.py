"""Modes `diffusion` and `simulated_ar`: block-wise mask diffusion. Letters: b rows, s positions of the block."""

import dataclasses
from typing import Self

import torch
from torch import Tensor

from twotower.decoding import unmasking
from twotower.decoding.params import SamplingParams
from twotower.decoding.sampling import Proposal, Temper, propose, temper, uniforms
from twotower.decoding.step import BlockView, Request, Stepped, Token
from twotower.model.state import ContextState
from twotower.model.two_tower import TwoTower

# Steps of `posterior` coins are kept apart from steps of token draws in the counter-based generator.
_COIN_STEP = 1 << 20


@dataclasses.dataclass(frozen=True)
class Block:
    """The rows' blocks: xt (b, s) int64 with masks, `valid` (b, s) bool false at padding, and for fixed positions the
    probability and the step of their commit, (b, s) each. `seed` is the context state on the denoiser's device."""

    xt: Tensor
    valid: Tensor
    masked: Tensor
    confidence: Tensor
    committed_at: Tensor
    widths: tuple[int, ...]
    seed: ContextState
    mask_token_id: int
    step: int


@dataclasses.dataclass(frozen=True)
class DiffusionRows:
    """Rows whose context holds everything before `block`; `block` None before the first."""

    requests: tuple[Request, ...]
    context: ContextState
    settings: Temper
    produced: tuple[int, ...]  # new tokens of each row before the block
    block: Block | None = None

    def select(self, rows: list[int]) -> Self:
        block = self.block
        if block is not None:
            block = dataclasses.replace(
                block,
                xt=block.xt[rows],
                valid=block.valid[rows],
                masked=block.masked[rows],
                confidence=block.confidence[rows],
                committed_at=block.committed_at[rows],
                widths=tuple(block.widths[r] for r in rows),
                seed=block.seed.select(rows),
            )
        return dataclasses.replace(
            self,
            requests=tuple(self.requests[r] for r in rows),
            context=self.context.select(rows),
            settings=self.settings.select(rows),
            produced=tuple(self.produced[r] for r in rows),
            block=block,
        )

    def view(self, row: int) -> BlockView | None:
        if self.block is None:
            return None
        width = self.block.widths[row]
        left = int(self.block.masked[row].sum())
        return BlockView(
            tuple(self.block.xt[row, :width].tolist()),
            tuple(self.block.confidence[row, :width].tolist()),
            self.block.step,
            left / width,
        )


def start(model: TwoTower, requests: tuple[Request, ...], context: ContextState) -> DiffusionRows:
    """Rows whose prompts are absorbed."""
    settings = temper(tuple(r.params for r in requests), model.config.vocab_size, model.denoiser_device)
    return DiffusionRows(requests, context, settings, (0,) * len(requests))


def _begin_block(model: TwoTower, rows: DiffusionRows) -> DiffusionRows:
    """Absorbs a finished block and masks the next; leaves rows in the middle of a block as they are."""
    block, context, produced = rows.block, rows.context, rows.produced
    if block is not None:
        if bool(block.masked.any()):
            return rows
        context = model.absorb(block.xt.to(model.context_device), context, block.widths, with_logits=False)
        produced = tuple(n + w for n, w in zip(produced, block.widths, strict=True))
    lengths = (r.params for r in rows.requests)
    widths = tuple(min(p.block_size, p.max_new_tokens - n) for p, n in zip(lengths, produced, strict=True))
    device = model.denoiser_device
    places = torch.arange(max(widths), device=device)
    valid = places < torch.tensor(widths, device=device)[:, None]  # (b, s)
    xt = torch.full(valid.shape, model.config.mask_token_id, device=device)
    fresh = Block(
        xt=xt,
        valid=valid,
        masked=valid,
        confidence=torch.zeros(valid.shape, device=device),
        committed_at=torch.zeros_like(xt),
        widths=widths,
        seed=context.to(device),
        mask_token_id=model.config.mask_token_id,
        step=0,
    )
    return dataclasses.replace(rows, context=context, produced=produced, block=fresh)


def step(model: TwoTower, rows: DiffusionRows) -> Stepped:
    """One NFE: proposals for every masked position, of which some commit. A finished block gives its tokens.

    A batch's rows walk through their blocks together; one whose block is full waits, untouched and uncounted. The
    context tower absorbs a block at the start of the next step, so the last block of a batch costs no context call.
    """
    before = rows.block
    rows = _begin_block(model, rows)
    block = rows.block
    assert block is not None
    absorbed = int(before is not None and block is not before)
    active = block.masked.any(-1)  # (b,)
    widths = torch.tensor(block.widths, device=block.xt.device)
    level = block.masked.sum(-1) / widths
    ragged = block.widths if min(block.widths) < block.xt.shape[1] else None
    logits = model.denoiser_logits(block.xt, block.seed, level, ragged)
    logits[..., model.config.mask_token_id] = -torch.inf
    proposal = propose(logits, rows.settings, _draws(rows, block, block.step))
    after = _unmask(rows.requests, block, proposal, logits)
    done = ~after.masked.any(-1)
    finished = (active & done).tolist()
    emitted = tuple(_tokens(after, row) if full else () for row, full in enumerate(finished))
    calls = tuple(int(a) for a in active.tolist())
    return Stepped(dataclasses.replace(rows, block=after), emitted, calls, (absorbed,) * len(calls))


def _unmask(requests: tuple[Request, ...], block: Block, proposal: Proposal, logits: Tensor) -> Block:
    params = tuple(r.params for r in requests)
    at = unmasking.schedule(params, block.step, block.xt.device)
    rules = [_rule(p) for p in params]
    active = block.masked.any(-1, keepdim=True)
    fixed = torch.zeros_like(block.masked)  # positions fixed after this step
    xt = torch.where(block.masked, proposal.tokens, block.xt)
    sure = torch.where(block.masked, proposal.confidence, block.confidence)
    for rule in sorted(set(rules)):
        ours = torch.tensor([r == rule for r in rules], device=block.xt.device)[:, None]
        if rule == "remask":
            kept = unmasking.remask(sure, block.valid, at)
        else:
            coins = _coins(requests, block) if rule == "posterior" else None
            ranked = unmasking.certainty(rule, logits, proposal)
            kept = (block.valid & ~block.masked) | unmasking.commit(rule, ranked, block.masked, at, coins)
        fixed = torch.where(ours & active, kept, fixed)
    fixed = torch.where(active, fixed, block.valid)
    new = fixed & block.masked
    masked = block.valid & ~fixed
    return dataclasses.replace(
        block,
        xt=torch.where(fixed, xt, block.mask_token_id),
        masked=masked,
        confidence=torch.where(new, proposal.confidence, block.confidence).masked_fill(masked, 0.0),
        committed_at=torch.where(new, block.step, block.committed_at),
        step=block.step + 1,
    )


def _rule(params: SamplingParams) -> str:
    return "leftmost" if params.mode == "simulated_ar" else params.commit_rule


def _draws(rows: DiffusionRows, block: Block, step_id: int) -> Tensor | None:
    return None if rows.settings.all_greedy else _uniforms(rows.requests, block, step_id)


def _coins(requests: tuple[Request, ...], block: Block) -> Tensor:
    return _uniforms(requests, block, _COIN_STEP + block.step)


def _uniforms(requests: tuple[Request, ...], block: Block, step_id: int) -> Tensor:
    """(b, s) uniforms: as many per row as its block is wide, whatever the batch's width."""
    table = torch.zeros(block.valid.shape)
    for row, (request, start) in enumerate(zip(requests, block.seed.lengths, strict=True)):
        width = block.widths[row]
        table[row, :width] = uniforms(request.seed, start, step_id, width)
    return table.to(block.xt.device)


def _tokens(block: Block, row: int) -> tuple[Token, ...]:
    width = block.widths[row]
    columns = (block.xt, block.committed_at, block.confidence)
    return tuple(Token(*values) for values in zip(*(c[row, :width].tolist() for c in columns), strict=True))

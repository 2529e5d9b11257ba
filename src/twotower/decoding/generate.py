"""The plain driver: a loop over steps of each mode, for whole batches or one stream."""

import time
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple, cast

import torch

from twotower.decoding import ar, diffusion, mock_ar, verified
from twotower.decoding.params import FinishReason, Generation, SamplingParams
from twotower.decoding.record import Prompt, Record, make_request, warn_about_block_size
from twotower.decoding.step import BlockView, Request, Rows, step
from twotower.model.two_tower import TwoTower

# Mode -> the module whose launch() it is.
MODULES: dict[str, ModuleType] = {
    "ar": ar,
    "mock_ar": mock_ar,
    "simulated_ar": diffusion,
    "diffusion": diffusion,
    "verified": verified,
}


class Piece(str):
    """New text of a stream, a `str`, with what led to it.

    `token_ids` are the new tokens; the last piece has a `finish_reason` and the whole `result`. With `every_step`, a
    piece comes after every step: its text may be empty, and `block` shows the block that the step worked on.
    """

    token_ids: list[int]
    finish_reason: FinishReason | None
    block: BlockView | None
    result: Generation | None

    @property
    def text(self) -> str:
        return str(self)


def generate(
    model: TwoTower, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
) -> list[Generation]:
    """Continues every prompt, a string or a sequence of token ids, with one set of params or one per prompt.

    Rows of one mode run as a batch; each result is what the row would give alone. Raises ValueError for bad prompts
    or settings before anything runs.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is one string, must be a list of prompts; write [prompt]")
    chosen = _per_prompt(params, len(prompts))
    _settle_mode(chosen)
    requests = [make_request(model, prompt, p) for prompt, p in zip(prompts, chosen, strict=True)]
    warn_about_block_size(model, chosen)
    results: dict[int, Generation] = {}
    for module in dict.fromkeys(MODULES[p.mode] for p in chosen):
        members = [i for i, p in enumerate(chosen) if MODULES[p.mode] is module]
        for done in _drive(model, module, [requests[i] for i in members]):
            if done.result is not None:
                results[members[done.row]] = done.result
    return [results[i] for i in range(len(prompts))]


def stream(
    model: TwoTower, prompt: Prompt, params: SamplingParams | None = None, *, every_step: bool = False
) -> Iterator[Piece]:
    """Continues one prompt piece by piece; see `Piece`. The joined pieces are the text of `generate`."""
    chosen = params or SamplingParams()
    _settle_mode([chosen])
    request = make_request(model, prompt, chosen)
    warn_about_block_size(model, [chosen])
    for event in _drive(model, MODULES[chosen.mode], [request], watch=every_step):
        if every_step or event.text or event.token_ids or event.result is not None:
            piece = Piece(event.text)
            piece.token_ids = event.token_ids
            piece.block = event.block
            piece.result = event.result
            piece.finish_reason = None if event.result is None else event.result.finish_reason
            yield piece


def _per_prompt(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise ValueError(f"there are {len(params)} params for {count} prompts; give one, or one per prompt")
    return list(params)


def _settle_mode(params: Sequence[SamplingParams]) -> None:
    if any(p.mode == "auto" for p in params):
        raise ValueError(
            f"mode is 'auto', which only twotower.Engine can choose for; must be one of {', '.join(MODULES)}"
        )


class _Event(NamedTuple):
    """What one step meant for one row: new text and tokens, the block in progress, the result once finished."""

    row: int
    text: str
    token_ids: list[int]
    block: BlockView | None
    result: Generation | None


def _drive(model: TwoTower, module: ModuleType, requests: list[Request], watch: bool = False) -> Iterator[_Event]:
    """Steps one mode's batch until every row is finished; finished rows leave it between steps."""
    began = time.perf_counter()
    records = [Record(model, request, began) for request in requests]
    active = []
    for row, record in enumerate(records):
        if record.request.params.max_new_tokens == 0:
            yield _Event(row, "", [], None, record.result("length"))
        else:
            active.append(row)
    if not active:
        return
    with torch.inference_mode():
        rows = _prefill(model, module, [requests[i] for i in active])
    for row in active:
        records[row].context_calls += 1
    while active:
        with torch.inference_mode():
            stepped = step(module, model, rows)
        rows = stepped.rows
        keep = []
        for place, row in enumerate(active):
            record = records[row]
            taken = record.take(stepped, place)
            block = None
            if watch:
                with torch.inference_mode():
                    block = rows.view(place)
            if taken.result is None:
                keep.append(place)
            yield _Event(row, taken.text, [t.id for t in taken.tokens], block, taken.result)
        if len(keep) < len(active):
            active = [active[place] for place in keep]
            if active:
                with torch.inference_mode():
                    rows = rows.select(keep)


def _prefill(model: TwoTower, module: ModuleType, requests: list[Request]) -> Rows:
    """Absorbs ragged prompts in one batch, with room for everything the rows may produce."""
    prompts: list[tuple[int, ...]] = [module.context_ids(r) for r in requests]
    lengths = [len(p) for p in prompts]
    longest = max(lengths)
    table = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        table[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.long)
    room = max(n + r.params.max_new_tokens + r.params.block_size + 1 for n, r in zip(lengths, requests, strict=True))
    context = model.prefill(table, lengths, capacity=room)
    return cast(Rows, module.start(model, tuple(requests), context))

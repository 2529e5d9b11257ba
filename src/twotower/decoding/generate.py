"""The plain driver: a loop over each mode's `step`, for whole batches or one stream."""

import secrets
import time
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple, cast

import torch

from twotower.decoding import ar, diffusion, mock_ar, verified
from twotower.decoding.params import FinishReason, Generation, GenerationStats, SamplingParams
from twotower.decoding.step import BlockView, Request, Rows, Stepped, Token
from twotower.decoding.text import TextStream
from twotower.model.two_tower import TwoTower

_MODULES: dict[str, ModuleType] = {
    "ar": ar,
    "mock_ar": mock_ar,
    "simulated_ar": diffusion,
    "diffusion": diffusion,
    "verified": verified,
}

Prompt = str | Sequence[int]


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
    requests = [_request(model, prompt, p) for prompt, p in zip(prompts, chosen, strict=True)]
    _warn_about_block_size(model, chosen)
    results: dict[int, Generation] = {}
    for module in dict.fromkeys(_MODULES[p.mode] for p in chosen):
        members = [i for i, p in enumerate(chosen) if _MODULES[p.mode] is module]
        for done in _drive(model, module, [requests[i] for i in members]):
            if done.result is not None:
                results[members[done.row]] = done.result
    return [results[i] for i in range(len(prompts))]


def stream(
    model: TwoTower, prompt: Prompt, params: SamplingParams | None = None, *, every_step: bool = False
) -> Iterator[Piece]:
    """Continues one prompt piece by piece; see `Piece`. The joined pieces are the text of `generate`."""
    chosen = params or SamplingParams()
    request = _request(model, prompt, chosen)
    _warn_about_block_size(model, [chosen])
    for event in _drive(model, _MODULES[chosen.mode], [request], watch=every_step):
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


def _request(model: TwoTower, prompt: Prompt, params: SamplingParams) -> Request:
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer.json; give the prompt as token ids")
        ids = tuple(model.tokenizer.encode(prompt).ids)
    else:
        ids = tuple(int(i) for i in prompt)
    if params.stop and model.tokenizer is None:
        raise ValueError(f"stop is {params.stop}, but the checkpoint has no tokenizer.json to find it with; drop it")
    if not ids:
        if model.config.bos_token_id is None:
            raise ValueError("the prompt is empty and the config has no bos_token_id; give at least one token")
        ids = (model.config.bos_token_id,)
    v = model.config.vocab_size
    strange = [i for i in ids if not 0 <= i < v]
    if strange:
        raise ValueError(f"prompt has token id {strange[0]}, must be in [0, {v - 1}]; was another tokenizer used?")
    seed = secrets.randbits(63) if params.seed is None else params.seed
    return Request(ids, params, seed)


def _warn_about_block_size(model: TwoTower, params: Sequence[SamplingParams]) -> None:
    trained = model.config.block_size
    largest = max((p.block_size for p in params if p.mode == "diffusion" and p.temperature > 0), default=0)
    if largest > trained:
        text = f"block_size {largest} is larger than the {trained} this checkpoint was trained with: sampling collapses"
        warnings.warn(text, UserWarning, stacklevel=3)


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
    records = [_Record(model, request, began) for request in requests]
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
            stepped: Stepped = module.step(model, rows)
        rows = stepped.rows
        keep = []
        for place, row in enumerate(active):
            record = records[row]
            event = record.take(row, stepped, place)
            if watch:
                with torch.inference_mode():
                    event = event._replace(block=rows.view(place))
            if event.result is None:
                keep.append(place)
            yield event
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


class _Record:
    """One row's output so far: tokens, text, counts and the reason it ended."""

    def __init__(self, model: TwoTower, request: Request, began: float) -> None:
        self.request = request
        self.tokens: list[Token] = []
        self.denoiser_calls = self.context_calls = 0
        self.began = began
        self.first: float | None = None
        params = request.params
        self.ends = () if params.ignore_eos else model.config.eos_token_ids
        self.stream = None if model.tokenizer is None else TextStream(model.tokenizer, request.prompt_ids)
        self.shown = 0  # characters of the text already given out

    def take(self, row: int, stepped: Stepped, place: int) -> _Event:
        """Adds a step's tokens, ends the row where they say so, and tells what is new."""
        self.denoiser_calls += stepped.denoiser_calls[place]
        self.context_calls += stepped.context_calls[place]
        before = len(self.tokens)
        reason: FinishReason | None = None
        text_end: int | None = None
        for token in stepped.tokens[place]:
            self.tokens.append(token)
            if self.stream is not None and token.id not in self.ends:
                self.stream.push([token.id])
                text_end = self._stop_at()
            if text_end is not None or token.id in self.ends:
                reason = "stop"
            elif len(self.tokens) == self.request.params.max_new_tokens:
                reason = "length"
            if reason is not None:
                break
        if self.first is None and len(self.tokens) > before:
            self.first = time.perf_counter()
        if reason is not None and self.stream is not None and text_end is None:
            self.stream.flush()
            text_end = self._stop_at()
            reason = "stop" if text_end is not None else reason
        text = self._new_text(text_end, final=reason is not None)
        ids = [t.id for t in self.tokens[before:]]
        return _Event(row, text, ids, None, None if reason is None else self.result(reason, text_end))

    def _stop_at(self) -> int | None:
        """Where in the text the earliest stop string begins."""
        assert self.stream is not None
        found = [self.stream.text.find(s) for s in self.request.params.stop]
        return min((at for at in found if at >= 0), default=None)

    def _new_text(self, end: int | None, *, final: bool) -> str:
        """Text not given out yet; what might become a stop string waits."""
        if self.stream is None:
            return ""
        whole = self.stream.text if end is None else self.stream.text[:end]
        held = 0
        if not final:
            for stop in self.request.params.stop:
                sizes = (n for n in range(min(len(stop) - 1, len(whole)), 0, -1) if whole.endswith(stop[:n]))
                held = max(held, next(sizes, 0))
        piece = whole[self.shown : len(whole) - held]
        self.shown += len(piece)
        return piece

    def result(self, reason: FinishReason, text_end: int | None = None) -> Generation:
        now = time.perf_counter()
        stats = GenerationStats(
            denoiser_calls=self.denoiser_calls,
            context_calls=self.context_calls,
            seconds_to_first_token=(self.first or now) - self.began,
            seconds_total=now - self.began,
            num_tokens=len(self.tokens),
        )
        return Generation(
            token_ids=[t.id for t in self.tokens],
            text=None if self.stream is None else self.stream.text[:text_end],
            finish_reason=reason,
            stats=stats,
            commit_steps=[t.step for t in self.tokens],
            confidences=[t.confidence for t in self.tokens],
        )

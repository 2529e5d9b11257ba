"""A request from its prompt to its result, in either driver."""

import dataclasses
import secrets
import time
import warnings
from collections.abc import Sequence

from twotower.decoding.constraint import check_constraint
from twotower.decoding.drafters import DRAFTERS, draft_sources
from twotower.decoding.output import (
    DraftCount,
    FinishReason,
    Generation,
    GenerationStats,
    StepOutput,
    Token,
    TokenScore,
    add_drafts,
)
from twotower.decoding.params import SamplingParams
from twotower.decoding.prompt import Prompt, prompt_ids
from twotower.decoding.scoring import PromptScores
from twotower.decoding.shape_checks import check_shape
from twotower.decoding.step import BatchStep, Request
from twotower.decoding.stops import FoundStop, StopFinder
from twotower.decoding.text import TextStream
from twotower.decoding.unmasking import chosen_rule
from twotower.errors import SettingError
from twotower.model.two_tower import TwoTower


def make_request(model: TwoTower, prompt: Prompt, params: SamplingParams) -> Request:
    """Makes ids of a prompt and settles the seed. Raises SettingError for what this model can't run."""
    ids = prompt_ids(model, prompt)[-(params.truncate_prompt_tokens or 0) :]
    if params.stop and model.tokenizer is None:
        raise SettingError("stop", params.stop, "empty for a checkpoint without a tokenizer.json", "drop it")
    check_constraint(model, params)
    settled = params.settled(model.config.block_size, model.sampling)
    room = (model.config.trained_positions or 0) - len(ids)
    if params.max_new_tokens is None and room >= 1 and not params.past_positions:
        # Nobody asked for more than what fits.
        settled = dataclasses.replace(settled, max_new_tokens=min(settled.max_new_tokens or room, room))
    params = settled
    if params.drafter is not None:
        check_drafter(model, params.drafter)
    check_shape(model, params)
    if params.target_retention is not None:
        chosen_rule(model.calibration, params)
    _check_positions(model, len(ids), params)
    return Request(ids, params, secrets.randbits(63) if params.seed is None else params.seed)


def check_drafter(model: TwoTower, drafter: str) -> None:
    """Raises SettingError for a drafter that needs what the model's checkpoint doesn't have."""
    if model.ngrams is None and any(source.needs_ngrams for source in draft_sources(drafter)):
        there = ", ".join(name for name, source in DRAFTERS.items() if not source.needs_ngrams)
        rule = f"made of {there}: the checkpoint has no counts of n-grams"
        raise SettingError("drafter", drafter, rule, "twotower ngrams makes them")


def _check_positions(model: TwoTower, num_prompt: int, params: SamplingParams) -> None:
    positions = model.config.trained_positions
    num_new = params.max_new_tokens or 0
    if positions is not None and num_prompt + num_new > positions and not params.past_positions:
        rule = (
            f"at most {max(positions - num_prompt, 0)} after a prompt of {num_prompt} tokens: the checkpoint was "
            f"trained for {positions} positions"
        )
        fix = "shorten the prompt, or set past_positions (--past-positions) to go beyond them"
        raise SettingError("max_new_tokens", num_new, rule, fix)


def warn_about_block_size(model: TwoTower, params: Sequence[SamplingParams]) -> None:
    """Warns, at the caller's caller, where sampling would fill larger blocks than the model was trained with."""
    trained = model.config.block_size
    settled = [p.settled(trained, model.sampling) for p in params]
    largest = max((p.block_size or 0 for p in settled if p.mode == "diffusion" and p.temperature), default=0)
    if largest > trained:
        text = f"block_size {largest} is larger than the {trained} this checkpoint was trained with: sampling collapses"
        warnings.warn(text, UserWarning, stacklevel=3)


class Record:
    """One request's output so far: tokens, text, counts, and why it ended.

    `id` is the id that its outputs carry, `watch` whether they show the block in progress. `began` is when the request
    came, by time.perf_counter; `seconds_queued` is how long it waited, None while it does, and `num_cached` how many of
    the prompt's tokens were cached then. `prompt_scores` are those that the request asks for, until they are told.
    """

    def __init__(self, model: TwoTower, request: Request, began: float, id: str = "", watch: bool = False) -> None:
        self.id = id
        self.request = request
        self.watch = watch
        self.tokens: list[Token] = []
        self.denoiser_calls = self.context_calls = 0
        self.drafts: tuple[DraftCount, ...] = ()
        self.began = began
        self.seconds_queued: float | None = None
        self.num_cached = 0
        self.first: float | None = None
        num_top = request.prompt_logprobs
        self.prompt_scores = None if num_top is None else PromptScores(request.prompt_ids, num_top)
        params = request.params
        self.ends = (() if params.ignore_eos else model.config.eos_token_ids) + params.stop_token_ids
        skip, self.include = params.skip_special_tokens, params.include_stop_str_in_output
        self.stream = (
            None
            if model.tokenizer is None
            else TextStream(model.tokenizer, request.prompt_ids, skip_special_tokens=skip)
        )
        self.stops = StopFinder(
            model.tokenizer,
            params.stop,
            shows_control=not skip,
            min_tokens=params.min_tokens,
            include=self.include,
        )
        self.shown = 0  # characters of the text already given out

    def leave_queue(self, num_cached: int = 0) -> None:
        """Notes how long the request has waited and how many of its tokens are cached, if this is the first time that
        it is taken up."""
        if self.seconds_queued is None:
            self.seconds_queued = time.perf_counter() - self.began
            self.num_cached = num_cached

    def take(self, stepped: BatchStep, place: int) -> StepOutput:
        """Adds the tokens of row `place` of a step, ends the request where they say so, and returns what is new."""
        self.request = stepped.rows.requests[place]
        self.denoiser_calls += stepped.denoiser_calls[place]
        self.context_calls += stepped.context_calls[place]
        draft = stepped.drafts[place] if stepped.drafts else None
        if draft is not None:
            self.drafts = add_drafts(self.drafts, [draft])
        before = len(self.tokens)
        reason: FinishReason | None = None
        stop: FoundStop | None = None
        for token in stepped.tokens[place]:
            self.tokens.append(token)
            if self.stream is not None and (self.include or token.id not in self.ends):
                self.stops.push(token.id, self.stream.push([token.id]))
                stop = self.stops.find()
            if stop is not None or token.id in self.ends:
                reason = "stop"
            elif len(self.tokens) == self.request.max_new_tokens:
                reason = "length"
            if reason is not None:
                break
        if self.first is None and len(self.tokens) > before:
            self.first = time.perf_counter()
        if reason is not None and self.stream is not None and stop is None:
            self.stops.push(-1, self.stream.flush())
            stop = self.stops.find()
            reason = "stop" if stop is not None else reason
        return StepOutput(
            request_id=self.id,
            text=self._new_text(None if stop is None else stop.end, final=reason is not None),
            tokens=tuple(self.tokens[before:]),
            block=stepped.rows.view(place) if self.watch else None,
            result=None if reason is None else self._result(reason, stop),
            seconds_queued=self.seconds_queued or 0.0,
        )

    def begin(self) -> StepOutput:
        """An output without tokens: it has the scores of the prompt, if the request asks for them, and it is the last
        of a request that asks for no new tokens."""
        scores = () if self.prompt_scores is None else self.prompt_scores.tokens()
        self.prompt_scores = None
        result = None if self.request.max_new_tokens else self._result("length", None)
        return self._without_tokens(result, scores=scores)

    def fail(self, error: BaseException) -> StepOutput:
        """The last output of a request that failed."""
        return self._without_tokens(None, error=error)

    def _without_tokens(
        self, result: Generation | None, error: BaseException | None = None, scores: tuple[TokenScore, ...] = ()
    ) -> StepOutput:
        return StepOutput(
            request_id=self.id,
            text="",
            tokens=(),
            block=None,
            result=result,
            seconds_queued=self.seconds_queued or 0.0,
            error=error,
            prompt_scores=scores,
        )

    def _new_text(self, end: int | None, *, final: bool) -> str:
        """Text not given out yet; what might become a stop string waits."""
        if self.stream is None:
            return ""
        whole = self.stream.text if end is None else self.stream.text[:end]
        held = 0 if final else self.stops.num_pending
        piece = whole[self.shown : len(whole) - held]
        self.shown += len(piece)
        return piece

    def _result(self, reason: FinishReason, stop: FoundStop | None) -> Generation:
        """The request's result, with its text up to `stop`."""
        now = time.perf_counter()
        stats = GenerationStats(
            denoiser_calls=self.denoiser_calls,
            context_calls=self.context_calls,
            seconds_to_first_token=(self.first or now) - self.began,
            seconds_total=now - self.began,
            num_tokens=len(self.tokens),
            num_cached_tokens=self.num_cached,
            drafts=self.drafts,
        )
        return Generation(
            token_ids=[t.id for t in self.tokens],
            text=None if self.stream is None else self.stream.text[: None if stop is None else stop.end],
            finish_reason=reason,
            stop_string=None if stop is None else stop.stop,
            stats=stats,
            commit_steps=[t.step for t in self.tokens],
            confidences=[t.confidence for t in self.tokens],
            top=[t.top for t in self.tokens],
        )

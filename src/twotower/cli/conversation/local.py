"""Answers by a model in this process."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from twotower.checkpoints.chat_template import ChatTemplate, Turn
from twotower.cli.conversation.answering import (
    PLAIN_STOP,
    AnswerEnd,
    AnswerFailed,
    AnswerSettings,
    Moment,
    Said,
    plain_form,
)
from twotower.cli.live import BlockReader
from twotower.decoding.output import StepOutput
from twotower.decoding.params import SamplingParams
from twotower.decoding.prompt import text_ids
from twotower.engine.config import EngineConfig
from twotower.engine.engine import Engine
from twotower.model.two_tower import TwoTower

# Most tokens of an answer where neither the user nor the checkpoint says it.
_ANSWER_TOKENS = 1024


class LocalModel:
    """Answers with an engine, whose prefix cache keeps the conversation from turn to turn."""

    def __init__(self, model: TwoTower, folder: Path, name: str, limits: EngineConfig) -> None:
        if model.tokenizer is None:
            raise ValueError(f"{folder} has no tokenizer.json, and a chat needs texts; give another model")
        self._model = model
        self._engine = Engine(model, limits)
        self._template = ChatTemplate.load(folder)
        self._blocks = BlockReader(model.tokenizer, model.config.mask_token_id)
        self._name = name

    @property
    def about(self) -> str:
        return self._name

    @property
    def is_plain(self) -> bool:
        return self._template is None

    def moments(self, messages: Sequence[Said], settings: AnswerSettings) -> Generator[Moment, None, None]:
        params = settings.params
        if self._template is None:
            ids = text_ids(self._model, plain_form(messages), "prompt", special=True)
            params = dataclasses.replace(params, stop=(*params.stop, PLAIN_STOP))
        else:
            # no special tokens: templates write the control tokens that a prompt begins with
            ids = text_ids(self._model, self._template.render([Turn(m.role, m.content) for m in messages]), "prompt")
        params = self._with_length(len(ids), params)
        # The engine finishes its step before it looks: interrupted in the middle, its states would not fit together.
        with _noting_interrupts() as interrupted:
            running = self._engine.add(ids, params, watch=True)
            try:
                while self._engine.has_work:
                    if interrupted.is_set():
                        raise KeyboardInterrupt
                    for output in self._engine.step():
                        if output.error is not None:
                            raise output.error
                        yield self._moment(output, len(ids))
            finally:
                self._engine.abort(running)

    def _with_length(self, num_prompt: int, params: SamplingParams) -> SamplingParams:
        """The settings with a length for the answer. Raises AnswerFailed where the model has no room for one."""
        positions = None if params.past_positions else self._model.config.trained_positions
        if positions is not None and num_prompt >= positions:
            raise AnswerFailed(
                f"the conversation has {num_prompt} tokens, and this model reads at most {positions}; "
                "/undo takes back the last message, and /clear begins anew"
            )
        if params.max_new_tokens is not None:
            return params
        usual = self._model.sampling.max_new_tokens or _ANSWER_TOKENS
        room = usual if positions is None else positions - num_prompt
        return dataclasses.replace(params, max_new_tokens=min(usual, room))

    def _moment(self, output: StepOutput, num_prompt: int) -> Moment:
        # a finished block is in `text`
        places = () if output.tokens or output.block is None else self._blocks.places(output.block)
        if output.result is None:
            return Moment(output.text, places)
        stats = output.result.stats
        end = AnswerEnd(
            output.result.finish_reason,
            stats.num_tokens,
            stats.denoiser_calls,
            stats.context_calls,
            num_prompt + stats.num_tokens,
            self._model.config.trained_positions,
        )
        return Moment(output.text, (), end)


@contextlib.contextmanager
def _noting_interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets the event in place of raising KeyboardInterrupt."""
    event = threading.Event()

    def note(*_: Any) -> None:
        event.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)

"""Between the protocol and the engine: tokens in, events of several texts out, and the server's limits."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager, aclosing, nullcontext
from typing import Any, NamedTuple

import tokenizers

from twotower.checkpoints.chat_template import ChatTemplate
from twotower.decoding.output import StepOutput
from twotower.decoding.params import SamplingParams
from twotower.decoding.record import Prompt
from twotower.engine.aio import AsyncEngine
from twotower.server.config import ServerConfig
from twotower.server.errors import ApiError, from_value_error
from twotower.server.logprobs import TokenNames
from twotower.server.metrics import Metrics
from twotower.server.protocol import NAMES

# What an overloaded server tells clients to wait; a request takes about a second.
_RETRY_SECONDS = "1"
# Characters of a prompt above which one is made into tokens at a time: it takes 200 times its size in memory.
_LONG_TEXT = 100_000


class Choice(NamedTuple):
    """One text to write: its prompt's ids and its settings."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams


class Indexed(NamedTuple):
    """An event of the choice at `place`."""

    place: int
    event: StepOutput


class Places(AbstractContextManager["Places"]):
    """A request's places among the unfinished texts of the server; each is given back once, at the latest at exit."""

    def __init__(self, service: "Service", count: int) -> None:
        self._service = service
        self._left = count

    def give_back(self, count: int = 1) -> None:
        self._service.num_unfinished -= min(count, self._left)
        self._left -= min(count, self._left)

    def __exit__(self, *_: object) -> None:
        self.give_back(self._left)


class Service:
    """What all endpoints share: one engine, its limits and its metrics."""

    def __init__(self, engine: AsyncEngine, config: ServerConfig, template: ChatTemplate | None) -> None:
        if engine.model.tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer.json, and a server needs texts; serve another one")
        self.engine = engine
        self.config = config
        self.template = template
        self.tokenizer: tokenizers.Tokenizer = engine.model.tokenizer
        self.metrics = Metrics(engine)
        self.names = TokenNames(self.tokenizer)
        self.started = int(time.time())
        self.num_unfinished = 0
        self.scoring = asyncio.Lock()
        self._long_texts = asyncio.Lock()

    @property
    def model_card(self) -> dict[str, Any]:
        """The model as /v1/models shows it."""
        card = {"id": self.config.model_name, "object": "model", "created": self.started, "owned_by": "twotower"}
        return card | {"max_model_len": self.config.max_context}

    def check_model(self, name: str) -> None:
        """Raises ApiError for a model that isn't there."""
        if name != self.config.model_name:
            message = f"the model {name!r} does not exist; this server has {self.config.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def admit(self, count: int) -> Places:
        """Places for `count` texts. Raises ApiError where a request may not have so many, or the server is full."""
        most = self.config.max_choices
        if count > most:
            message = (
                f"the request asks for {count} texts, prompts times n, and the limit is {most}; send fewer at once"
            )
            raise ApiError(400, message, param="n", code="invalid_value")
        limit = self.engine.config.max_num_requests + self.engine.config.max_num_waiting
        if self.num_unfinished + count > limit:
            message = f"the server is full: {self.num_unfinished} texts are unfinished, the limit is {limit}; try later"
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": _RETRY_SECONDS})
        self.num_unfinished += count
        return Places(self, count)

    async def encode(self, prompt: Prompt, *, special: bool = True) -> tuple[int, ...]:
        """The ids of a prompt, at least one. Raises ApiError if they fill the context or are no tokens."""
        if isinstance(prompt, str):
            # A whole book takes seconds. Of the library's calls only encode_batch lets other threads run meanwhile.
            async with self._long_texts if len(prompt) > _LONG_TEXT else nullcontext():
                encoded = await asyncio.to_thread(self.tokenizer.encode_batch, [prompt], add_special_tokens=special)
            prompt = encoded[0].ids
        v = self.engine.model.config.vocab_size
        strange = next((i for i in prompt if not 0 <= i < v), None)
        if strange is not None:
            message = f"prompt has token id {strange}, must be in [0, {v - 1}]"
            raise ApiError(400, message, param="prompt", code="invalid_value")
        bos = self.engine.model.config.bos_token_id
        ids = tuple(prompt)
        if not ids and bos is None:
            raise ApiError(400, "prompt has no tokens, must have at least one", param="prompt", code="invalid_value")
        ids = ids or (bos,)  # type: ignore[assignment]
        if len(ids) > self.config.max_context:
            raise self._too_long(len(ids), 0)
        return ids

    def room(self, prompt_ids: Sequence[int], wanted: int | None, default: int) -> int:
        """How many new tokens a request gets: `wanted`, or else `default` or what the context has room for."""
        room = self.config.max_context - len(prompt_ids)
        if (1 if wanted is None else wanted) > room:
            raise self._too_long(len(prompt_ids), wanted or 1)
        return min(room, default) if wanted is None else wanted

    async def check(self, choice: Choice) -> None:
        """Raises ApiError for what the engine can't run."""
        try:
            # a large schema takes long enough to hold up all other requests
            await asyncio.to_thread(self.engine.prepare, choice.prompt_ids, choice.params)
        except ValueError as error:
            raise from_value_error(error, NAMES) from error

    async def run(
        self, choices: Sequence[Choice], places: Places, log: dict[str, Any], *, watch: bool = False
    ) -> AsyncGenerator[Indexed, None]:
        """The events of all choices as they come. Closing the iterator aborts what is unfinished.

        The request's `log` is told how long the text that waited longest has waited.
        Texts go on at their own pace however slowly the events are taken. Raises EngineFailed where nothing runs.
        """
        queue: asyncio.Queue[Indexed | asyncio.Task[None]] = asyncio.Queue()

        async def pump(index: int, choice: Choice) -> None:
            with self.metrics.observe(choice.params.mode) as observed:
                async with aclosing(self.engine.stream(choice.prompt_ids, choice.params, watch=watch)) as events:
                    async for event in events:
                        observed.take(event, len(choice.prompt_ids))
                        log["seconds_queued"] = max(log.get("seconds_queued", 0.0), round(event.seconds_queued, 4))
                        queue.put_nowait(Indexed(index, event))

        tasks = [asyncio.create_task(pump(i, choice)) for i, choice in enumerate(choices)]
        for task in tasks:
            task.add_done_callback(lambda _: places.give_back())
            task.add_done_callback(queue.put_nowait)
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if isinstance(item, Indexed):
                    yield item
                else:
                    item.result()  # raises what ended it early
                    left -= 1
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _too_long(self, num_prompt: int, num_new: int) -> ApiError:
        message = (
            f"this model's context is {self.config.max_context} tokens, but the request has {num_prompt} in the prompt "
            f"and asks for {num_new} new ones; shorten the prompt or lower max_tokens"
        )
        return ApiError(400, message, param="prompt" if num_new == 0 else "max_tokens", code="context_length_exceeded")

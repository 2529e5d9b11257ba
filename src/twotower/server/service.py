"""What the endpoints share: the engine and its limits, prompts as token ids, and several texts written at once."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import tokenizers

from twotower.checkpoints.chat_template import ChatTemplate
from twotower.decoding.constraint import behind
from twotower.decoding.modes import MODES
from twotower.decoding.output import StepOutput
from twotower.decoding.params import SamplingParams
from twotower.decoding.prompt import Prompt, prompt_ids, text_ids
from twotower.decoding.record import check_drafter
from twotower.decoding.step import Request
from twotower.decoding.unmasking import chosen_rule
from twotower.engine.aio import Admission, AsyncEngine
from twotower.errors import SettingError
from twotower.server.config import MAX_CONTEXT, ServerConfig
from twotower.server.errors import ENDINGS, ApiError
from twotower.server.metrics import Metrics
from twotower.server.reasoning import AtStart, thought_format, thought_rules
from twotower.server.sampling import Sampling
from twotower.server.structure import Structure
from twotower.server.token_names import TokenNames
from twotower.server.tool_request import ToolUse
from twotower.server.tools.answer import Marks
from twotower.server.tools.choice import tool_format
from twotower.server.tools.grammar import grammar, literal

logger = logging.getLogger(__name__)

# Prompts of more characters than this are tokenized one at a time: that takes 200 times their size in memory.
_LONG_TEXT = 100_000


class Service:
    """One engine with its limits and its metrics. Raises ValueError for a model without a tokenizer, and SettingError
    for a `target_retention` that its calibration can't promise."""

    def __init__(self, engine: AsyncEngine, config: ServerConfig, template: ChatTemplate | None) -> None:
        if engine.model.tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer.json, and a server needs texts; serve another one")
        if config.default_drafter is not None:
            check_drafter(engine.model, config.default_drafter)
        if config.target_retention is not None:
            usual = SamplingParams(target_retention=config.target_retention)
            chosen_rule(engine.model.calibration, usual.settled(engine.model.config.block_size, engine.model.sampling))
            if _usual_temperature(engine) > 0:
                message = (
                    "--target-retention promises its share for temperature 0, and requests without one are sampled at "
                    "%g: ask with temperature 0, or write do_sample false into generation_config.json"
                )
                logger.warning(message, _usual_temperature(engine))
        self.engine = engine
        self.config = config
        self.model_names = config.model_names or ("twotower",)
        self.model_name = self.model_names[0]
        self.max_context, self.limited_by = _most_tokens(engine, config)
        # what the engine never has room for at once would be asked for again and again
        self.max_choices = min(config.max_choices, engine.config.max_num_requests + engine.config.max_num_waiting)
        self.template = template
        self.tokenizer: tokenizers.Tokenizer = engine.model.tokenizer
        self.metrics = Metrics(engine, self.model_name, config.default_mode)
        self.names = TokenNames(self.tokenizer)
        added = self.tokenizer.get_added_tokens_decoder()
        self.control = frozenset(token.content for token in added.values() if token.special)
        self._added = {token.content: i for i, token in added.items()}
        self.tool_marks = Marks(tool_format(config.tool_parser, template))
        self.thoughts = thought_format(config.reasoning_parser, template)
        self.started = int(time.time())
        self._long_texts = asyncio.Lock()

    def model_card(self, name: str) -> dict[str, Any]:
        """The model as /v1/models shows it under one of its names, with the server's limits and modes; `root` is its
        first name."""
        card = {"id": name, "object": "model", "created": self.started, "owned_by": "twotower", "root": self.model_name}
        limits = {"max_model_len": self.max_context, "limited_by": self.limited_by, "max_choices": self.max_choices}
        return card | limits | {"modes": [*MODES, "auto"], "default_mode": self.config.default_mode}

    def token_names(self, skip_special_tokens: bool | None) -> TokenNames:
        """What tokens stand for in a text, which has control tokens if they are not to be skipped."""
        return self.names.with_control_tokens() if skip_special_tokens is False else self.names

    def check_model(self, name: str | None) -> None:
        """Raises ApiError unless `name` is one of the served model, which is also meant where a request names none."""
        if name not in (None, "", *self.model_names):
            served = " and ".join(map(repr, self.model_names))
            message = f"the model {name!r} does not exist; this server has {served}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def admit(self, count: int) -> AbstractContextManager[Admission]:
        """Places for `count` texts. Raises ApiError if one request may not have so many.

        Entering it raises Overloaded if the server is full.
        """
        most = self.max_choices
        if count > most:
            message = (
                f"the request asks for {count} texts, prompts times n, and the limit is {most}; send fewer at once"
            )
            raise ApiError(400, message, param="n", code="invalid_value")
        return self.engine.admit(count)

    async def prepare(
        self,
        prompt: Prompt,
        settings: Sampling,
        wanted: int | None,
        default: int | None = None,
        *,
        num_choices: int = 1,
        special: bool = True,
        structure: Structure | None = None,
    ) -> list[Request]:
        """Checks a prompt with its settings, and makes one request for the engine per text.

        `wanted` is the number of new tokens. If it is None there are `default` of them, or as many as the context has
        room for if that is less or `default` is None. `structure` is what the texts must match, by default what the
        settings say. `special` says whether the tokenizer adds its control tokens,
        such as BOS. Raises ApiError and SettingError for what can't run.
        """
        ids = await self._encode(prompt, special, self._kept(settings, wanted or default or 1))
        room = self.max_context - len(ids)
        if (1 if wanted is None else wanted) > room:
            raise self._too_long(len(ids), wanted or 1)
        own = self.engine.model.sampling
        if wanted is None:
            wanted = min(default or own.max_new_tokens or self._usual_room(len(ids)), room)
        usual = _usual_temperature(self.engine)
        structure = structure or settings.structure()
        defaults = (self.config.default_drafter, self.config.target_retention)
        try:
            params = [
                settings.sampling(self.config.default_mode, wanted, k, usual, structure, *defaults)
                for k in range(num_choices)
            ]
            # In a thread: compiling a large JSON schema takes long enough to hold up all other requests.
            return await asyncio.to_thread(lambda: [self.engine.prepare(ids, p) for p in params])
        except SettingError as error:
            raise error if structure is None else structure.refused(error) from None

    @asynccontextmanager
    async def run(
        self, requests: Sequence[Request], admission: Admission, log: dict[str, Any], *, watch: bool = False
    ) -> AsyncIterator[AsyncIterator[tuple[int, StepOutput]]]:
        """The outputs of all requests as they come, each with the index of its request.

        Leaving the context aborts what is unfinished, which counts as failed if an exception is why, and else as
        cancelled. The texts are written at their own pace, however slowly the outputs are taken. The longest time that
        a text had to wait is written to `log`. Iterating raises what ended one of the texts early: RequestFailed,
        Draining or EngineFailed.
        """
        queue: asyncio.Queue[tuple[int, StepOutput] | asyncio.Task[None]] = asyncio.Queue()
        seen = [self.metrics.observed(request.params.mode) for request in requests]

        async def pump(index: int, request: Request) -> None:
            with seen[index] as observed:
                async with aclosing(self.engine.stream_prepared(request, admission, watch=watch)) as stream:
                    async for output in stream:
                        observed.take(output, len(request.prompt_ids))
                        log["seconds_queued"] = max(log.get("seconds_queued", 0.0), round(output.seconds_queued, 4))
                        queue.put_nowait((index, output))

        async def taken() -> AsyncGenerator[tuple[int, StepOutput]]:
            left = len(tasks)
            while left:
                item = await queue.get()
                if isinstance(item, tuple):
                    yield item
                else:
                    item.result()  # raises what ended the task early
                    left -= 1

        tasks = [asyncio.create_task(pump(i, request)) for i, request in enumerate(requests)]
        for task in tasks:
            task.add_done_callback(queue.put_nowait)
        try:
            async with aclosing(taken()) as outputs:
                yield outputs
        except BaseException as error:
            for observed in [] if isinstance(error, ENDINGS) else seen:
                observed.fail()
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _kept(self, settings: Sampling, num_new: int) -> int | None:
        """How many of a prompt's last tokens a request wants to be read; None for all. -1 means what fits."""
        kept = settings.truncate_prompt_tokens
        if kept is not None and (kept == 0 or kept < -1):
            message = f"truncate_prompt_tokens is {kept}, must be at least 1, or -1 for what fits"
            raise ApiError(400, message, param="truncate_prompt_tokens", code="invalid_value")
        return max(self.max_context - num_new, 1) if kept == -1 else kept

    async def _encode(self, prompt: Prompt, special: bool, kept: int | None) -> tuple[int, ...]:
        """The last `kept` token ids of a prompt, at least one. Raises SettingError for bad ids, ApiError for more than
        fit."""
        if isinstance(prompt, str):
            prompt = await self.tokens(prompt, special=special)
        ids = prompt_ids(self.engine.model, prompt)[-(kept or 0) :]
        if len(ids) > self.max_context:
            raise self._too_long(len(ids), 0)
        return ids

    async def tokens(self, text: str, *, special: bool) -> tuple[int, ...]:
        """The token ids of a text, maybe none; with `special` those that the tokenizer adds, such as BOS, too."""
        # A whole book takes seconds.
        async with self._long_texts if len(text) > _LONG_TEXT else nullcontext():
            return await asyncio.to_thread(text_ids, self.engine.model, text, "prompt", special=special)

    def behind_thought(self, structure: Structure, start: AtStart) -> Structure:
        """What an answer must match that may begin with reasoning, of which nothing is demanded, unless the structure
        itself has a mark of it. Raises ApiError for a constraint that can't be read."""
        format = self.thoughts
        if format is None or start == "over" or find_spec("llguidance") is None:
            return structure
        if format.open in structure.text or format.close in structure.text:
            return structure
        try:
            text = behind(structure.kind, structure.text, thought_rules(format, start, self._added))
        except SettingError as error:
            raise structure.refused(error) from None
        return structure._replace(kind="grammar", text=text)

    def tool_grammar(self, tools: ToolUse, answer: Mapping[str, Any] | None = None) -> str:
        """The grammar of calls of the tools, or if a JSON schema is given of JSON that it describes too."""

        def mark(text: str) -> str:
            # a token of its own is not found by its text
            return f"<[{self._added[text]}]>" if text in self._added else literal(text)

        return grammar(self.tool_marks.format.grammar(tools.functions, mark, many=not tools.one_call), answer)

    def _usual_room(self, num_prompt: int) -> int:
        """The most new tokens that no one needs to ask for.

        RoPE that depends on a text's length turns a text by the length that it may have: nobody who gives no limit
        wants it turned as the longest, so a short prompt's text ends where that would begin.
        """
        most = self.max_context
        for kind in self.engine.model.config.attention_kinds:
            rope = kind.rope_parameters
            if rope is not None and rope.length_class(most) and num_prompt < rope.original_max_position_embeddings:
                most = rope.original_max_position_embeddings
        return most - num_prompt

    def _too_long(self, num_prompt: int, num_new: int) -> ApiError:
        # clients know an error of this kind by the words "maximum context length is"
        message = f"this model's maximum context length is {self.max_context} tokens, but the prompt has {num_prompt}"
        if num_new:
            message += f" and the request asks for {num_new} new ones; shorten the prompt or lower max_tokens"
        else:
            message += "; shorten it, or set truncate_prompt_tokens"
        return ApiError(400, message, param="prompt" if num_new == 0 else "max_tokens", code="context_length_exceeded")


def _usual_temperature(engine: AsyncEngine) -> float:
    """The temperature of requests that name none."""
    own = engine.model.sampling.temperature
    # OpenAI's protocol has 1 where nobody says anything
    return 1.0 if own is None else own


def _most_tokens(engine: AsyncEngine, config: ServerConfig) -> tuple[int, str]:
    """The most tokens of a prompt and its answer, and what says so: the setting, the checkpoint, nobody ("default"), or
    the memory where it has no room for as many."""
    trained = engine.model.config.trained_positions
    said = [(config.max_context, "max_context"), (trained, "checkpoint"), (MAX_CONTEXT, "default")]
    wanted, by = next((most, by) for most, by in said if most is not None)
    if trained is not None and wanted > trained:
        message = (
            "texts may have %d tokens by --max-context, but the checkpoint was trained for %d: longer ones get worse"
        )
        logger.warning(message, wanted, trained)
    fitting = engine.longest_text(engine.model.config.block_size)
    if fitting is None or wanted <= fitting:
        return wanted, by
    message = "texts are limited to %d tokens, not %d: there is no memory for the keys of more; raise --state-mib"
    if engine.plan.max_context < wanted:  # else the engine has said it
        logger.warning(message, fitting, wanted)
    return fitting, "memory"

"""How to decode, as requests say it."""

import json
from typing import Annotated, Any

from pydantic import ValidationInfo, field_validator

from twotower.decoding.modes import DRAFTING_MODES, Mode
from twotower.decoding.params import MAX_BLOCK, CommitRule, SamplingParams
from twotower.model.sampling_defaults import LEAST_DIVISOR, MOST_REPETITION_PENALTY
from twotower.server.errors import ApiError
from twotower.server.fields import Integer, Many, shown
from twotower.server.structure import Structure, Structured

# Enough for the names of everybody in a group chat.
MAX_STOPS, MAX_STOP_CHARACTERS = 128, 256
_STOP_RULE = f"a text of 1 to {MAX_STOP_CHARACTERS} characters, or a list of at most {MAX_STOPS} such texts"
_SEEDS = 2**63

_BlockCount = Annotated[Integer, shown(minimum=1, maximum=MAX_BLOCK)]
_Stop = Annotated[str, shown(minLength=1, maxLength=MAX_STOP_CHARACTERS)]
_Share = Annotated[float, shown(minimum=0, maximum=1)]
_Penalty = Annotated[float, shown(minimum=-2, maximum=2)]
_Id = Annotated[Integer, shown(minimum=0)]

# How blocks are filled.
_PROMISE = "Promised for temperature 0; a request without a temperature is sampled as the checkpoint says, else at 1."
_COMMITS = ("block_size", "steps_per_block", "confidence_threshold", "target_retention", "commit_rule", "entropy_bound")
# Fields that are called and mean the same in `SamplingParams`.
_SAME = (
    *(*_COMMITS, "ignore_eos", "allow_loss", "top_k"),
    *("min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "allowed_token_ids"),
    *("bad_words", "stop_token_ids", "include_stop_str_in_output", "min_tokens", "skip_special_tokens", "priority"),
    "cache_salt",
)


class Sampling(Structured):
    """How to decode; `None` is the default."""

    temperature: Annotated[float, shown(minimum=0, maximum=100)] | None = None
    top_k: Annotated[Integer, shown(minimum=-1)] | None = None
    top_p: _Share | None = None
    min_p: _Share | None = None
    typical_p: Annotated[float, shown(exclusiveMinimum=0, maximum=1)] | None = None
    repetition_penalty: Annotated[float, shown(minimum=LEAST_DIVISOR, maximum=MOST_REPETITION_PENALTY)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: Annotated[dict[str, float], shown(propertyNames={"pattern": "^[0-9]+$"})] | None = None
    allowed_token_ids: Many[_Id] | None = None
    bad_words: Many[str] | None = None
    seed: Annotated[Integer, shown(minimum=-_SEEDS, exclusiveMaximum=_SEEDS)] | None = None
    stop: _Stop | Annotated[Many[_Stop], shown(maxItems=MAX_STOPS)] | None = None
    stop_token_ids: Many[_Id] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[Integer, shown(minimum=0)] | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[Integer, shown(minimum=-1)] | None = None
    priority: Integer | None = None
    cache_salt: str | None = None
    mode: Mode | None = None
    block_size: _BlockCount | None = None
    steps_per_block: _BlockCount | None = None
    confidence_threshold: _Share | None = None
    target_retention: Annotated[float, shown(description=_PROMISE, exclusiveMinimum=0, exclusiveMaximum=1)] | None = (
        None
    )
    commit_rule: CommitRule | None = None
    entropy_bound: Annotated[float, shown(minimum=0)] | None = None
    allow_loss: bool | None = None
    drafter: str | None = None

    @field_validator("top_k", "seed")
    @classmethod
    def _off(cls, value: int | None, info: ValidationInfo) -> int | None:
        """None for the numbers by which clients say that a setting is off."""
        return None if value == -1 or (value == 0 and info.field_name == "top_k") else value

    @property
    def num_top(self) -> int:
        """How many of the likeliest tokens at each place are asked for; endpoints have names of their own for it."""
        return 0

    def sampling(
        self,
        default_mode: Mode,
        max_new_tokens: int,
        choice: int = 0,
        default_temperature: float = 1.0,
        structure: Structure | None = None,
        default_drafter: str | None = None,
        default_retention: float | None = None,
    ) -> SamplingParams:
        """The settings of one text, number `choice` of its prompt, which must match `structure`. Raises SettingError
        and ApiError for bad values.

        The texts of one prompt use the seeds `seed`, `seed` + 1, and so on, modulo 2**63, so that negative seeds, which
        OpenAI's protocol has, are seeds too. A temperature too small to divide by is greedy. `default_retention` is the
        target of a request whose mode has one, and which says nothing about how its blocks are filled.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > MAX_STOPS or not all(0 < len(one) <= MAX_STOP_CHARACTERS for one in stop):
            raise ApiError(400, f"stop must be {_STOP_RULE}", param="stop", code="invalid_value")
        given: dict[str, Any] = {name: getattr(self, name) for name in _SAME}
        given |= {
            "top_p": self.top_p or None,
            "seed": self._seed(choice),
            "logit_bias": self._biases(),
            "logprobs": self.num_top,
        }
        mode = self.mode or default_mode
        given["drafter"] = self.drafter or (default_drafter if mode in DRAFTING_MODES else None)
        if (mode == "diffusion" or self.allow_loss) and all(given[name] is None for name in _COMMITS):
            given["target_retention"] = default_retention
        if structure is not None:
            given[structure.kind] = structure.text
        temperature = default_temperature if self.temperature is None else self.temperature
        if self.top_p == 0 or 0 < temperature < LEAST_DIVISOR:
            temperature = 0.0  # of the likeliest tokens that have no probability together only the first is left
        return SamplingParams(
            mode=mode,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop=tuple(stop),
            past_positions=True,  # --max-context says how long a text may be
            **{name: value for name, value in given.items() if value is not None},
        )

    def _seed(self, choice: int) -> int | None:
        if self.seed is None:
            return None
        if not -_SEEDS <= self.seed < _SEEDS:
            message = f"seed is {self.seed}, must be an integer in [{-_SEEDS}, {_SEEDS - 1}]"
            raise ApiError(400, message, param="seed", code="invalid_value")
        return (self.seed + choice) % _SEEDS

    def _biases(self) -> dict[int, float] | None:
        """`logit_bias` with ids for keys, which are texts in JSON. Raises ApiError for a key that is no id."""
        if self.logit_bias is None:
            return None
        wrong = next((key for key in self.logit_bias if not (key.isascii() and key.isdigit() and len(key) < 20)), None)
        if wrong is not None:
            message = f"logit_bias has the key {json.dumps(wrong[:40])}, must have token ids as keys"
            raise ApiError(400, message, param="logit_bias", code="invalid_value")
        return {int(key): value for key, value in self.logit_bias.items()}

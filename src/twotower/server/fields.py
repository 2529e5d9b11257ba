"""What a request's fields may hold before their types are checked: values that ask for nothing, and names that change
nothing.

Clients send fields on their own that nobody asked for. Each is of one of four kinds: an empty value, which means that
the field is absent; bookkeeping, which changes no answer; a field of other servers, accepted at the value that leaves
the answer as it is; and everything else, which is refused by name.
"""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from twotower.server.errors import ApiError

# Fields that change no answer: names for billing, caching and tracing, and hints for speed.
BOOKKEEPING = frozenset(
    (
        *("metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
        *("safety_identifier", "prediction", "request_id", "session_id", "trace_id", "api_key", "extra_headers"),
        *("cache_prompt", "id_slot", "slot_id", "timings_per_token", "return_progress", "keep_alive", "provider"),
        *("transforms", "route", "caching", "litellm_metadata", "litellm_call_id", "num_retries", "timeout"),
        *("separate_reasoning", "stream_reasoning", "include_reasoning", "api_type", "api_server", "api_base"),
        "guided_decoding_backend",
        *("context_management", "cache_control", "diagnostics", "inference_geo", "user_profile_id", "workspace_id"),
        "max_tool_calls",
        # what the chat page of Open WebUI says of itself
        *("id", "chat_id", "parent_id", "user_message", "parent_message", "background_tasks", "model_item"),
        "variables",
        # what belongs to samplers of other servers that are off below
        *("dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_range", "dry_sequence_breakers"),
        *("mirostat_tau", "mirostat_eta", "xtc_threshold", "dynatemp_low", "dynatemp_high", "dynatemp_exponent"),
        *("repeat_last_n", "repetition_penalty_range", "rep_pen_range", "penalty_last_n", "penalize_nl"),
        *("samplers", "sampler_order", "sampler_priority", "temperature_last", "smoothing_curve", "rep_pen_slope"),
        "adaptive_decay",
        *("threads", "n_threads", "num_thread", "num_ctx", "max_context_length", "truncation_length", "min_keep"),
    )
)

# Other servers' fields and OpenAI's that can't be followed -> the values, beside empty ones and 0, that leave the
# answer as it is. Any other value is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": (),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True,),
    "functions": (),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "use_beam_search": (),
    "length_penalty": (1,),
    "early_stopping": (),
    "spaces_between_special_tokens": (True,),
    "repeat_penalty": (1,),
    "rep_pen": (1,),
    "tfs": (1,),
    "tfs_z": (1,),
    "typical": (1,),
    "guidance_scale": (1,),
    "smoothing_factor": (),
    "lora_path": (),
    "logits_processors": (),
    "do_sample": (True,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "no_repeat_ngram_size": (),
    "skip_reading_prefix_cache": (),
    "watermark": (),
    "add_bos_token": (True,),
    "encoder_repetition_penalty": (1,),
    "encoder_rep_pen": (1,),
    "adaptive_target": (-0.01, -1),
    "top_n_sigma": (-1,),
    "nsigma": (-1,),
    "detokenize": (True,),
    "speed": ("standard",),
    "truncation": ("disabled",),
    "background": (),
    "moderation": (),
    "previous_response_id": (),
    "conversation": (),
    "top_logprobs": (),
}
# What other servers call settings of this one. Clients of several servers send a setting under all of its names.
_OURS = {
    "repeat_penalty": "repetition_penalty",
    "rep_pen": "repetition_penalty",
    "typical": "typical_p",
    "n_predict": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "num_predict": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "functions": "tools",
    "function_call": "tool_choice",
    "stopping_strings": "stop",
    "stop_sequence": "stop",
    "sampler_seed": "seed",
}
# What to do instead of what other fields ask for.
_INSTEAD = dict.fromkeys(("previous_response_id", "conversation"), "send the earlier items in input, for none are kept")
_EMPTY: tuple[Any, ...] = ("", [], {})
# Fields of which an empty value is not as if there were none: {} as a schema is any JSON, and no choice is a mistake.
_EMPTY_SAYS_SOMETHING = ("prompt", "messages", "tokens", "guided_choice", "guided_json")

# fail_fast: a list of 100,000 wrong entries gives one error, not 100,000.
Entry = TypeVar("Entry")
Many = Annotated[list[Entry], Field(fail_fast=True)]


def shown(**keywords: Any) -> Any:
    """Keywords of JSON Schema that are only written into the OpenAPI schema and not checked by pydantic."""
    return Field(json_schema_extra=keywords)


def _whole(value: Any) -> Any:
    """3 for 3.0: JSON has one kind of number, and some languages' clients write every number with a point."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_whole)]


class Strict(BaseModel):
    """A part of a request: nulls are absent, unknown fields are refused unless they are empty, and no type is
    converted: a number in quotes is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        names = cls.model_fields.keys() | {f.alias for f in cls.model_fields.values() if f.alias}
        known = {name: value for name, value in raw.items() if name in names and value is not None}
        # One of them is enough for the error: a body of 100,000 unknown fields gives one, not 100,000.
        first = next(((k, v) for k, v in raw.items() if k not in names and not is_empty(v)), None)
        return known if first is None else known | dict([first])


class Body(Strict):
    """A whole request: beside nulls, empty values, bookkeeping and what leaves the answer as it is are absent."""

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        return {name: value for name, value in raw.items() if not cls._asks_for_nothing(name, value, raw)}

    @classmethod
    def _asks_for_nothing(cls, name: str, value: Any, raw: dict[str, Any]) -> bool:
        if name in _EMPTY_SAYS_SOMETHING:
            return value is None
        if name in cls.model_fields:
            return any(_equal(value, empty) for empty in _EMPTY)
        if _OURS.get(name) in raw and _equal(value, raw[_OURS[name]]):
            return True
        if is_empty(value) or any(_equal(value, neutral) for neutral in NEUTRAL.get(name, ())):
            return True
        if name not in NEUTRAL and _OURS.get(name) not in cls.model_fields:
            return name in BOOKKEEPING
        raise ApiError(400, unsupported(name), param=name, code="unsupported_parameter")


def unsupported(name: str) -> str:
    """What the error for a field that can't be followed says."""
    remedy = f"call it {_OURS[name]}" if name in _OURS else _INSTEAD.get(name, "leave it out")
    return f"{name} is not supported by this server; {remedy}"


def is_empty(value: Any) -> bool:
    """Whether a value asks for nothing wherever it stands: null, false, 0, an empty text, list or object, or an object
    that has only such values, as of features that are all off."""
    inner = value.values() if isinstance(value, dict) else (value,)
    return all(one is None or any(_equal(one, empty) for empty in (*_EMPTY, False, 0)) for one in inner)


def _equal(value: Any, other: Any) -> bool:
    # In Python True == 1 and False == 0; in JSON they differ.
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)

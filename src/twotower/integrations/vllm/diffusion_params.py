"""A request of mode `diffusion`: vLLM's sampling parameters and `vllm_xargs` as our own settings."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

from twotower.decoding.params import SamplingParams
from twotower.errors import SettingError

# What `vllm_xargs` may say of blocks
BLOCK_SETTINGS = (
    *("block_size", "steps_per_block", "confidence_threshold", "target_retention", "commit_rule", "entropy_bound"),
)
# What else may stand there: our mode, and what vLLM itself reads
_OTHERS = frozenset(("mode", "session_id", "kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode"))
# More tokens than any vocabulary has
_ALL = 2**31
# vLLM's parameters that blocks can't follow, with the values that mean "not used"
_UNUSED: dict[str, tuple[Any, ...]] = {
    "structured_outputs": (None,),
    "logprob_token_ids": (None, []),
    "thinking_token_budget": (None,),
}


class VllmParams(Protocol):
    """The fields of vllm.SamplingParams that are read here."""

    extra_args: Mapping[str, Any] | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    allowed_token_ids: list[int] | None
    bad_words: list[str] | None
    seed: int | None
    stop_token_ids: list[int] | None
    ignore_eos: bool
    min_tokens: int
    logprobs: int | None
    structured_outputs: Any


def diffusion_params(params: VllmParams, max_new_tokens: int) -> SamplingParams:
    """Our settings for a request that may write `max_new_tokens`.

    Raises SettingError for a setting that is unknown, out of range, or that `diffusion` doesn't have here.
    """
    extra = params.extra_args or {}
    unknown = sorted(set(extra) - set(BLOCK_SETTINGS) - _OTHERS)
    if unknown:
        raise SettingError("vllm_xargs", unknown[0], f"of mode, {', '.join(BLOCK_SETTINGS)} with mode 'diffusion'")
    for name, unused in _UNUSED.items():
        value = getattr(params, name, None)
        if value not in unused:
            raise SettingError(name, _said(value), "left out with mode 'diffusion'", "'ar' and 'verified' have it")
    return SamplingParams(
        mode="diffusion",
        max_new_tokens=max_new_tokens,
        temperature=params.temperature,
        # 0 and -1 are how vLLM writes "all"
        top_k=params.top_k if params.top_k > 0 else None,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=dict(params.logit_bias or {}),
        allowed_token_ids=None if params.allowed_token_ids is None else tuple(params.allowed_token_ids),
        bad_words=tuple(params.bad_words or ()),
        # negative ones too are seeds, and of several texts of one prompt each adds its number
        seed=None if params.seed is None else params.seed % 2**63,
        stop_token_ids=tuple(params.stop_token_ids or ()),
        ignore_eos=params.ignore_eos,
        min_tokens=min(params.min_tokens, max_new_tokens),
        logprobs=_num_likeliest(params.logprobs),
        past_positions=True,  # vLLM has its own limit
        **{name: extra[name] for name in BLOCK_SETTINGS if name in extra},
    )


def _num_likeliest(logprobs: int | None) -> int:
    """How many of the likeliest tokens a request needs, 0 for none. -1 is how vLLM writes "all", and beside 0 it still
    wants the rank of the chosen token, which is known where one is asked for."""
    if logprobs is None:
        return 0
    return _ALL if logprobs < 0 else max(logprobs, 1)


def check_logprobs(params: VllmParams, mode: str) -> None:
    """Raises SettingError for a request of `diffusion` with log-probabilities, where vLLM's --logprobs-mode isn't that
    of the denoiser's."""
    if params.logprobs is not None and mode != "raw_logprobs":
        rule = f"left out with mode 'diffusion' on a server with --logprobs-mode {mode}"
        raise SettingError("logprobs", params.logprobs, rule, "start vLLM with raw_logprobs, which blocks have")


def check_allowed(params: VllmParams, mask_token_id: int) -> None:
    """Raises SettingError for a request of any mode that may write nothing but the mask token, which none writes."""
    if params.allowed_token_ids and set(params.allowed_token_ids) == {mask_token_id}:
        rule = f"with another token than {mask_token_id}, the mask token, which no text has"
        raise SettingError("allowed_token_ids", params.allowed_token_ids, rule, "allow others")


def _said(value: object) -> object:
    """A value without the many fields of vLLM's classes that nobody has set."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    return {name: found for name, found in vars(value).items() if found and not name.startswith("_")}


def seed_of(params: SamplingParams, request_id: str) -> int:
    """The request's seed, the same for each of its blocks; without one, a number that vLLM's id for it decides."""
    if params.seed is not None:
        return params.seed
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8]) >> 1

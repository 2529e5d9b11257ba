"""All that the plugin changes in vLLM, and where it asks it. docs/vllm.md has each change with its reason.

Made for the versions in `versions`, and imported with no other, whose modules may have other names.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm import ModelRegistry, SamplingParams
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.model_executor.models.config import (
    MODELS_CONFIG_MAP,
    NemotronHForCausalLMConfig,
    VerifyAndUpdateConfig,
)
from vllm.platforms import current_platform
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.input_processor import InputProcessor

from twotower.checkpoints.hf.hub import resolve
from twotower.errors import SettingError
from twotower.integrations.vllm.config import HYBRID, TRANSFORMER
from twotower.integrations.vllm.diffusion_params import check_allowed, check_logprobs
from twotower.integrations.vllm.drafted_states import convolve_drafts_, turns, without_drafts
from twotower.integrations.vllm.kept_states import first_tokens, settle_rows_
from twotower.integrations.vllm.outline import outline, request_of
from twotower.integrations.vllm.server import (
    check_server,
    has_drafter,
    is_two_tower,
    server_settings,
    settle_denoiser,
)
from twotower.integrations.vllm.settings import DIFFUSION

logger = init_logger(__name__)

_wrapped: set[tuple[object, str, object]] = set()  # where this package runs something in the place of vLLM's

_MODELS = "twotower.integrations.vllm.models"


class DenoiserSettings(VerifyAndUpdateConfig):
    """What is settled for a server with the denoiser."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Changes the configuration before vLLM settles the rest of it."""
        settle_denoiser(vllm_config)


class RecurrentSettings(NemotronHForCausalLMConfig):
    """That, what vLLM settles for Nemotron-H, such as recurrent states in float32, and on CPUs no prefix cache."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Changes the configuration before vLLM sizes its cache."""
        settle_denoiser(vllm_config)
        super().verify_and_update_config(vllm_config)
        if current_platform.is_cpu() and vllm_config.cache_config.enable_prefix_caching:
            # Its builds for CPUs lack the kernels that store states within a prompt, and stop at the first long one.
            logger.warning("Prefix caching is off: vLLM's build for CPUs can't store recurrent states within prompts")
            vllm_config.cache_config.enable_prefix_caching = False


def apply() -> None:
    """Registers the models, and applies patches 1, 2 and 7; a second call changes nothing."""
    # Interfaces that are meant for it
    for name in (HYBRID, TRANSFORMER):
        ModelRegistry.register_model(name, f"{_MODELS}:{name}")
    # Patch 1: settings of a server with the denoiser, and of recurrent states; this map knows models by name alone.
    MODELS_CONFIG_MAP.update({HYBRID: RecurrentSettings, TRANSFORMER: DenoiserSettings})
    # Patch 2: a server is checked before vLLM starts its other processes, and `mode` in vllm_xargs before a request is
    # taken; models have no say in either, nor in the tokens that end a text.
    _wrap(InputProcessor, "__init__", _begin)
    _wrap(InputProcessor, "_validate_params", _validate)
    # Patch 7: a prompt of one token that comes while others are written is scheduled as it is. vLLM pads it with empty
    # drafts, unless its schedule may shorten drafts: recurrent layers take these for more of the prompt, and of a block
    # that is written behind them vLLM counts more as kept than was drafted, and stops.
    _wrap(Scheduler, "__init__", _pad_nothing)


def write_blocks() -> None:
    """Applies patch 4, in the process that has the denoiser."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    # Patch 4: a row's sampled token becomes the block that the denoiser writes. What follows, from stops to the next
    # step's input, takes any number of tokens, as speculative decoding needs it.
    _wrap(GPUModelRunner, "_sample", _sample)


def pass_rows_to_drafter() -> None:
    """Applies patch 3, in the process that has the drafter."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    # Patch 3: a class that drafts learns which request each row belongs to, where its keys are, and how long a draft
    # may be by the server's schedule; vLLM gives it tokens alone.
    _wrap(GPUModelRunner, "propose_draft_token_ids", _propose)
    # Its drafts may be drawn, and vLLM's rejection sampler is told from which probabilities.
    _wrap(GPUModelRunner, "_get_spec_decode_draft_probs", _probabilities)
    # Where one row is so near the longest text that a whole draft doesn't fit behind it, vLLM gives all rows drafts of
    # zeros, those that write blocks, too. This package's drafter shortens each row's draft by itself.
    _wrap(GPUModelRunner, "_input_fits_in_drafter", _fits)


def sample_behind_drafts() -> None:
    """Applies patch 8, in the process that has the drafter."""
    from vllm.v1.sample import rejection_sampler

    # Patch 8: a step without any draft ends in an error where a row has top_k, and on CPUs places with drafts have a
    # temperature, top_k and top_p from memory that nobody has written.
    _wrap(rejection_sampler, "apply_sampling_constraints", _constrain)
    if current_platform.is_cpu():
        _wrap(rejection_sampler, "expand_batch_to_tokens", _expand)


def verify_recurrent_states() -> None:
    """Applies patch 5, on CPUs, in the process that has the drafter."""
    from vllm.model_executor.layers.mamba import mamba_mixer2

    # Patch 5: the CPU build's kernels ignore how many tokens of the last draft were kept.
    _wrap(mamba_mixer2, "causal_conv1d_update", _convolve)
    _wrap(mamba_mixer2, "selective_state_update", _scan)


def keep_recurrent_states() -> None:
    """Applies patch 6, in the process that has the drafter."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    # Patch 6: rows of several tokens without a draft leave their recurrent states where the next step begins, before
    # anything reads them, and count as one token that was kept.
    _wrap(GPUModelRunner, "_sample", _settle)
    _wrap(GPUModelRunner, "_update_states_after_model_execute", _count)


def _wrap(owner: object, name: str, wrapper: Callable[..., Any]) -> None:
    """Has `wrapper(original, …)` run in the place of a method or function, once."""
    if (owner, name, wrapper) in _wrapped:
        return
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    _wrapped.add((owner, name, wrapper))
    setattr(owner, name, wrapped)


def _begin(original: Callable[..., None], processor: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
    check_server(vllm_config)
    original(processor, vllm_config, *args, **kwargs)
    model = vllm_config.model_config
    if is_two_tower(model) and model.hf_config.eos_token_id is not None:
        # Texts end where config.json says; vLLM asks generation_config.json, or a tokenizer_config.json, alone
        processor.generation_config_fields.setdefault("eos_token_id", model.hf_config.eos_token_id)
    if is_two_tower(model) and server_settings(vllm_config).denoiser:
        processor.two_tower = outline(resolve(model.model), model.dtype)


def _validate(original: Callable[..., Any], processor: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    config = processor.vllm_config
    if is_two_tower(config.model_config) and isinstance(params, SamplingParams):
        try:
            check_allowed(params, config.model_config.hf_config.mask_token_id)
            if server_settings(config).mode_of(params.extra_args) == DIFFUSION:
                check_logprobs(params, config.model_config.logprobs_mode)
                request_of(processor.two_tower, params, config.model_config.max_model_len)
        except SettingError as error:
            raise VLLMValidationError(str(error)) from error
    return original(processor, params, *args, **kwargs)


def _pad_nothing(original: Callable[..., None], scheduler: Any, *args: Any, **kwargs: Any) -> None:
    original(scheduler, *args, **kwargs)
    if has_drafter(scheduler.vllm_config.speculative_config) and scheduler.dynamic_sd_lookup is None:
        scheduler.dynamic_sd_lookup = [scheduler.num_spec_tokens] * (scheduler.max_num_running_reqs + 1)


def _sample(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    output = original(runner, *args, **kwargs)
    denoiser = getattr(runner.get_model(), "denoiser", None)
    return output if denoiser is None else denoiser.write(runner, output)


def _settle(original: Callable[..., Any], runner: Any, logits: Any, drafts: Any, *args: Any, **kwargs: Any) -> Any:
    if has_drafter(runner.speculative_config) and drafts is not None:
        settle_rows_(runner, drafts.num_draft_tokens)
    return original(runner, logits, drafts, *args, **kwargs)


def _count(original: Callable[..., Any], runner: Any, tokens: Tensor, scheduled: Any) -> Any:
    if has_drafter(runner.speculative_config):
        drafted = [name for name, ids in scheduled.scheduled_spec_decode_tokens.items() if ids]
        tokens = first_tokens(tokens, runner.input_batch.req_ids, drafted)
    return original(runner, tokens, scheduled)


def _propose(original: Callable[..., Any], runner: Any, scheduled: Any, sampled: Any, *args: Any, **kwargs: Any) -> Any:
    if not has_drafter(runner.speculative_config):
        return original(runner, scheduled, sampled, *args, **kwargs)
    return runner.drafter.propose(runner, sampled, scheduled.num_spec_tokens_to_schedule)


def _probabilities(original: Callable[..., Tensor | None], runner: Any, drafted: Any) -> Tensor | None:
    if not has_drafter(runner.speculative_config):
        return original(runner, drafted)
    found: Tensor | None = runner.drafter.probabilities(runner, drafted)
    return found


def _fits(original: Callable[..., bool], runner: Any, *args: Any, **kwargs: Any) -> bool:
    return has_drafter(runner.speculative_config) or original(runner, *args, **kwargs)


def _constrain(original: Callable[..., Tensor], logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return original(logits, *args, **kwargs) if len(logits) else logits


def _expand(_: object, x: Tensor, ends: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0) -> Tensor:
    """Of x (b,) what each row has, for each of its drafted tokens, which end at ends (b,): (num_tokens,)."""
    counts = ends.diff(prepend=ends.new_zeros(1))
    return torch.where(x == replace_from, replace_to, x).repeat_interleave(counts, output_size=num_tokens)


def _convolve(original: Callable[..., Tensor], x: Tensor, state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    accepted = kwargs.get("num_accepted_tokens")
    if accepted is None:
        return original(x, state, *args, **kwargs)
    weight, bias, activation = args
    assert activation in ("silu", "swish")
    slots, starts = kwargs["conv_state_indices"][:, 0], kwargs["query_start_loc"]
    if without_drafts(accepted, starts):
        newest = state[:, :, : weight.shape[1] - 1]
        return original(x, newest, weight, bias, activation, conv_state_indices=slots.contiguous())
    return convolve_drafts_(x, state, weight, bias, slots=slots, num_accepted=accepted, starts=starts)


def _scan(original: Callable[..., None], state: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
    accepted = kwargs.get("num_accepted_tokens")
    if accepted is None:
        return original(state, x, *args, **kwargs)
    table, starts, out = kwargs["state_batch_indices"], kwargs["cu_seqlens"], kwargs["out"]
    softplus = kwargs["dt_softplus"]
    if without_drafts(accepted, starts):
        entries = table[:, 0].contiguous()
        theirs = {"state_batch_indices": entries, "dst_state_batch_indices": entries, "out": out}
        return original(state, x, *args, dt_softplus=softplus, **theirs)
    dt, a, b, c, *of_heads = args
    order = turns(table, accepted, starts)
    x, dt, b, c = x[order.tokens], dt[order.tokens], b[order.tokens], c[order.tokens]
    found, done = torch.empty_like(x, dtype=out.dtype), 0
    for before, after in order.entries:
        now = slice(done, done + len(after))
        # The kernel writes to the entry that it reads, too, and that of a token in the draft may be needed again.
        state[after] = state[before]
        theirs = {"state_batch_indices": after, "dst_state_batch_indices": after, "out": found[now]}
        original(state, x[now], dt[now], a, b[now], c[now], *of_heads, dt_softplus=softplus, **theirs)
        done = now.stop
    out[order.tokens] = found
    return None

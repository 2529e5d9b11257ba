"""What a server of vLLM is asked for, and whether it can be had.

`check_server` runs in vLLM's first process, before it starts any other: there a refusal is the last line that an
operator sees, while an error in a worker is one of hundreds.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from vllm.config import ModelConfig, SpeculativeConfig, VllmConfig

from twotower.checkpoints.hf.generation_file import read_config, read_sampling_defaults
from twotower.checkpoints.hf.hub import resolve
from twotower.checkpoints.hf.ngrams_file import NGRAMS_FILE
from twotower.checkpoints.hf.tensor_files import scan
from twotower.decoding.drafters import draft_sources
from twotower.errors import SettingError
from twotower.integrations.vllm.config import HYBRID, TRANSFORMER
from twotower.integrations.vllm.settings import DIFFUSION, DRAFTER, NEEDED, ServerSettings
from twotower.integrations.vllm.shards import narrowed

RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
SCHEDULER = "twotower.integrations.vllm.scheduler.CanvasScheduler"
_WITHOUT = 'start vLLM without "denoiser": true in --additional-config'


def is_two_tower(model_config: ModelConfig) -> bool:
    """Whether vLLM has opened a two-tower checkpoint."""
    return model_config.architecture in (HYBRID, TRANSFORMER)


def has_drafter(speculative_config: SpeculativeConfig | None) -> bool:
    """Whether vLLM's drafts come from this package."""
    return speculative_config is not None and speculative_config.model == DRAFTER


def server_settings(vllm_config: VllmConfig) -> ServerSettings:
    """What a server's `--additional-config` and `--speculative-config` say."""
    return ServerSettings.of(vllm_config.additional_config, drafts=has_drafter(vllm_config.speculative_config))


def settle_denoiser(vllm_config: VllmConfig) -> None:
    """Chooses for a server with the denoiser what it needs and nobody has chosen, before vLLM chooses.

    It needs a scheduler that waits for a step's tokens, of which there may be a whole block, and with the second model
    runner one that knows steps without tokens. Drafts beside it need the first.
    """
    if not server_settings(vllm_config).denoiser:
        return
    scheduler = vllm_config.scheduler_config
    if vllm_config.speculative_config is not None:
        os.environ.setdefault(RUNNER, "0")  # which vLLM and its workers read; a configuration has no field for it
    if scheduler.async_scheduling is None:
        scheduler.async_scheduling = False
    if vllm_config.use_v2_model_runner and scheduler.scheduler_cls is None:
        scheduler.scheduler_cls = SCHEDULER


def check_server(vllm_config: VllmConfig) -> None:
    """Raises ValueError for a server that can't be, with what to start vLLM with instead."""
    if has_drafter(vllm_config.speculative_config):
        sources_of(vllm_config)
    if is_two_tower(vllm_config.model_config) and server_settings(vllm_config).denoiser:
        check_denoiser(vllm_config)


def sources_of(vllm_config: VllmConfig) -> list[str]:
    """The names of the drafter's sources. Raises SettingError for one that this server doesn't have, and ValueError for
    a model that isn't two towers."""
    if not is_two_tower(vllm_config.model_config):
        raise ValueError(f"{vllm_config.model_config.model} is no two-tower checkpoint; choose another drafter")
    settings, folder = server_settings(vllm_config), resolve(vllm_config.model_config.model)
    usual = "denoiser" if settings.denoiser else "prompt"
    named = settings.drafter or read_sampling_defaults(folder).drafter or usual
    sources: list[str] = [source.name for source in draft_sources(named)]
    if "denoiser" in sources and not settings.denoiser:
        raise SettingError("drafter", named, "of ngram and prompt on a server without the denoiser", NEEDED[DIFFUSION])
    if "ngram" in sources and not (folder / NGRAMS_FILE).is_file():
        raise SettingError("drafter", named, f"another for a checkpoint without {NGRAMS_FILE}", "try prompt")
    return sources


def check_denoiser(vllm_config: VllmConfig) -> None:
    """Raises ValueError for what the denoiser can't run with, and for a folder without one.

    Of a checkpoint elsewhere its config and the names of tensors are known only when vLLM reads them.
    """
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    speculative = vllm_config.speculative_config
    problems: Sequence[tuple[bool, str]] = (
        (parallel.pipeline_parallel_size > 1, "--pipeline-parallel-size 1: it reads all layers"),
        (parallel.decode_context_parallel_size > 1, "--decode-context-parallel-size 1: it reads all tokens"),
        (parallel.prefill_context_parallel_size > 1, "--prefill-context-parallel-size 1: it reads all tokens"),
        (
            vllm_config.use_v2_model_runner and speculative is not None,
            f"{RUNNER}=0 in the environment beside drafts, and nothing that needs the second runner",
        ),
        (
            vllm_config.use_v2_model_runner and vllm_config.scheduler_config.scheduler_cls != SCHEDULER,
            f"no --scheduler-cls, or {SCHEDULER}: it knows steps without tokens",
        ),
        (
            vllm_config.use_v2_model_runner and parallel.use_ubatching,
            "no --enable-dbo: in halves of a step it doesn't know which rows wait",
        ),
        (parallel.enable_batch_sharded_sampling, "no batch-sharded sampling: all devices must write the same block"),
        (vllm_config.scheduler_config.async_scheduling, "--no-async-scheduling: a step gives a whole block"),
        (cache.cache_dtype.startswith("fp8"), "--kv-cache-dtype auto: the denoiser reads the cache"),
        (cache.mamba_cache_mode == "all", "--mamba-cache-mode align: the denoiser reads the newest state"),
        (vllm_config.model_config.enable_prompt_embeds, "no --enable-prompt-embeds: blocks follow tokens"),
        (
            speculative is not None and not has_drafter(speculative),
            f'"model": "{DRAFTER}" in --speculative-config, or none: others draft for rows that write blocks, too',
        ),
        (
            vllm_config.model_config.is_hybrid and speculative is not None and cache.mamba_cache_mode == "align",
            "--no-enable-prefix-caching beside drafts for recurrent states: that moves them",
        ),
    )
    for found, needed in problems:
        if found:
            raise ValueError(f"the denoiser needs {needed}")
    folder = Path(vllm_config.model_config.model)
    if not folder.is_dir():
        return
    narrowed(read_config(folder), parallel.tensor_parallel_size)
    if not any(name.startswith("denoiser_tower.") for name in scan(folder).specs):
        raise ValueError(f"the checkpoint has no denoiser: {folder} holds no tensor denoiser_tower.*; {_WITHOUT}")

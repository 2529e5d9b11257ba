"""The denoiser beside vLLM's context tower: its weights, and the blocks that it writes."""

import dataclasses
import functools
from collections.abc import Container, Sequence
from typing import Any, Protocol

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.platforms import current_platform

from twotower.backends.choose import pack_denoiser_
from twotower.checkpoints.hf.generation_file import read_config
from twotower.checkpoints.hf.hub import resolve
from twotower.checkpoints.hf.two_towers import load_denoiser_
from twotower.decoding.output import Token
from twotower.decoding.step import Request
from twotower.integrations.vllm.blocks import fill_blocks, put_blocks, put_logprobs
from twotower.integrations.vllm.canvases import Canvases
from twotower.integrations.vllm.diffusion_params import seed_of
from twotower.integrations.vllm.drafts import Drafts, draft_blocks, draw_of
from twotower.integrations.vllm.outline import outline, request_of
from twotower.integrations.vllm.seeding import CacheReader, RowsCache, first_runner_cache
from twotower.integrations.vllm.server import check_denoiser
from twotower.integrations.vllm.settings import DIFFUSION, ServerSettings
from twotower.integrations.vllm.shards import cut, join_
from twotower.model.state import ContextState


class BlockRow(Protocol):
    """What is read of a request in mode `diffusion`."""

    req_id: str
    sampling_params: SamplingParams | None
    prompt_token_ids: list[int] | None
    output_token_ids: list[int]


class Denoiser:
    """Our denoiser with the weights of the checkpoint that vLLM has opened.

    It owns no cache: a block reads the context tower's keys and states from vLLM's. Not a module, so that vLLM treats
    none of its parameters as one of its own model's. Raises ValueError for a server that it can't run in.

    Where several devices share the context tower's layers each has a part of the denoiser, see `shards`, and all of
    them run it at once over the same rows.
    """

    def __init__(self, vllm_config: VllmConfig, settings: ServerSettings) -> None:
        check_denoiser(vllm_config)
        self._settings = settings
        self._longest = vllm_config.model_config.max_model_len
        self._checkpoint = folder = resolve(vllm_config.model_config.model)
        self._config = read_config(folder)
        self._group = get_tp_group()
        device, size = current_platform.device_type, self._group.world_size
        self.model = outline(folder, vllm_config.model_config.dtype, device, num_devices=size, is_compared=True)
        if size > 1:
            join_(self.model, self._config, self._group)
        self._reader: CacheReader | None = None
        self._canvases = Canvases(self.model)

    def load(self) -> None:
        """Reads the denoiser's weights from the checkpoint, quantised ones as floats; ValueError if it lacks some."""
        if self._group.world_size == 1:
            load_denoiser_(self.model, self._checkpoint)
            pack_denoiser_(self.model)
            return
        load_denoiser_(self.model, self._checkpoint, functools.partial(cut, config=self._config, group=self._group))
        if self._config.tie_word_embeddings:
            self.model.lm_head.tie_(self.model.denoiser_tower.embeddings)
        # The C kernels run whole towers
        pack_denoiser_(self.model, "reference")

    def write(self, runner: Any, output: Any) -> Any:
        """vLLM's sampler output with a block in the place of the token of each row in mode `diffusion`."""
        batch = runner.input_batch
        requests = [runner.requests[name] for name in batch.req_ids]
        # A row that is still in its prompt samples nothing
        rows = [
            row
            for row, request in enumerate(requests)
            if not runner.discard_request_mask.np[row] and self.writes_blocks(request.sampling_params)
        ]
        if not rows:
            return output
        lengths = [int(batch.num_tokens_no_spec[row]) for row in rows]
        with torch.inference_mode():
            context = self._context(first_runner_cache(runner, rows), lengths, (1,) * len(rows))
            filled = fill_blocks(self.model, tuple(self._request(requests[row]) for row in rows), context)
        blocks = {row: block.tokens for row, block in zip(rows, filled, strict=True)}
        before = output.sampled_token_ids
        table = put_blocks(before, {row: [token.id for token in block] for row, block in blocks.items()})
        wide = put_logprobs(output.logprobs_tensors, before, blocks, table.shape[1])
        return dataclasses.replace(output, sampled_token_ids=table, logprobs_tensors=wide)

    def step_blocks(
        self,
        cache: RowsCache,
        rows: Sequence[BlockRow],
        lengths: Sequence[int],
        *,
        until_full: bool,
        hurried: Container[str],
    ) -> dict[str, tuple[Token, ...]]:
        """One denoising step of the blocks of these rows, which begin where they haven't, or as many as it takes until
        one is full, and those of the `hurried` requests: the tokens of those that are, by their requests' ids."""
        names = [row.req_id for row in rows]
        new = {row.req_id: self._request(row) for row in rows if row.req_id not in self._canvases}
        with torch.inference_mode():
            context = self._context(cache, lengths, (1,) * len(rows))
            full = self._canvases.step(names, new, context, until_full=until_full, hurried=hurried)
        return {name: block.tokens for name, block in full.items()}

    def forget(self, name: str) -> None:
        """Drops the unfinished block of a request that has ended or lost its place."""
        self._canvases.forget([name])

    def draft(self, runner: Any, rows: list[int], newest: list[int], widths: list[int]) -> Drafts:
        """Drafts for some rows: the denoiser's tokens of a block of each row's width behind its newest token, which the
        context tower hasn't read."""
        lengths = [int(runner.input_batch.num_tokens_no_spec[row]) - 1 for row in rows]
        kept: Sequence[int] = (1,) * len(rows)
        if runner.model_config.is_hybrid:
            kept = runner.num_accepted_tokens.gpu[rows].tolist()
        requests = [runner.requests[runner.input_batch.req_ids[row]] for row in rows]
        draws = [draw_of(request.sampling_params, request.req_id) for request in requests]
        with torch.inference_mode():
            context = self._context(first_runner_cache(runner, rows), lengths, kept)
            return draft_blocks(self.model, context, newest, widths, draws)

    def _context(self, cache: RowsCache, lengths: Sequence[int], kept: Sequence[int]) -> ContextState:
        """The state of these rows, of the heads that this device has."""
        if self._reader is None:
            self._reader = CacheReader(cache.layers, cache.kv_cache_config, self.model.config)
        return self._reader.state(cache.tables, lengths, kept)

    def writes_blocks(self, params: SamplingParams | None) -> bool:
        """Whether a request with these parameters is in mode `diffusion`."""
        return params is not None and self._settings.mode_of(params.extra_args) == DIFFUSION

    def _request(self, request: BlockRow) -> Request:
        params, prompt = request.sampling_params, request.prompt_token_ids
        assert params is not None
        assert prompt is not None
        ours = request_of(self.model, params, self._longest, prompt=tuple(prompt))
        return ours._replace(seed=seed_of(ours.params, request.req_id), produced=tuple(request.output_token_ids))

"""What vLLM's second model runner keeps for our models, and how it samples: `diffusion` beside vLLM's own sampler.

A row in `diffusion` reads its text as any other. Where a row in `ar` would get a token, the denoiser begins its block
and fills it from one step of vLLM to the next. Meanwhile the row is in each step with its last token once more, which
leaves no trace in the cache. A full block counts as the rest of the row's prompt, which the runner reads from its table
of texts; of what was sampled it reads the newest token alone. Only the process with the second runner imports this.
Letters: b rows of a step, m blocks of a row, t tokens of a step.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm import SamplingParams
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID, PAD_SLOT_ID
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

from twotower.decoding.output import Token
from twotower.integrations.vllm.blocks import put_blocks, put_logprobs
from twotower.integrations.vllm.denoiser import Denoiser
from twotower.integrations.vllm.seeding import RowsCache

# How the requests' names begin with which vLLM warms its kernels up
_WARMUPS = ("_warmup_", "_v2_mixed_warmup", "_sparse_mla_v2_warmup")


@dataclasses.dataclass
class CanvasRow:
    """A request in mode `diffusion` at a place of the runner's tables; `waits` while its block is unfinished."""

    req_id: str
    sampling_params: SamplingParams | None
    prompt_token_ids: list[int] | None
    output_token_ids: list[int]
    place: int
    waits: bool = False

    @property
    def tells_of_prompt(self) -> bool:
        """Whether it asks for log-probabilities of its prompt's tokens."""
        params = self.sampling_params
        if params is None:
            return False
        return params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None


class BlockSampler:
    """vLLM's sampler, with blocks in the place of what it gave rows in `diffusion`. All but the call is its own."""

    def __init__(self, sampler: Any, state: "_Canvases") -> None:
        self._sampler = sampler
        self._state = state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def __call__(self, logits: Tensor, batch: Any) -> Any:
        """vLLM's SamplerOutput for the rows of a step, which get one token, a block, or none."""
        output = self._sampler(logits, batch)
        ends = batch.num_computed_tokens_np + batch.num_scheduled_tokens
        # A row that is still in its prompt samples nothing
        found = {
            row: self._state.canvas_rows[name]
            for row, name in enumerate(batch.req_ids)
            if name in self._state.canvas_rows and ends[row] >= batch.prefill_len_np[row]
        }
        if not found:
            return output
        lengths = [int(ends[row]) for row in found]
        blocks = self._state.step_blocks(list(found.values()), lengths, alone=len(found) == batch.num_reqs)
        counts, rejected = output.num_sampled.tolist(), output.num_rejected.tolist()
        prefill = self._sampler.req_states.prefill_len
        full: dict[int, tuple[Token, ...]] = {}
        for (row, canvas), length in zip(found.items(), lengths, strict=True):
            block = blocks.get(canvas.req_id)
            canvas.waits = block is None
            # Of the tokens that a waiting row has read the last counts as rejected: it is read again.
            counts[row], rejected[row] = (0, 1) if block is None else (len(block), 0)
            if block is not None:
                full[row] = block
                canvas.output_token_ids += [token.id for token in block]
                prefill.np[canvas.place] = length + len(block)
        prefill.copy_to_uva()
        before = output.sampled_token_ids
        table = put_blocks(before, {row: [token.id for token in block] for row, block in full.items()})
        return dataclasses.replace(
            output,
            sampled_token_ids=table,
            logprobs_tensors=_with_starts(put_logprobs(output.logprobs_tensors, before, full, table.shape[1]), table),
            num_sampled=torch.tensor(counts).to(output.num_sampled),
            num_rejected=torch.tensor(rejected).to(output.num_rejected),
        )


def _with_starts(logprobs: Any, table: Tensor) -> Any:
    """vLLM's LogprobsTensors, or None, told where each row of the table (b, s) begins in them."""
    b, s = table.shape
    starts = [row * s for row in range(b + 1)]
    return None if logprobs is None else logprobs._replace(cu_num_generated_tokens=starts)


class _Canvases(ModelState):
    """What both kinds of models have: the rows that are in `diffusion`, by their names."""

    def __init__(self, vllm_config: Any, model: nn.Module, *args: Any) -> None:
        super().__init__(vllm_config, model, *args)
        self._denoiser = cast(Denoiser, model.denoiser)
        self._layers = vllm_config.compilation_config.static_forward_context
        self._attn_groups: Any = ()  # which vLLM tells in `prepare_attn` alone, for all of its steps the same
        self.canvas_rows: dict[str, CanvasRow] = {}

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        """The sampler that vLLM uses for all rows, and none for drafts."""
        return BlockSampler(sampler, self), None

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        """Keeps where blocks are found."""
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self._kv_cache_config, self._block_tables = kv_cache_config, block_tables

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """A new row, or one that had lost its place and comes back."""
        super().add_request(req_index, new_req_data)
        name, params = new_req_data.req_id, new_req_data.sampling_params
        if self._denoiser.writes_blocks(params) and not name.startswith(_WARMUPS):
            prompt = new_req_data.prompt_token_ids
            written = new_req_data.prefill_token_ids[len(prompt) :]
            self.canvas_rows[name] = CanvasRow(name, params, prompt, list(written), req_index)

    def remove_request(self, req_id: str) -> None:
        """A row that has ended or loses its place, with its unfinished block."""
        super().remove_request(req_id)
        if self.canvas_rows.pop(req_id, None) is not None:
            self._denoiser.forget(req_id)

    def prepare_attn(
        self, batch: Any, mode: Any, tables: Any, slots: Tensor, groups: Any, config: Any, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Attention's metadata, by which waiting rows write no keys and change the states that nobody uses."""
        self._attn_groups = groups
        for row, name in enumerate(batch.req_ids):
            if name in self.canvas_rows and self.canvas_rows[name].waits:
                start, end = batch.query_start_loc_np[row : row + 2]
                slots[:, start:end] = PAD_SLOT_ID
                for number, group in enumerate(config.kv_cache_groups):
                    if isinstance(group.kv_cache_spec, MambaSpec):
                        tables[number][row] = NULL_BLOCK_ID
        return super().prepare_attn(batch, mode, tables, slots, groups, config, *args, **kwargs)

    def step_blocks(
        self, rows: Sequence[CanvasRow], lengths: Sequence[int], *, alone: bool
    ) -> dict[str, tuple[Token, ...]]:
        """The blocks that are full after this step of vLLM; where all of its rows write blocks, nobody waits for more
        denoising steps, and it takes as many as one block needs.

        A row with log-probabilities of its prompt must have a block in the step that ends it: vLLM asserts that what it
        says of a prompt comes with tokens.
        """
        places, tables = [row.place for row in rows], dict[str, Tensor]()
        for groups, table in zip(self._attn_groups, self._block_tables.block_tables, strict=True):
            for group in groups:
                # Kernels may want smaller blocks than those that vLLM shares out
                tables |= dict.fromkeys(group.layer_names, group.map_to_kernel_block_table(table.gpu[places]).long())
        cache = RowsCache(self._layers, self._kv_cache_config, tables)
        hurried = {row.req_id for row in rows if row.tells_of_prompt and not row.output_token_ids}
        return self._denoiser.step_blocks(cache, rows, lengths, until_full=alone, hurried=hurried)


class CanvasState(_Canvases, DefaultModelState):
    """vLLM's state for models with attention alone, and `diffusion`."""


class HybridCanvasState(_Canvases, MambaHybridModelState):
    """vLLM's state for models with recurrent layers, and `diffusion`."""

    def postprocess_state(self, idx_mapping: Tensor, num_sampled: Any, num_computed_tokens: Any = None) -> None:
        """What the prefix cache keeps of states. A waiting row's is ahead of what counts as read, and a block's tokens
        are no drafts, of which some were kept."""
        waiting = [row.place for row in self.canvas_rows.values() if row.waits]
        held = torch.isin(idx_mapping, torch.tensor(waiting, dtype=idx_mapping.dtype).to(idx_mapping.device))
        if isinstance(num_sampled, Tensor):
            num_sampled = num_sampled.clamp(max=1)
        super().postprocess_state(idx_mapping.masked_fill(held, -1), num_sampled, num_computed_tokens)


def state_class(*, hybrid: bool, blocks: bool) -> type[ModelState]:
    """The class for a model with recurrent layers or without, on a server with the denoiser or without."""
    if blocks:
        return HybridCanvasState if hybrid else CanvasState
    return MambaHybridModelState if hybrid else DefaultModelState

"""Drafts of mode `verified` inside vLLM's speculative decoding, as a class that `--speculative-config` names.

vLLM verifies them by a pass of the context tower and decides by its rejection sampler, as for any draft.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from twotower.checkpoints.hf.generation_file import read_config, read_sampling_defaults
from twotower.checkpoints.hf.hub import resolve
from twotower.checkpoints.hf.ngrams_file import NGRAMS_FILE, read_ngrams
from twotower.checkpoints.hf.tokenizer_file import load_tokenizer
from twotower.decoding.drafters import draft_sources
from twotower.decoding.drafting import ngram, prompt_lookup
from twotower.decoding.drafting.written import Written
from twotower.errors import SettingError
from twotower.integrations.vllm.settings import VERIFIED
from twotower.model.ngrams import NgramTable


class TwoTowerDrafter:
    """Proposes tokens for the rows whose requests are in mode `verified`.

    Raises SettingError for a drafter that can't draft here, ValueError for a model that isn't two towers.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        from twotower.integrations.vllm.patches import is_two_tower, pass_requests_to_drafter, server_settings

        if not is_two_tower(vllm_config.model_config):
            raise ValueError(f"{vllm_config.model_config.model} is no two-tower checkpoint; choose another drafter")
        if vllm_config.model_config.is_hybrid and current_platform.is_cpu():
            raise ValueError(
                "vLLM's build for CPUs can't verify drafts for models with recurrent states: its kernels give other "
                "tokens than without drafts; leave --speculative-config out, or use twotower serve"
            )
        self._settings = server_settings(vllm_config)
        self._most = vllm_config.speculative_config.num_speculative_tokens
        self._longest = vllm_config.model_config.max_model_len
        folder = resolve(vllm_config.model_config.model)
        config = read_config(folder)
        named = self._settings.drafter or read_sampling_defaults(folder).drafter or "prompt"
        self._sources = [source.name for source in draft_sources(named)]
        if "denoiser" in self._sources:
            raise SettingError("drafter", named, "of ngram and prompt in vLLM", "twotower serve drafts from denoisers")
        self._table: NgramTable | None = None
        if "ngram" in self._sources:
            self._table = read_ngrams(folder, config, load_tokenizer(folder, config.vocab_size))
            if self._table is None:
                raise SettingError("drafter", named, f"another for a checkpoint without {NGRAMS_FILE}", "try prompt")
        self._written: dict[str, Written] = {}
        pass_requests_to_drafter()

    def load_model(self, model: nn.Module) -> None:
        """Nothing: these drafters have no weights."""

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens: NDArray[np.integer],
        token_ids: NDArray[np.integer],
        requests: Sequence[CachedRequestState],
        **_: Any,
    ) -> list[list[int]]:
        """A draft for each row (b), empty for one without; `token_ids` (b, t) has num_tokens (b) of each row, the newly
        sampled among them."""
        self._written = {r.req_id: self._written[r.req_id] for r in requests if r.req_id in self._written}
        drafts = []
        for place, request in enumerate(requests):
            params = request.sampling_params
            draft: list[int] = []
            # A row that is still in its prompt has sampled nothing
            if (
                params is not None
                and sampled_token_ids[place]
                and self._settings.mode_of(params.extra_args) == VERIFIED
            ):
                ids = token_ids[place, : num_tokens[place]]
                # The last token that a pass gives needs no draft
                left = self._longest if params.max_tokens is None else params.max_tokens - len(request.output_token_ids)
                most = min(self._most, self._longest - len(ids) - 1, left - 1)
                draft = self._draft(request.req_id, ids, most)
                stops = params.all_stop_token_ids
                end = next((n for n, token in enumerate(draft, 1) if token in stops), len(draft))
                draft = draft[:end]
            drafts.append(draft)
        return drafts

    def _draft(self, request_id: str, ids: NDArray[np.integer], most: int) -> list[int]:
        """The draft of the first source that has one."""
        if most < 1:
            return []
        known = self._written.get(request_id)
        # A request that was preempted and came back has the same tokens
        written = Written.of(ids.tolist()) if known is None else known.after(ids[known.length :].tolist())
        self._written[request_id] = written
        for name in self._sources:
            if name == "ngram":
                assert self._table is not None
                draft = ngram.continuation(self._table, written.ids, most)
            else:
                draft = prompt_lookup.continuation(written, most)
            if draft:
                return draft
        return []

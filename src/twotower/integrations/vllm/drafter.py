"""Drafts of mode `verified` inside vLLM's speculative decoding, as a class that `--speculative-config` names.

vLLM verifies them by a pass of the context tower and decides by its rejection sampler, as for any draft.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from twotower.checkpoints.hf.generation_file import read_config
from twotower.checkpoints.hf.hub import resolve
from twotower.checkpoints.hf.ngrams_file import read_ngrams
from twotower.checkpoints.hf.tokenizer_file import load_tokenizer
from twotower.decoding.drafting import ngram, prompt_lookup
from twotower.decoding.drafting.denoiser import next_length
from twotower.decoding.drafting.written import Written
from twotower.integrations.vllm.drafts import probabilities_of
from twotower.integrations.vllm.server import server_settings, sources_of
from twotower.integrations.vllm.settings import VERIFIED
from twotower.model.ngrams import NgramTable


class TwoTowerDrafter:
    """Proposes tokens for the rows whose requests are in mode `verified`.

    Raises SettingError for a drafter that can't draft here, ValueError for a model that isn't two towers.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        from twotower.integrations.vllm.patches import (
            keep_recurrent_states,
            pass_rows_to_drafter,
            sample_behind_drafts,
            verify_recurrent_states,
        )

        self._sources = sources_of(vllm_config)
        if vllm_config.model_config.is_hybrid:
            keep_recurrent_states()
            if current_platform.is_cpu():
                verify_recurrent_states()
        self._settings = server_settings(vllm_config)
        self._longest = vllm_config.model_config.max_model_len
        folder = resolve(vllm_config.model_config.model)
        config = read_config(folder)
        self._block_size = config.block_size
        self._table: NgramTable | None = None
        if "ngram" in self._sources:
            self._table = read_ngrams(folder, config, load_tokenizer(folder, config.vocab_size))
        self._written: dict[str, Written] = {}
        self._widths: dict[str, int] = {}
        self._drawn: dict[str, Tensor] = {}
        pass_rows_to_drafter()
        sample_behind_drafts()

    def load_model(self, model: nn.Module) -> None:
        """Nothing: the denoiser is loaded with the model, and other drafters have no weights."""

    def propose(self, runner: Any, sampled_token_ids: Sequence[Sequence[int]], longest_draft: int) -> list[list[int]]:
        """A draft for each row (b) of vLLM's model runner, of at most `longest_draft` tokens and empty for a row
        without one, after it has noted what was sampled (b, of each row any number)."""
        batch = runner.input_batch
        requests = [runner.requests[name] for name in batch.req_ids]
        self._written = {r.req_id: self._written[r.req_id] for r in requests if r.req_id in self._written}
        self._widths = {r.req_id: self._widths[r.req_id] for r in requests if r.req_id in self._widths}
        # A row that isn't in this step still has its draft
        waiting = runner.requests.keys() - batch.req_id_to_index.keys()
        self._drawn = {name: self._drawn[name] for name in waiting if name in self._drawn}
        drafts: list[list[int]] = [[] for _ in requests]
        asked: dict[int, int] = {}  # rows that the denoiser drafts for, and the width of their block
        for row, request in enumerate(requests):
            length = int(batch.num_tokens_no_spec[row])
            most = min(longest_draft, self._room(request, length))
            # A row that is still in its prompt has sampled nothing
            if sampled_token_ids[row] and most >= 1:
                draft = self._continuation(request.req_id, batch.token_ids_cpu[row, :length], most)
                if draft is None:
                    asked[row] = self._width(request.req_id, most, len(sampled_token_ids[row]))
                else:
                    drafts[row] = draft
        if asked:
            newest = [sampled_token_ids[row][-1] for row in asked]
            proposed = runner.get_model().denoiser.draft(runner, list(asked), newest, list(asked.values()))
            for place, (row, draft) in enumerate(zip(asked, proposed.tokens, strict=True)):
                drafts[row] = draft
                if place in proposed.probabilities:
                    self._drawn[requests[row].req_id] = proposed.probabilities[place]
        return [_ended(draft, request) for draft, request in zip(drafts, requests, strict=True)]

    def probabilities(self, runner: Any, drafted: Any) -> Tensor | None:
        """With which probabilities (t, v) the drafts (t) came about that vLLM's metadata has for the runner's rows;
        None where each was certain."""
        rows = list(zip(runner.input_batch.req_ids, drafted.num_draft_tokens, strict=True))
        return probabilities_of(drafted.draft_token_ids, rows, self._drawn, runner.input_batch.vocab_size)

    def _room(self, request: CachedRequestState, length: int) -> int:
        """The most tokens that a request's draft may have behind `length` tokens; 0 for one in another mode."""
        params = request.sampling_params
        if params is None or self._settings.mode_of(params.extra_args) != VERIFIED:
            return 0
        left = self._longest if params.max_tokens is None else params.max_tokens - len(request.output_token_ids)
        # The last token that a pass gives needs no draft
        return min(self._longest - length - 1, left - 1)

    def _continuation(self, request_id: str, ids: NDArray[np.integer], most: int) -> list[int] | None:
        """The draft of the first source that has one, where it reads the text; None where it is the denoiser."""
        known = self._written.get(request_id)
        # A request that was preempted and came back has the same tokens
        written = Written.of(ids.tolist()) if known is None else known.after(ids[known.length :].tolist())
        self._written[request_id] = written
        for name in self._sources:
            if name == "denoiser":
                return None
            if name == "ngram":
                assert self._table is not None
                draft = ngram.continuation(self._table, written.ids, most)
            else:
                draft = prompt_lookup.continuation(written, most)
            if draft:
                return draft
        return []

    def _width(self, request_id: str, most: int, num_emitted: int) -> int:
        """The width of the block that the denoiser fills, behind the newest token that is its first, which follows how
        much was kept lately."""
        known = self._widths.get(request_id)
        width = self._block_size if known is None else next_length(known, num_emitted)
        self._widths[request_id] = min(max(width, 2), most + 1, self._block_size)
        return self._widths[request_id]


def _ended(draft: list[int], request: CachedRequestState) -> list[int]:
    """A draft up to the first token that ends the text."""
    params, stops = request.sampling_params, set[int]()
    if params is not None:
        # A text that goes on behind its end token has that one, too, among all that stop
        stops = set(params.stop_token_ids or ()) if params.ignore_eos else params.all_stop_token_ids
    end = next((n for n, token in enumerate(draft, 1) if token in stops), len(draft))
    return draft[:end]

"""Where the recurrent states of a row are that took several tokens and no draft, in a server that verifies drafts.

A row has an entry of the cache for each token that it may take in a step. A step over drafts begins at the entry of the
last token that was kept, and leaves the state after its k-th token in the k-th entry. A step over a prompt begins at
the first entry and leaves its last state there. vLLM knows how many drafted tokens were kept, but takes any short row
behind its prompt for a draft, such as a block of mode `diffusion` or the last tokens of a text that has lost its place
and comes back. Here such rows end like a prompt: with their last state in the first entry. Letters: b rows, s tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.v1.kv_cache_interface import MambaSpec


def settle_rows_(runner: Any, num_drafts: Sequence[int]) -> None:
    """Puts the last state of rows that had several tokens and no draft where the next step begins; `num_drafts` (b,)
    are the drafted tokens of the step that the runner has just computed."""
    rows, counts = _rows(runner, num_drafts)
    if not len(rows):
        return
    layers = runner.compilation_config.static_forward_context
    for number, group in enumerate(runner.kv_cache_config.kv_cache_groups):
        if not isinstance(group.kv_cache_spec, MambaSpec):
            continue
        table = runner.input_batch.block_table[number].block_table.np
        entries = torch.from_numpy(np.stack([table[rows, 0], table[rows, counts - 1]])).long()
        for name in group.layer_names:
            conv, ssm = layers[name].kv_cache[:2]
            first, last = entries.to(ssm.device)
            ssm[first] = ssm[last]
            # The convolution has one entry, in which its last inputs stand behind those of this step.
            places = conv.transpose(1, 2) if is_conv_state_dim_first() else conv  # (entries, places, channels)
            width = places.shape[1] - runner.num_spec_tokens
            behind = torch.from_numpy(counts)[:, None] - 1 + torch.arange(width)
            places[first, :width] = places[first[:, None], behind.to(conv.device)]


def first_tokens(tokens: Tensor, req_ids: Sequence[str], drafted: Sequence[str]) -> Tensor:
    """What was sampled (b, s) with one token for each row that is not among the `drafted`: vLLM counts a row's tokens
    to learn how many of a draft were kept."""
    alone = [row for row, name in enumerate(req_ids) if name not in drafted]
    counted = tokens.clone()
    counted[torch.tensor(alone, dtype=torch.long, device=tokens.device), 1:] = -1
    return counted


def _rows(runner: Any, num_drafts: Sequence[int]) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """The rows that vLLM took for drafts though they had none, and how many tokens of each; both (rows,)."""
    batch = runner.input_batch
    counts = np.diff(runner.query_start_loc.np[: batch.num_reqs + 1])
    computed = batch.num_computed_tokens_cpu[: batch.num_reqs]
    # As vLLM tells rows apart for recurrent layers: the first that reads a prompt or many tokens, and all behind it
    prompt = (computed < batch.num_prompt_tokens[: batch.num_reqs]) & ((counts > 1) | (computed == 0))
    long = prompt | (counts > 1 + runner.num_spec_tokens)
    end = int(long.argmax()) if long.any() else batch.num_reqs
    rows = np.flatnonzero((counts[:end] > 1) & (np.asarray(num_drafts)[:end] == 0))
    return rows, counts[rows]

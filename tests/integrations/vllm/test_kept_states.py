"""Which rows vLLM takes for drafts though they have none, and where their recurrent states go."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm")
PLACES = 5  # of an entry for the convolution: 2 inputs before a token, and one for each of 3 drafted tokens


@pytest.fixture
def runner():
    """runner(counts, computed, prompts): a model runner with one recurrent layer whose entries hold their numbers."""
    from vllm.v1.kv_cache_interface import MambaSpec

    def make(counts, computed, prompts):
        number = len(counts)
        table = np.arange(1, 1 + 4 * number).reshape(number, 4)
        conv = torch.arange(float((1 + 4 * number) * PLACES)).reshape(-1, PLACES, 1)
        ssm = torch.arange(float(1 + 4 * number))[:, None, None, None]
        spec = MambaSpec(block_size=16, shapes=((PLACES, 1), (1, 1, 1)), dtypes=(torch.float32, torch.float32))
        group = SimpleNamespace(kv_cache_spec=spec, layer_names=["mixer"])
        return SimpleNamespace(
            num_spec_tokens=3,
            query_start_loc=SimpleNamespace(np=np.cumsum([0, *counts])),
            kv_cache_config=SimpleNamespace(kv_cache_groups=[group]),
            compilation_config=SimpleNamespace(static_forward_context={"mixer": SimpleNamespace(kv_cache=(conv, ssm))}),
            input_batch=SimpleNamespace(
                num_reqs=number,
                num_computed_tokens_cpu=np.array(computed),
                num_prompt_tokens=np.array(prompts),
                block_table=[SimpleNamespace(block_table=SimpleNamespace(np=table))],
            ),
        )

    return make


@pytest.mark.parametrize(
    ("counts", "computed", "num_drafts", "moved"),
    [
        ([1, 3, 2], [10, 10, 10], [0, 0, 1], [1]),  # one token, a block of three, one token with a draft
        ([4, 5], [10, 10], [0, 0], [0]),  # five tokens are too many for drafts
        ([2, 3], [0, 10], [0, 0], []),  # all behind a prompt's beginning end as it does
        ([1, 2, 2], [4, 10, 4], [0, 0, 0], [1]),  # a prompt's last token is as one behind it, two aren't
    ],
)
def test_rows_of_several_tokens_without_a_draft_leave_their_last_state_in_the_first_entry(
    counts, computed, num_drafts, moved, runner
) -> None:
    from twotower.integrations.vllm.kept_states import settle_rows_

    running = runner(counts, computed, [8] * len(counts))
    conv, ssm = running.compilation_config.static_forward_context["mixer"].kv_cache
    before, states = conv.clone(), ssm.clone()
    settle_rows_(running, num_drafts)
    for row, count in enumerate(counts):
        first, last = 1 + 4 * row, 4 * row + count
        assert ssm[first] == (states[last] if row in moved else states[first])
        kept = before[first, count - 1 : count + 1] if row in moved else before[first, :2]
        assert torch.equal(conv[first, :2], kept)


def test_only_rows_with_drafts_count_more_than_one_token() -> None:
    from twotower.integrations.vllm.kept_states import first_tokens

    sampled = torch.tensor([[5, 6, 7], [8, 9, -1], [4, -1, -1]], dtype=torch.int32)
    counted = first_tokens(sampled, ["block", "drafted", "alone"], ["drafted"])
    assert counted.tolist() == [[5, -1, -1], [8, 9, -1], [4, -1, -1]]
    assert sampled[0].tolist() == [5, 6, 7]

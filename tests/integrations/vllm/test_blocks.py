"""Blocks that are filled and put into vLLM's output, without vLLM."""

from typing import NamedTuple

import pytest
import torch

from twotower import SamplingParams, generate
from twotower.decoding.record import make_request
from twotower.integrations.vllm.blocks import fill_blocks, put_blocks, put_logprobs


@pytest.mark.parametrize("pattern", ["llama", "M*-E"])
def test_blocks_are_those_of_generate_with_as_many_passes(pattern, tiny) -> None:
    model = tiny(pattern)
    prompts, lengths = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]], (40, 16, 3)
    params = [SamplingParams(max_new_tokens=n, temperature=0) for n in lengths]
    requests = tuple(make_request(model, p, one) for p, one in zip(prompts, params, strict=True))
    table = torch.tensor([p + [0] * (5 - len(p)) for p in prompts])
    filled = fill_blocks(model, requests, model.prefill(table, [len(p) for p in prompts]))
    for place, whole in enumerate(generate(model, prompts, params)):
        assert [t.id for t in filled[place].tokens] == whole.token_ids[:16]
        assert [t.step for t in filled[place].tokens] == whole.commit_steps[:16]
        if lengths[place] <= 16:
            assert filled[place].num_calls == whole.stats.denoiser_calls


def test_blocks_take_the_place_of_sampled_tokens() -> None:
    table = put_blocks(torch.tensor([[7, -1], [8, 9]], dtype=torch.int32), {0: [1, 2, 3]})
    assert table.tolist() == [[1, 2, 3], [8, 9, -1]]
    assert put_blocks(torch.tensor([[7, 6], [8, 9]]), {1: [5]}).tolist() == [[7, 6], [5, -1]]


class Logprobs(NamedTuple):
    """As vLLM's LogprobsTensors."""

    logprobs: torch.Tensor
    ranks: torch.Tensor
    starts: list[int] | None = None


def test_log_probabilities_stay_with_their_rows() -> None:
    given = Logprobs(torch.arange(4.0)[:, None], torch.arange(4))
    wide = put_logprobs(given, 2, 2, 3)
    assert wide.ranks.tolist() == [0, 1, 0, 2, 3, 0]
    assert wide.logprobs.tolist() == [[0], [1], [0], [2], [3], [0]]
    assert put_logprobs(given, 2, 2, 2) is given
    assert put_logprobs(None, 2, 2, 3) is None

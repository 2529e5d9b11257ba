"""Blocks that are filled and put into vLLM's output, without vLLM."""

import math
from typing import NamedTuple

import pytest
import torch

from twotower import SamplingParams, generate
from twotower.decoding.output import Token
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

    logprob_token_ids: torch.Tensor
    logprobs: torch.Tensor
    selected_token_ranks: torch.Tensor
    cu_num_generated_tokens: list[int] | None = None


SAMPLED = torch.tensor([[7, 6], [8, 9]])


def given() -> Logprobs:
    """Those of two rows with two places each, of the chosen token alone."""
    ids = torch.tensor([[7], [6], [8], [9]], dtype=torch.int32)
    return Logprobs(ids, -torch.arange(4.0)[:, None], torch.arange(4))


def test_log_probabilities_stay_with_their_rows() -> None:
    wide = put_logprobs(given(), SAMPLED, {}, 3)
    assert wide.logprob_token_ids.tolist() == [[7], [6], [0], [8], [9], [0]]
    assert wide.logprobs.tolist() == [[0], [-1], [0], [-2], [-3], [0]]
    assert wide.selected_token_ranks.tolist() == [0, 1, 0, 2, 3, 0]
    unasked = {0: (Token(5, 0, 0.5), Token(4, 1, 0.5))}
    for table, same in zip(put_logprobs(given(), SAMPLED, unasked, 2)[:3], given(), strict=False):
        assert torch.equal(table, same)
    assert put_logprobs(None, SAMPLED, unasked, 3) is None


def test_those_of_a_block_take_the_place_of_the_sampled_tokens() -> None:
    block = (
        Token(5, 0, 0.25, ((2, -1.0), (5, -1.5)), 2),
        Token(4, 1, 0.0, ((2, -0.5), (3, -2.0)), 9),
        Token(3, 1, 0.5, ((3, -0.25), (2, -3.0)), 1),
    )
    wide = put_logprobs(given(), SAMPLED, {1: block}, 3)
    assert wide.logprob_token_ids.tolist() == [[7, 0, 0], [6, 0, 0], [0, 0, 0], [5, 2, 5], [4, 2, 3], [3, 3, 2]]
    assert wide.logprobs[3:].tolist() == [[-1.5, -1.0, -1.5], [-math.inf, -0.5, -2.0], [-0.25, -0.25, -3.0]]
    assert wide.selected_token_ranks.tolist() == [0, 1, 0, 2, 9, 1]
    assert [table.dtype for table in wide[:3]] == [table.dtype for table in given()[:3]]

"""RoPE that depends on a text's length: for a text of n tokens it is ours where n tokens are planned."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

ORIGINAL = 24  # tokens; texts have 40
DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0},
    "max_position_embeddings": ORIGINAL,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.2, 1.4, 1.6],
    "long_factor": [2.0, 3.0, 5.0, 9.0],
    "original_max_position_embeddings": ORIGINAL,
}
# As Phi 3's first release wrote it
OLDER = {"type": "su", "short_factor": LONGROPE["short_factor"], "long_factor": LONGROPE["long_factor"]}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", DYNAMIC),
    ("qwen2", {"rope_parameters": LONGROPE | {"factor": 4.0}}),
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": ORIGINAL, "sliding_window": None}),
    ("phi3", {"rope_parameters": LONGROPE | {"attention_factor": 1.5}, "sliding_window": 12}),
]


@pytest.mark.parametrize(("model_type", "settings"), CASES)
@pytest.mark.parametrize("length", [ORIGINAL, ORIGINAL + 1, 40])
def test_a_text_is_turned_by_its_length(
    model_type: str, settings: dict[str, Any], length: int, open_family: Callable, same_logits: Callable
) -> None:
    opened = open_family(model_type, length=length, **settings)
    same_logits(opened.ours.context_logits(opened.ids), opened.logits)
    state = opened.ours.prefill(opened.ids[:, :3], capacity=length)
    for block in opened.ids[:, 3:].split(7, dim=1):
        state = opened.ours.extend(block, state)
    same_logits(state.next_logits, opened.logits[:, -1])


@pytest.mark.parametrize(("model_type", "settings"), CASES[:2])
def test_rows_of_one_batch_are_turned_by_their_own_lengths(
    model_type: str, settings: dict[str, Any], open_family: Callable, same_logits: Callable
) -> None:
    short, long = (open_family(model_type, length=length, **settings) for length in (20, 40))
    ids = long.ids.clone()
    ids[0, :20] = short.ids[0]
    for model in (long.ours, long.fastest):
        state = model.prefill(ids, lengths=(20, 40))
        same_logits(state.next_logits, torch.stack((short.logits[0, -1], long.logits[1, -1])))
        again = model.prefill(ids[:, :13], planned=(20, 40)).select([1, 0])
        both = model.extend(torch.stack((long.ids[1, 13:20], short.ids[0, 13:20])), again)
        same_logits(both.next_logits[1], short.logits[0, -1])
        same_logits(both.next_logits[0], long.logits[1, 19])

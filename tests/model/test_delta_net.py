from collections.abc import Callable

import pytest
import torch

from twotower.model.delta_net import DeltaNet
from twotower.model.state import MambaState


def mixer(tiny: Callable) -> DeltaNet:
    return tiny("G", dtype=torch.float64).context_tower.layers[0].mixer


def seeded(layer: DeltaNet, batch: int) -> MambaState:
    torch.manual_seed(1)
    return MambaState(*(torch.randn_like(part) for part in layer.initial_state(batch)))


@pytest.mark.parametrize("tokens", [1, 2, 17, 70])
def test_marks_are_the_states_of_prefixes(tokens: int, tiny: Callable, close: Callable) -> None:
    layer = mixer(tiny)
    state, x = seeded(layer, 2), torch.randn(2, tokens, 32, dtype=torch.float64)
    prepared = layer.prepare(x, state.conv)
    marks = tuple(sorted({0, tokens // 2, tokens}))
    mixed, end, marked = layer.scan(prepared, state, marks, torch.float64)
    close(layer.outputs(prepared, state, torch.float64), mixed, 1e-12)
    close(layer.advance(prepared, state, None, None).ssm, end, 1e-12)
    for mark, found in zip(marks, marked, strict=True):
        expected = layer.advance(prepared, state, torch.full((2,), mark), torch.full_like(end, torch.nan))
        close(found.ssm, expected.ssm, 1e-12)
        assert torch.equal(found.conv, expected.conv)


def test_states_are_float32_beside_bf16_weights(tiny: Callable, ids: Callable) -> None:
    state = tiny("G", dtype=torch.bfloat16).prefill(ids(1, 5))
    assert state.mamba[0].ssm.dtype == torch.float32
    assert state.mamba[0].conv.dtype == torch.bfloat16

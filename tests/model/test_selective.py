from collections.abc import Callable

import pytest
import torch

from twotower.model.selective import SelectiveMixer
from twotower.model.state import MambaState


def mixer(tiny: Callable, kind: str, **config: object) -> SelectiveMixer:
    return tiny(kind, dtype=torch.float64, **config).context_tower.layers[0].mixer


def seeded(layer: SelectiveMixer, batch: int) -> MambaState:
    """A state after some tokens: a channel that counts them is 1 in it."""
    torch.manual_seed(1)
    conv, ssm = (torch.randn_like(part) for part in layer.initial_state(batch))
    if layer.core.counts:
        conv[..., -1] = 1.0
    return MambaState(conv, ssm)


@pytest.mark.parametrize("kind", ["S", "R"])
@pytest.mark.parametrize("tokens", [1, 2, 17, 70])
def test_marks_are_the_states_of_prefixes(kind: str, tokens: int, tiny: Callable, close: Callable) -> None:
    layer = mixer(tiny, kind)
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


@pytest.mark.parametrize("kind", ["S", "R"])
def test_states_are_float32_beside_bf16_weights(kind: str, tiny: Callable, ids: Callable) -> None:
    state = tiny(kind, dtype=torch.bfloat16).prefill(ids(1, 5))
    assert state.mamba[0].ssm.dtype == torch.float32
    assert state.mamba[0].conv.dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "shapes"), [("S", ((3, 3, 32), (3, 32, 8))), ("R", ((3, 3, 33), (3, 32, 1)))])
def test_states_have_a_row_for_each_channel(kind: str, shapes: tuple[tuple[int, ...], ...], tiny: Callable) -> None:
    assert tuple(tuple(part.shape) for part in mixer(tiny, kind).initial_state(3)) == shapes

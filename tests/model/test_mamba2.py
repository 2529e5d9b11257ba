from collections.abc import Callable

import pytest
import torch

from twotower.model.mamba2 import Mamba2
from twotower.model.state import MambaState


def mixer(tiny: Callable, **config: object) -> Mamba2:
    return tiny("M", dtype=torch.float64, **config).context_tower.layers[0].mixer


def seeded(layer: Mamba2, batch: int) -> MambaState:
    torch.manual_seed(1)
    return MambaState(*(torch.randn_like(part) for part in layer.initial_state(batch)))


def test_dt_is_clamped_to_the_limit_and_not_below(tiny: Callable) -> None:
    x = torch.randn(2, 40, 32, dtype=torch.float64) * 5
    free = mixer(tiny)
    dt = free.prepare(x, free.initial_state(2).conv).scan.dt
    assert dt.min() < 0.02
    assert dt.max() > 0.2
    limited = mixer(tiny, time_step_limit=(0.02, 0.2))
    clamped = limited.prepare(x, limited.initial_state(2).conv).scan.dt
    assert torch.equal(clamped, dt.clamp(0.02, 0.2))


def test_dt_ignores_time_step_min_of_the_file(tiny: Callable) -> None:
    """One library clamps at `time_step_min`; the released model does not."""
    plain, carrying = mixer(tiny), mixer(tiny, carried={"time_step_min": 0.5})
    x, past = torch.randn(1, 40, 32, dtype=torch.float64), plain.initial_state(1).conv
    assert torch.equal(carrying.prepare(x, past).scan.dt, plain.prepare(x, past).scan.dt)


@pytest.mark.parametrize("tokens", [1, 2, 5, 17])
def test_outputs_and_scan_agree(tokens: int, tiny: Callable, close: Callable) -> None:
    layer = mixer(tiny)
    state, x = seeded(layer, 2), torch.randn(2, tokens, 32, dtype=torch.float64)
    prepared = layer.prepare(x, state.conv)
    scanned, end, _ = layer.scan(prepared, state, (), torch.float64)
    close(layer.outputs(prepared, state, torch.float64), scanned, 1e-12)
    advanced = layer.advance(prepared, state, None, None)
    close(advanced.ssm, end, 1e-12)
    assert torch.equal(layer.advance(prepared, state, None, end).ssm, end)


@pytest.mark.parametrize("tokens", [1, 2, 17, 70])
def test_marks_are_the_states_of_prefixes(tokens: int, tiny: Callable, close: Callable) -> None:
    """Those at the first and last place as well, between which and the ends there is nothing to scan."""
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


def test_advance_replays_each_rows_prefix(tiny: Callable, close: Callable) -> None:
    layer = mixer(tiny)
    state, x = seeded(layer, 4), torch.randn(4, 9, 32, dtype=torch.float64)
    prepared = layer.prepare(x, state.conv)
    counts = [0, 1, 4, 9]
    # the end state given is that of all 9 tokens: it must not be used
    advanced = layer.advance(prepared, state, torch.tensor(counts), torch.full_like(state.ssm, torch.nan))
    for row, count in enumerate(counts):
        alone = MambaState(*(part[row : row + 1] for part in state))
        if count:
            prefix = layer.prepare(x[row : row + 1, :count], alone.conv)
            alone = layer.advance(prefix, alone, None, None)
        close(advanced.ssm[row], alone.ssm[0], 1e-12)
        close(advanced.conv[row], alone.conv[0], 1e-12)


def test_states_are_float32_beside_bf16_weights(tiny: Callable, ids: Callable) -> None:
    state = tiny("M", dtype=torch.bfloat16).prefill(ids(1, 5))
    assert state.mamba[0].ssm.dtype == torch.float32
    assert state.mamba[0].conv.dtype == torch.bfloat16


def test_scales_multiply_what_the_projection_makes(tiny: Callable) -> None:
    """Each of the five factors reaches its own part: z, x, B, C and the step sizes."""
    factors = (2.0, 3.0, 5.0, 7.0, 11.0)
    plain, scaled = mixer(tiny), mixer(tiny, mamba_scales=factors)
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    for i, (ours, theirs) in enumerate(zip(scaled.split(x), plain.split(x), strict=True)):
        parts = (theirs.split((32, 16, 16), dim=-1), factors[1:4]) if i == 1 else ((theirs,), (factors[i and 4],))
        assert torch.equal(ours, torch.cat([part * factor for part, factor in zip(*parts, strict=True)], dim=-1))


@pytest.mark.parametrize("norm", ["before_gate", None])
def test_the_norm_may_stand_before_the_gate_or_be_missing(norm: str | None, tiny: Callable, close: Callable) -> None:
    usual, other = mixer(tiny), mixer(tiny, mamba_norm=norm)
    y, z = torch.randn(2, 3, 4, 8, dtype=torch.float64), torch.randn(2, 3, 32, dtype=torch.float64)
    assert (usual.output(y, z, y.dtype) - other.output(y, z, y.dtype)).abs().max() > 0.1
    assert ("norm.weight" in other.released_tensors()) == (norm is not None)

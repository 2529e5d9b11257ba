import pytest
import torch
from torch import Tensor

from twotower.ops import selective_scan as op
from twotower.ops.selective_scan import (
    SelectiveInputs,
    selective_output,
    selective_scan,
    selective_state,
    selective_states,
)
from twotower.ops.ssd import ScanOutput


def case(tokens: int, batch: int = 2, width: int = 4) -> tuple[SelectiveInputs, Tensor, Tensor]:
    """5 channels; decays from nearly none to forgetting at once."""
    generator = torch.Generator().manual_seed(tokens)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dt = (randn(batch, tokens, 5) * 2 - 1).exp()
    u, skip = randn(2, batch, tokens, 5)
    B, C = randn(2, batch, tokens, width)
    return SelectiveInputs(dt, u, B, C, skip), -randn(5, width).exp(), randn(batch, 5, width)


def naive(inputs: SelectiveInputs, A: Tensor, state: Tensor) -> ScanOutput:
    """The recurrence, one token, row, channel and number of the state at a time."""
    state, y = state.clone(), inputs.skip.clone()
    for b, t, c, n in torch.cartesian_prod(*map(torch.arange, (*inputs.u.shape, A.shape[1]))).tolist():
        decay = (inputs.dt[b, t, c] * A[c, n]).exp()
        state[b, c, n] = decay * state[b, c, n] + inputs.u[b, t, c] * inputs.B[b, t, n]
        y[b, t, c] += state[b, c, n] * inputs.C[b, t, n]
    return ScanOutput(y, state)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
@pytest.mark.parametrize("piece", [1, 100, op.PIECE])
def test_scan_is_the_loop(tokens: int, width: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "PIECE", piece)  # of one token, of a few, of all
    inputs, A, state = case(tokens, width=width)
    # float64, in another order
    torch.testing.assert_close(selective_scan(inputs, A, state), naive(inputs, A, state), rtol=1e-12, atol=1e-12)


def test_counts_stop_each_row_exactly() -> None:
    inputs, A, state = case(33, batch=4)
    counts = [0, 1, 20, 33]
    found = selective_state(inputs, A, state, torch.tensor(counts))
    for row, count in enumerate(counts):
        prefix = SelectiveInputs(*(part[row : row + 1, :count] for part in inputs))
        expected = naive(prefix, A, state[row : row + 1]).state
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-12, atol=1e-12)


def test_the_last_state_does_not_keep_those_of_all_tokens() -> None:
    inputs, A, state = case(33, batch=1)
    end = selective_scan(inputs, A, state).state
    assert end.untyped_storage().nbytes() == end.nbytes


def test_fresh_tokens_forget_what_was_before_them() -> None:
    inputs, A, state = case(9)
    fresh = torch.zeros(2, 9, dtype=torch.bool)
    fresh[0, 4] = fresh[1, 0] = True
    found = selective_states(inputs, A, state, fresh)
    for row, start in ((0, 4), (1, 0)):
        rest = SelectiveInputs(*(part[row : row + 1, start:] for part in inputs))
        expected = naive(rest, A, torch.zeros_like(state[:1])).state
        torch.testing.assert_close(found[row, -1:], expected, rtol=1e-12, atol=1e-12)
    before = SelectiveInputs(*(part[:1, :4] for part in inputs))
    torch.testing.assert_close(found[:1, 3], naive(before, A, state[:1]).state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 6])
def test_gradients_are_those_of_the_recurrence(tokens: int) -> None:
    inputs, A, state = case(tokens)
    fresh = torch.zeros(2, tokens, dtype=torch.bool)
    fresh[0, tokens // 2] = True

    def outputs(*leaves: Tensor) -> Tensor:
        inputs, (A, state) = SelectiveInputs(*leaves[:5]), leaves[5:]
        return selective_output(selective_states(inputs, A, state, fresh), inputs)

    given = [part.requires_grad_() for part in (*inputs, A, state)]
    assert torch.autograd.gradcheck(outputs, given)

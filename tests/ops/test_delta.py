import pytest
import torch
from torch import Tensor

from twotower.ops.delta import DeltaInputs, delta_scan, delta_state
from twotower.ops.ssd import ScanOutput

LENGTHS = (1, 2, 5, 16, 63, 64, 65, 130)


def case(tokens: int, batch: int = 2) -> tuple[DeltaInputs, Tensor]:
    """6 heads of width 3 with 2 keys of width 5; decays from nearly none to forgetting at once."""
    generator = torch.Generator().manual_seed(tokens)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    k, q = (torch.nn.functional.normalize(randn(batch, tokens, 2, 5), dim=-1) for _ in range(2))
    a, beta = -(randn(batch, tokens, 6) * 1.5 - 2).exp(), randn(batch, tokens, 6).sigmoid()
    return DeltaInputs(randn(batch, tokens, 6, 3), a, beta, k, q), randn(batch, 6, 3, 5)


def naive(inputs: DeltaInputs, state: Tensor) -> ScanOutput:
    """The recurrence, one token, row and head at a time."""
    state, y = state.clone(), torch.empty_like(inputs.v)
    for b, t, h in torch.cartesian_prod(*map(torch.arange, inputs.v.shape[:3])).tolist():
        key, query = inputs.k[b, t, h // 3], inputs.q[b, t, h // 3]
        decayed = inputs.a[b, t, h].exp() * state[b, h]
        state[b, h] = decayed + inputs.beta[b, t, h] * torch.outer(inputs.v[b, t, h] - decayed @ key, key)
        y[b, t, h] = state[b, h] @ query
    return ScanOutput(y, state)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_scan_is_the_loop(tokens: int) -> None:
    inputs, state = case(tokens)
    # float64, in another order
    torch.testing.assert_close(delta_scan(inputs, state), naive(inputs, state), rtol=1e-11, atol=1e-11)


def test_counts_stop_each_row_exactly() -> None:
    inputs, state = case(70, batch=4)
    counts = [0, 1, 65, 70]
    found = delta_state(inputs, state, torch.tensor(counts))
    for row, count in enumerate(counts):
        prefix = DeltaInputs(*(part[row : row + 1, :count] for part in inputs))
        expected = delta_state(prefix, state[row : row + 1], None) if count else state[row : row + 1]
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-12, atol=1e-12)


def test_a_step_size_of_one_overwrites_what_the_state_holds_under_a_key() -> None:
    inputs, state = case(1)
    inputs = inputs._replace(q=inputs.k, a=torch.zeros_like(inputs.a), beta=torch.ones_like(inputs.beta))
    torch.testing.assert_close(delta_scan(inputs, state).y, inputs.v, rtol=1e-12, atol=1e-12)

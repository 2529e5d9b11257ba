from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import twotower.ops.ssd as ssd
from twotower.ops.ssd import ScanInputs, ScanOutput, ssd_output, ssd_scan, ssd_state

LENGTHS = (1, 2, 5, 16, 17, 63, 64, 65, 130)


class Case(NamedTuple):
    inputs: ScanInputs
    A: Tensor
    D: Tensor
    state: Tensor


def case(tokens: int, *, dtype: torch.dtype = torch.float64, batch: int = 2, scale: float = 1.0) -> Case:
    """6 heads of width 3 in 2 groups, state width 5; dt from tiny to large enough to forget at once."""
    generator = torch.Generator().manual_seed(tokens)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dt = (randn(batch, tokens, 6) * 1.5 - 1).exp()
    inputs = ScanInputs(randn(batch, tokens, 6, 3), dt, randn(batch, tokens, 2, 5), randn(batch, tokens, 2, 5))
    A, D, state = -randn(6).exp(), randn(6), randn(batch, 6, 3, 5) * scale
    return Case(ScanInputs(*(v.to(dtype) for v in inputs)), A.to(dtype), D.to(dtype), state.to(dtype))


def naive(c: Case) -> ScanOutput:
    """The recurrence in float64, one token, head and group at a time."""
    x, dt, B, C = (v.double() for v in c.inputs)
    A, D, state = c.A.double(), c.D.double(), c.state.double().clone()
    y = torch.empty_like(x)
    heads_per_group = x.shape[2] // B.shape[2]
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for h in range(x.shape[2]):
                g = h // heads_per_group
                update = dt[b, t, h] * torch.outer(x[b, t, h], B[b, t, g])
                state[b, h] = (dt[b, t, h] * A[h]).exp() * state[b, h] + update
                y[b, t, h] = state[b, h] @ C[b, t, g] + D[h] * x[b, t, h]
    return ScanOutput(y, state)


@pytest.fixture(scope="module", params=LENGTHS)
def loop(request: pytest.FixtureRequest) -> tuple[Case, ScanOutput]:
    c = case(request.param)
    return c, naive(c)


def test_scan_is_the_loop(loop: tuple[Case, ScanOutput]) -> None:
    c, expected = loop
    out = ssd_scan(c.inputs, c.A, c.D, c.state)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)


def test_scan_without_a_state_is_the_loop_from_zeros() -> None:
    c = case(17)
    c = c._replace(state=torch.zeros_like(c.state))
    torch.testing.assert_close(ssd_scan(*c), naive(c), rtol=1e-11, atol=1e-11)


def test_output_and_state_alone_are_the_loop(loop: tuple[Case, ScanOutput]) -> None:
    c, expected = loop
    torch.testing.assert_close(ssd_output(*c), expected.y, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ssd_state(c.inputs, c.A, c.state), expected.state, rtol=1e-11, atol=1e-11)


def test_float32_scan_is_close_to_the_loop(loop: tuple[Case, ScanOutput]) -> None:
    c, expected = loop
    narrow = Case(ScanInputs(*(v.float() for v in c.inputs)), c.A.float(), c.D.float(), c.state.float())
    out = ssd_scan(*narrow)
    assert out.y.dtype == out.state.dtype == torch.float32
    for ours, theirs in zip(out, expected, strict=True):
        # float32 sums of up to 64 terms of the largest magnitude, with decays rounded at |u| up to a few hundred
        assert (ours.double() - theirs).abs().max() < 2e-5 * theirs.abs().max()


@pytest.mark.parametrize("block", [1, 5, 8, 16, 17, 64])
@pytest.mark.parametrize("chunk", [16, 64, 128])
def test_any_block_and_chunk_continue_a_seed(monkeypatch: pytest.MonkeyPatch, block: int, chunk: int) -> None:
    """A fast scan whose chunk exceeds the block once gave garbage from a seeded state."""
    monkeypatch.setattr(ssd, "CHUNK", chunk)
    c = case(block, batch=1, scale=5.0)
    torch.testing.assert_close(ssd_scan(*c), naive(c), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("magnitude", [1e4, 1e20])
def test_large_seed_with_bf16_inputs_stays_finite_and_close(magnitude: float) -> None:
    """A bf16 scan over a large seeded state overflows; state and scan are float32."""
    c = case(16, dtype=torch.bfloat16)
    wide = Case(ScanInputs(*(v.float() for v in c.inputs)), c.A.float(), c.D.float(), c.state.float() * magnitude)
    out, expected = ssd_scan(*wide), naive(wide)
    for ours, theirs in zip(out, expected, strict=True):
        assert ours.isfinite().all()
        # float32 accumulation over 16 tokens
        assert (ours.double() - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_strong_decay_does_not_overflow_forward_or_backward() -> None:
    """Above the diagonal the exponents are positive: computed and then hidden they give inf · 0 in the gradient."""
    c = case(64, dtype=torch.float32)
    dt = torch.full_like(c.inputs.dt, 50.0).requires_grad_()
    c = c._replace(inputs=c.inputs._replace(dt=dt), A=c.A.requires_grad_())
    out, expected = ssd_scan(*c), naive(c)
    torch.testing.assert_close(out.y.double(), expected.y, rtol=1e-4, atol=1e-3)
    out.y.sum().backward()
    assert dt.grad.isfinite().all()
    assert c.A.grad.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 5, 65])
def test_tokens_with_dt_zero_leave_the_state_as_it_was(tokens: int) -> None:
    c = case(tokens)
    still = c.inputs._replace(dt=torch.zeros_like(c.inputs.dt))
    assert torch.equal(ssd_scan(still, c.A, c.D, c.state).state, c.state)
    assert torch.equal(ssd_state(still, c.A, c.state), c.state)


@pytest.mark.parametrize("count", [0, 1, 4, 16])
def test_dt_zero_after_a_prefix_gives_the_prefix_state(count: int) -> None:
    c = case(17)
    prefix = ScanInputs(*(v[:, :count] for v in c.inputs))
    expected = naive(c._replace(inputs=prefix)).state
    cut = c.inputs._replace(dt=c.inputs.dt * (torch.arange(17) < count)[:, None])
    torch.testing.assert_close(ssd_state(cut, c.A, c.state), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tokens", [1, 5, 65])
def test_inputs_are_not_written_to(tokens: int) -> None:
    c = case(tokens)
    before = [v.clone() for v in (*c.inputs, c.A, c.D, c.state)]
    ssd_scan(*c)
    assert all(torch.equal(a, b) for a, b in zip(before, (*c.inputs, c.A, c.D, c.state), strict=True))


def test_gradients_are_right() -> None:
    c = case(3, batch=1)
    leaves = tuple(v.requires_grad_() for v in (*c.inputs, c.A, c.D, c.state))
    assert torch.autograd.gradcheck(lambda *v: tuple(ssd_scan(ScanInputs(*v[:4]), *v[4:])), leaves)

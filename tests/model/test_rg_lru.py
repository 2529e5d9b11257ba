from collections.abc import Callable

import torch
import torch.nn.functional as F

from twotower.model.rg_lru import RGLRU
from twotower.ops.selective_scan import selective_scan


def core(tiny: Callable) -> RGLRU:
    return tiny("R", dtype=torch.float64).context_tower.layers[0].mixer.core


def test_the_scan_is_that_of_the_paper(tiny: Callable, close: Callable) -> None:
    """The first token, before which the count is 0, is added without the root."""
    unit = core(tiny)
    x, count = torch.randn(1, 6, 32, dtype=torch.float64), torch.ones(1, 6, 1, dtype=torch.float64)
    count[:, 0] = 0
    start = torch.randn(1, 32, 1, dtype=torch.float64)
    y = selective_scan(unit.scan_inputs(torch.cat((x, count), dim=-1)), unit.A, start).y
    h = start[0, :, 0]
    for t in range(6):
        heads = x[0, t].view(4, 8)
        enters, decays = (
            torch.cat([head @ w + b for head, w, b in zip(heads, weight, bias, strict=True)]).sigmoid()
            for weight, bias in zip(unit.gate_weights, unit.gate_biases, strict=True)
        )
        a = (-8 * decays * F.softplus(unit.recurrent_param)).exp()
        h = a * h + (1 - a.square()).sqrt() ** (t > 0) * enters * x[0, t]
        close(y[0, t], h, 1e-12)


def test_gradients_are_finite_where_nothing_is_forgotten(tiny: Callable) -> None:
    unit = core(tiny).float()
    with torch.no_grad():
        unit.recurrent_param.fill_(-30.0)  # a rounds to 1, and the root's slope there is infinite
    inputs = unit.scan_inputs(torch.ones(1, 3, 33))
    assert not inputs.u.any()
    inputs.u.sum().backward()
    assert unit.recurrent_param.grad is not None
    assert unit.recurrent_param.grad.isfinite().all()

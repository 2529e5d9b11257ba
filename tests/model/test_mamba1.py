from collections.abc import Callable

import torch
import torch.nn.functional as F

from twotower.model.mamba1 import Mamba1
from twotower.ops.selective_scan import selective_scan


def core(tiny: Callable, **config: object) -> Mamba1:
    return tiny("S", dtype=torch.float64, **config).context_tower.layers[0].mixer.core


def test_the_scan_is_that_of_the_paper(tiny: Callable, close: Callable) -> None:
    """One channel and number of the state at a time, with a norm of what the step sizes, B and C are made of."""
    mamba = core(tiny, mamba_inner_epsilon=0.1, mamba_state_size=5)
    convolved = torch.randn(1, 6, 32, dtype=torch.float64)
    y = selective_scan(mamba.scan_inputs(convolved), mamba.A, torch.zeros(1, 32, 5, dtype=torch.float64)).y
    x = F.silu(convolved[0])
    parts = (x @ mamba.x_proj.weight.T).split((3, 5, 5), dim=-1)
    steps, B, C = (
        part / (part.square().mean(-1, keepdim=True) + 0.1).sqrt() * mamba.norms[name]
        for name, part in zip(("dt_norm", "b_norm", "c_norm"), parts, strict=True)
    )
    dt = F.softplus(steps @ mamba.dt_proj.weight.T + mamba.dt_bias)
    for c in range(32):
        h = torch.zeros(5, dtype=torch.float64)
        for t in range(6):
            h = (-dt[t, c] * mamba.A_log[c].exp()).exp() * h + dt[t, c] * x[t, c] * B[t]
            close(y[0, t, c], h @ C[t] + mamba.D[c] * x[t, c], 1e-12)


def test_step_sizes_are_limited(tiny: Callable) -> None:
    convolved = torch.randn(1, 40, 32, dtype=torch.float64) * 5
    free = core(tiny).scan_inputs(convolved).dt
    limited = core(tiny, time_step_limit=(0.1, 0.2)).scan_inputs(convolved).dt
    assert torch.equal(limited, free.clamp(0.1, 0.2))
    assert not torch.equal(limited, free)

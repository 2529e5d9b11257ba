"""Compiled training passes."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch._dynamo.utils import counters

from twotower.training.data import Batch
from twotower.training.denoising import Denoising, DenoisingConfig


def losses(objective: Denoising) -> list[float]:
    """Of two steps forward, whose sizes differ."""
    found = []
    for step in range(2):
        ids = torch.randint(4, 40, (2, 16), generator=torch.Generator().manual_seed(step))
        batch = Batch(ids, torch.ones_like(ids).bool(), ids * 0, torch.arange(2) + 2 * step)
        rows = objective.prepare(batch, step, 0, torch.device("cpu"))
        found.append(objective(rows, slice(0, 2), rows.denominators).loss.item())
    return found


def test_every_kind_of_layer_is_compiled(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced but not translated, which would take minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    expected = losses(Denoising(tiny("M*-E"), DenoisingConfig()))
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        found = losses(Denoising(tiny("M*-E"), DenoisingConfig(compile=True)))
    torch._dynamo.reset()
    assert found == pytest.approx(expected, rel=1e-5)
    assert counters["stats"]["unique_graphs"] > 8

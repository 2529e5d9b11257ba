"""Compiled training passes, traced but not translated, which would take minutes."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from twotower.model.two_tower import TwoTower
from twotower.training.config import Share
from twotower.training.corpus.shards import CorpusBatch
from twotower.training.objectives.denoising import Denoising, DenoisingConfig
from twotower.training.run.compiling import compiled

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def test_a_function_has_a_version_for_each_kind_of_layer() -> None:
    """Towers of every kind, at sizes that change, need 9 and more of one function."""

    def scaled(x: Tensor, kind: str) -> Tensor:
        return x * len(kind)

    fast = compiled(scaled)
    for length in range(1, 31):
        assert fast(torch.ones(2), "M" * length).tolist() == [length, length]
    assert counters["stats"]["unique_graphs"] == 30


def loss(objective: Denoising) -> float:
    ids = torch.randint(4, 40, (2, 16), generator=torch.Generator().manual_seed(0))
    batch = CorpusBatch(ids, torch.ones_like(ids).bool(), ids * 0, torch.arange(2))
    rows = objective.prepare(batch, 0, 0, torch.device("cpu"))
    return objective(rows, slice(0, 2), rows.denominators).loss.item()


LOSSES = tuple(Share(n, 0.5) for n in ("certainty", "consistency", "distillation", "acceptance", "cross_entropy"))
MASKS = tuple(Share(n, 1.0) for n in ("drafting", "trajectory", "prefix"))


@pytest.mark.parametrize(("pattern", "layers"), [("*", None), ("*-*-*", (1, 2))])
@pytest.mark.parametrize("what", [DenoisingConfig(), DenoisingConfig(objective=LOSSES, masks=MASKS)])
def test_a_compiled_objective_has_the_same_loss(
    what: DenoisingConfig, pattern: str, layers: tuple[int, ...] | None, tiny: Callable[..., TwoTower]
) -> None:
    def model() -> TwoTower:
        return tiny(pattern, denoiser_layers=layers)

    expected = loss(Denoising(model(), what))
    assert counters["stats"]["unique_graphs"] == 0
    fast = dataclasses.replace(what, compile=True)
    assert loss(Denoising(model(), fast)) == pytest.approx(expected, rel=1e-5)
    assert counters["stats"]["unique_graphs"] > 0

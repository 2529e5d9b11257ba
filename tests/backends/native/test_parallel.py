"""Sharing work out to threads: who does a piece changes no bit, whatever else calls or forks meanwhile."""

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from twotower.backends.choose import pack_
from twotower.backends.native import build
from twotower.backends.native.pack import PanelWeight, pack_weight
from twotower.backends.native.unmask import best
from twotower.model.two_tower import TwoTower

pytestmark = pytest.mark.skipif(build.library() is None, reason="this machine has no C compiler")

# Wide enough that every kernel shares its work out
WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 320,
    "mamba_num_heads": 16,
    "mamba_head_dim": 32,
    "mamba_state_size": 32,
    "head_dim": 64,
    "expert_intermediate_size": 128,
}


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def outcome(model: TwoTower, ids: Callable) -> list[Tensor]:
    state = model.prefill(ids(2, 600), [600, 590], capacity=640)
    scored = model.score(ids(2, 16, seed=1), state)
    assert state.next_logits is not None
    found = best(model.scored_logits(scored))
    return [state.next_logits, *found, *(part for layer in state.mamba for part in layer)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["M*-E", "G*-"])
def test_a_pass_has_the_same_bits_on_any_number_of_threads(tiny, ids, pattern: str, dtype: torch.dtype) -> None:
    model = tiny(pattern, dtype=dtype, **WIDE)
    pack_(model, "native")
    torch.set_num_threads(1)
    alone = outcome(model, ids)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, outcome(model, ids), alone)), f"{threads} threads"


def product() -> tuple[PanelWeight, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(700, 256, generator=generator)
    return pack_weight(weight.bfloat16()), torch.randn(9, 256, generator=generator)


def test_callers_at_the_same_time_each_get_their_own_result() -> None:
    weight, x = product()
    torch.set_num_threads(1)
    rows = [x + i for i in range(8)]
    alone = [weight(own, None) for own in rows]

    def all_right(place: int) -> bool:
        torch.set_num_threads(3)
        return all(torch.equal(weight(rows[place], None), alone[place]) for _ in range(500))

    with concurrent.futures.ThreadPoolExecutor(8) as callers:
        assert all(callers.map(all_right, range(8)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system doesn't fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_forked_child_starts_threads_of_its_own() -> None:
    weight, x = product()
    torch.set_num_threads(2)
    expected = weight(x, None)
    context = multiprocessing.get_context("fork")
    child = context.Process(
        target=lambda: os._exit(not all(torch.equal(weight(x, None), expected) for _ in range(200)))
    )
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert torch.equal(weight(x, None), expected)

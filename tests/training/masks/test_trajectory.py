"""The order in which decoding makes places known, against decoding itself."""

from collections.abc import Callable

import pytest
import torch

from twotower.model.two_tower import TwoTower
from twotower.training.forward.block_parallel import block_parallel_hidden
from twotower.training.forward.layout import make_layout
from twotower.training.masks.trajectory import known_from


def order(model: TwoTower, x0: torch.Tensor, scored: torch.Tensor, passes: int, threshold: float) -> torch.Tensor:
    layout = make_layout(x0 * 0, 5)
    settings = {"passes": passes, "threshold": threshold, "towers": block_parallel_hidden}
    return known_from(model, x0, scored, layout, **settings)


@pytest.mark.parametrize("threshold", [0.03, 0.06, 1.0])
def test_places_become_known_as_in_decoding(threshold: float, tiny: Callable, ids: Callable) -> None:
    model, x0 = tiny("M*-", dtype=torch.float64), ids(3, 13)
    scored = torch.arange(13).expand(3, -1) >= torch.tensor([[0], [2], [6]])
    found = order(model, x0, scored, 3, threshold)
    for row in range(3):
        for start in (0, 5, 10):
            place = torch.arange(start, min(start + 5, 13))
            state = model.prefill(x0[row : row + 1, :start])
            known, every = ~scored[row, place], int(scored[row, place].sum())
            expected = torch.where(known, 0, 4)
            for number in (1, 2, 3):
                if known.all():
                    break
                xt = x0[row : row + 1, place].masked_fill(~known, 3)
                with torch.no_grad():
                    logits = model.denoiser_logits(xt, state, (int((~known).sum()) / every,))[0]
                sure = logits.softmax(-1).amax(-1).masked_fill(known, 0.0)
                now = ~known & ((sure > threshold) | (sure == sure.max()))
                expected[now], known = number, known | now
            assert found[row, place].tolist() == expected.tolist()
    if threshold == 1.0:
        assert set(found[0].tolist()) == {1, 2, 3, 4}


def test_rows_without_scored_places_are_known(tiny: Callable, ids: Callable) -> None:
    x0 = ids(2, 10)
    assert order(tiny("*-"), x0, torch.zeros(2, 10, dtype=torch.bool), 2, 0.9).tolist() == [[0] * 10] * 2

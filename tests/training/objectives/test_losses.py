"""Each loss against its equation, computed position by position."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from twotower.model.two_tower import TwoTower
from twotower.training.forward.layout import make_layout
from twotower.training.masks.noise import Corrupted, Noise, corrupt
from twotower.training.objectives.acceptance import acceptance
from twotower.training.objectives.certainty import TEMPERATURE, certainty
from twotower.training.objectives.distillation import taught
from twotower.training.objectives.sums import loss_sums, weigh

EOS = 2


def hidden_places(x0: Tensor, masked: Tensor, block_size: int = 4, document: Tensor | None = None) -> Corrupted:
    """Rows x0 (b, t) of which the places `masked` (v·b, t) are hidden."""
    layout = make_layout(x0 * 0 if document is None else document, block_size)
    level = torch.full(masked.shape, 0.5)
    xt = x0.repeat(len(masked) // len(x0), 1).masked_fill(masked, 3)
    return Corrupted(xt, masked, level, level, torch.ones_like(x0, dtype=torch.bool), layout)


def denoised(model: TwoTower, x0: Tensor, noisy: Corrupted, view: int) -> Tensor:
    """(t, o): log-probabilities of row `view`, block by block as decoding computes them."""
    row = view % len(x0)
    found = []
    for index in noisy.layout.block[row].unique():
        place = (noisy.layout.block[row] == index).nonzero()[:, 0]
        start = noisy.layout.document_start[row, place[0]]
        state = model.prefill(x0[row : row + 1, start : place[0]])
        told = tuple(noisy.told[view, place[:1]].tolist())
        with torch.no_grad():
            found.append(model.denoiser_logits(noisy.xt[view : view + 1, place], state, told)[0].log_softmax(-1))
    return torch.cat(found)


def divergence(log_p: Tensor, log_q: Tensor) -> float:
    return float((log_p.exp() * (log_p - log_q)).nansum())


def total(model: TwoTower, x0: Tensor, noisy: Corrupted, name: str) -> float:
    return loss_sums(model, x0, noisy, noisy.masked.float(), losses=(name,)).losses[name].item()


def test_certainty_is_the_entropy_where_the_denoiser_is_right() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64)
    logits[:, 3] = -torch.inf
    logits.requires_grad_()
    targets = logits.argmax(-1)
    targets[1] = (targets[1] + 1) % 3  # wrong there
    found = certainty(logits.log_softmax(-1), targets, 3)
    sharp = (logits.detach() / TEMPERATURE).softmax(-1)
    expected = [-sum(float(p) * math.log(p) for p in row if p > 0) for row in sharp]
    expected[1] = 0.0
    assert found.tolist() == pytest.approx(expected)
    found.sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[1].abs().max() == 0
    step = (logits - 0.1 * logits.grad).log_softmax(-1)
    assert (step.max(-1).values >= logits.log_softmax(-1).max(-1).values).all()  # it gets surer


@pytest.mark.parametrize("views", [1, 2])
def test_acceptance_is_the_expected_length_of_a_kept_draft(views: int) -> None:
    x0 = torch.tensor([[5, 6, 7, 8, 9, 10, EOS, EOS, 5, 6, 7]])
    #                  known | draft | gap, known behind | two blocks and a short last one
    masked = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1]]).bool().repeat(views, 1)
    noisy = hidden_places(x0, masked)
    q = torch.linspace(0.2, 0.9, 11 * views, dtype=torch.float64).view(views, 11)
    found = acceptance(q.log().masked_fill(~masked, 0.0), x0, noisy, (EOS,))
    expected = torch.zeros_like(found)
    for row, own in enumerate(q.tolist()):
        first = own[1] * (1 + own[2] * (1 + own[3]))
        second = own[4] * (1 + own[5] * (1 + own[6]))  # the second end of text is not counted
        expected[row, 1], expected[row, 4] = -math.log(first / 3), -math.log(second / 3)
    torch.testing.assert_close(found, expected)


def test_acceptance_weighs_a_place_by_what_is_kept_from_there_on() -> None:
    x0 = torch.tensor([[5, 6, 7, 8]])
    noisy = hidden_places(x0, torch.tensor([[False, True, True, True]]))
    log_q = torch.tensor([[0.0, -0.1, -3.0, -0.1]], dtype=torch.float64, requires_grad=True)
    acceptance(log_q, x0, noisy, ()).sum().backward()
    q = log_q.exp()[0].tolist()
    kept = [q[1], q[1] * q[2], q[1] * q[2] * q[3]]
    weights = [-sum(kept[i:]) / sum(kept) for i in range(3)]
    assert log_q.grad[0].tolist() == pytest.approx([0.0, *weights])
    assert weights[0] == -1.0


def test_a_row_without_a_draft_has_no_acceptance_and_a_finite_gradient() -> None:
    x0 = torch.tensor([[EOS, EOS, 5, 6]])
    log_q = torch.full((1, 4), -1.0, requires_grad=True)
    for masked in ([False] * 4, [True, True, False, False]):
        found = acceptance(log_q, x0, hidden_places(x0, torch.tensor([masked])), (EOS,))
        assert found.tolist() == [[0.0] * 4]
        found.sum().backward()
        assert log_q.grad.isfinite().all()


def test_the_context_tower_teaches_only_where_it_knows_as_much() -> None:
    x0 = torch.tensor([[5, 6, 7, 8, 9, EOS, EOS, EOS, 5, 6]])
    document = torch.tensor([[0] * 8 + [1] * 2])
    masked = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1, 1]]).bool()
    #                       first, gap, -, x, x, the end, behind it, first of its document, x
    expected = [0, 0, 0, 1, 1, 1, 0, 0, 0, 1]
    assert taught(x0, hidden_places(x0, masked, document=document), (EOS,)).long().tolist() == [expected]
    assert taught(x0, hidden_places(x0, masked, document=document), ()).long().tolist() == [[0, 0, 0, *[1] * 5, 0, 1]]


def test_distilling_is_the_divergence_from_what_the_context_tower_expects(tiny: Callable, ids: Callable) -> None:
    model, x0 = tiny("M*-E", dtype=torch.float64), ids(2, 15)
    document = torch.tensor([[0] * 6 + [1] * 9, [0] * 15])
    scored = torch.ones(2, 15, dtype=torch.bool)
    noise: Any = {"noise": Noise(complementary=True), "block_size": 4, "mask_token_id": 3, "document": document}
    noisy = corrupt(x0, scored, torch.arange(2), seed=0, **noise)
    counts = taught(x0, noisy, model.config.eos_token_ids)
    expected = 0.0
    for view in range(4):
        log_q, row = denoised(model, x0, noisy, view), view % 2
        for start, end in [(0, 6), (6, 15)] if row == 0 else [(0, 15)]:
            log_p = model.context_logits(x0[row : row + 1, start:end])[0].log_softmax(-1)
            for at in range(start, end):
                if counts[view, at]:
                    expected += divergence(log_p[at - 1 - start], log_q[at])
    assert 0 < counts.sum() < noisy.masked.sum()
    assert total(model, x0, noisy, "distillation") == pytest.approx(expected, rel=1e-5)  # logits are rounded to float32


def test_a_teacher_gets_no_gradient_from_its_pupil(tiny: Callable, ids: Callable) -> None:
    model, x0 = tiny("*-", dtype=torch.float64), ids(2, 8)
    # one block a row: the context tower is read by nothing but its own head
    noisy = hidden_places(x0, torch.ones(2, 8, dtype=torch.bool), block_size=8)
    weight = weigh(noisy, "masked_mean").weight
    loss_sums(model, x0, noisy, weight, losses=("distillation",)).losses["distillation"].backward()
    assert model.lm_head.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in model.context_lm_head.parameters())
    assert all(p.grad is None for p in [model.context_tower.norm_f.weight])


def test_consistency_is_the_divergence_from_the_later_state(tiny: Callable, ids: Callable) -> None:
    model, x0 = tiny("M*-E", dtype=torch.float64), ids(2, 9)
    early = torch.rand(2, 9, generator=torch.manual_seed(0)) < 0.8
    late = early & (torch.rand(2, 9) < 0.5)
    noisy = hidden_places(x0, torch.cat((early, late)))
    expected = 0.0
    for row in range(2):
        log_q, log_p = denoised(model, x0, noisy, row), denoised(model, x0, noisy, row + 2)
        expected += sum(divergence(log_p[at], log_q[at]) for at in late[row].nonzero()[:, 0].tolist())
    assert total(model, x0, noisy, "consistency") == pytest.approx(expected, rel=1e-5)
    weight = noisy.masked.double()
    loss_sums(model, x0, noisy, weight, losses=("consistency",)).losses["consistency"].backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    same = hidden_places(x0, torch.cat((late, late)))  # nothing is known more: no divergence, no gradient
    loss_sums(model, x0, same, weight, losses=("consistency",)).losses["consistency"].backward()
    assert gradient.abs().max() > 1e6 * model.lm_head.weight.grad.abs().max()

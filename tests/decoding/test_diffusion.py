"""The two block-wise modes as a process: what each step does to the block."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from twotower.decoding.generate import stream
from twotower.decoding.output import BlockView
from twotower.decoding.params import COMMIT_RULES, SamplingParams
from twotower.model.two_tower import TwoTower

MASK = 3
ADDING_RULES = sorted(set(COMMIT_RULES) - {"remask"})


def blocks(model: TwoTower, params: SamplingParams) -> list[list[BlockView]]:
    """The views after every step, block by block; the last piece's result must agree with them."""
    done: list[list[BlockView]] = [[]]
    tokens: list[int] = []
    for piece in stream(model, [9, 8, 7], params, every_step=True):
        assert piece.block is not None
        done[-1].append(piece.block)
        if piece.block.t == 0:
            tokens += piece.block.ids
            assert piece.token_ids == piece.block.ids
            done.append([])
        else:
            assert piece.token_ids == ()
    assert piece.result is not None
    assert piece.result.token_ids == tokens
    steps, sure = piece.result.commit_steps, piece.result.confidences
    for index, block in enumerate(done[:-1]):
        places = slice(index * params.block_size, index * params.block_size + len(block[-1].ids))
        assert tuple(sure[places]) == block[-1].confidences
        if params.commit_rule != "remask":
            for place, step in enumerate(steps[places]):  # masked before the step of its commit, fixed after
                assert [view.ids[place] != MASK for view in block] == [view.step > step for view in block]
    assert not done.pop()
    return done


def settings(rule: Any, **changed: Any) -> SamplingParams:
    defaults = {"max_new_tokens": 40, "block_size": 16, "steps_per_block": 6, "confidence_threshold": 0.5, "seed": 1}
    return SamplingParams(commit_rule=rule, **defaults | changed)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rule", ADDING_RULES)
def test_a_committed_position_never_changes_again(rule: str, temperature: float, tiny: Callable) -> None:
    for block in blocks(tiny(), settings(rule, temperature=temperature)):
        for before, after in itertools.pairwise(block):
            for a, b, p, q in zip(before.ids, after.ids, before.confidences, after.confidences, strict=True):
                assert a in (MASK, b)
                assert p in (0.0, q)


@pytest.mark.parametrize("rule", COMMIT_RULES)
def test_a_block_is_full_after_its_steps_and_never_commits_the_mask(rule: str, tiny: Callable) -> None:
    found = blocks(tiny(), settings(rule, temperature=1.0))
    assert [len(block[-1].ids) for block in found] == [16, 16, 8]
    for block in found:
        assert [view.step for view in block] == list(range(1, len(block) + 1))
        assert len(block) <= 6
        assert MASK not in block[-1].ids
        for view in block:
            assert view.t == view.ids.count(MASK) / len(view.ids)
            assert all((p == 0.0) == (token == MASK) for p, token in zip(view.confidences, view.ids, strict=True))


@pytest.mark.parametrize("rule", sorted(set(ADDING_RULES) - {"posterior"}))
def test_every_step_commits_something(rule: str, tiny: Callable) -> None:
    least = {"entropy_bound": 0.0} if rule == "entropy_bound" else {}
    for block in blocks(tiny(), settings(rule, steps_per_block=16, confidence_threshold=1.0, **least)):
        assert [view.ids.count(MASK) for view in block] == list(range(len(block[0].ids) - 1, -1, -1))


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 1.0])
def test_what_is_sure_enough_commits_at_once(threshold: float, tiny: Callable) -> None:
    for block in blocks(tiny(), settings("confidence", confidence_threshold=threshold, steps_per_block=16)):
        before = [MASK] * len(block[0].ids)
        for view in block:
            new = [p for p, a, b in zip(view.confidences, before, view.ids, strict=True) if a != b]
            unsure = [p for p in new if p <= threshold]
            assert len(unsure) <= 1  # only where nothing, or not enough for the schedule, is above γ
            assert not unsure or len(new) == 1
            before = list(view.ids)


def test_threshold_zero_takes_one_step_a_block(tiny: Callable) -> None:
    assert [len(block) for block in blocks(tiny(), settings("confidence", confidence_threshold=0.0))] == [1, 1, 1]


def test_fixed_commits_the_schedule(tiny: Callable) -> None:
    left = [[view.ids.count(MASK) for view in block] for block in blocks(tiny(), settings("fixed"))]
    # 16 over 6 steps: ceil(16/6) = 3, ceil(13/5) = 3, ceil(10/4) = 3, then 7/3, 4/2, 2/1; 8 over 6: ceil(8/6) = 2, …
    assert left == [[13, 10, 7, 4, 2, 0], [13, 10, 7, 4, 2, 0], [6, 4, 3, 2, 1, 0]]


def test_leftmost_and_simulated_ar_go_from_left_to_right(tiny: Callable) -> None:
    for block in blocks(tiny(), settings("leftmost")):
        for view in block:
            assert list(view.ids).index(MASK) if MASK in view.ids else True
            assert MASK not in view.ids[: len(view.ids) - view.ids.count(MASK)]
    one_by_one = SamplingParams(mode="simulated_ar", max_new_tokens=21, block_size=8, steps_per_block=2)
    for block in blocks(tiny(), one_by_one):
        assert [view.ids.count(MASK) for view in block] == list(range(len(block[0].ids) - 1, -1, -1))
        assert all(MASK not in view.ids[: view.step] for view in block)


def test_remask_follows_its_schedule_and_takes_tokens_back(tiny: Callable) -> None:
    found = [block for seed in range(4) for block in blocks(tiny(seed=seed), settings("remask"))]
    for block in found:
        width = len(block[0].ids)
        assert [v.ids.count(MASK) for v in block] == [min(-(-width * (6 - s) // 6), width - 1) for s in range(1, 7)]
    pairs = [(a, b) for block in found for a, b in itertools.pairwise(block)]
    assert any(x not in (MASK, y) for a, b in pairs for x, y in zip(a.ids, b.ids, strict=True))


def test_rules_differ(tiny: Callable) -> None:
    """Else one of them may be another in disguise."""
    found = {rule: blocks(tiny(), settings(rule, confidence_threshold=0.9)) for rule in COMMIT_RULES}
    assert len({str(found[rule]) for rule in COMMIT_RULES}) == len(COMMIT_RULES)

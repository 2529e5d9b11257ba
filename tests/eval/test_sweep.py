"""The grid, the points that come of it, and the pictures."""

import dataclasses
import itertools

import pytest

from twotower.decoding.params import SamplingParams
from twotower.eval import sweep as module
from twotower.eval.answering import ScoredAnswer
from twotower.eval.evaluate import SpeedConfig
from twotower.eval.plots import draw, front
from twotower.eval.retention import Interval
from twotower.eval.sweep import Point, SweepConfig, commits, grid, sweep
from twotower.eval.tasks import FILLER, prompt_ids
from twotower.eval.throughput import PHASES, Quartiles, Speed

QUICK = SpeedConfig(prompts=2, batch_sizes=(1, 2))


def point(label, rate, score, **changes):
    speed = None if rate is None else Speed(Quartiles(rate - 1, rate, rate + 1), Quartiles(1, 2, 3), Quartiles(0, 0, 0))
    made = Point(
        task="t",
        label=label,
        params=SamplingParams(),
        batch_size=1,
        distance=None,
        prompt_tokens=4,
        examples=2,
        score=score,
        degenerate=0,
        retention=Interval(0.5, None, None),
        timed_prompts=2,
        speed=speed,
        gain_counts=True,
        tokens_per_nfe=1.5,
        tokens_per_context_call=None,
        phases=dict.fromkeys(PHASES, 0.25),
        commits=[[2, 0], [0, 2]],
    )
    return dataclasses.replace(made, **changes)


def test_a_mode_is_run_with_the_values_that_it_reads():
    config = SweepConfig(
        modes=("diffusion", "verified", "mock_ar"), thresholds=(0.5, 0.9), block_sizes=(4, 8), steps_per_block=(2,)
    )
    found = grid(config, 0.7)
    assert list(found) == [
        "ar",
        "diffusion γ 0.5 S 4 T 2",
        "diffusion γ 0.5 S 8 T 2",
        "diffusion γ 0.9 S 4 T 2",
        "diffusion γ 0.9 S 8 T 2",
        "verified S 4",
        "verified S 8",
        "mock_ar",
    ]
    assert {params.temperature for params in found.values()} == {0.7}
    chosen = found["diffusion γ 0.9 S 8 T 2"]
    assert (chosen.confidence_threshold, chosen.block_size, chosen.steps_per_block) == (0.9, 8, 2)
    assert found["verified S 4"].block_size == 4


def test_targets_and_bounds_are_ways_to_commit_beside_thresholds():
    sweep_config = SweepConfig(
        modes=("diffusion", "verified"),
        thresholds=(0.5,),
        target_retentions=(0.9,),
        entropy_bounds=(0.2,),
        block_sizes=(8,),
    )
    found = grid(sweep_config, 0.0)
    labels = [f"diffusion {dial} S 8 T 16" for dial in ("γ 0.5", "target 0.9", "H 0.2")]
    assert list(found) == ["ar", *labels, "verified S 8"]
    values = [(p.confidence_threshold, p.target_retention, p.entropy_bound, p.commit_rule) for p in found.values()]
    assert values[1:4] == [
        (0.5, None, None, "confidence"),
        (None, 0.9, None, "confidence"),
        (None, None, 0.2, "entropy_bound"),
    ]


def test_a_mode_that_drafts_is_run_with_each_drafter():
    found = grid(SweepConfig(modes=("verified", "mock_ar"), block_sizes=(4,), drafters=("prompt", "denoiser")), 0.0)
    assert list(found) == ["ar", "verified prompt S 4", "verified denoiser S 4", "mock_ar"]
    assert [params.drafter for params in found.values()] == [None, "prompt", "denoiser", None]


def test_values_that_differ_little_are_settings_of_their_own():
    found = grid(SweepConfig(thresholds=(0.9, 0.9000001), block_sizes=(16,)), 0.0)
    assert list(found) == ["ar", "diffusion γ 0.9 S 16 T 16", "diffusion γ 0.9000001 S 16 T 16"]
    warm = [point("p", 1, 1, params=SamplingParams(temperature=t)).condition for t in (0.7, 0.7000001)]
    assert warm == ["temperature 0.7, batch 1", "temperature 0.7000001, batch 1"]


def test_empty_axes_and_bad_distances_are_mistakes():
    with pytest.raises(ValueError, match="thresholds"):
        SweepConfig(thresholds=())
    with pytest.raises(ValueError, match="0 or more"):
        SweepConfig(distances=(-1,))
    with pytest.raises(ValueError, match="temperature is -1"):
        SweepConfig(temperatures=(0, -1))


@pytest.mark.slow
def test_every_condition_has_its_own_ar(model, asking):
    config = SweepConfig(thresholds=(0.3,), block_sizes=(4,), temperatures=(1.0,), distances=(0, 40))
    found = list(sweep(model, asking("likelihood", length=4), config, QUICK))
    assert [len(points) for points in found] == [4, 4]
    conditions = [(p.distance, p.batch_size) for points in found for p in points]
    assert list(dict.fromkeys(conditions)) == list(itertools.product((0, 40), (1, 2)))
    for ar, diffusion in zip(found[0][::2], found[0][1::2], strict=True):
        assert (ar.label, diffusion.label) == ("ar", "diffusion γ 0.3 S 4 T 16")
        assert ar.retention == (1, 1, 1)
        assert ar.speed.gain == (1, 1, 1)
        assert ar.commits == []
        assert diffusion.tokens_per_nfe > 0
        assert diffusion.phases["denoise"] > 0
        row = diffusion.row()
        assert row["gain_median"] == diffusion.speed.gain.median
        assert row["confidence_threshold"] == 0.3
        assert row["denoise_phase_seconds"] == diffusion.phases["denoise"]
        assert ar.row().keys() == row.keys()
        assert ar.row()["confidence_threshold"] is None
    near, far = found[0][0], found[1][0]
    assert 28 <= far.prompt_tokens - near.prompt_tokens <= 41


def test_what_is_not_timed_has_no_speed(model, asking, monkeypatch):
    settings = grid(SweepConfig(block_sizes=(model.config.block_size,)), 0.0)
    answers = {name: [ScoredAnswer("", 0.0, False, None, [])] * 10 for name in settings}
    monkeypatch.setattr(module, "evaluate", lambda *_: module.TaskResult(asking("exact"), settings, answers, {}, timed))
    timed = {}
    monkeypatch.setattr(module, "tokens_per_call", lambda _: (None, None))
    [points] = sweep(model, asking("exact"), SweepConfig(), QUICK)
    assert {(p.batch_size, p.speed, p.retention.value) for p in points} == {(None, None, None)}
    assert points[1].row()["gain_median"] is None
    assert {p.params.block_size for p in points} == {model.config.block_size}  # as none was asked for
    timed |= {1: [], 4: []}  # too few prompts for either size, which the table says
    [points] = sweep(model, asking("exact"), SweepConfig(), QUICK)
    assert {(p.batch_size, p.speed, p.timed_prompts) for p in points} == {(1, None, 0), (4, None, 0)}


def test_filler_goes_where_the_prompt_wants_it(model, asking):
    plain = asking("exact").examples[1]
    before = module.at_distance(plain, 30)
    assert before.prompt == f"{FILLER}\n{plain.prompt}"
    assert model.tokenizer.decode(prompt_ids(before, model)).endswith(f"\n{plain.prompt}")
    assert module.at_distance(plain, 0) == plain
    inside = module.at_distance(before, 50)
    assert (inside.prompt, inside.distance) == (before.prompt, 50)
    assert module.at_distance(inside, 0) == plain


def test_commits_are_counted_by_step_and_place():
    answers = [ScoredAnswer("", 1.0, False, None, [0, 1, 1, 0]), ScoredAnswer("", 0.0, True, None, [5, 5])]
    assert commits(answers, 2) == [[1, 1], [1, 1]]
    assert commits(answers[:1], 3) == [[2, 0, 0], [0, 1, 1]]
    assert commits(answers[1:], 2) == []


def test_the_front_is_what_nothing_beats():
    points = [point("slow", 10, 1.0), point("worse", 9, 0.9), point("fast", 30, 0.5), point("mid", 20, 0.5)]
    assert [p.label for p in front(points)] == ["fast", "slow"]


@pytest.mark.slow
def test_pictures_are_drawn_of_what_there_is(tmp_path):
    points = [point("a", 10, 1.0), point("b", 20, 0.5, distance=64), point("c", None, 0.5, phases={})]
    assert [file.name for file in draw(points, tmp_path)] == [
        "pareto.png",
        "tokens_per_nfe.png",
        "commits.png",
        "phases.png",
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in tmp_path.iterdir())
    bare = point("ar", None, 0.0, tokens_per_nfe=None, phases={}, commits=[])
    assert draw([bare], tmp_path) == []

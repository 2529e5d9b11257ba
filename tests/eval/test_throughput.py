"""Speeds are tokens over seconds without prefill, in turns; the clock is told apart from what it measures."""

import itertools

import pytest

import twotower
from twotower.decoding.params import SamplingParams
from twotower.eval import throughput
from twotower.eval.throughput import Quartiles, Timed, Work, phase_seconds, quartiles, speeds

PROMPTS = [[1, 70], [1, 80, 90], [1, 75, 76, 77]]


def work(batch_size=1, **lengths):
    params = {
        name: [SamplingParams(mode=name, max_new_tokens=n, block_size=4, seed=0, ignore_eos=True)] * len(PROMPTS)
        for name, n in lengths.items()
    }
    return Work(PROMPTS, params, batch_size)


@pytest.fixture
def ticking(monkeypatch):
    """Every look at the clock is 1 s after the one before."""
    seconds = itertools.count()
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(seconds))


def test_quartiles_of_five():
    assert quartiles([5, 1, 4, 2, 3]) == Quartiles(2, 3, 4)


def test_settings_take_turns_after_a_warm_up(model, monkeypatch):
    seen = []

    def spy(timed, prompts, params):
        seen.append((params[0].mode, len(prompts)))
        return twotower.generate(timed, prompts, params)

    monkeypatch.setattr(throughput, "generate", spy)
    found = speeds(model, work(batch_size=2, ar=4, diffusion=4), repeats=5, advance=lambda: seen.append("done"))
    assert seen == [("ar", 2), ("ar", 1), "done", ("diffusion", 2), ("diffusion", 1), "done"] * 6
    assert list(found) == ["ar", "diffusion"]
    assert found["ar"].gain == (1, 1, 1)
    assert all(q1 > 0 and q1 <= median <= q3 for speed in found.values() for q1, median, q3 in vars(speed).values())


def test_the_warm_up_does_not_count(model, monkeypatch):
    rates = iter([1000, 1, 2, 3, 4, 5])
    monkeypatch.setattr(throughput, "_sample", lambda *_: throughput.SpeedSample(next(rates), 1.0, 0.0))
    assert speeds(model, work(ar=1), repeats=5)["ar"].tokens_per_second == (2, 3, 4)


def test_prefill_is_apart(model, ticking):
    """With a clock of looks, a run of one prompt is: begin, prefill's two looks, generate's own, end."""
    found = speeds(model, work(batch_size=3, ar=4), repeats=5)["ar"]
    prefill, whole = found.prefill_seconds.median, 12 / found.tokens_per_second.median
    assert prefill == 1
    assert whole + prefill == pytest.approx(_looks(model, work(batch_size=3, ar=4)))


def _looks(model, task):
    """Seconds of one run by the ticking clock."""
    timed = Timed(model, ("prefill",))
    seconds, _ = throughput.clock(model, lambda: throughput._run(timed, task, "ar"))
    return seconds


@pytest.mark.parametrize("mode", ["ar", "diffusion", "verified"])
def test_phases_add_up_to_the_whole(model, mode):
    found = phase_seconds(model, work(**{mode: 12}), mode)
    assert list(found) == ["prefill", "denoise", "extend", "other"]
    assert found["prefill"] > 0
    assert found["extend"] > 0
    assert found["other"] > 0
    assert (found["denoise"] > 0) == (mode != "ar")


def test_only_the_phases_asked_for_are_timed(model):
    timed = Timed(model, ("prefill",))
    twotower.generate(timed, PROMPTS, SamplingParams(max_new_tokens=4))
    assert list(timed.seconds) == ["prefill"]
    assert timed.denoiser_logits == model.denoiser_logits

"""Tokens per second of decoding modes against `ar`'s: same prompts, same run, in turns, prefill apart."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch

from twotower.decoding.generate import generate
from twotower.decoding.output import Generation
from twotower.decoding.params import SamplingParams
from twotower.model.two_tower import TwoTower

PHASES = ("prefill", "denoise", "extend", "other")
# The model's calls that a step is made of, and the phase that each of them belongs to.
_PHASES = {
    "prefill": "prefill",
    "denoiser_logits": "denoise",
    "absorb": "extend",
    "score": "extend",
    "scored_logits": "extend",
    "accept": "extend",
}


class Timed:
    """A model that adds up the seconds of its calls per phase, and otherwise is the model it wraps.

    Only `phases` are timed: on a GPU every clock waits for the device.
    """

    def __init__(self, model: TwoTower, phases: Sequence[str] = ("prefill", "denoise", "extend")) -> None:
        self.model = model
        self.seconds = dict.fromkeys(phases, 0.0)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.model, name)
        phase = _PHASES.get(name)
        if phase not in self.seconds:
            return found

        def timed(*args: Any, **kwargs: Any) -> Any:
            seconds, result = clock(self.model, lambda: found(*args, **kwargs))
            self.seconds[phase] += seconds
            return result

        return timed


class Quartiles(NamedTuple):
    q1: float
    median: float
    q3: float


class Work(NamedTuple):
    """Prompts' token ids, the settings of each by the setting's name, and how many run as one batch."""

    prompts: Sequence[Sequence[int]]
    settings: Mapping[str, Sequence[SamplingParams]]
    batch_size: int


class Sample(NamedTuple):
    """One setting over all prompts, once; prefill is not part of `seconds`."""

    tokens: int
    seconds: float
    prefill_seconds: float


class Speed(NamedTuple):
    """One setting's rounds: its speed without prefill, that over ar's in the same round, seconds of all prefills."""

    tokens_per_second: Quartiles
    gain: Quartiles
    prefill_seconds: Quartiles


def speeds(model: TwoTower, work: Work, repeats: int, advance: Callable[[], None] = lambda: None) -> dict[str, Speed]:
    """Every setting's speed over `repeats` rounds in which they take turns, after one to warm up.

    `work.settings` has "ar", which the gains compare with. `advance` is called after each setting of each round.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in work.settings}
    for round_number in range(repeats + 1):
        for name, own in samples.items():
            sample = _sample(model, work, name)
            if round_number > 0:
                own.append(sample)
            advance()
    ar = [s.tokens / s.seconds for s in samples["ar"]]
    found = {}
    for name, own in samples.items():
        rates = [s.tokens / s.seconds for s in own]
        gains = [rate / base for rate, base in zip(rates, ar, strict=True)]
        found[name] = Speed(quartiles(rates), quartiles(gains), quartiles([s.prefill_seconds for s in own]))
    return found


def quartiles(values: Sequence[float]) -> Quartiles:
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def phase_seconds(model: TwoTower, work: Work, name: str) -> dict[str, float]:
    """Seconds of one more run in each phase, with a clock around every call, and under "other" what is left."""
    timed = Timed(model)
    seconds, _ = clock(model, lambda: _run(timed, work, name))
    return timed.seconds | {"other": seconds - sum(timed.seconds.values())}


def clock(model: TwoTower, call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, the device's work included, and its result."""
    _synchronise(model)
    began = time.perf_counter()
    result = call()
    _synchronise(model)
    return time.perf_counter() - began, result


def _sample(model: TwoTower, work: Work, name: str) -> Sample:
    timed = Timed(model, ("prefill",))
    seconds, done = clock(model, lambda: _run(timed, work, name))
    prefill = timed.seconds["prefill"]
    return Sample(sum(one.stats.num_tokens for one in done), seconds - prefill, prefill)


def _run(model: Timed, work: Work, name: str) -> list[Generation]:
    prompts, params, size = work.prompts, work.settings[name], work.batch_size
    done = []
    for i in range(0, len(prompts), size):
        done += generate(cast(TwoTower, model), prompts[i : i + size], params[i : i + size])
    return done


def _synchronise(model: TwoTower) -> None:
    if model.context_device.type == "cuda":
        torch.cuda.synchronize(model.context_device)

"""Tokens per second of decoding modes beside `ar`'s: the same prompts in the same run, in turns, without prefill."""

import dataclasses
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
# The phase of each of the model's calls that decoding is made of.
_PHASES = {
    "prefill": "prefill",
    "denoiser_logits": "denoise",
    "absorb": "extend",
    "score": "extend",
    "scored_logits": "extend",
    "accept": "extend",
}


class Timed:
    """Stands for the model that it wraps and adds up the seconds of its calls, by phase.

    Only `phases` are timed, because on a GPU each reading of the clock waits for the device.
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
    """The quartiles of some values."""

    q1: float
    median: float
    q3: float


@dataclasses.dataclass(frozen=True)
class Work:
    """What is timed: the token ids of prompts, each setting's params for every prompt, and the size of a batch."""

    prompts: Sequence[Sequence[int]]
    settings: Mapping[str, Sequence[SamplingParams]]
    batch_size: int


@dataclasses.dataclass(frozen=True)
class SpeedSample:
    """One run of a setting over all prompts; `seconds` are without prefill."""

    tokens: int
    seconds: float
    prefill_seconds: float


@dataclasses.dataclass(frozen=True)
class Speed:
    """A setting's rounds: its speed without prefill, this divided by ar's of the same round, its seconds of prefill."""

    tokens_per_second: Quartiles
    gain: Quartiles
    prefill_seconds: Quartiles


def speeds(model: TwoTower, work: Work, repeats: int, advance: Callable[[], None] = lambda: None) -> dict[str, Speed]:
    """The speed of every setting over `repeats` rounds in which they take turns, after one more to warm up.

    One setting is named "ar", which gains compare with. `advance` is called after each setting of each round.
    """
    samples: dict[str, list[SpeedSample]] = {name: [] for name in work.settings}
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
    """The quartiles of at least two values, the smallest and largest of which are the ends."""
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def phase_seconds(model: TwoTower, work: Work, name: str) -> dict[str, float]:
    """Seconds in each phase of one more run of a setting, with a clock around every call; "other" is the remainder."""
    timed = Timed(model)
    seconds, _ = clock(model, lambda: _run(timed, work, name))
    return timed.seconds | {"other": seconds - sum(timed.seconds.values())}


def clock(model: TwoTower, call: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds that a call takes, including the work it starts on the device, and its result."""
    _synchronise(model)
    began = time.perf_counter()
    result = call()
    _synchronise(model)
    return time.perf_counter() - began, result


def _sample(model: TwoTower, work: Work, name: str) -> SpeedSample:
    timed = Timed(model, ("prefill",))
    seconds, done = clock(model, lambda: _run(timed, work, name))
    prefill = timed.seconds["prefill"]
    return SpeedSample(sum(one.stats.num_tokens for one in done), seconds - prefill, prefill)


def _run(model: Timed, work: Work, name: str) -> list[Generation]:
    prompts, params, size = work.prompts, work.settings[name], work.batch_size
    done = []
    for i in range(0, len(prompts), size):
        done += generate(cast(TwoTower, model), prompts[i : i + size], params[i : i + size])
    return done


def _synchronise(model: TwoTower) -> None:
    if model.context_device.type == "cuda":
        torch.cuda.synchronize(model.context_device)

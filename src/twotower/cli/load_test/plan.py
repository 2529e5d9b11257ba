"""What a load test sends: reproducible requests, drawn from mixes of lengths and modes, and when they arrive."""

import random
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

# Common words. Prompts have them in random order, so that a prefix cache does not help.
_WORDS = (
    *("once", "upon", "a", "time", "there", "was", "little", "girl", "boy", "dog", "cat", "bird", "tree", "house"),
    *("big", "red", "happy", "sad", "one", "day", "she", "he", "they", "went", "to", "the", "park", "and", "saw"),
    *("found", "played", "with", "ball", "mom", "dad", "friend", "said", "hello", "ran", "home", "sun", "rain", "box"),
)


class Share(NamedTuple):
    """One value of a mix, and its weight."""

    value: str
    weight: float


class Shot(NamedTuple):
    """One request: its text, how many tokens it asks for, its mode (None for an endpoint without modes), and when it
    arrives, in seconds (None in a closed loop, where requests wait for each other)."""

    prompt: str
    new_tokens: int
    mode: str | None
    due: float | None


class Mixes(NamedTuple):
    """What requests are drawn from. If there are no `prompts`, random words are put together."""

    prompt_words: list[Share]
    new_tokens: list[Share]
    modes: list[Share]
    prompts: list[str]


class Target(NamedTuple):
    """Where requests go and what all of them carry."""

    url: str
    model: str
    endpoint: Literal["completions", "chat"]
    temperature: float
    ignore_eos: bool


class LoadTest(NamedTuple):
    """A load test: `warmup`, which is not measured, then the requests of every load, in an open or closed loop."""

    target: Target
    warmup: Sequence[Shot]
    loads: Mapping[str, Sequence[Shot]]
    is_open: bool


def parse_mix(name: str, text: str, *, integers: bool) -> list[Share]:
    """Reads a mix. "32:3,128:1" means three times as many 32 as 128; a value without a weight has weight 1.

    Raises ValueError that names the option if a weight is not positive, or with `integers` if a value is not a positive
    integer.
    """
    shares = []
    for part in text.split(","):
        value, _, weight = part.strip().partition(":")
        allowed = (
            "must be like 32:3,128:1, whole numbers of at least 1" if integers else "must be like ar:3,diffusion:1"
        )
        try:
            share = Share(value, float(weight or 1))
        except ValueError as error:
            raise ValueError(f"{name} is {text!r}, {allowed}") from error
        if (
            not value
            or not 0 < share.weight < float("inf")
            or (integers and not (value.isdecimal() and int(value) > 0))
        ):
            raise ValueError(f"{name} is {text!r}, {allowed}, with weights above 0")
        shares.append(share)
    return shares


def plan(mixes: Mixes, count: int, *, rate: float | None, seed: int) -> list[Shot]:
    """`count` requests, which arrive by a Poisson process with `rate` per second, or without it as earlier ones end.

    The same seed gives the same requests at any rate.
    """
    rng, clock = random.Random(seed), random.Random(seed + 1)
    shots, due = [], 0.0
    for _ in range(count):
        words = int(_pick(rng, mixes.prompt_words))
        given = rng.choice(mixes.prompts) if mixes.prompts else " ".join(rng.choices(_WORDS, k=words))
        tokens, mode = int(_pick(rng, mixes.new_tokens)), _pick(rng, mixes.modes) if mixes.modes else None
        shots.append(Shot(given, tokens, mode, None if rate is None else due))
        due += 0.0 if rate is None else clock.expovariate(rate)
    return shots


def _pick(rng: random.Random, shares: Sequence[Share]) -> str:
    return rng.choices([s.value for s in shares], [s.weight for s in shares])[0]

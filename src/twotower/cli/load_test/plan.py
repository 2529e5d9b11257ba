"""What a load test sends: reproducible requests, drawn from mixes of lengths and modes, and when they arrive."""

import random
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

# Words that every tokenizer has, in no order that a prefix cache could know.
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
    """One request: its text, how many tokens it asks for, its mode (None for an endpoint that has none), and the second
    at which it arrives, None where requests wait for each other."""

    prompt: str
    new_tokens: int
    mode: str | None
    due: float | None


class Mixes(NamedTuple):
    """What requests are drawn from. `prompts` are given texts, or else random words are put together."""

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
    """A load test: requests that are not measured, then those of every load, in an open or in a closed loop."""

    target: Target
    warmup: Sequence[Shot]
    loads: Mapping[str, Sequence[Shot]]
    is_open: bool


def parse_mix(name: str, text: str, *, integers: bool) -> list[Share]:
    """ "32:3,128:1" as three times as many 32 as 128; a value without a weight has weight 1.

    Raises ValueError naming the option, for values that are no positive integers where they must be, and for weights
    that are no positive numbers.
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
    """`count` requests. With a `rate` per second they arrive by a Poisson process, else when an earlier one is done.

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

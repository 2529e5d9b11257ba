import random
from collections.abc import Callable

import numpy as np
import pytest

from twotower.model.ngrams import NgramTable, context_keys
from twotower.model.two_tower import TwoTower


@pytest.fixture
def with_ngrams() -> Callable[[TwoTower, int], TwoTower]:
    """with_ngrams(model, seed) gives a model counts of n-grams that are often right: of its own greedy texts."""

    def make(model: TwoTower, seed: int = 0) -> TwoTower:
        from twotower.decoding.generate import generate
        from twotower.decoding.params import SamplingParams

        rng = random.Random(seed)
        prompts = [[rng.randrange(model.config.vocab_size - 1) for _ in range(3)] for _ in range(12)]
        params = SamplingParams(mode="ar", max_new_tokens=30, ignore_eos=True)
        guesses: dict[int, tuple[int, int]] = {}
        for prompt, result in zip(prompts, generate(model, prompts, params), strict=True):
            text = prompt + result.token_ids
            for i in range(len(prompt), len(text)):
                for key in context_keys(text[:i][::-1], 3):
                    guesses[key] = (text[i], rng.choice([120, 200, 255]))
        keys = sorted(guesses)
        tokens, shares = zip(*(guesses[key] for key in keys), strict=True)
        model.ngrams = NgramTable(
            4,
            model.config.vocab_size,
            np.array(keys, np.uint32),
            np.array(tokens, np.uint16),
            np.array(shares, np.uint8),
        )
        return model

    return make

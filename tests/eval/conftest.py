"""A tiny model that reads and writes bytes, and a task it can be asked."""

from collections.abc import Callable

import pytest
import tokenizers

from twotower.eval.tasks import Example, Task
from twotower.model.two_tower import TwoTower

QUESTIONS = ("ab", "the cat", "x = 3", "Once", "zzzz", "{}", "7 + 1 =", "no", "a longer prompt than the others", "q")


@pytest.fixture(scope="session")
def model(tiny: Callable[..., TwoTower], byte_tokenizer: tokenizers.Tokenizer) -> TwoTower:
    made = tiny(vocab_size=260, block_size=8)
    made.tokenizer = byte_tokenizer
    return made


@pytest.fixture(scope="session")
def asking() -> Callable[..., Task]:
    """asking(scorer, answers=…): a task of ten questions; more than one batch."""

    def make(scorer: str, answers: tuple[str, ...] = ("",) * len(QUESTIONS), length: int = 12) -> Task:
        pairs = zip(QUESTIONS, answers, strict=True)
        return Task("asked", tuple(Example(prompt=q, scorer=scorer, answer=a, max_new_tokens=length) for q, a in pairs))

    return make

"""Every entrance refuses the same prompts."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from twotower.decoding.generate import generate, stream
from twotower.decoding.params import SamplingParams
from twotower.decoding.prompt import checked_ids
from twotower.engine.engine import Engine
from twotower.errors import SettingError
from twotower.model.two_tower import TwoTower

PARAMS = SamplingParams(mode="ar", max_new_tokens=2)


def of_lists(model: TwoTower) -> Iterator[Callable]:
    """The entrances that take a list of prompts."""
    yield lambda prompts: generate(model, prompts, PARAMS)
    yield lambda prompts: Engine(model).generate(prompts, PARAMS)


def of_prompts(model: TwoTower) -> Iterator[Callable]:
    """All entrances, given one prompt."""
    yield lambda prompt: generate(model, [prompt], PARAMS)
    yield lambda prompt: list(stream(model, prompt, PARAMS))
    yield lambda prompt: Engine(model).generate([prompt], PARAMS)
    yield lambda prompt: Engine(model).add(prompt, PARAMS)


@pytest.mark.parametrize("bare", ["hello", [5, 6]])
def test_one_prompt_where_a_list_is_meant_is_refused(bare: Any, tiny: Callable) -> None:
    for entrance in of_lists(tiny()):
        with pytest.raises(SettingError, match=r"must be a list of prompts, .*write it in \[ \]") as raised:
            entrance(bare)
        assert (raised.value.name, raised.value.value) == ("prompts", bare)


def test_an_id_that_is_no_token_is_refused_and_named(tiny: Callable) -> None:
    for entrance in of_prompts(tiny()):
        for bad in (-1, 40, True, 1.0, "5", None, np.bool_(True)):
            with pytest.raises(SettingError, match=r"must be a token id in \[0, 39\]") as raised:
                entrance([5, bad])
            assert raised.value.name == "prompt[1]"
            assert raised.value.value is bad


def test_integers_of_any_library_are_ids() -> None:
    assert checked_ids(torch.tensor([5, 6]), 40, "prompt") == (5, 6)
    found = checked_ids(np.array([5, 6]), 40, "prompt")
    assert found == (5, 6)
    assert all(type(i) is int for i in found)


@pytest.mark.parametrize(
    "ids", [torch.tensor([True]), torch.tensor([1.0]), torch.tensor([[5, 6]]), np.array([True]), np.array([1.0]), [[5]]]
)
def test_what_is_no_integer_in_any_library_is_no_id(ids: Any) -> None:
    with pytest.raises(SettingError, match=r"^prompt\[0\] is .*must be a token id in \[0, 39\]"):
        checked_ids(ids, 40, "prompt")


def test_an_empty_prompt_needs_a_bos_token(tiny: Callable) -> None:
    for entrance in of_prompts(tiny(bos_token_id=None)):
        with pytest.raises(SettingError, match=r"prompt is .*no bos_token_id; give at least one token"):
            entrance([])

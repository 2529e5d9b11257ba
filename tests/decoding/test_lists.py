"""Settings that are lists: what may be in them, and what is said of what may not."""

import dataclasses
import json
import math
from typing import Any

import pytest

from twotower.decoding.lists import parse_biases
from twotower.decoding.params import SamplingParams
from twotower.errors import SettingError

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("logit_bias", {5: NAN}, "logit_bias[5] is nan, must be a number in [-100, 100]"),
        ("logit_bias", {5: INF}, "logit_bias[5] is inf, must be a number in [-100, 100]"),
        ("logit_bias", {5: 100.5}, "logit_bias[5] is 100.5, must be a number in [-100, 100]"),
        ("logit_bias", {5: 10**400}, "must be a number in [-100, 100]"),
        ("logit_bias", {5: True}, "logit_bias[5] is True, must be a number in [-100, 100]"),
        ("logit_bias", {5: "1"}, "logit_bias[5] is '1', must be a number in [-100, 100]"),
        ("logit_bias", {5: None}, "logit_bias[5] is None"),
        ("logit_bias", {-1: 1}, "logit_bias[-1] is 1, must be the bias of a token id, an integer of at least 0"),
        ("logit_bias", {True: 1}, "logit_bias[True] is 1, must be the bias of a token id"),
        ("logit_bias", {1.0: 1}, "logit_bias[1.0] is 1, must be the bias of a token id"),
        ("logit_bias", {"-1": 1}, "logit_bias['-1'] is 1, must be the bias of a token id"),
        ("logit_bias", {"five": 1}, "logit_bias['five'] is 1, must be the bias of a token id"),
        ("logit_bias", {"٥": 1}, "must be the bias of a token id"),
        ("logit_bias", {"9" * 5000: 1}, "must be the bias of a token id"),
        ("logit_bias", {"5": 1, 5: 2}, "names 5 twice; name each id once"),
        ("logit_bias", {"05": 1, "5": 1}, "names 5 twice"),
        ("logit_bias", [5, 6], "must be a mapping from token ids to biases; write logit_bias={50: -100.0}"),
        ("logit_bias", None, "must be a mapping from token ids to biases"),
        ("logit_bias", "5=1", "must be a mapping from token ids to biases"),
        ("allowed_token_ids", [], "allowed_token_ids is [], must be not empty; leave it None for all"),
        ("allowed_token_ids", [1, -2], "allowed_token_ids[1] is -2, must be a token id, an integer of at least 0"),
        ("allowed_token_ids", ["1"], "allowed_token_ids[0] is '1', must be a token id"),
        ("allowed_token_ids", [True], "allowed_token_ids[0] is True, must be a token id"),
        ("allowed_token_ids", [1.0], "allowed_token_ids[0] is 1.0, must be a token id"),
        ("allowed_token_ids", [NAN], "allowed_token_ids[0] is nan, must be a token id"),
        ("allowed_token_ids", [None], "allowed_token_ids[0] is None, must be a token id"),
        ("allowed_token_ids", "12", "must be a list of token ids; write allowed_token_ids=[…]"),
        ("allowed_token_ids", 12, "must be a list of token ids"),
        ("stop_token_ids", [[2]], "stop_token_ids[0] is [2], must be a token id"),
        ("stop_token_ids", None, "stop_token_ids is None, must be a list of token ids"),
        ("bad_words", "word", "must be a list of texts that are not empty; write bad_words=('…',)"),
        ("bad_words", ["a", ""], "must be a list of texts that are not empty"),
        ("bad_words", [5], "must be a list of texts that are not empty"),
        ("bad_words", ["a"] * 1001, "must be at most 1000 strings"),
    ],
)
def test_other_lists_are_refused(name: str, bad: Any, message: str) -> None:
    with pytest.raises(SettingError) as raised:
        SamplingParams(**{name: bad})
    assert message in str(raised.value)
    assert raised.value.name.partition("[")[0] == name
    assert len(str(raised.value)) < 600


def test_lists_are_told_shortly_and_read_quickly_however_long() -> None:
    ids = list(range(131072)) * 8
    assert len(SamplingParams(allowed_token_ids=ids).allowed_token_ids or ()) == 131072
    with pytest.raises(SettingError, match=r"stop_token_ids\[1048576\] is -1"):
        SamplingParams(stop_token_ids=[*ids, -1])  # type: ignore[arg-type]


def test_params_with_lists_are_compared_hashed_and_read_again() -> None:
    p = SamplingParams(logit_bias={"7": 2, 50: -100}, allowed_token_ids=[5, 3, 5], stop_token_ids=[9, 9])  # type: ignore
    assert p.logit_bias == ((7, 2.0), (50, -100.0))
    assert p.allowed_token_ids == (5, 3)
    assert p.stop_token_ids == (9,)
    same = SamplingParams(logit_bias={50: -100, 7: 2}, allowed_token_ids=(5, 3), stop_token_ids=(9,))
    assert p == same
    assert hash(p) == hash(same)
    assert dataclasses.replace(p, seed=None) == p
    assert SamplingParams(**json.loads(json.dumps(dataclasses.asdict(p)))) == p


def test_biases_are_read_from_the_command_line() -> None:
    assert SamplingParams(logit_bias=parse_biases("50=-100, 7=2.5")).logit_bias == ((7, 2.5), (50, -100.0))  # type: ignore
    assert parse_biases("") == ()
    for text in ("50", "50=", "=", "50:3", "50=x"):
        with pytest.raises(SettingError, match="token ids with their biases and commas between them"):
            parse_biases(text)
    with pytest.raises(SettingError, match="must be a number in"):
        SamplingParams(logit_bias=parse_biases("50=nan"))  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="must be the bias of a token id"):
        SamplingParams(logit_bias=parse_biases("x=1"))  # type: ignore[arg-type]

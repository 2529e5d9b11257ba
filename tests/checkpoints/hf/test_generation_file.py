"""generation_config.json: ends and sampling defaults."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from twotower.checkpoints.hf.generation_file import (
    read_config,
    read_sampling_defaults,
    with_generation_ends,
    without_token_ids,
)
from twotower.config import TwoTowerConfig
from twotower.model.sampling_defaults import SamplingDefaults


@pytest.fixture
def folder(tmp_path: Path):
    def make(settings: dict[str, Any] | str) -> Path:
        content = settings if isinstance(settings, str) else json.dumps(settings)
        (tmp_path / "generation_config.json").write_text(content)
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, SamplingDefaults()),
        ({"_from_model_config": True, "eos_token_id": 2}, SamplingDefaults()),
        ({"do_sample": False, "temperature": 0.6}, SamplingDefaults(temperature=0.0)),
        ({"temperature": 0.6, "top_p": 0.9}, SamplingDefaults()),
        ({"do_sample": True}, SamplingDefaults(temperature=1.0)),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "max_new_tokens": 512},
            SamplingDefaults(temperature=0.7, top_k=20, top_p=0.8, max_new_tokens=512),
        ),
        ({"do_sample": True, "temperature": 0, "top_k": 0, "top_p": 1.0}, SamplingDefaults(temperature=0)),
        ({"do_sample": True, "top_k": -1, "top_p": None}, SamplingDefaults(temperature=1.0)),
        ({"repetition_penalty": 1.0, "min_p": 0, "num_beams": 1}, SamplingDefaults()),
        ({"repetition_penalty": 1.05, "min_p": 0.1}, SamplingDefaults(repetition_penalty=1.05)),
        (
            {"do_sample": True, "min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.1},
            SamplingDefaults(temperature=1.0, min_p=0.1, typical_p=0.9, repetition_penalty=1.1),
        ),
        ({"do_sample": True, "min_p": 0, "typical_p": 1.0}, SamplingDefaults(temperature=1.0)),
    ],
)
def test_sampling_counts_only_with_do_sample(folder, settings, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_sampling_defaults(folder(settings)) == expected


def test_settings_that_decoding_does_not_have_are_named(folder):
    settings = {"guidance_scale": 1.05, "num_beams": 4, "do_sample": True, "temperature": 0.7}
    with pytest.warns(UserWarning, match=r"does not have: guidance_scale=1\.05, num_beams=4"):
        assert read_sampling_defaults(folder(settings)).temperature == 0.7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", r"generation_config\.json is not JSON"),
        ({"do_sample": True, "temperature": -1}, r"has temperature -1, must be a number in \[0, 100\]"),
        ({"do_sample": True, "top_p": "0.9"}, r"has top_p '0\.9', must be a number in \[0, 1\]"),
        ({"repetition_penalty": 0}, "has repetition_penalty 0, must be a number in"),
        ({"max_new_tokens": 0}, "has max_new_tokens 0, must be a number in"),
    ],
)
def test_broken_files_are_named(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        read_sampling_defaults(folder(settings))


@pytest.mark.parametrize(
    ("settings", "ends", "bos"),
    [
        ({}, (2,), None),
        ({"eos_token_id": None}, (2,), None),
        ({"eos_token_id": 5, "bos_token_id": 7}, (5,), 7),
        ({"eos_token_id": [5, 6]}, (5, 6), None),
        ({"eos_token_id": []}, (), None),
    ],
)
def test_its_ends_win_over_those_of_the_config(folder, tiny, settings, ends, bos):
    config = with_generation_ends(tiny(bos_token_id=None, eos_token_id=2).config, folder(settings))
    assert (config.eos_token_ids, config.bos_token_id) == (ends, bos)
    config.to_json(folder(settings) / "config.json")
    assert read_config(folder(settings)) == config


def test_ids_that_are_none_are_named(folder, tiny):
    with pytest.raises(ValueError, match="has the token id '5', must be an integer"):
        with_generation_ends(tiny().config, folder({"eos_token_id": ["5"]}))


def test_without_ids_only_lengths_and_numbers_stay():
    settings = {"eos_token_id": 2, "suppress_tokens": [1], "bad_words_ids": [[3]], "max_new_tokens": 9, "top_k": 4}
    assert json.loads(without_token_ids(json.dumps(settings).encode())) == {"max_new_tokens": 9, "top_k": 4}


def test_the_shipped_checkpoints_are_greedy_and_name_their_drafter() -> None:
    from twotower.checkpoints.hf import SHIPPED

    for name in SHIPPED:
        drafter = {"stories": "ngram"}.get(name)
        assert read_sampling_defaults(SHIPPED[name]) == SamplingDefaults(drafter=drafter)
        assert read_config(SHIPPED[name]) == TwoTowerConfig.from_json(SHIPPED[name] / "config.json")

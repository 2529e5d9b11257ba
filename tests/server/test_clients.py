"""What programs really send gets an answer: whole bodies, and the names and values that they have for one thing."""

import json
from pathlib import Path

import pytest

BODIES = json.loads(Path(__file__).parents[2].joinpath("benchmarks/clients/bodies.json").read_text())
ASK = {"model": "tiny", "prompt": "ab", "max_tokens": 6, "temperature": 0, "mode": "ar"}


@pytest.mark.parametrize("program", BODIES)
def test_bodies_of_programs_are_answered(http, program):
    asked = BODIES[program]
    response = http.post(asked["path"], json={"max_tokens": 8, **asked["body"], "model": "tiny"})
    assert response.status_code == 200, response.text
    if not asked["body"].get("stream"):
        assert response.json()["usage"]["completion_tokens"] > 0
        return
    assert response.text.rstrip().endswith("data: [DONE]")
    assert '"error"' not in response.text


@pytest.mark.parametrize(
    "field",
    [
        {"max_new_tokens": 6, "n_predict": 6, "num_predict": 6.0},
        {"repetition_penalty": 1.5, "rep_pen": 1.5, "repeat_penalty": 1.5},
        {"typical_p": 0.5, "typical": 0.5},
        {"stop": ["9"], "stopping_strings": ["9"], "stop_sequence": ["9"]},
        {"seed": 5, "sampler_seed": 5},
        {"features": {"web_search": False, "memory": None, "note": ""}},
        {"adaptive_target": -0.01, "top_n_sigma": -1, "add_bos_token": True, "encoder_repetition_penalty": 1.0},
    ],
    ids=lambda field: next(iter(field)),
)
def test_a_setting_may_come_under_all_of_its_names(http, field):
    ours = {name: value for name, value in field.items() if name in ("repetition_penalty", "typical_p", "stop", "seed")}
    first, second = (http.post("/v1/completions", json=ASK | given) for given in (field, ours))
    assert first.status_code == 200, first.text
    assert first.json()["choices"] == second.json()["choices"]


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ({"max_new_tokens": 7}, "max_new_tokens is not supported by this server; call it max_tokens"),
        ({"rep_pen": 1.5}, "rep_pen is not supported by this server; call it repetition_penalty"),
        ({"repetition_penalty": 1.5, "rep_pen": 1.2}, "rep_pen is not supported"),
        ({"stopping_strings": ["a"]}, "stopping_strings is not supported by this server; call it stop"),
        ({"features": {"web_search": True}}, "features is not supported"),
        ({"features": {"more": {"web_search": True}}}, "features is not supported"),
        ({"adaptive_target": 0.5}, "adaptive_target is not supported"),
        # settings of samplers that are off are taken, as the bodies show
        ({"suffix": "b"}, "suffix is not supported"),
        ({"dry_multiplier": 0.8, "dry_base": 1.75}, "dry_multiplier is not supported"),
        ({"xtc_probability": 0.5, "xtc_threshold": 0.1}, "xtc_probability is not supported"),
        ({"mirostat": 2, "mirostat_tau": 5}, "mirostat is not supported"),
        ({"dynamic_temperature": True, "dynatemp_low": 0.5}, "dynamic_temperature is not supported"),
        ({"use_beam_search": True}, "use_beam_search is not supported"),
    ],
    ids=str,
)
def test_what_asks_for_something_else_is_refused(http, field, told):
    response = http.post("/v1/completions", json=ASK | field)
    assert response.status_code == 400
    assert told in response.json()["error"]["message"]

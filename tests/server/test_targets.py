"""A share of ar's score in place of a threshold: as a field of requests, and as a server's default."""

import contextlib
import copy
from collections.abc import Iterator

import httpx
import pytest

from twotower.decoding.generate import generate
from twotower.decoding.params import SamplingParams
from twotower.engine.aio import AsyncEngine
from twotower.errors import SettingError
from twotower.model.calibration import CalibratedRule, Calibration
from twotower.model.sampling_defaults import SamplingDefaults
from twotower.model.two_tower import TwoTower
from twotower.server.app import make_app
from twotower.server.config import ServerConfig
from twotower.server.service import Service


@pytest.fixture(scope="module")
def calibrated(model: TwoTower) -> TwoTower:
    """Two rules: one commits all at once, the safer one alternate places first."""
    tables = (((1.0, 0.0) * 4,) * 8, ((0.0,) * 8,) * 8)
    rules = tuple(
        CalibratedRule(risk=0.1, thresholds=t, shown=s, tokens_per_nfe=n, held_out=(None, None, None))
        for t, s, n in zip(tables, (0.98, 0.9), (2.0, 8.0), strict=True)
    )
    made = copy.copy(model)
    made.calibration = Calibration(
        block_size=8, steps_per_block=16, confidence=0.9, prompts="p", num_prompts=99, fingerprint="", rules=rules
    )
    return made


@pytest.fixture(scope="module")
def engine_of_it(calibrated: TwoTower) -> Iterator[AsyncEngine]:
    made = AsyncEngine(calibrated).start()
    yield made
    made.close()


BODY = {"model": "tiny", "prompt": "a", "max_tokens": 24, "temperature": 0, "mode": "diffusion"}


def text(url: str, **fields: object) -> str:
    answer = httpx.post(f"{url}/v1/completions", json=BODY | fields, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_requests_and_the_server_may_say_a_target(serve, engine_of_it, calibrated):
    def expected(**settings: object) -> str | None:
        return generate(calibrated, ["a"], SamplingParams(max_new_tokens=24, **settings))[0].text

    texts = [expected(target_retention=t) for t in (0.95, 0.9)]
    plain = [expected(), expected(block_size=4), expected(mode="ar"), expected(confidence_threshold=0.01)]
    assert len({*texts, *plain}) >= 4, "else nothing could be told apart"
    app = make_app(engine_of_it, ServerConfig(model_names=("tiny",), target_retention=0.95))
    with serve(app) as served:
        assert text(served.url) == texts[0]
        assert text(served.url, target_retention=0.9) == texts[1]
        # who says how blocks are filled gets that
        assert text(served.url, block_size=4) == plain[1]
        assert text(served.url, mode="ar") == plain[2]
        assert text(served.url, confidence_threshold=0.01) == plain[3]
        about = httpx.get(f"{served.url}/twotower/about").json()
        assert about["most_target_retention"] == 0.98
        assert [s["most"] for s in about["settings"] if s["name"] == "target_retention"] == [0.98]
        named = {s["name"]: s["default"] for s in about["settings"]}
        assert (named["target_retention"], named["confidence_threshold"]) == (0.95, None)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"target_retention": 0.99}, "target_retention"),
        ({"target_retention": 1}, "target_retention"),
        ({"target_retention": 0.9, "confidence_threshold": 0.5}, "target_retention"),
        ({"target_retention": 0.9, "block_size": 4}, "block_size"),
        ({"target_retention": 0.9, "mode": "verified"}, "target_retention"),
        ({"entropy_bound": 0.1}, "entropy_bound"),
        ({"entropy_bound": -1, "commit_rule": "entropy_bound"}, "entropy_bound"),
    ],
)
def test_what_can_not_be_promised_is_a_400_that_names_the_field(serve, engine_of_it, fields, param):
    with serve(make_app(engine_of_it, ServerConfig(model_names=("tiny",)))) as served:
        answer = httpx.post(f"{served.url}/v1/completions", json=BODY | fields, timeout=60)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param


def test_without_a_calibration_a_request_is_told_the_command(http):
    answer = http.post("/v1/completions", json=BODY | {"target_retention": 0.9})
    assert answer.status_code == 400
    assert "twotower calibrate CHECKPOINT PROMPTS" in answer.json()["error"]["message"]


def test_a_server_does_not_start_with_a_target_that_it_can_not_keep(engine, engine_of_it):
    with pytest.raises(SettingError, match=r"at most 0\.98"):
        make_app(engine_of_it, ServerConfig(target_retention=0.99))
    with pytest.raises(SettingError, match="twotower calibrate"):
        make_app(engine, ServerConfig(target_retention=0.9))


@pytest.mark.parametrize(("usual", "warned"), [(None, "sampled at 1:"), (0.5, "sampled at 0.5:"), (0.0, None)])
def test_a_server_whose_requests_are_sampled_warns_that_its_target_is_for_temperature_0(
    usual: float | None, warned: str | None, calibrated: TwoTower, caplog: pytest.LogCaptureFixture
) -> None:
    model = copy.copy(calibrated)
    model.sampling = SamplingDefaults(temperature=usual)
    with contextlib.closing(AsyncEngine(model).start()) as running:
        Service(running, ServerConfig(model_names=("tiny",), target_retention=0.95), None)
        told = [record.getMessage() for record in caplog.records if "temperature 0" in record.getMessage()]
        assert [warned in one for one in told] == [True] * (warned is not None)
        caplog.clear()
        Service(running, ServerConfig(model_names=("tiny",)), None)
    assert not caplog.records

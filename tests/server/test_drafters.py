"""Where drafts come from, as requests say it and answers tell it."""

import pytest

from twotower.engine.aio import AsyncEngine
from twotower.errors import SettingError
from twotower.server.config import ServerConfig
from twotower.server.service import Service

# the text that the model's context tower goes round
CYCLE = "ab 🎉é…z"
ASK = {"model": "tiny", "prompt": CYCLE * 2, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "mode": "verified"}


def test_a_request_chooses_its_drafter_and_usage_says_what_it_gave(http):
    by_denoiser = http.post("/v1/completions", json=ASK).json()
    by_lookup = http.post("/v1/completions", json=ASK | {"drafter": "prompt,denoiser"}).json()
    assert by_lookup["choices"][0]["text"] == by_denoiser["choices"][0]["text"]
    assert list(by_denoiser["usage"]["drafts"]) == ["denoiser"]
    drafts = by_lookup["usage"]["drafts"]
    assert list(drafts) == ["prompt"]
    assert drafts["prompt"]["accepted"] == drafts["prompt"]["drafted"] > 12, "the text goes round the same bytes"
    assert by_lookup["usage"]["denoiser_calls"] == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"drafter": "lookup"}, 'drafter is "lookup", must be one of denoiser, ngram, prompt'),
        ({"drafter": "ngram"}, "the checkpoint has no counts of n-grams"),
        ({"drafter": "prompt", "mode": "diffusion"}, 'only modes "verified" and "auto" draft'),
        ({"drafter": ["prompt"]}, "drafter"),
    ],
)
def test_a_drafter_that_cannot_run_is_refused(changed, message, http):
    answer = http.post("/v1/completions", json=ASK | changed)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_a_server_has_a_drafter_for_requests_that_name_none(http, engine: AsyncEngine):
    def drafter(asked):
        [request] = service_requests(ServerConfig(default_drafter="prompt"), engine, asked)
        return request

    assert drafter({"mode": "verified"}) == "prompt"
    assert drafter({"mode": "auto"}) == "prompt"
    assert drafter({"mode": "verified", "drafter": "denoiser"}) == "denoiser"
    assert drafter({"mode": "ar"}) is None
    with pytest.raises(SettingError, match="drafter is 'lookup'"):
        ServerConfig(default_drafter="lookup")
    with pytest.raises(SettingError, match="no counts of n-grams"):
        Service(engine, ServerConfig(default_drafter="ngram"), None)
    service = Service(engine, ServerConfig(default_drafter="prompt"), None)
    assert service.config.default_drafter == "prompt"


def service_requests(config: ServerConfig, engine: AsyncEngine, asked):
    import asyncio

    from twotower.server.protocol import CompletionRequest

    service = Service(engine, config, None)
    body = CompletionRequest.model_validate({"prompt": "ab", **asked})
    requests = asyncio.run(service.prepare("ab", body, 4))
    return [request.params.drafter for request in requests]


def test_metrics_count_drafts_under_both_names(http):
    http.post("/v1/completions", json=ASK | {"drafter": "prompt"})
    lines = http.get("/metrics").text.splitlines()
    ours = {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}
    for name, other in (
        ("draft_rounds", "num_drafts"),
        ("drafted_tokens", "num_draft_tokens"),
        ("accepted_tokens", "num_accepted_tokens"),
    ):
        counts = [value for key, value in ours.items() if key.startswith(f"twotower_{name}_total{{drafter=")]
        assert ours[f'twotower_{name}_total{{drafter="prompt"}}'] > 0
        assert ours[f'vllm:spec_decode_{other}_total{{model_name="tiny"}}'] == sum(counts)

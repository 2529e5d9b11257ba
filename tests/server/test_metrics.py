"""The metrics under vLLM's names, and the board that shows them."""

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from twotower.decoding.modes import MODES
from twotower.server.metrics import Metrics

BOARD = Path(__file__).parents[2] / "recipes" / "serving" / "grafana.json"
# The names that vLLM's own board and the usual autoscalers ask for.
VLLM = {
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_hits_total",
    "prefix_cache_queries_total",
    "num_preemptions_total",
    "request_success_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "time_per_output_token_seconds_bucket",
    "request_time_per_output_token_seconds_bucket",
    "e2e_request_latency_seconds_sum",
    "request_queue_time_seconds_sum",
    "request_prefill_time_seconds_sum",
    "request_decode_time_seconds_sum",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
}


def samples(text):
    """The samples of an exposition by name: labels and value."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def total(found, name, **labels):
    return sum(value for own, value in found.get(name, []) if labels.items() <= own.items())


def ask(http, **more):
    body = {"prompt": "abc", "max_tokens": 9, "ignore_eos": True} | more
    return http.post("/v1/completions", json=body).raise_for_status().json()["usage"]


def test_metrics_are_there_before_the_first_request(engine):
    found = samples(Metrics(engine, "tiny", "diffusion").exposition().decode())
    missing = {f"vllm:{name}" for name in VLLM} - found.keys()
    assert not missing
    assert all(labels["model_name"] == "tiny" for name in VLLM for labels, _ in found[f"vllm:{name}"])


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("prompt_tokens_total", "prompt_tokens_total"),
        ("generation_tokens_total", "new_tokens_total"),
        ("request_success_total", "texts_total"),
        ("prefix_cache_hits_total", "cache_hit_tokens_total"),
        ("prefix_cache_queries_total", "cache_query_tokens_total"),
        ("time_to_first_token_seconds_sum", "time_to_first_token_seconds_sum"),
        ("inter_token_latency_seconds_count", "time_between_outputs_seconds_count"),
        ("e2e_request_latency_seconds_count", "text_time_seconds_count"),
        ("request_generation_tokens_bucket", "tokens_per_text_bucket"),
    ],
)
def test_what_vllm_has_is_the_sum_over_modes(http, name, own):
    for mode in MODES:
        ask(http, mode=mode)
    found = samples(http.get("/metrics").text)
    expected = total(found, f"twotower_{own}")
    assert expected > 0
    assert total(found, f"vllm:{name}", model_name="tiny") == pytest.approx(expected)
    # one line for each value of the other labels, as vLLM has it
    lines = [tuple(sorted(labels.items())) for labels, _ in found[f"vllm:{name}"]]
    assert len(lines) == len(set(lines))
    assert not any("mode" in labels for labels, _ in found[f"vllm:{name}"])


def test_times_and_lengths_are_those_of_the_texts(http):
    before = samples(http.get("/metrics").text)
    usage = ask(http, mode="ar", n=2)
    ask(http, mode="ar", max_tokens=0, echo=True)
    after = samples(http.get("/metrics").text)

    def added(name, **labels):
        return total(after, name, **labels) - total(before, name, **labels)

    assert usage["completion_tokens"] == 18
    # without new tokens there is nothing to time but the whole
    assert added("vllm:time_to_first_token_seconds_count") == added("vllm:request_decode_time_seconds_count") == 2
    assert added("vllm:inter_token_latency_seconds_count") == 16
    assert added("vllm:e2e_request_latency_seconds_count") == 3
    assert added("vllm:request_generation_tokens_sum") == 18
    assert added("vllm:request_prompt_tokens_bucket", le="2.0") == 0
    assert added("vllm:request_prompt_tokens_bucket", le="5.0") == 3
    assert added("vllm:request_success_total", finished_reason="length") == 3
    first, decode = added("vllm:time_to_first_token_seconds_sum"), added("vllm:request_decode_time_seconds_sum")
    assert first + decode <= added("vllm:e2e_request_latency_seconds_sum")
    queued, prefill = added("vllm:request_queue_time_seconds_sum"), added("vllm:request_prefill_time_seconds_sum")
    assert 0 < prefill < first
    assert 0 <= queued < first + prefill


def test_a_text_that_nobody_waits_for_is_aborted(http, url, wait_until):
    def aborted():
        return total(samples(http.get("/metrics").text), "vllm:request_success_total", finished_reason="abort")

    before = aborted()
    body = {"prompt": "a", "max_tokens": 1900, "ignore_eos": True, "stream": True, "mode": "ar"}
    with http.stream("POST", "/v1/completions", json=body) as stream:
        next(stream.iter_lines())
    wait_until(lambda: aborted() == before + 1)


def test_the_board_shows_metrics_that_there_are(http):
    ask(http, mode="diffusion")
    found = samples(http.get("/metrics").text)
    board = json.loads(BOARD.read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    queries += [variable["query"] for variable in board["templating"]["list"] if variable["type"] == "query"]
    names = {name for query in queries for name in re.findall(r"\b(?:twotower_|vllm:)\w+", query)}
    assert len(names) > 15
    assert names <= found.keys()
    for query in queries:
        for name, labels in re.findall(r"\b((?:twotower_|vllm:)\w+)\{([^}]*)\}", query):
            asked = set(re.findall(r"(\w+)=", labels)) - {"job", "instance"}
            assert asked <= found[name][0][0].keys(), query
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))

"""Settings of other servers, through HTTP: each gives what `generate` gives, and what only a reply has."""

import pytest

from twotower.decoding.generate import generate
from twotower.decoding.params import SamplingParams

ASK = {"model": "tiny", "prompt": "ab", "max_tokens": 12, "temperature": 0, "mode": "ar"}
CASES = [
    {"min_p": 0.2, "temperature": 1, "seed": 5},
    {"typical_p": 0.5, "temperature": 1, "seed": 5},
    {"repetition_penalty": 1.8},
    {"presence_penalty": 2.0},
    {"frequency_penalty": -1.5},
    {"allowed_token_ids": [100, 101, 102]},
    {"bad_words": ["z"]},
    {"stop_token_ids": [4 + ord("z")]},
    {"stop": ["z"], "include_stop_str_in_output": True},
    {"stop": ["z"], "min_tokens": 11},
    {"priority": 3, "cache_salt": "mine"},
]


@pytest.mark.parametrize("setting", CASES)
def test_a_setting_means_what_it_means_in_the_library(http, model, setting):
    choice = http.post("/v1/completions", json=ASK | setting).json()["choices"][0]
    given = {"temperature": 0.0, **setting}
    [expected] = generate(model, ["ab"], SamplingParams(mode="ar", max_new_tokens=12, **given))
    assert (choice["text"], choice["finish_reason"]) == (expected.text, expected.finish_reason)


def test_biases_have_ids_as_texts(http):
    choice = http.post("/v1/completions", json=ASK | {"logit_bias": {str(4 + ord("q")): 100}}).json()["choices"][0]
    assert choice["text"] == "q" * 12


@pytest.mark.parametrize(("kept", "count"), [(2, 2), (50, 5), (-1, 5)])
def test_a_prompt_is_cut_at_its_beginning(http, kept, count):
    body = ASK | {"prompt": "xxxab", "truncate_prompt_tokens": kept}
    assert http.post("/v1/completions", json=body).json()["usage"]["prompt_tokens"] == count


def test_a_prompt_that_is_too_long_is_cut_to_what_fits(http):
    body = ASK | {"prompt": "x" * 5000, "truncate_prompt_tokens": -1}
    usage = http.post("/v1/completions", json=body).json()["usage"]
    usage.pop("prompt_tokens_details")  # other tests' prompts begin with x too
    assert usage == {
        "prompt_tokens": 1988,
        "completion_tokens": 12,
        "total_tokens": 2000,
        "denoiser_calls": 0,
        "context_calls": 12,
    }


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_likeliest_of_several_texts_are_given(http, path):
    body = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    body |= {"model": "tiny", "max_tokens": 6, "seed": 1, "temperature": 3, "mode": "ar", "ignore_eos": True}
    every = http.post(path, json=body | {"n": 5}).json()
    best = http.post(path, json=body | {"n": 2, "best_of": 5, "logprobs": "chat" in path or 0}).json()
    means = [sum(scores(choice)) for choice in best["choices"]]
    assert means == sorted(means, reverse=True)
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    texts = [text(choice) for choice in every["choices"]]
    assert all(text(choice) in texts for choice in best["choices"])
    assert best["usage"]["completion_tokens"] == 30


def text(choice):
    return choice["text"] if "text" in choice else choice["message"]["content"]


def scores(choice):
    shown = choice["logprobs"]
    return shown["token_logprobs"] if "token_logprobs" in shown else [token["logprob"] for token in shown["content"]]


@pytest.mark.parametrize("best_of", [{"n": 3, "best_of": 2}, {"n": 1, "best_of": 2, "stream": True}])
def test_best_of_is_at_least_n_and_not_streamed(http, best_of):
    response = http.post("/v1/completions", json=ASK | best_of)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "best_of")


def test_log_probabilities_of_the_prompt(http, model):
    choice = http.post("/v1/completions", json=ASK | {"prompt": "abx", "prompt_logprobs": 2}).json()["choices"][0]
    first, *others = choice["prompt_logprobs"]
    ids = [4 + ord(c) for c in "abx"]
    expected = model.context_logits([ids])[0].log_softmax(-1)
    assert first is None
    for place, entry in enumerate(others):
        own = entry[str(ids[place + 1])]
        assert own["logprob"] == pytest.approx(expected[place, ids[place + 1]].item(), abs=1e-4)
        assert own["decoded_token"] == "abx"[place + 1]
        assert [value["rank"] for value in entry.values() if value["rank"]] in ([1, 2], [1, 2, 3])
    streamed = http.post("/v1/completions", json=ASK | {"prompt_logprobs": 0, "stream": True})
    assert streamed.json()["error"]["param"] == "prompt_logprobs"


@pytest.mark.parametrize("stream", [False, True])
def test_ids_of_prompt_and_text(client, stream):
    answer = client.completions.create(**{k: v for k, v in ASK.items() if k != "mode"}, stream=stream,
                                       extra_body={"mode": "ar", "return_token_ids": True})  # fmt: skip
    choices = [chunk.choices[0].model_dump() for chunk in answer] if stream else [answer.choices[0].model_dump()]
    found = [i for choice in choices for i in choice.get("token_ids", ())]
    whole = "".join(choice["text"] for choice in choices)
    assert bytes(i - 4 for i in found).decode() == whole
    if not stream:
        assert choices[0]["prompt_token_ids"] == [4 + ord("a"), 4 + ord("b")]

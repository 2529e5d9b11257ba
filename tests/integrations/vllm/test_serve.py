"""`vllm serve` of both shipped checkpoints, as OpenAI's client sees it."""

import contextlib
import importlib.util
import json
import math
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import twotower
from twotower.integrations.vllm.settings import DRAFTER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
DATA = Path(twotower.__file__).parent / "data"
SPECULATIVE = json.dumps({"method": "custom_class", "model": DRAFTER, "num_speculative_tokens": 8})


@contextlib.contextmanager
def serving(name, log, *options):
    """The address of a running `vllm serve`, which is killed at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["vllm", "serve", str(DATA / name), "--served-model-name", name, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", *options]
    with log.open("w") as output:
        running = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            began = time.monotonic()
            while True:
                assert running.poll() is None, log.read_text()
                assert time.monotonic() - began < 240, log.read_text()
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            running.terminate()
            try:
                running.wait(20)
            except subprocess.TimeoutExpired:
                running.kill()


def test_stories_in_mixed_modes_in_one_load(tmp_path):
    import openai

    model = twotower.load("stories", dtype="float32")
    prompts = ["Once upon a time", "Lily and Tom went to the park", "The dog", "One day, a bird"]
    params = twotower.SamplingParams(mode="ar", max_new_tokens=40, temperature=0)
    expected = [result.text for result in twotower.generate(model, prompts, params)]
    with serving("stories", tmp_path / "log", "--speculative-config", SPECULATIVE) as url:
        client = openai.OpenAI(base_url=url, api_key="none")

        def ask(number):
            mode = ["ar", "verified", None][number % 3]
            return client.completions.create(
                model="stories",
                prompt=prompts[number % 4],
                max_tokens=40,
                temperature=0,
                extra_body={"vllm_xargs": {"mode": mode}} if mode else None,
            )

        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(ask, range(12)))
        assert [a.choices[0].text for a in answers] == [expected[n % 4] for n in range(12)]
        stream = client.completions.create(
            model="stories", prompt=prompts[0], max_tokens=40, temperature=0, stream=True, logprobs=1
        )
        assert "".join(chunk.choices[0].text for chunk in stream) == expected[0]
        with pytest.raises(openai.BadRequestError, match="mode is 'diffusion', must be ar"):
            client.completions.create(model="stories", prompt="One", extra_body={"vllm_xargs": {"mode": "diffusion"}})
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        guided = client.completions.create(
            model="stories",
            prompt="One",
            max_tokens=60,
            temperature=0,
            extra_body={"structured_outputs": {"json": schema}, "vllm_xargs": {"mode": "verified"}},
        )
        assert guided.choices[0].text.lstrip().startswith("{")


def test_a_chat_with_the_hybrid(tmp_path):
    import openai

    model = twotower.load("hybrid", dtype="float32")
    messages = [{"role": "user", "content": "Sort: 3, 1, 2"}]
    with serving("hybrid", tmp_path / "log") as url:
        client = openai.OpenAI(base_url=url, api_key="none")
        answer = client.chat.completions.create(model="hybrid", messages=messages, max_tokens=40, temperature=0)
        ids = client.post("/../tokenize", body={"messages": messages}, cast_to=object)["tokens"]
        [ours] = twotower.generate(model, [ids], twotower.SamplingParams(mode="ar", max_new_tokens=40, temperature=0))
        assert answer.choices[0].message.content == ours.text
        with pytest.raises(openai.BadRequestError, match="must be ar on this server"):
            client.chat.completions.create(
                model="hybrid", messages=messages, extra_body={"vllm_xargs": {"mode": "verified"}}
            )


def test_log_probabilities_of_blocks(tmp_path):
    import openai

    model, prompt = twotower.load("hybrid", dtype="float32"), "Sort: 3, 1, 2"
    params = twotower.SamplingParams(max_new_tokens=40, temperature=0, logprobs=3)
    [ours] = twotower.generate(model, [prompt], params)
    chosen = [math.log(one) for one in ours.confidences]
    diffusion = {"vllm_xargs": {"mode": "diffusion"}}
    with serving("hybrid", tmp_path / "log", "--additional-config", '{"twotower": {"denoiser": true}}') as url:
        client = openai.OpenAI(base_url=url, api_key="none")

        def ask(**settings):
            given = {"prompt": prompt, "max_tokens": 40, "temperature": 0, "extra_body": diffusion}
            return client.completions.create(model="hybrid", **given | settings)

        whole = ask(logprobs=3).choices[0]
        assert whole.text == ours.text
        assert whole.logprobs.token_logprobs == pytest.approx(chosen, abs=2e-4)
        for found, top in zip(whole.logprobs.top_logprobs, ours.top, strict=True):
            numbers = [value for _, value in top]
            assert list(found.values())[-2:] == pytest.approx(numbers[-2:], abs=2e-4)
            assert max(found.values()) == pytest.approx(numbers[0], abs=2e-4)
        streamed = [chunk.choices[0] for chunk in ask(logprobs=3, stream=True)]
        assert "".join(choice.text for choice in streamed) == ours.text
        parts = [choice.logprobs.token_logprobs for choice in streamed if choice.logprobs]
        assert [value for part in parts for value in part] == pytest.approx(chosen, abs=2e-4)
        assert max(map(len, parts)) > 1
        echoed = ask(logprobs=1, echo=True).choices[0]
        assert echoed.text == prompt + ours.text
        assert echoed.logprobs.token_logprobs[-len(chosen) :] == pytest.approx(chosen, abs=2e-4)
        with pytest.raises(openai.BadRequestError, match="greater than max allowed: 20"):
            ask(logprobs=21)
        messages = [{"role": "user", "content": prompt}]
        ids = client.post("/../tokenize", body={"messages": messages}, cast_to=object)["tokens"]
        [ours] = twotower.generate(model, [ids], params)
        settings = {
            "model": "hybrid",
            "messages": messages,
            "max_tokens": 40,
            "temperature": 0,
            "extra_body": diffusion,
        }
        answer = client.chat.completions.create(**settings, logprobs=True, top_logprobs=3).choices[0]
        assert answer.message.content == ours.text
        content = answer.logprobs.content
        assert [one.logprob for one in content] == pytest.approx([math.log(one) for one in ours.confidences], abs=2e-4)
        for one, top in zip(content, ours.top, strict=True):
            numbers = [value for _, value in top]
            assert [other.logprob for other in one.top_logprobs][-2:] == pytest.approx(numbers[-2:], abs=2e-4)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two CPUs")
def test_two_replicas_serve_all_modes(tmp_path, monkeypatch):
    import openai

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model, modes = twotower.load("hybrid", dtype="float32"), ["ar", "verified", "diffusion"]
    prompts = ["Sort: 3, 1, 2", "def glass(w, s):", "The dog", "1"]
    expected = {
        mode: [
            result.text
            for result in twotower.generate(
                model, prompts, twotower.SamplingParams(mode=mode, max_new_tokens=40, temperature=0)
            )
        ]
        for mode in modes
    }
    settings = '{"twotower": {"denoiser": true, "drafter": "denoiser"}}'
    options = ["--data-parallel-size", "2", "--speculative-config", SPECULATIVE, "--additional-config", settings]
    with serving("hybrid", tmp_path / "log", "--max-num-seqs", "4", *options) as url:
        client = openai.OpenAI(base_url=url, api_key="none")

        def ask(number):
            return client.completions.create(
                model="hybrid",
                prompt=prompts[number % 4],
                max_tokens=40,
                temperature=0,
                extra_body={"vllm_xargs": {"mode": modes[number % 3]}},
            )

        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(ask, range(24)))
        assert [a.choices[0].text for a in answers] == [expected[modes[n % 3]][n % 4] for n in range(24)]
        with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as told:
            counts = re.findall(
                r'^vllm:generation_tokens_total\{engine="(\d)".*\} ([\d.e+]+)$', told.read().decode(), re.M
            )
        assert {engine for engine, count in counts if float(count) > 0} == {"0", "1"}

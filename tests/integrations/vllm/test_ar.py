"""`ar` inside vLLM gives the tokens of our `ar`, in float32."""

import importlib.util

import pytest

import twotower

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
MODELS = ["stories", "hybrid", "llama", "M*-", "M*-M*E", "MEM*E"]


@pytest.mark.parametrize("name", MODELS)
def test_each_prompt_alone_and_all_together_give_our_tokens(name, engine, expected, prompts, ask) -> None:
    running = engine(name)
    ids = prompts(6)
    ours = expected(name, ids, 40)
    assert ask(running, ids, 40) == ours
    assert [ask(running, [one], 40) for one in ids[:2]] == [[tokens] for tokens in ours[:2]]


@pytest.mark.parametrize("name", ["stories", "llama", "hybrid", "M*-"])
def test_prompts_in_chunks_give_our_tokens(name, engine, expected, prompts, ask) -> None:
    running = engine(name, max_num_batched_tokens=48, enable_prefix_caching=False)
    ids = prompts(5, most=150, seed=1)
    assert ask(running, ids, 20) == expected(name, ids, 20)


@pytest.mark.parametrize("name", ["stories", "llama"])
def test_beginnings_that_are_known_already_give_our_tokens(name, engine, expected, prompts, ask, count) -> None:
    running = engine(name, block_size=32)
    beginning = [token for part in prompts(40, seed=3) for token in part][:180]
    ids = [beginning + tail for tail in prompts(3, most=20, seed=4)]
    ask(running, ids[:1], 8)
    assert ask(running, ids, 20) == expected(name, ids, 20)
    assert count(running, "prefix_cache_hits") > 0


@pytest.mark.parametrize("name", ["hybrid", "M*-"])
def test_recurrent_states_are_not_cached_on_cpus(name, engine, expected, prompts, ask, count) -> None:
    """vLLM would end at the first prompt that is longer than a block of its cache."""
    running = engine(name, max_model_len=1024)
    ids = [[token for part in prompts(60, seed=seed) for token in part][:700] for seed in (7, 8)]
    assert ask(running, [*ids, *ids], 10) == expected(name, [*ids, *ids], 10)
    assert count(running, "prefix_cache_queries") == 0


@pytest.mark.parametrize("name", ["stories", "M*-"])
def test_requests_that_lose_their_place_and_come_back_give_our_tokens(
    name, engine, expected, prompts, ask, count
) -> None:
    running = engine(name, num_gpu_blocks_override=6 if name == "stories" else 14, enable_prefix_caching=False)
    ids = prompts(6, most=100, seed=5)
    assert ask(running, ids, 120) == expected(name, ids, 120)
    assert count(running, "num_preemptions") > 0


def test_a_request_that_is_aborted_leaves_the_others_their_tokens(engine, expected, prompts) -> None:
    from vllm import SamplingParams

    running = engine("hybrid").llm_engine
    ids = prompts(3, seed=6)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, detokenize=False)
    names = [running.add_request(str(n), {"prompt_token_ids": one}, params) for n, one in enumerate(ids)]
    found = {}
    for step in range(60):
        if step == 5:
            running.abort_request([names[1]], internal=True)
        for output in running.step():
            if output.finished:
                found[output.request_id] = list(output.outputs[0].token_ids)
        if not running.has_unfinished_requests():
            break
    ours = expected("hybrid", ids, 30)
    assert found["0"] == ours[0]
    assert found["2"] == ours[2]
    assert len(found.get("1", [])) < 30


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_a_text_ends_where_the_checkpoint_says(mode, engine) -> None:
    """By config.json alone: stories has a generation_config.json without an end, and no tokenizer_config.json."""
    from vllm import SamplingParams

    running = engine("stories", additional_config={"twotower": {"denoiser": True, "mode": mode}})
    model = twotower.load("stories", dtype="float32")
    ids = list(model.tokenizer.encode("Once upon a time").ids)
    [output] = running.generate([{"prompt_token_ids": ids}], SamplingParams(temperature=0, max_tokens=250))
    [ours] = twotower.generate(model, [ids], twotower.SamplingParams(mode=mode, temperature=0, max_new_tokens=250))
    assert list(output.outputs[0].token_ids) == list(ours.token_ids)
    assert output.outputs[0].finish_reason == "stop"

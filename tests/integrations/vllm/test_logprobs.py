"""Log-probabilities of `diffusion` inside vLLM: those of our own decoding, in vLLM's fields."""

import importlib.util

import pytest

import twotower
from twotower.integrations.vllm.settings import DRAFTER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
WITH_DENOISER = {"additional_config": {"twotower": {"denoiser": True}}}
SPECULATIVE = {"method": "custom_class", "model": DRAFTER, "num_speculative_tokens": 8}


@pytest.fixture
def generate():
    """generate(engine, prompts, [(mode, vLLM's settings)]): vLLM's output of each."""
    from vllm import SamplingParams

    def answers(engine, ids, settings):
        common = {"temperature": 0, "max_tokens": 20, "ignore_eos": True, "detokenize": False}
        params = [SamplingParams(**common | more, extra_args={"mode": mode}) for mode, more in settings]
        return engine.generate([{"prompt_token_ids": one} for one in ids], params, use_tqdm=False)

    return answers


@pytest.fixture
def check(checkpoint):
    """check(name, prompt, output, mode, vLLM's settings): an output's tokens and log-probabilities are ours."""
    models = {}

    def same(name, prompt, output, mode, settings):
        if name not in models:
            models[name] = twotower.load(checkpoint(name), dtype="float32")
        settings, asked = dict(settings), settings.get("logprobs")
        settings.pop("logprobs", None)
        settings.pop("prompt_logprobs", None)
        vocab_size = models[name].config.vocab_size
        num = {None: 0, -1: vocab_size, 0: 1}.get(asked, asked)
        params = {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True} | settings
        stream = twotower.stream(models[name], prompt, twotower.SamplingParams(mode=mode, logprobs=num, **params))
        ours = [token for one in stream for token in one.tokens]
        found = output.outputs[0]
        assert list(found.token_ids) == [token.id for token in ours]
        if asked is None:
            assert found.logprobs is None
            return
        assert len(found.logprobs) == len(ours)
        for place, token in zip(found.logprobs, ours, strict=True):
            likeliest = token.top[: 0 if asked == 0 else num]
            assert next(iter(place)) == token.id
            assert set(place) == {token.id, *(i for i, _ in likeliest)}
            numbers = {token.id: token.logprob, **dict(likeliest)}
            # float32, and other kernels for the context tower
            assert {i: one.logprob for i, one in place.items()} == pytest.approx(numbers, abs=2e-4)
            ranks = {token.id: token.rank} | {i: rank for rank, (i, _) in enumerate(likeliest, 1)}
            if asked != -1:  # far down, tokens are equally likely up to that
                assert {i: one.rank for i, one in place.items()} == ranks
            else:
                assert sorted(one.rank for one in place.values()) == list(range(1, num + 1))
                ordered = sorted(place.values(), key=lambda one: one.rank)
                assert ordered == sorted(ordered, key=lambda one: -one.logprob)
        assert found.cumulative_logprob == pytest.approx(sum(token.logprob for token in ours), abs=1e-2)

    return same


SAMPLED = {"temperature": 1.5, "seed": 7, "top_p": 0.95}
MIXED = [
    ("diffusion", {"logprobs": 5}),
    ("ar", {"logprobs": 3}),
    ("diffusion", {}),
    ("diffusion", {"logprobs": 0, **SAMPLED}),
    ("ar", {}),
    ("diffusion", {"logprobs": 2, "max_new_tokens": 1}),
    ("diffusion", {"logprobs": -1, **SAMPLED}),
]


def vllms(settings):
    return {"max_tokens" if name == "max_new_tokens" else name: value for name, value in settings.items()}


@pytest.mark.parametrize("name", ["stories", "hybrid", "M*-"])
def test_rows_of_several_modes_have_as_many_as_each_asks_for(name, engine, prompts, generate, check) -> None:
    running = engine(name, max_logprobs=-1, **WITH_DENOISER)
    ids = prompts(len(MIXED))
    outputs = generate(running, ids, [(mode, vllms(settings)) for mode, settings in MIXED])
    for prompt, output, (mode, settings) in zip(ids, outputs, MIXED, strict=True):
        check(name, prompt, output, mode, settings)
    [alone] = generate(running, ids[:1], [("diffusion", {"logprobs": 5})])
    check(name, ids[0], alone, "diffusion", {"logprobs": 5})


def test_blocks_and_kept_drafts_in_one_step_have_their_own(engine, prompts, generate, check) -> None:
    running = engine("stories", speculative_config=SPECULATIVE, **WITH_DENOISER)
    settings = [("diffusion", {"logprobs": 4}), ("verified", {"logprobs": 2}), ("verified", {})]
    settings += [("ar", {"logprobs": 6}), ("diffusion", {}), ("verified", {"logprobs": 0})]
    ids = prompts(6, seed=3)
    for prompt, output, (mode, more) in zip(ids, generate(running, ids, settings), settings, strict=True):
        check("stories", prompt, output, mode, more)


def test_blocks_beside_tokens_by_their_ids(engine, prompts, generate, check) -> None:
    """For these vLLM makes fewer numbers of a place than the block's row has."""
    running = engine("llama", **WITH_DENOISER)
    ids = prompts(2)
    settings = [("diffusion", {"logprobs": 5}), ("ar", {"logprob_token_ids": [7, 9]})]
    outputs = generate(running, ids, settings)
    check("llama", ids[0], outputs[0], "diffusion", {"logprobs": 5})
    assert all({7, 9} <= set(place) for place in outputs[1].outputs[0].logprobs)


@pytest.mark.parametrize("name", ["stories", "hybrid"])
def test_a_prompts_own_are_the_context_towers_in_any_mode(name, engine, prompts, generate, checkpoint) -> None:
    running = engine(name, max_num_batched_tokens=48, **WITH_DENOISER)
    ids = [*prompts(2, most=20), [token for part in prompts(8, seed=3) for token in part][:120]]
    outputs = generate(running, ids, [("diffusion", {"prompt_logprobs": 3, "logprobs": 1})] * 3)
    model = twotower.load(checkpoint(name), dtype="float32")
    for prompt, output in zip(ids, outputs, strict=True):
        [scored] = twotower.score(model, [prompt[1:]], [prompt[:1]], num_top=3)
        assert output.prompt_logprobs[0] is None
        for place, token, logprob, top in zip(
            output.prompt_logprobs[1:], prompt[1:], scored.logprobs, scored.top, strict=True
        ):
            # float32, and other kernels
            numbers = {token: logprob, **dict(top)}
            assert {i: one.logprob for i, one in place.items()} == pytest.approx(numbers, abs=2e-4)


def test_requests_that_come_back_keep_theirs(engine, prompts, generate, check, count) -> None:
    running = engine("stories", num_gpu_blocks_override=6, **WITH_DENOISER)
    ids = prompts(6, most=100, seed=5)
    outputs = generate(running, ids, [("diffusion", {"logprobs": 2, "max_tokens": 120})] * 6)
    assert count(running, "num_preemptions") > 0
    for prompt, output in zip(ids, outputs, strict=True):
        check("stories", prompt, output, "diffusion", {"logprobs": 2, "max_new_tokens": 120})


def test_those_of_another_kind_are_refused(engine, prompts, ask) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    running = engine("llama", logprobs_mode="processed_logprobs", **WITH_DENOISER)
    params = SamplingParams(max_tokens=8, logprobs=1, extra_args={"mode": "diffusion"}, detokenize=False)
    with pytest.raises(VLLMValidationError, match=r"logprobs is 1, must be left out .*; start vLLM with raw_logprobs"):
        running.generate([{"prompt_token_ids": [5]}], params, use_tqdm=False)
    assert ask(running, prompts(1), 8, ["diffusion"])

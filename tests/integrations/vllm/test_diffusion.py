"""`diffusion` inside vLLM: our denoiser reads vLLM's cache and gives our tokens, passes and commit steps."""

import importlib.util

import pytest

import twotower

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
WITH_DENOISER = {"additional_config": {"twotower": {"denoiser": True}}}


@pytest.fixture
def watched(monkeypatch):
    """Each request's blocks in order, by its prompt: (tokens, passes of the denoiser)."""
    from twotower.integrations.vllm import blocks, denoiser

    seen = {}

    def fill(model, requests, context):
        filled = blocks.fill_blocks(model, requests, context)
        for request, block in zip(requests, filled, strict=True):
            seen.setdefault(request.prompt_ids, []).append(block)
        return filled

    monkeypatch.setattr(denoiser, "fill_blocks", fill)
    return seen


@pytest.mark.parametrize("name", ["stories", "hybrid", "llama", "M*-", "M*-M*E", "MEM*E"])
def test_tokens_passes_and_commit_steps_are_ours_alone_and_mixed_with_ar(
    name, engine, expected, prompts, ask, watched, checkpoint
) -> None:
    running = engine(name, **WITH_DENOISER)
    ids = prompts(6)
    modes = ["diffusion", "ar"] * 3
    params = twotower.SamplingParams(max_new_tokens=41, temperature=0, ignore_eos=True)
    ours = twotower.generate(twotower.load(checkpoint(name), dtype="float32"), ids, params)
    mixed = ask(running, ids, 41, modes)
    assert mixed[0::2] == [list(one.token_ids) for one in ours[0::2]]
    assert mixed[1::2] == expected(name, ids[1::2], 41)
    for prompt, one in zip(ids[0::2], ours[0::2], strict=True):
        blocks = watched[tuple(prompt)]
        assert [t.step for block in blocks for t in block.tokens] == one.commit_steps
        assert sum(block.num_calls for block in blocks) == one.stats.denoiser_calls
    assert ask(running, ids[:1], 41, ["diffusion"]) == [list(ours[0].token_ids)]


@pytest.mark.parametrize("name", ["stories", "hybrid"])
def test_prompts_in_chunks_and_known_beginnings_give_our_tokens(name, engine, expected, prompts, ask, count) -> None:
    running = engine(name, max_num_batched_tokens=48, block_size=32, **WITH_DENOISER)
    beginning = [token for part in prompts(40, seed=3) for token in part][:150]
    ids = [beginning + tail for tail in prompts(4, most=20, seed=4)]
    ours = expected(name, ids, 40, "diffusion")
    assert ask(running, ids, 40, ["diffusion"] * 4) == ours
    assert ask(running, ids, 40, ["diffusion"] * 4) == ours
    assert (count(running, "prefix_cache_hits") > 0) == (name == "stories")


@pytest.mark.parametrize("name", ["stories", "M*-"])
def test_requests_that_lose_their_place_and_come_back_give_our_tokens(
    name, engine, expected, prompts, ask, count
) -> None:
    running = engine(name, num_gpu_blocks_override=6 if name == "stories" else 14, **WITH_DENOISER)
    ids = prompts(6, most=100, seed=5)
    assert ask(running, ids, 120, ["diffusion"] * 6) == expected(name, ids, 120, "diffusion")
    assert count(running, "num_preemptions") > 0


def test_a_request_that_is_aborted_leaves_the_others_their_tokens(engine, expected, prompts) -> None:
    from vllm import SamplingParams

    running = engine("hybrid", **WITH_DENOISER).llm_engine
    ids = prompts(3, seed=6)
    extra = {"mode": "diffusion"}
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, detokenize=False, extra_args=extra)
    names = [running.add_request(str(n), {"prompt_token_ids": one}, params) for n, one in enumerate(ids)]
    found = {}
    for step in range(60):
        if step == 2:
            running.abort_request([names[1]], internal=True)
        for output in running.step():
            if output.finished:
                found[output.request_id] = list(output.outputs[0].token_ids)
        if not running.has_unfinished_requests():
            break
    ours = expected("hybrid", ids, 60, "diffusion")
    assert found["0"] == ours[0]
    assert found["2"] == ours[2]
    assert len(found.get("1", [])) < 60


def test_a_text_ends_at_an_end_token_inside_a_block(engine, checkpoint) -> None:
    from vllm import SamplingParams

    running = engine("hybrid", **WITH_DENOISER)
    model = twotower.load("hybrid", dtype="float32")
    prompt = list(model.tokenizer.encode("def glass(w, s):").ids)
    [ours] = twotower.generate(model, [prompt], twotower.SamplingParams(max_new_tokens=100, temperature=0))
    assert ours.finish_reason == "stop"
    params = SamplingParams(temperature=0, max_tokens=100, extra_args={"mode": "diffusion"})
    [output] = running.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].text == ours.text


def test_settings_of_blocks_and_sampling_reach_the_denoiser(engine, prompts, watched, checkpoint) -> None:
    from vllm import SamplingParams

    running = engine("llama", **WITH_DENOISER)
    [prompt] = prompts(1)
    extra = {"mode": "diffusion", "block_size": 8, "steps_per_block": 4, "commit_rule": "margin"}
    extra["confidence_threshold"] = 0.99
    sampled = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 3, "presence_penalty": 0.5, "ignore_eos": True}
    params = SamplingParams(**sampled, max_tokens=30, detokenize=False, extra_args=extra)
    [output] = running.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    del extra["mode"]
    ours = twotower.SamplingParams(**sampled, max_new_tokens=30, **extra)
    [expected] = twotower.generate(twotower.load(checkpoint("llama"), dtype="float32"), [prompt], ours)
    assert list(output.outputs[0].token_ids) == list(expected.token_ids)
    assert [len(block.tokens) for block in watched[tuple(prompt)]] == [8, 8, 8, 6]


def test_logprobs_of_ar_stay_right_beside_blocks(engine, prompts) -> None:
    from vllm import SamplingParams

    running = engine("llama", **WITH_DENOISER)
    ids = [{"prompt_token_ids": one} for one in prompts(3)]
    ar = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=2, detokenize=False)
    other = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, extra_args={"mode": "diffusion"})
    other.detokenize = False
    [alone] = running.generate(ids[1:2], ar, use_tqdm=False)
    outputs = running.generate(ids, [other, ar, other], use_tqdm=False)
    found, wanted = outputs[1].outputs[0].logprobs, alone.outputs[0].logprobs
    assert [list(place) for place in found] == [list(place) for place in wanted]
    for place, before in zip(found, wanted, strict=True):
        assert [t.logprob for t in place.values()] == pytest.approx([t.logprob for t in before.values()], abs=1e-4)


@pytest.mark.parametrize("name", ["stories", "hybrid"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_read_from_the_cache_is_the_context_towers_state(name, dtype, engine, ask, monkeypatch) -> None:
    """In bfloat16 vLLM's kernels lay keys out for matrix units where the processor has them."""
    from twotower.integrations.vllm.seeding import CacheReader

    running, states = engine(name, dtype=dtype, **WITH_DENOISER), []
    read = CacheReader.state
    monkeypatch.setattr(CacheReader, "state", lambda *a: states.append(read(*a)) or states[-1])
    model = twotower.load(name, dtype="float32")
    ids = [list(range(20, 60)), list(range(300, 475))]
    ask(running, ids, 8, ["diffusion"] * 2)
    assert [state.lengths for state in states] == [(40, 175)]
    # bfloat16 has 8 bits, and their errors add up over the layers
    tolerance = 1e-4 if dtype == "float32" else 0.06
    for row, prompt in enumerate(ids):
        ours, theirs, n = model.prefill([prompt]), states[0], len(prompt)
        pairs = [*zip(ours.buffer.keys, theirs.buffer.keys, strict=True)]
        pairs += [*zip(ours.buffer.values, theirs.buffer.values, strict=True)]
        for a, b in pairs:
            assert (a[0, :, :n].float() - b[row, :, :n].float()).norm() < tolerance * a[0, :, :n].float().norm()
        for m, other in zip(ours.mamba, theirs.mamba, strict=True):
            for a, b in ((m.conv, other.conv), (m.ssm, other.ssm)):
                assert (a[0].float() - b[row].float()).norm() < tolerance * a[0].float().norm()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"extra_args": {"steps": 4}}, "must be of mode, block_size, steps_per_block"),
        ({"extra_args": {"confidence_threshold": 1.5}}, "confidence_threshold is 1.5, must be"),
        ({"extra_args": {"commit_rule": "luck"}}, "commit_rule is 'luck', must be"),
        ({"logprob_token_ids": [5]}, "logprob_token_ids is .* must be left out with mode 'diffusion'"),
    ],
)
def test_what_blocks_dont_have_is_refused_and_the_server_goes_on(settings, words, engine, prompts, ask) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    running = engine("llama", **WITH_DENOISER)
    extra = {"mode": "diffusion", **settings.pop("extra_args", {})}
    params = SamplingParams(max_tokens=8, extra_args=extra, detokenize=False, **settings)
    with pytest.raises(VLLMValidationError, match=words):
        running.generate([{"prompt_token_ids": [5]}], params, use_tqdm=False)
    assert ask(running, prompts(1), 8, ["diffusion"])


def test_a_checkpoint_without_a_denoiser_is_served_in_ar_alone(engine, tmp_path, checkpoint, ask, prompts) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint("llama"), tmp_path / "bare")
    tensors = load_file(tmp_path / "bare" / "model.safetensors")
    context = {name: t for name, t in tensors.items() if name.startswith("context_")}
    assert 0 < len(context) < len(tensors)
    save_file(context, tmp_path / "bare" / "model.safetensors")
    with pytest.raises(ValueError, match=r"the checkpoint has no denoiser: .*/bare holds no tensor denoiser_tower"):
        engine(str(tmp_path / "bare"), **WITH_DENOISER)
    assert ask(engine(str(tmp_path / "bare")), prompts(1), 4)


def test_a_server_that_cant_write_blocks_is_refused_at_the_start(engine) -> None:
    with pytest.raises(ValueError, match="the denoiser needs --kv-cache-dtype auto"):
        engine("llama", kv_cache_dtype="fp8", dtype="bfloat16", **WITH_DENOISER)

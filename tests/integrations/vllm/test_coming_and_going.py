"""Recurrent states beside drafts of the denoiser, of requests that lose their places, are aborted and follow others."""

import importlib.util
import random

import pytest

from twotower.integrations.vllm.settings import DRAFTER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
SERVER = {
    "speculative_config": {"method": "custom_class", "model": DRAFTER, "num_speculative_tokens": 16},
    "additional_config": {"twotower": {"drafter": "denoiser", "denoiser": True}},
}


@pytest.mark.parametrize("name", ["hybrid", "M*-"])
def test_requests_that_lose_their_place_and_come_back_give_our_tokens(
    name, engine, expected, prompts, ask, count
) -> None:
    # Two sequences: each has an entry for every token of a draft
    running = engine(name, num_gpu_blocks_override=38, **SERVER)
    ids = prompts(6, most=100, seed=5)
    ours, blocks = expected(name, ids, 150), expected(name, ids, 150, "diffusion")
    for modes in (["verified"] * 6, ["verified", "ar"] * 3, ["verified", "diffusion"] * 3):
        before = count(running, "num_preemptions")
        found = ask(running, ids, 150, modes)
        assert found == [blocks[n] if mode == "diffusion" else ours[n] for n, mode in enumerate(modes)]
        assert count(running, "num_preemptions") > before
    assert count(running, "spec_decode_num_accepted_tokens") > 0


@pytest.mark.parametrize("chunk", [512, 48])
@pytest.mark.parametrize("name", ["hybrid", "M*-"])
def test_requests_that_come_and_go_at_any_time_give_our_tokens(
    name, chunk, engine, expected, prompts, count, monkeypatch
) -> None:
    """Drafts here are right in four places of five, as those of no random tower are."""
    from vllm import SamplingParams

    from twotower.integrations.vllm.denoiser import Denoiser
    from twotower.integrations.vllm.drafts import Drafts

    sizes = {"max_model_len": 512, "max_num_seqs": 6, "max_num_batched_tokens": chunk, "num_gpu_blocks_override": 57}
    running, rng = engine(name, **sizes, **SERVER).llm_engine, random.Random(1)
    ids = prompts(24, most=200, seed=5)
    ours = expected(name, ids, 150)
    known = {tuple(prompt): text for prompt, text in zip(ids, ours, strict=True)}

    def draft(denoiser, runner, rows, newest, widths):
        requests = [runner.requests[runner.input_batch.req_ids[row]] for row in rows]
        right = [known[tuple(r.prompt_token_ids)][len(r.output_token_ids) :] for r in requests]
        tokens = [
            [token if rng.random() < 0.8 else rng.randrange(4, 90) for token in text[: width - 1]]
            for text, width in zip(right, widths, strict=True)
        ]
        return Drafts(tokens, {})

    monkeypatch.setattr(Denoiser, "draft", draft)
    names, found, wanted, aborted = {}, {}, {}, set()
    while len(names) < len(ids) or running.has_unfinished_requests():
        number = len(names)
        if number < len(ids) and rng.random() < 0.7:
            mode, most = rng.choice(["verified", "verified", "ar", "diffusion"]), rng.randint(1, 150)
            text = ours[number][:most]
            if mode == "diffusion":  # the last block is as long as what is left
                [text] = expected(name, ids[number : number + 1], most, mode)
            stop = [rng.choice(text)] if rng.random() < 0.4 else []
            wanted[str(number)] = text[: text.index(stop[0]) + 1] if stop else text
            params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True, detokenize=False)
            params.stop_token_ids, params.extra_args = stop, {"mode": mode}
            names[str(number)] = running.add_request(str(number), {"prompt_token_ids": ids[number]}, params)
        if names and rng.random() < 0.03:
            aborted.add(gone := rng.choice(list(names)))
            running.abort_request([names[gone]], internal=True)
        for output in running.step():
            if output.finished:
                found[output.request_id] = list(output.outputs[0].token_ids)
    whole = set(wanted) - aborted
    assert aborted
    assert len(whole) > len(ids) / 2
    assert {one: found[one] for one in whole} == {one: wanted[one] for one in whole}
    metrics = {m.name: m.value for m in running.get_metrics() if hasattr(m, "value")}
    assert metrics["vllm:num_preemptions"] > 0
    assert metrics["vllm:spec_decode_num_accepted_tokens"] > 0

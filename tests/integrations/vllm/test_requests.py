"""What a request of `diffusion` may ask of vLLM, and that one which can't be harms no other."""

import importlib.util

import pytest

import twotower
from twotower.checkpoints.hf.generation_file import read_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
WITH_DENOISER = {"additional_config": {"twotower": {"denoiser": True}}}


def test_a_block_that_cant_be_is_an_error_of_its_request(engine, checkpoint, prompts, ask) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import StructuredOutputsParams

    config = read_config(checkpoint("stories"))
    mask, most = config.mask_token_id, list(range(config.vocab_size))
    refused = [
        ({"allowed_token_ids": [mask]}, f"allowed_token_ids is .* must be with another token than {mask}, the mask"),
        ({"allowed_token_ids": [mask, 7]}, f"allowed_token_ids is .* must be without {mask}, the mask token"),
        ({"logit_bias": {mask: 5.0}}, f"logit_bias is .* must be without {mask}, the mask token"),
        ({"allowed_token_ids": [7], "min_tokens": 4, "stop_token_ids": [7]}, "allowed_token_ids is .* must be with a"),
        ({"min_tokens": 4, "stop_token_ids": most}, "min_tokens is 4, must be such that a token is left"),
        ({"stop_token_ids": [1 << 20]}, "stop_token_ids is .* must be about token ids in"),
        (
            {"structured_outputs": StructuredOutputsParams(regex="a+")},
            r"structured_outputs is \{'regex': 'a\+'\}, must",
        ),
    ]
    of_blocks = [
        ({"block_size": 4096}, r"block_size is 4096, must be an integer in \[1, 256\]; its logits must fit"),
        ({"block_size": "16"}, "block_size is '16', must be an integer"),
        ({"steps_per_block": -1}, "steps_per_block is -1"),
        (
            {"steps_per_block": 257},
            r"steps_per_block is 257, must be an integer in \[1, 256\]; the rows beside it wait",
        ),
        ({"target_retention": 0.9}, "the checkpoint has no calibration"),
        ({"confidence_threshold": [0.9]}, "confidence_threshold is"),
    ]
    refused += [({"extra_args": settings}, words) for settings, words in of_blocks]
    running = engine("stories", **WITH_DENOISER)
    for changes, words in refused:
        settings = {"temperature": 0, "max_tokens": 8} | changes
        settings["extra_args"] = {"mode": "diffusion"} | settings.get("extra_args", {})
        with pytest.raises(VLLMValidationError, match=words):
            running.generate({"prompt_token_ids": [5]}, SamplingParams(**settings), use_tqdm=False)
        assert ask(running, prompts(1), 4, ["diffusion"])


def test_a_share_of_ars_score_can_be_asked_for(engine, checkpoint, prompts) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    running, ours = engine("hybrid", **WITH_DENOISER), twotower.load(checkpoint("hybrid"), dtype="float32")

    def asked(target: float) -> SamplingParams:
        given = {"mode": "diffusion", "target_retention": target}
        return SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False, extra_args=given)

    ids = prompts(4)
    outputs = running.generate([{"prompt_token_ids": one} for one in ids], asked(0.95), use_tqdm=False)
    params = twotower.SamplingParams(max_new_tokens=40, ignore_eos=True, target_retention=0.95)
    expected = [list(one.token_ids) for one in twotower.generate(ours, ids, params)]
    assert [list(one.outputs[0].token_ids) for one in outputs] == expected
    with pytest.raises(VLLMValidationError, match=r"target_retention is 0\.9999, must be at most"):
        running.generate({"prompt_token_ids": [5]}, asked(0.9999), use_tqdm=False)

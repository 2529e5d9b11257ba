"""vLLM's sampling parameters as settings of `diffusion`, without vLLM."""

import dataclasses
from types import SimpleNamespace

import pytest

from twotower import SamplingParams
from twotower.errors import SettingError
from twotower.integrations.vllm.diffusion_params import check_allowed, check_logprobs, diffusion_params, seed_of

USUAL = {
    "extra_args": None,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": None,
    "seed": None,
    "stop_token_ids": [],
    "ignore_eos": False,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "structured_outputs": None,
}


def given(**changes):
    return SimpleNamespace(**USUAL | changes)


def test_what_vllm_sets_by_itself_changes_nothing() -> None:
    found = diffusion_params(given(), 20)
    assert found == SamplingParams(
        past_positions=True,
        max_new_tokens=20,
        temperature=1.0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        logit_bias={},
    )


def test_every_setting_arrives() -> None:
    extra = {"mode": "diffusion", "block_size": 8, "steps_per_block": 4, "confidence_threshold": 0.5, "session_id": "a"}
    found = diffusion_params(
        given(
            extra_args=extra, top_k=5, seed=3, stop_token_ids=[4], logit_bias={7: 2.0}, bad_words=["x"], min_tokens=30
        ),
        20,
    )
    assert (found.block_size, found.steps_per_block, found.confidence_threshold) == (8, 4, 0.5)
    assert (found.top_k, found.seed, found.stop_token_ids, found.bad_words) == (5, 3, (4,), ("x",))
    assert dict(found.logit_bias) == {7: 2.0}
    assert found.min_tokens == 20  # of 20 that may be written


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"extra_args": {"drafter": "ngram"}}, "vllm_xargs is 'drafter', must be of mode, block_size"),
        ({"extra_args": {"block_size": 0}}, "block_size is 0"),
        ({"extra_args": {"commit_rule": "entropy", "entropy_bound": 1.0}}, "entropy_bound"),
        ({"structured_outputs": object()}, "structured_outputs is .* must be left out with mode 'diffusion'"),
        ({"logprob_token_ids": [5]}, r"logprob_token_ids is \[5\], must be left out"),
    ],
)
def test_what_blocks_dont_have_is_refused(changes, words) -> None:
    with pytest.raises(SettingError, match=words):
        diffusion_params(given(**changes), 20)


def test_log_probabilities_are_asked_for_as_vllm_writes_it() -> None:
    asked = {None: 0, 0: 1, 3: 3}
    for theirs, ours in asked.items():
        assert diffusion_params(given(logprobs=theirs, prompt_logprobs=2), 20).logprobs == ours
    assert diffusion_params(given(logprobs=-1), 20).logprobs > 1 << 20


def test_log_probabilities_of_another_kind_are_refused() -> None:
    check_logprobs(given(logprobs=2, prompt_logprobs=2), "raw_logprobs")
    check_logprobs(given(prompt_logprobs=2), "processed_logits")
    with pytest.raises(SettingError, match=r"logprobs is 0, must be left out .* --logprobs-mode processed_logprobs"):
        check_logprobs(given(logprobs=0), "processed_logprobs")


def test_a_long_value_is_told_by_what_was_set() -> None:
    @dataclasses.dataclass
    class Outputs:
        json: str | None = None
        regex: str | None = None
        disable_fallback: bool = False
        _backend: str | None = "auto"

    with pytest.raises(SettingError, match=r"structured_outputs is \{'regex': 'a\+'\}, must be left out"):
        diffusion_params(given(structured_outputs=Outputs(regex="a+")), 20)


def test_every_seed_of_vllm_is_one() -> None:
    assert diffusion_params(given(seed=-5), 20).seed == 2**63 - 5
    assert diffusion_params(given(seed=2**63 + 1), 20).seed == 1  # the third text of a prompt with the largest seed


def test_a_request_that_may_write_the_mask_alone_is_refused() -> None:
    check_allowed(given(), 3)
    check_allowed(given(allowed_token_ids=[3, 5]), 3)
    with pytest.raises(SettingError, match="must be with another token than 3, the mask token"):
        check_allowed(given(allowed_token_ids=[3]), 3)


def test_a_request_has_one_seed_for_all_its_blocks() -> None:
    none, three = SamplingParams(), SamplingParams(seed=3)
    assert seed_of(three, "a") == 3
    assert seed_of(none, "a") == seed_of(none, "a") != seed_of(none, "b")
    assert 0 <= seed_of(none, "a") < 2**63

"""The likeliest tokens of every mode: of the distribution that the chosen token's probability is of."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from twotower.backends.choose import pack_
from twotower.backends.native.build import library
from twotower.decoding import diffusion
from twotower.decoding.generate import generate, stream
from twotower.decoding.likeliest import top_tokens
from twotower.decoding.modes import MODES
from twotower.decoding.params import COMMIT_RULES, SamplingParams
from twotower.decoding.record import make_request
from twotower.decoding.scoring import score
from twotower.decoding.step import step
from twotower.engine.config import EngineConfig
from twotower.engine.engine import Engine
from twotower.errors import SettingError

# A machine without a C compiler has one backend less.
BACKENDS = ["reference", *(["native"] if library() is not None else [])]
# Chosen tokens that a setting forces are unlikely; a filter and a temperature leave probabilities what they are.
SETTINGS: list[dict[str, Any]] = [{}, {"temperature": 2.0, "top_k": 9}, {"logit_bias": {7: 9.0, 8: 9.5}}]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_the_chosen_token_has_its_own_probability(mode: Any, settings: Any, backend: str, tiny: Callable) -> None:
    """With all tokens of the vocabulary, a place's probabilities add up to 1; the chosen one's is its confidence."""
    model = tiny("M*-E", vocab_size=16, mask_token_id=3)
    pack_(model, backend)
    params = SamplingParams(mode=mode, max_new_tokens=19, block_size=5, seed=1, logprobs=20, **settings)
    [done] = generate(model, [[5, 6]], params)
    assert len(done.top) == 19
    for token, confidence, top in zip(done.token_ids, done.confidences, done.top, strict=True):
        ids, logprobs = zip(*top, strict=True)
        assert sorted(ids) == list(range(16))
        assert list(logprobs) == sorted(logprobs, reverse=True)
        assert top[-1] == (3, -math.inf), "the mask"
        # float32
        assert sum(map(math.exp, logprobs)) == pytest.approx(1, abs=1e-5)
        assert math.exp(dict(top)[token]) == pytest.approx(confidence, rel=1e-5)
        if not settings:
            assert ids[0] == token or mode in ("diffusion", "simulated_ar")
    [fewer] = generate(model, [[5, 6]], SamplingParams(**{**vars(params), "logprobs": 3}))
    assert fewer.top == [top[:3] for top in done.top]
    [without] = generate(model, [[5, 6]], SamplingParams(**{**vars(params), "logprobs": 0}))
    assert without.top == [()] * 19
    assert (without.token_ids, without.confidences) == (done.token_ids, done.confidences)


@pytest.mark.parametrize("mode", ["ar", "verified"])
def test_modes_that_follow_the_context_tower_have_its_likeliest(mode: Any, tiny: Callable) -> None:
    model = tiny("M*-E")
    params = SamplingParams(mode=mode, max_new_tokens=12, temperature=1.5, seed=3, logprobs=5)
    [done] = generate(model, [[5, 6]], params)
    [scored] = score(model, [done.token_ids], [[5, 6]], num_top=5)
    for ours, theirs in zip(done.top, scored.top, strict=True):
        assert [i for i, _ in ours] == [i for i, _ in theirs]
        assert [p for _, p in ours] == pytest.approx([p for _, p in theirs], abs=1e-4)  # sums in another order


@pytest.mark.parametrize("rule", COMMIT_RULES)
def test_a_block_keeps_what_was_likeliest_when_a_place_was_committed(rule: Any, tiny: Callable) -> None:
    """Every step's logits again, by the denoiser: those of a committed place are of the step that committed it."""
    model = tiny("M*-E")
    params = SamplingParams(
        commit_rule=rule, max_new_tokens=8, block_size=8, steps_per_block=4, temperature=1.0, seed=2, logprobs=4
    )
    request = make_request(model, [5, 6], params)
    with torch.inference_mode():
        rows = diffusion.start(model, (request,), model.prefill([request.prompt_ids]))
        by_step = []
        while True:
            left = rows.block.left[0]
            by_step.append(model.denoiser_logits(rows.block.xt, rows.context, (left / 8,), None)[0].log_softmax(-1))
            stepped = step(diffusion, model, rows)
            rows = stepped.rows
            if stepped.tokens[0]:
                break
    assert len(by_step) > 1
    for place, token in enumerate(stepped.tokens[0]):
        logprobs = by_step[token.step][place]
        assert [i for i, _ in token.top] == logprobs.topk(4).indices.tolist()
        assert [p for _, p in token.top] == pytest.approx(logprobs.topk(4).values.tolist(), abs=1e-5)
        assert token.logprob == pytest.approx(logprobs[token.id].item(), abs=1e-5)
        assert token.rank == (logprobs >= logprobs[token.id]).sum()


def test_an_engine_gives_each_request_as_many_as_it_asks_for(tiny: Callable) -> None:
    """Rows that ask for none, some and many, of all modes, that join and leave at different steps; blocks differ."""
    model = tiny("M*-E")
    params = [
        SamplingParams(
            mode=mode, max_new_tokens=5 + 3 * (n % 4), block_size=3 + n % 4, seed=n, temperature=n % 2, logprobs=num
        )
        for n, (mode, num) in enumerate((mode, num) for num in (0, 7, 2, 20) for mode in MODES)
    ]
    prompts = [[5 + n % 3, 6] * (1 + n % 5) for n in range(len(params))]
    limits = EngineConfig(max_num_requests=7, state_bytes=60_000, snapshot_bytes=20_000)
    engine = Engine(model, limits)
    alone = [generate(model, [prompt], p)[0] for prompt, p in zip(prompts, params, strict=True)]
    for results in (engine.generate(prompts, params), generate(model, prompts, params)):
        for ours, theirs, p in zip(results, alone, params, strict=True):
            assert ours.token_ids == theirs.token_ids
            assert {len(top) for top in ours.top} == {p.logprobs}
            for mine, other in zip(ours.top, theirs.top, strict=True):
                assert [i for i, _ in mine] == [i for i, _ in other]
                assert [q for _, q in mine] == pytest.approx([q for _, q in other], abs=1e-4)  # other sums


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_has_what_the_result_has(mode: Any, tiny: Callable) -> None:
    params = SamplingParams(mode=mode, max_new_tokens=9, block_size=4, logprobs=2)
    outputs = list(stream(tiny("M*-E"), [5, 6], params))
    result = outputs[-1].result
    assert result is not None
    assert [token.top for output in outputs for token in output.tokens] == result.top


@pytest.mark.parametrize("mode", MODES)
def test_a_token_knows_how_many_were_at_least_as_likely(mode: Any, tiny: Callable) -> None:
    model, settings = (
        tiny("M*-E", vocab_size=16, mask_token_id=3),
        {"temperature": 3.0, "seed": 2, "max_new_tokens": 30},
    )
    ranks = {}
    for num in (16, 1, 0):
        params = SamplingParams(mode=mode, logprobs=num, **settings)
        tokens = [token for one in stream(model, [5, 6], params) for token in one.tokens]
        ranks[num] = [token.rank for token in tokens]
        if num == 16:
            assert ranks[num] == [sum(p >= token.logprob for _, p in token.top) for token in tokens]
    assert max(ranks[1]) > 1
    assert ranks[1] == ranks[16]
    assert ranks[0] == [0] * 30


def test_more_than_the_vocabulary_are_all(tiny: Callable) -> None:
    params = SamplingParams(max_new_tokens=3, logprobs=1 << 40)
    [done] = generate(tiny("M*-E", vocab_size=16, mask_token_id=3), [[5, 6]], params)
    assert {len(top) for top in done.top} == {16}


def test_of_equal_logits_the_first_comes_first() -> None:
    logits = torch.tensor([1.0, 3.0, -0.0, 3.0, 0.0, 1.0, -torch.inf])
    for num in range(1, 8):
        assert top_tokens(logits, num).ids.tolist() == [1, 3, 0, 5, 2, 4, 6][:num]
    many = torch.randint(0, 40, (3, 5000), generator=torch.Generator().manual_seed(0)).float()
    many[:, 1000:] -= 30  # so that some forty are equal to the largest
    expected = many.sort(dim=-1, descending=True, stable=True)
    for num in (1, 20, 64):
        found = top_tokens(many, num)
        assert torch.equal(found.logits, expected.values[:, :num])
        assert torch.equal(found.ids[:, :20], expected.indices[:, : min(num, 20)])


@pytest.mark.parametrize("value", [-1, True, 1.0])
def test_how_many_is_checked(value: Any) -> None:
    with pytest.raises(SettingError, match="logprobs is"):
        SamplingParams(logprobs=value)

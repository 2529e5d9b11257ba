"""Settings that change logits in the modes that fill blocks, and in engines whose rows are of all modes."""

import dataclasses
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from twotower.decoding import diffusion
from twotower.decoding.bad_words import finishing, word_sequences
from twotower.decoding.generate import generate
from twotower.decoding.modes import MODES
from twotower.decoding.params import COMMIT_RULES, SamplingParams
from twotower.decoding.record import make_request
from twotower.decoding.step import step
from twotower.engine.config import EngineConfig
from twotower.engine.engine import Engine
from twotower.model.two_tower import TwoTower

END, MASK = 2, 3
PROMPTS = ["ab", "the cat", "q", "abcabcabc abcabc"]


@pytest.fixture(scope="module")
def model(tiny: Callable, byte_tokenizer: Any) -> TwoTower:
    made = tiny("M*-E", vocab_size=260, eos_token_id=END, block_size=8, seed=1)
    made.tokenizer = byte_tokenizer
    return made


def ids(model: TwoTower, text: str) -> list[int]:
    assert model.tokenizer is not None
    return model.tokenizer.encode(text).ids


@pytest.mark.parametrize("rule", COMMIT_RULES)
@pytest.mark.parametrize("mode", ["diffusion", "simulated_ar"])
def test_a_bad_word_is_complete_in_no_order_of_commits(mode: Any, rule: Any, model: TwoTower) -> None:
    """Three letters are all that may come, so that without the setting the words come often."""
    if mode == "simulated_ar" and rule != "confidence":
        return
    letters, words = ids(model, "abc"), ("aa", "bca", "cc", "abab")
    given = {"mode": mode, "commit_rule": rule, "allowed_token_ids": [*letters, *ids(model, "x")], "max_new_tokens": 48}
    params = [
        SamplingParams(**given, steps_per_block=steps, temperature=1.5, seed=seed, confidence_threshold=0.1)
        for steps, seed in itertools.product((1, 3, 8), range(2))
    ]
    free = generate(model, ["ab"] * len(params), params)
    assert any(word in (done.text or "") for done in free for word in words)
    held = generate(model, ["ab"] * len(params), [dataclasses.replace(p, bad_words=words) for p in params])
    for done in held:
        assert not any(word in "ab" + (done.text or "") for word in words)
        assert set(done.token_ids) <= set(given["allowed_token_ids"])
        assert len(done.token_ids) == 48


def test_the_rightmost_masked_place_is_where_a_word_is_stopped() -> None:
    word = (5, 6, 7)
    assert list(finishing([word], (5, 6, None), 2)) == [(2, 7)]
    assert list(finishing([word], (5, None, 7), 2)) == [(1, 6)]
    assert list(finishing([word], (None, None, None), 0)) == [(2, 7)]
    assert list(finishing([word], (5, 6, 7), 0)) == []
    assert list(finishing([word], (5, 9, None), 0)) == []
    assert list(finishing([word], (6, None), 0)) == []
    assert list(finishing([word], (5, 6, None, 6, None), 3)) == [(4, 7)]
    assert list(finishing([word], (5, 6, None, 9, None), 3)) == []


def test_a_block_counts_what_it_has_committed_from_the_next_step_on(model: TwoTower) -> None:
    """A bias makes two tokens the only likely ones; each commit of one outweighs the bias with its penalty."""
    a, b = ids(model, "ab")
    params = SamplingParams(
        max_new_tokens=64, block_size=32, commit_rule="leftmost", steps_per_block=32, logit_bias={a: 100, b: 70}
    )
    assert generate(model, ["q"], params)[0].token_ids == [a] * 64
    held = dataclasses.replace(params, frequency_penalty=2.0)
    [one_by_one] = generate(model, ["q"], held)
    assert b in one_by_one.token_ids[:32], "some fifteen times 2 outweigh the bias"
    [together] = generate(model, ["q"], dataclasses.replace(held, steps_per_block=1))
    assert together.token_ids[:32] == [a] * 32, "tokens of one step don't see each other"
    assert together.token_ids[32:] == [b] * 32, "the next block sees them"


@pytest.mark.parametrize("mode", MODES)
def test_min_tokens_keeps_ends_away_at_their_own_places(mode: Any, model: TwoTower) -> None:
    """Also where a block reaches over the least length."""
    stop = ids(model, "z")[0]
    params = SamplingParams(mode=mode, max_new_tokens=30, logit_bias={END: 100, stop: 90}, stop_token_ids=[stop])
    assert len(generate(model, ["q"], params)[0].token_ids) == 1
    for least in (1, 5, 11, 30):
        [done] = generate(model, ["q"], dataclasses.replace(params, min_tokens=least))
        assert len(done.token_ids) == min(least + 1, 30)
        assert done.finish_reason == ("length" if least == 30 else "stop")
        assert done.token_ids[-1] == END or least == 30


@pytest.mark.parametrize("mode", MODES)
def test_confidence_is_the_models_own(mode: Any, model: TwoTower) -> None:
    """Not the probability after the settings, by which the only allowed token would have 1."""
    [a] = ids(model, "a")
    [done] = generate(model, ["q"], SamplingParams(mode=mode, max_new_tokens=8, allowed_token_ids=[a]))
    assert done.token_ids == [a] * 8
    assert 0 < max(done.confidences) < 0.9
    if mode == "ar":
        own = model.context_logits([[*ids(model, "q"), *done.token_ids]])[0].softmax(-1)
        assert done.confidences == pytest.approx(own[len(ids(model, "q")) - 1 : -1, a].tolist(), rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_rows_without_settings_are_what_they_are_alone(mode: Any, model: TwoTower) -> None:
    """To the bit, at a temperature and greedy; and their logits are nowhere copied."""
    free = [SamplingParams(mode=mode, max_new_tokens=12, temperature=t, seed=1) for t in (0.0, 1.0)]
    held = SamplingParams(mode=mode, max_new_tokens=12, repetition_penalty=1.5, temperature=0.5, bad_words=("e",))
    for one in free:
        alone = generate(model, ["q"], one)[0]
        beside = generate(model, ["ab", "q", "cd"], [held, one, held])[1]
        assert (beside.token_ids, beside.commit_steps) == (alone.token_ids, alone.commit_steps)
        assert beside.confidences == pytest.approx(alone.confidences, rel=1e-5)


def test_a_batch_without_settings_copies_no_logits(model: TwoTower) -> None:
    request = make_request(model, "q", SamplingParams(mode="diffusion", max_new_tokens=8))
    rows = diffusion.start(model, (request,), model.prefill([request.prompt_ids]))
    assert rows.shaping.apply_to_blocks(torch.zeros(1, 8, 260)) is None
    assert step(diffusion, model, rows).rows.shaping is rows.shaping


def some_settings(rng: random.Random, model: TwoTower) -> SamplingParams:
    every: dict[str, Any] = {
        "repetition_penalty": rng.uniform(0.6, 1.8),
        "presence_penalty": rng.uniform(-1, 2),
        "frequency_penalty": rng.uniform(-0.5, 1),
        "logit_bias": {i: rng.uniform(-5, 5) for i in rng.sample([END, *range(4, 260)], 50)},
        "allowed_token_ids": [END, *rng.sample(range(4, 260), 150)],
        "bad_words": ("ab", "e", " a"),
        "min_tokens": rng.randrange(1, 10),
        "stop_token_ids": rng.sample(range(4, 260), 5),
        "temperature": rng.uniform(0.3, 2),
        "min_p": rng.uniform(0, 0.2),
        "typical_p": rng.uniform(0.2, 1),
        "top_p": rng.uniform(0.2, 1),
    }
    mode: Any = rng.choice(list(MODES))
    rule: Any = rng.choice(COMMIT_RULES) if mode == "diffusion" else "confidence"
    given = {name: value for name, value in every.items() if rng.random() < 0.4}
    return SamplingParams(
        mode=mode,
        commit_rule=rule,
        max_new_tokens=rng.randrange(8, 30),
        seed=rng.randrange(99),
        steps_per_block=4,
        **given,
    )


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 6))])
def test_an_engine_gives_what_generate_gives_whatever_its_batch(seed: int, model: TwoTower) -> None:
    """All modes and settings beside each other, with preemptions and prefix hits."""
    rng = random.Random(seed)
    params = [some_settings(rng, model) for _ in range(8)]
    prompts = [rng.choice(PROMPTS) for _ in params]
    alone = [generate(model, [prompt], p)[0] for prompt, p in zip(prompts, params, strict=True)]
    together = generate(model, prompts, params)
    engine = Engine(model, EngineConfig(max_num_requests=5, state_bytes=80_000, snapshot_bytes=20_000))
    for results in (together, engine.generate(prompts, params)):
        assert [(r.token_ids, r.text, r.commit_steps) for r in results] == [
            (r.token_ids, r.text, r.commit_steps) for r in alone
        ]
    for prompt, p, done in zip(prompts, params, alone, strict=True):
        words = word_sequences(model, p.bad_words)
        text = (*ids(model, prompt), *done.token_ids)
        first = len(text) - len(done.token_ids)
        assert not any(text[end - len(word) : end] == word for word in words for end in range(first + 1, len(text) + 1))

"""Answers are what the library generates; scores and retention are what their definitions say."""

import dataclasses
import math

import pytest
import torch

import twotower
from twotower.decoding.params import MODES, SamplingParams
from twotower.eval.quality import Answer, _batches, answer, likelihood_score, log_probabilities, retention


@pytest.mark.parametrize("mode", MODES)
def test_answers_are_what_each_question_gets_alone(model, asking, mode):
    task = asking("exact")
    params = SamplingParams(mode=mode, block_size=8, temperature=1.0, seed=5)
    answers = answer(model, task, params)
    for i, (example, reply) in enumerate(zip(task.examples, answers, strict=True)):
        own = dataclasses.replace(params, max_new_tokens=example.max_new_tokens, seed=5 + i)
        alone = twotower.generate(model, [example.prompt], own)[0]
        assert reply.text == alone.text
        assert reply.commit_steps == alone.commit_steps
        assert reply.stats.denoiser_calls == alone.stats.denoiser_calls


def test_batches_hold_similar_lengths_and_bounded_sizes():
    lengths = [10, 5000, 20, 3000, 30, 9000, *[7] * 9]
    batches = _batches(lengths)
    assert batches == [[6, 7, 8, 9, 10, 11, 12, 13], [14, 0, 2, 4], [3], [1], [5]]


def test_the_stop_strings_of_a_question_end_its_answer(model, asking):
    params = SamplingParams(mode="ar", seed=0, temperature=1.0)
    [long, *_] = answer(model, asking("exact"), params)
    stopping = asking("exact")
    example = dataclasses.replace(stopping.examples[0], stop=(long.text[3],))
    [cut] = answer(model, stopping._replace(examples=(example,)), params)
    assert cut.text == long.text[: long.text.index(long.text[3])]


def test_the_scorer_decides(model, asking):
    params = SamplingParams(mode="ar", seed=0, temperature=1.0)
    texts = [reply.text for reply in answer(model, asking("exact"), params)]
    scores = [reply.score for reply in answer(model, asking("exact", ("wrong", *texts[1:])), params)]
    assert scores == [0.0, *[1.0] * (len(texts) - 1)]


def test_a_checkpoint_without_a_tokenizer_cannot_be_asked(tiny, asking):
    with pytest.raises(ValueError, match="no tokenizer"):
        answer(tiny(), asking("exact"), SamplingParams(seed=0))


def test_likelihood_is_the_context_towers_own_step_by_step(model):
    prompt, new = [1, 70, 80, 90], [100, 75, 60]
    state = model.prefill([prompt])
    expected = []
    for token in new:
        expected.append(state.next_logits[0].log_softmax(-1)[token].item())
        state = model.extend([[token]], state)
    assert log_probabilities(model, prompt, new).tolist() == pytest.approx(expected, abs=1e-4)
    score = likelihood_score(model, prompt, new, "abc")
    assert score == pytest.approx(math.exp(sum(expected) / 3), rel=1e-4)
    assert likelihood_score(model, prompt, new, "abc " * 20) == 0.0
    assert likelihood_score(model, prompt, [], "") == 0.0


def replies(*scores):
    return [Answer("", score, False, None, []) for score in scores]


def test_retention_is_the_mean_over_tasks_of_ratios():
    ar = {"a": replies(1, 1, 0, 0) * 25, "b": replies(0.5) * 10}
    mode = {"a": replies(1, 0, 0, 0) * 25, "b": replies(0.45) * 10}
    value, low, high = retention(mode, ar)
    assert value == pytest.approx((0.5 + 0.9) / 2)
    assert low < value < high
    # b's answers all agree, and of a's ratio the spread is sqrt(0.5 · 0.5 / 50) for 50 that ar has right, halved
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.25 / 50) / 2, rel=0.15)


def test_pairs_are_drawn_together():
    scores = torch.rand(30, generator=torch.Generator().manual_seed(0)).tolist()
    half = {"a": replies(*(s / 2 for s in scores))}
    assert retention(half, {"a": replies(*scores)}) == pytest.approx((0.5, 0.5, 0.5))


def test_where_ar_scores_nothing_retention_is_undefined():
    assert retention({"a": replies(1, 0)}, {"a": replies(0, 0)}) == (None, None, None)
    both = retention({"a": replies(1, 0), "b": replies(1, 1)}, {"a": replies(0, 0), "b": replies(1, 1)})
    assert both == (1.0, 1.0, 1.0)


def test_too_few_right_answers_of_ar_give_no_interval():
    scores = replies(1, *[0] * 9)  # a third of the resamples has none
    assert retention({"a": scores}, {"a": scores}) == (1.0, None, None)

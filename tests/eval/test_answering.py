"""Answers are what the library generates, and scores what their definitions say."""

import dataclasses
import math

import pytest

import twotower
from twotower.decoding.modes import MODES
from twotower.decoding.params import SamplingParams
from twotower.eval.answering import answer, batches, likelihood_score


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
    found = batches(lengths)
    assert found == [[6, 7, 8, 9, 10, 11, 12, 13], [14, 0, 2, 4], [3], [1], [5]]


def test_the_stop_strings_of_a_question_end_its_answer(model, asking):
    params = SamplingParams(mode="ar", seed=0, temperature=1.0)
    [long, *_] = answer(model, asking("exact"), params)
    stopping = asking("exact")
    example = dataclasses.replace(stopping.examples[0], stop=(long.text[3],))
    [cut] = answer(model, dataclasses.replace(stopping, examples=(example,)), params)
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
    assert likelihood_score(model, prompt, new, "abc") == pytest.approx(math.exp(sum(expected) / 3), rel=1e-4)
    assert likelihood_score(model, prompt, new, "abc " * 20) == 0.0
    assert likelihood_score(model, prompt, [], "") == 0.0

"""Blocks that go on from step to step come out as `generate` writes them, whoever is beside them."""

import pytest

import twotower
from twotower.decoding.record import make_request
from twotower.integrations.vllm.canvases import Canvases

PROMPTS = {"a": [5, 6, 7], "b": [10, 11, 9], "c": [12, 13, 14]}


@pytest.fixture(params=["M*-E", "llama"])
def model(request, tiny):
    return tiny(request.param)


@pytest.fixture
def asked(model):
    """asked("a", "b"): the requests of these names"""
    settings = {"max_new_tokens": 16, "temperature": 0.8, "seed": 3, "steps_per_block": 8, "confidence_threshold": 1.0}
    params = twotower.SamplingParams(**settings, ignore_eos=True)
    return lambda *names: {name: make_request(model, PROMPTS[name], params) for name in names}


def test_blocks_join_leave_and_rest_and_are_ours(model, asked) -> None:
    canvases, full = Canvases(model), {}

    def step(names, *, new=(), until_full=False):
        context = model.prefill([PROMPTS[name] for name in names])
        found = canvases.step(list(names), asked(*new), context, until_full=until_full)
        assert not set(found) & set(full)
        full.update(found)
        return set(found)

    assert not step("a", new="a")
    assert not step("ab", new="b")
    assert not step("cb", new="c")  # "a" rests
    assert "a" in canvases
    assert not step("bca")
    done = step("abc", until_full=True)
    assert done
    assert not done & {name for name in "abc" if name in canvases}
    while left := [name for name in "cab" if name in canvases]:
        step(left)
    assert full.keys() == PROMPTS.keys()
    params = asked("a")["a"].params
    for name, prompt in PROMPTS.items():
        [ours] = twotower.generate(model, [prompt], params)
        assert [token.id for token in full[name].tokens] == list(ours.token_ids)
        assert [token.step for token in full[name].tokens] == ours.commit_steps
        assert full[name].num_calls == ours.stats.denoiser_calls


def test_a_block_that_was_forgotten_begins_again(model, asked) -> None:
    canvases, context = Canvases(model), model.prefill([PROMPTS["a"]])
    canvases.step(["a"], asked("a"), context, until_full=False)
    canvases.forget(["a", "nobody"])
    assert "a" not in canvases
    found = canvases.step(["a"], asked("a"), context, until_full=True)
    [ours] = twotower.generate(model, [PROMPTS["a"]], asked("a")["a"].params)
    assert [token.id for token in found["a"].tokens] == list(ours.token_ids)
    assert found["a"].num_calls == ours.stats.denoiser_calls


def test_a_hurried_block_is_full_after_a_step_and_others_go_on(model, asked) -> None:
    canvases, names = Canvases(model), ["a", "b"]
    alone, both = model.prefill([PROMPTS["b"]]), model.prefill([PROMPTS[name] for name in names])
    for hurried, full in (("a", {"a", "b"}), ("b", {"b"})):
        assert not canvases.step(["b"], asked("b"), alone, until_full=False)
        # "b" is one step ahead: full before "a" is, and before that nobody waits for "a"
        found = canvases.step(names, asked("a"), both, until_full=False, hurried={hurried})
        assert found.keys() == full
        assert {name for name in names if name in canvases} == set(names) - full
        for name, block in found.items():
            [ours] = twotower.generate(model, [PROMPTS[name]], asked(name)[name].params)
            assert [token.id for token in block.tokens] == list(ours.token_ids)
            assert block.num_calls == 8

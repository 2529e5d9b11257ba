"""Blocks that are held to a constraint: what a step commits, and that every text matches whatever the settings."""

import dataclasses
import itertools
import re

import pytest
import torch

from twotower.decoding.constraint import guides
from twotower.decoding.generate import generate
from twotower.decoding.params import COMMIT_RULES, SamplingParams
from twotower.decoding.record import make_request
from twotower.decoding.shaping import shaping

pytest.importorskip("llguidance")

END = 2
RULES = [rule for rule in COMMIT_RULES if rule != "remask"]
DATE = '"(19|20)[0-9]{2}-(0[1-9]|1[0-2])-[0-9]{2}( é…)?"'


@pytest.fixture(scope="module")
def model(tiny, byte_tokenizer):
    made = tiny("M*-E", vocab_size=260, eos_token_id=END, block_size=8)
    made.tokenizer = byte_tokenizer
    return made


def ids(model, text):
    return model.tokenizer.encode(text).ids


@pytest.mark.parametrize(
    ("regex", "proposed", "wanted", "forced", "taken"),
    [
        # the first is taken wanted or not, and then what is wanted as long as it matches
        ("[a-z]+", "abcd", (0, 1, 1, 0), "abc", "abc"),
        ("[a-z]+", "abcd", (0, 0, 1, 1), "a", "a"),
        ("[a-z]{2}[0-9]{9}", "abcd", (1, 1, 1, 1), "ab", "ab"),
        # of what only one text can come, that comes, and then the proposals again
        ("a12[a-z]+", "abcde", (1, 1, 1, 1, 1), "a12de", "a"),
        ("a12[a-z]+", "abcde", (1, 1, 1, 0, 1), "a12", "a"),
        ("a1234567", "abc", (1, 1, 1), "a12", "a"),
        # behind the end everything comes
        ("ab", "abc|x", (1, 1, 1, 0, 0), "ab|" + "|x", "ab"),
        ("a+", "a|bc", (1, 1, 0, 0), "a|bc", "a|bc"),
        ("a+", "|abc", (0, 0, 0, 0), "|abc", "|abc"),
    ],
)
def test_a_block_takes_the_longest_beginning_that_matches(model, regex, proposed, wanted, forced, taken):
    """`|` is the end of a text, and `taken` what comes where nothing is forced."""

    def tokens(text):
        return [END if c == "|" else ids(model, c)[0] for c in text]

    held = guides(model, [SamplingParams(mode="diffusion", regex=regex)], [()])
    flags = [bool(w) for w in wanted]
    for forces, text in ((True, forced), (False, taken)):
        matcher, found = held.follow_block(0, tokens(proposed), flags, forces=forces)
        assert found == (tokens(text) if text != "ab||x" else [*tokens("ab|"), *tokens("|x")])
        again = held.follow_block(0, tokens(proposed), flags, forces=forces)[1]
        assert again == found, "the guide itself is not moved"
        assert matcher is not held.rows[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rule", RULES)
def test_texts_match_whatever_the_rule_and_the_number_of_steps(model, rule, temperature):
    params = [
        SamplingParams(
            mode="diffusion",
            max_new_tokens=40,
            commit_rule=rule,
            steps_per_block=steps,
            block_size=size,
            confidence_threshold=0.02,
            temperature=temperature,
            seed=seed,
            regex=DATE,
        )
        for steps, size, seed in itertools.product((1, 3, 16), (1, 5, 8, 40), range(2))
    ]
    for p, done in zip(params, generate(model, ["ab"] * len(params), params), strict=True):
        assert done.finish_reason == "stop", p
        assert re.fullmatch(DATE, done.text), p
        assert all(0 <= c <= 1 for c in done.confidences)
        size = p.block_size
        blocks = [done.commit_steps[i : i + size] for i in range(0, len(done.commit_steps), size)]
        assert all(steps == sorted(steps) for steps in blocks), "a block fills from left to right"


def test_what_the_constraint_forces_costs_no_steps(model):
    text = "forced to the letter"
    params = SamplingParams(mode="diffusion", max_new_tokens=40, block_size=8, regex=text)
    [done] = generate(model, ["ab"], params)
    assert done.text == text
    assert done.stats.denoiser_calls == 3, "one for each block of 8 of 20 letters and the end"


def test_the_first_place_is_sampled_among_the_allowed_tokens(model):
    """Against the probabilities that the denoiser gives the two tokens at the first place of a block of masks."""
    [a], [b] = ids(model, "a"), ids(model, "b")
    masks = torch.full((1, 3), model.config.mask_token_id)
    with torch.inference_mode():
        state = model.prefill([ids(model, "xy")])
        logits = model.denoiser_logits(masks, model.seed(state), (1.0,), None)[0, 0].double()
    expected = float((logits[a] - torch.logsumexp(logits[[a, b]], 0)).exp())
    count = 400
    params = [
        SamplingParams(mode="diffusion", max_new_tokens=3, temperature=1.0, seed=s, regex="a|b") for s in range(count)
    ]
    share = sum(done.text == "a" for done in generate(model, ["xy"] * count, params)) / count
    # four standard deviations
    assert abs(share - expected) < 4 * (expected * (1 - expected) / count) ** 0.5 + 1e-9


@pytest.mark.parametrize("mode", ["diffusion", "simulated_ar"])
def test_free_rows_beside_a_held_one_are_what_they_are_beside_a_free_one(model, mode):
    free = SamplingParams(mode=mode, max_new_tokens=20, temperature=1.0, seed=1, block_size=8)
    held = dataclasses.replace(free, regex="[0-9]{30}")
    one, other = (generate(model, ["xy", "ab"], [beside, free])[1] for beside in (free, held))
    assert one.token_ids == other.token_ids
    # a batch's other rows change the order of sums
    assert one.confidences == pytest.approx(other.confidences, rel=1e-5)
    assert one.commit_steps == other.commit_steps


def test_held_rows_are_what_they_are_alone(model):
    params = [
        SamplingParams(mode="diffusion", max_new_tokens=30, block_size=8, temperature=1.0, seed=s, regex="[a-f]{9,20}")
        for s in range(6)
    ]
    prompts = ["x" * (s + 1) for s in range(6)]
    for prompt, p, done in zip(prompts, params, generate(model, prompts, params), strict=True):
        [alone] = generate(model, [prompt], p)
        assert alone.token_ids == done.token_ids
        assert alone.commit_steps == done.commit_steps


@pytest.mark.parametrize("more", [{"bad_words": ("aa", "bcb")}, {"min_tokens": 6}, {"presence_penalty": 2.0}])
def test_other_settings_of_the_request_hold_too(model, more):
    params = [
        SamplingParams(
            mode="diffusion",
            max_new_tokens=12,
            block_size=8,
            temperature=1.0,
            confidence_threshold=0.02,
            seed=s,
            regex="x?[abc]+",
            **more,
        )
        for s in range(20)
    ]
    for done in generate(model, ["b"] * len(params), params):
        assert re.fullmatch("x?[abc]*", done.text)
        assert "aa" not in done.text or "bad_words" not in more
        assert "bcb" not in done.text or "bad_words" not in more
        assert len(done.text) >= more.get("min_tokens", 0)


def test_a_resumed_row_is_held_from_where_it_was(model):
    request = make_request(model, "ab", SamplingParams(mode="diffusion", regex="abcd"))
    held = shaping(model, [request._replace(produced=tuple(ids(model, "ab")))], torch.device("cpu")).guides
    logits = torch.zeros(1, 260)
    held.mask_(logits, 0, ())
    assert logits[0].isfinite().nonzero()[:, 0].tolist() == ids(model, "c")

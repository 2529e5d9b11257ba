"""Constraints: every finished text matches, in the modes that can be held to one and in any batch."""

import json
import random
import re

import pytest
import torch

from twotower.decoding import constraint
from twotower.decoding.constraint import guides
from twotower.decoding.generate import generate
from twotower.decoding.modes import MODES
from twotower.decoding.params import SamplingParams
from twotower.engine.config import EngineConfig
from twotower.engine.engine import Engine

pytest.importorskip("llguidance")

STEP_MODES = ("ar", "verified")
NAME = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


@pytest.fixture(scope="module")
def model(tiny, byte_tokenizer):
    made = tiny("M*-E", vocab_size=260, eos_token_id=2, block_size=8)
    made.tokenizer = byte_tokenizer
    return made


def settings(mode, seed, **constraint):
    return SamplingParams(mode=mode, max_new_tokens=200, block_size=8, temperature=1.0, seed=seed, **constraint)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_json_schema_is_followed_to_its_end(model, mode, temperature):
    params = [
        SamplingParams(mode=mode, max_new_tokens=60, temperature=temperature, seed=seed, json_schema=NAME)
        for seed in range(4)
    ]
    for done in generate(model, ["ab", "abc", "b", "x y"], params):
        assert done.finish_reason == "stop"
        person = json.loads(done.text)
        assert person.keys() == {"name", "age"}
        assert len(person["name"]) <= 6
        assert 0 <= person["age"] <= 99
        assert all(0 <= c <= 1 for c in done.confidences)


@pytest.mark.parametrize("mode", MODES)
def test_a_regex_and_a_grammar_are_followed(model, mode):
    params = [settings(mode, seed, regex="(ab|cd){2,4}!") for seed in range(6)]
    for done in generate(model, ["ab"] * 6, params):
        assert re.fullmatch("(ab|cd){2,4}!", done.text)
    params = [settings(mode, seed, grammar='start: "(" start ")" | "x"') for seed in range(6)]
    for done in generate(model, ["ab"] * 6, params):
        if done.finish_reason == "stop":
            depth = done.text.index("x")
            assert done.text == "(" * depth + "x" + ")" * depth


def test_characters_of_several_bytes_are_whole(model):
    done = generate(model, ["ab"], settings("verified", 0, regex="[äöü€🙂]{5}"))[0]
    assert re.fullmatch("[äöü€🙂]{5}", done.text)


def test_greedy_verified_is_still_ar(model):
    prompts = ["ab", "hello", "q", "12"]
    ours, theirs = (
        generate(model, prompts, SamplingParams(mode=mode, max_new_tokens=40, json_schema=NAME)) for mode in STEP_MODES
    )
    assert [done.text for done in ours] == [done.text for done in theirs]
    assert any(len(set(done.confidences)) > 1 for done in ours)


def test_sampled_verified_is_distributed_as_ar(model):
    """Both against the probabilities that the context tower gives the two texts that are possible."""
    state = model.prefill([model.tokenizer.encode("ab").ids])
    a, b = (model.tokenizer.encode(c).ids[0] for c in "ab")
    logits = state.next_logits[0].double()
    expected = float((logits[a] - torch.logsumexp(logits[[a, b]], 0)).exp())
    count = 400
    for mode in STEP_MODES:
        params = [
            SamplingParams(mode=mode, max_new_tokens=3, temperature=1.0, seed=s, regex="a|b") for s in range(count)
        ]
        share = sum(done.text == "a" for done in generate(model, ["ab"] * count, params)) / count
        # four standard deviations
        assert abs(share - expected) < 4 * (expected * (1 - expected) / count) ** 0.5 + 1e-9, mode


def test_confidence_is_the_models_own(model):
    """Not the probability among the tokens that may come."""
    ids = model.tokenizer.encode("ab").ids
    [a] = model.tokenizer.encode("a").ids
    own = float(model.prefill([ids]).next_logits[0].softmax(-1)[a])
    for mode in STEP_MODES:
        done = generate(model, [ids], SamplingParams(mode=mode, max_new_tokens=4, regex="a"))[0]
        assert done.confidences[0] == pytest.approx(own, rel=1e-4)
        assert own < 0.9


def test_free_rows_of_the_batch_are_what_they_are_alone(model):
    free = SamplingParams(mode="ar", max_new_tokens=20, temperature=1.0, seed=1)
    alone = generate(model, ["ab"], free)[0]
    beside = generate(model, ["xy", "ab"], [settings("ar", 0, regex="[0-9]{9}"), free])[1]
    assert beside.token_ids == alone.token_ids
    assert beside.confidences == pytest.approx(alone.confidences, rel=1e-5)


@pytest.mark.slow
def test_the_engine_gives_what_generate_gives_also_when_it_preempts(model):
    params = [
        SamplingParams(
            mode=list(MODES)[s % len(MODES)],
            max_new_tokens=70,
            block_size=16,
            temperature=1.0,
            seed=s,
            regex="[a-z]{40}[0-9]{4}",
        )
        for s in range(10)
    ]
    prompts = [f"prompt {s}" for s in range(10)]
    engine = Engine(model, EngineConfig(max_num_requests=4, state_bytes=45_000, snapshot_bytes=0))
    ours = engine.generate(prompts, params)
    assert [done.text for done in ours] == [
        generate(model, [p], s)[0].text for p, s in zip(prompts, params, strict=True)
    ]
    assert engine.stats().num_preemptions > 0


def test_auto_is_held_to_it_whatever_it_picks(model):
    engine = Engine(model, EngineConfig(max_num_requests=4, state_bytes=1 << 22, snapshot_bytes=0))
    params = [settings("auto", s, json_schema=NAME, allow_loss=s % 2 == 1) for s in range(8)]
    for done in engine.generate(["ab"] * 8, params):
        assert json.loads(done.text).keys() == {"name", "age"}


def test_guides_are_not_moved_by_a_step(model):
    held = guides(model, [SamplingParams(mode="ar", regex="ab")], [()])

    def possible(held, draft=(), places=1):
        logits = torch.zeros(places, 260)
        held.mask_(logits, 0, draft)
        return [own.isfinite().nonzero()[:, 0].tolist() for own in logits]

    a, b = model.tokenizer.encode("ab").ids
    assert possible(held) == possible(held) == [[a]]
    after = held.after([[a]])
    assert possible(after) == [[b]]
    assert possible(after.after([[b, 2, a]])) == [[2]]
    assert possible(held, [a, b, a], 4) == [[a], [b], [2], [*range(260)]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"regex": "a", "grammar": "b"}, "grammar is 'b', must be None beside regex"),
        ({"regex": ""}, "regex is ''"),
        ({"json_schema": {"type": "string"}}, "json_schema is {'type'"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos is True"),
        ({"regex": "a", "mode": "diffusion", "commit_rule": "remask"}, "commit_rule is 'remask', must be another rule"),
    ],
)
def test_settings_that_exclude_each_other(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SamplingParams(**{"mode": "ar", **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"json_schema": "{"}, "must be JSON, which it is not"),
        ({"json_schema": "[" * 100_000}, "must be JSON, which it is not"),
        ({"json_schema": '{"type": "nonsense"}'}, "Invalid type: nonsense"),
        ({"json_schema": '{"not": {}}'}, 'Unimplemented keys: ["not"]'),
        ({"json_schema": '{"$ref": "http://127.0.0.1:9/x.json"}'}, "does not fetch"),
        ({"json_schema": '{"enum": []}'}, "Unsatisfiable"),
        ({"regex": "("}, "regex is '(', must be a constraint that llguidance can follow"),
        ({"grammar": "start: x"}, 'unknown name: "x"'),
    ],
)
def test_what_nobody_can_follow_is_refused_before_anything_runs(model, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(model, ["ab"], SamplingParams(mode="ar", **given))


def test_a_model_without_end_token_can_not_end_a_text(tiny, byte_tokenizer):
    made = tiny("*-", vocab_size=260)
    made.tokenizer = byte_tokenizer
    with pytest.raises(ValueError, match="must be None for a checkpoint without a tokenizer"):
        generate(made, ["ab"], SamplingParams(mode="ar", regex="a"))


def test_without_the_package_the_fix_is_named(model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    constraint._matcher.cache_clear()
    with pytest.raises(ValueError, match=r"twotower\[guide\]"):
        generate(model, ["ab"], SamplingParams(mode="ar", regex="a"))


def schema(rng, depth=2):
    """A random JSON schema of bounded texts."""
    simple = [
        {"type": "integer", "minimum": rng.randrange(-50, 0), "maximum": rng.randrange(1, 500)},
        {"type": "string", "maxLength": rng.randrange(0, 8)},
        {"type": "boolean"},
        {"type": "null"},
        {"enum": ["red", 1, None, {"a": [True]}][: rng.randrange(1, 5)]},
        {"type": "string", "pattern": "^[a-c]{1,4}$"},
    ]
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(simple)
    if rng.random() < 0.4:
        return {"type": "array", "items": schema(rng, depth - 1), "maxItems": rng.randrange(1, 4)}
    if rng.random() < 0.3:
        return {"anyOf": [schema(rng, depth - 1) for _ in range(2)]}
    names = rng.sample(["a", "b c", "ü", "name"], rng.randrange(1, 4))
    properties = {name: schema(rng, depth - 1) for name in names}
    required = [name for name in names if rng.random() < 0.7]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def test_random_schemas_give_valid_json_in_every_mode(model):
    jsonschema = pytest.importorskip("jsonschema_rs")
    schemas = [schema(random.Random(seed)) for seed in range(20)]
    params = [
        SamplingParams(mode=mode, max_new_tokens=400, temperature=1.0, seed=i, json_schema=json.dumps(s))
        for i, s in enumerate(schemas)
        for mode in MODES
    ]
    engine = Engine(model, EngineConfig(max_num_requests=16, state_bytes=1 << 24, snapshot_bytes=0))
    for done, p in zip(engine.generate(["ab"] * len(params), params), params, strict=True):
        assert done.finish_reason == "stop"
        jsonschema.validate(json.loads(p.json_schema), json.loads(done.text))

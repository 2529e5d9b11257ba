"""Settings that change logits against plain Python, and the modes that follow them against each other."""

import collections
import dataclasses
import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tokenizers
import torch

from twotower.decoding.bad_words import word_sequences
from twotower.decoding.generate import generate
from twotower.decoding.modes import MODES
from twotower.decoding.params import SamplingParams
from twotower.decoding.record import make_request
from twotower.decoding.sampling import distribution, temper
from twotower.decoding.shaping import shaping
from twotower.engine.config import EngineConfig
from twotower.engine.engine import Engine
from twotower.model.two_tower import TwoTower

CPU = torch.device("cpu")
END, MASK = 2, 3
LETTERS = "abct e"
WORDS = ("ab", "e", " t", "a cat", "aaa", "zz", "é", "bc", "ca")
SCHEMA = json.dumps({"type": "object", "properties": {"a": {"type": "string", "maxLength": 9}}, "required": ["a"]})


@pytest.fixture(scope="module")
def model(tiny: Callable, byte_tokenizer: Any) -> TwoTower:
    """It writes few different letters, so that drafts are often right and texts repeat themselves."""
    made = tiny("M*-E", vocab_size=260, eos_token_id=END, block_size=8, seed=1)
    made.tokenizer = byte_tokenizer
    letters = torch.tensor([END, *byte_tokenizer.encode(LETTERS).ids])
    with torch.no_grad():
        for name in ("lm_head.weight", "context_lm_head.weight"):
            weight = made.released_tensors()[name]
            kept = weight[letters]
            weight.zero_()
            weight[letters] = kept
    return made.eval()


def reference(
    logits: Sequence[float], prompt: Sequence[int], written: Sequence[int], p: SamplingParams, words: Sequence
) -> list[float]:
    """The probabilities of the next token, from the equations of `SamplingParams`."""
    l = list(logits)
    text = [*prompt, *written]
    for i in range(len(l)):
        l[i] += dict(p.logit_bias).get(i, 0.0)
        if p.repetition_penalty is not None and i in text:
            l[i] = l[i] / p.repetition_penalty if l[i] > 0 else l[i] * p.repetition_penalty
        l[i] -= p.frequency_penalty * written.count(i) + p.presence_penalty * (i in written)
        if p.allowed_token_ids is not None and i not in p.allowed_token_ids:
            l[i] = -math.inf
        if len(written) < p.min_tokens and i in (END, *p.stop_token_ids):
            l[i] = -math.inf
        if any(i == word[-1] and tuple([*text, i][-len(word) :]) == tuple(word) for word in words):
            l[i] = -math.inf
    if not p.temperature:
        return [float(i == l.index(max(l))) for i in range(len(l))]
    order = sorted(range(len(l)), key=lambda i: -l[i])
    weight = {i: math.exp((l[i] - l[order[0]]) / p.temperature) for i in order if l[i] > -math.inf}
    total = sum(weight.values())
    left = {i: w / total for i, w in weight.items()}
    left = {i: q for i, q in left.items() if q >= (p.min_p or 0) * max(left.values())}
    left = dict(list(left.items())[: p.top_k])

    def first(probabilities: dict[int, float], mass: float) -> dict[int, float]:
        kept, before, total = {}, 0.0, sum(probabilities.values())
        for i, q in probabilities.items():
            if not kept or before / total < mass:
                kept[i] = q
            before += q
        return kept

    if p.top_p not in (None, 1):
        left = first(left, p.top_p)
    if p.typical_p not in (None, 1):
        left = {i: q / sum(left.values()) for i, q in left.items()}
        entropy = -sum(q * math.log(q) for q in left.values())
        left = first(dict(sorted(left.items(), key=lambda pair: abs(-math.log(pair[1]) - entropy))), p.typical_p)
    return [left.get(i, 0.0) / sum(left.values()) for i in range(len(l))]


def random_settings(rng: random.Random, *, temperature: bool) -> dict[str, Any]:
    """Some of the settings, with values of their whole ranges; no two sums of which are equal."""
    every: dict[str, Callable[[], Any]] = {
        "repetition_penalty": lambda: rng.uniform(0.5, 2),
        "presence_penalty": lambda: rng.uniform(-2, 2),
        "frequency_penalty": lambda: rng.uniform(-0.5, 2),
        "logit_bias": lambda: {i: rng.uniform(-4, 4) for i in rng.sample([END, *range(4, 260)], 90)},
        "allowed_token_ids": lambda: [END, *rng.sample(range(4, 260), rng.choice([90, 200]))],
        "bad_words": lambda: rng.sample(WORDS, 3),
        "min_tokens": lambda: rng.randrange(1, 12),
        "stop_token_ids": lambda: rng.sample(range(60, 120), 2),
        "stop": lambda: (rng.choice(["q", "</s>", "ab", "c", "bac"]),),
        "include_stop_str_in_output": lambda: True,
        "skip_special_tokens": lambda: False,
    }
    if temperature:
        every |= {
            "min_p": lambda: rng.uniform(0, 0.3),
            "typical_p": lambda: rng.uniform(0.2, 1),
            "top_p": lambda: rng.uniform(0.3, 1),
            "top_k": lambda: rng.randrange(1, 100),
        }
    chosen = {name: make() for name, make in every.items() if rng.random() < 0.4}
    return chosen | ({"temperature": rng.uniform(0.3, 2)} if temperature else {})


@pytest.mark.parametrize("seed", range(40))
def test_every_place_of_a_draft_is_what_the_equations_say(seed: int, model: TwoTower) -> None:
    """Rows with settings beside one without; also where some tokens are written already. float32 against float64."""
    rng = random.Random(seed)
    logits = 3 * torch.randn(3, 5, 260, generator=torch.Generator().manual_seed(seed))
    logits[..., MASK] = -torch.inf
    # few different tokens, so that they come again and bad words begin
    [letters] = [model.tokenizer.encode("aab the cat").ids]
    rows, written = [], [[rng.choice(letters) for _ in range(rng.choice([0, 5]))] for _ in range(3)]
    for row in range(3):
        given = {} if row == 1 else random_settings(rng, temperature=seed % 3 != 0)
        params = SamplingParams(mode="verified", max_new_tokens=40, seed=0, **given)
        rows.append(make_request(model, [rng.choice(letters) for _ in range(6)], params))
    rows = [request._replace(produced=tuple(ids)) for request, ids in zip(rows, written, strict=True)]
    drafts = [[rng.choice(letters) for _ in range(4)] for _ in rows]
    before = logits.clone()
    shaped = shaping(model, rows, CPU).apply(logits, drafts)
    found = distribution(logits, temper(tuple(r.params for r in rows), 260, CPU), shaped)
    assert torch.equal(logits, before)
    for row, request in enumerate(rows):
        words = word_sequences(model, request.params.bad_words)
        for k in range(5):
            text = [*written[row], *drafts[row][:k]]
            expected = reference(logits[row, k].double().tolist(), request.prompt_ids, text, request.params, words)
            torch.testing.assert_close(found[row, k], torch.tensor(expected), rtol=1e-4, atol=1e-6)


ONE_BY_ONE: list[dict[str, Any]] = [
    {"repetition_penalty": 1.6},
    {"repetition_penalty": 0.7},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.8},
    {"frequency_penalty": 1.2},
    {"logit_bias": {69: 3.0, 60: 5.5, END: -100}},
    {"allowed_token_ids": [END, *range(70, 110)]},
    {"bad_words": list(WORDS)},
    {"min_tokens": 12, "logit_bias": {END: 50.0}},
    {"stop_token_ids": list(range(4, 70))},
    {"min_tokens": 9, "stop_token_ids": list(range(4, 100))},
    {"min_tokens": 9, "stop": ("a", "</s>", "tt", "b")},
]


def texts(results: Sequence[Any]) -> list[Any]:
    return [(r.token_ids, r.text, r.finish_reason) for r in results]


PROMPTS = ["the cat", "aab", "q", "Once upon a time there was a cat. The cat"]


@pytest.mark.parametrize("given", ONE_BY_ONE, ids=str)
def test_each_setting_leaves_verified_what_ar_is_and_both_what_the_equations_say(
    given: dict[str, Any], model: TwoTower
) -> None:
    given = {"max_new_tokens": 20, "repetition_penalty": None} | given
    ar, ours = (generate(model, PROMPTS, SamplingParams(mode=m, **given)) for m in ("ar", "verified"))
    assert texts(ours) == texts(ar)
    params = SamplingParams(mode="ar", **given)
    words = word_sequences(model, params.bad_words)
    for prompt, done in zip(PROMPTS, ar, strict=True):
        ids = model.tokenizer.encode(prompt).ids
        after = model.context_logits([[*ids, *done.token_ids]])[0, len(ids) - 1 :].double().tolist()
        for place, token in enumerate(done.token_ids):
            assert reference(after[place], ids, done.token_ids[:place], params, words)[token] == 1
    plain = generate(model, PROMPTS, SamplingParams(mode="ar", max_new_tokens=20))
    assert texts(plain) != texts(ar), "the setting changes something"


def exact_combination(model: TwoTower, seed: int) -> int:
    """Greedy verified = ar, by `generate` and by an engine whose prompts hit the cache and whose rows are mixed.

    Returns how many rows kept tokens of a draft.
    """
    rng = random.Random(seed)
    given: list[dict[str, Any]] = [random_settings(rng, temperature=False) for _ in PROMPTS]
    for one in given:
        if rng.random() < 0.3 and "allowed_token_ids" not in one:
            one["json_schema"] = SCHEMA
            one.pop("bad_words", None)
    given[rng.randrange(4)] = {}
    ar, ours = (
        [SamplingParams(mode=mode, max_new_tokens=24, block_size=rng.choice([3, 8]), **one) for one in given]
        for mode in ("ar", "verified")
    )
    expected = texts(generate(model, PROMPTS, ar))
    found = generate(model, PROMPTS, ours)
    assert texts(found) == expected
    engine = Engine(model, EngineConfig(max_num_requests=6, state_bytes=1 << 23, snapshot_bytes=1 << 20))
    for _ in range(2):
        assert texts(engine.generate(PROMPTS * 2, [*ours, *ar])) == expected * 2
    assert engine.stats().cache_hit_tokens > 0
    return sum(done.stats.denoiser_calls < len(done.token_ids) for done in found)


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(5, 205, 10))])
def test_verified_is_ar_under_combinations(first: int, model: TwoTower) -> None:
    num = 10 if first else 5
    assert sum(exact_combination(model, seed) for seed in range(first, first + num)) > num


def sampled_combination(model: TwoTower, seed: int) -> int:
    """Sampled texts of all modes by an engine, in rows that are mixed and come by priority, are those of each request
    alone.

    Returns how many texts of a setting differ from those without it.
    """
    rng = random.Random(seed)
    given = [
        random_settings(rng, temperature=rng.random() < 0.8)
        | {"mode": rng.choice(list(MODES)), "block_size": rng.choice([3, 8]), "steps_per_block": rng.choice([2, 8])}
        | {"max_new_tokens": rng.randrange(12, 24), "seed": rng.randrange(1 << 63), "priority": rng.randrange(-2, 3)}
        for _ in PROMPTS
    ]
    params = [SamplingParams(**one) for one in given]
    alone = [generate(model, [prompt], p)[0] for prompt, p in zip(PROMPTS, params, strict=True)]
    engine = Engine(model, EngineConfig(max_num_requests=3, state_bytes=1 << 23, snapshot_bytes=1 << 20))
    for _ in range(2):
        assert texts(engine.generate(PROMPTS, params)) == texts(alone)
    kept = {"mode", "block_size", "steps_per_block", "max_new_tokens", "seed", "temperature"}
    bare = [SamplingParams(**{n: v for n, v in one.items() if n in kept}) for one in given]
    return sum(a != b for a, b in zip(texts(alone), texts(generate(model, PROMPTS, bare)), strict=True))


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(5, 55, 10))])
def test_an_engine_is_generate_under_combinations(first: int, model: TwoTower) -> None:
    """Each seed has four requests with settings of their own."""
    num = 10 if first else 5
    assert sum(sampled_combination(model, seed) for seed in range(first, first + num)) > num


@pytest.fixture(scope="module")
def few_words(tiny: Callable) -> TwoTower:
    """Six tokens, so that every text of three of them can be listed; seed and size make drafts right in part."""
    names = ["a", "b", "</s>", "<mask>", "c", "d"]
    made = tiny("M*-", vocab_size=6, eos_token_id=END, seed=1)
    made.tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({name: i for i, name in enumerate(names)}, []))
    return made


def exact(model: TwoTower, prompt: list[int], params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The probability of every text under `ar`, from the context tower's logits and the equations."""
    words = word_sequences(model, params.bad_words)
    every = list(itertools.product(range(6), repeat=3))
    logits = model.context_logits([[*prompt, *ids] for ids in every])[:, len(prompt) - 1 :].double().tolist()
    after = {ids[:k]: logits[n][k] for n, ids in enumerate(every) for k in range(3)}
    found, open_texts = {}, {(): 1.0}
    while open_texts:
        text, before = open_texts.popitem()
        for i, q in enumerate(reference(after[text], prompt, text, params, words)):
            longer = (*text, i)
            ends = len(longer) == 3 or i in (END, *params.stop_token_ids)
            if q:
                (found if ends else open_texts)[longer] = before * q
    return found


def drawn(model: TwoTower, prompt: list[int], params: SamplingParams) -> collections.Counter:
    seeded = [dataclasses.replace(params, seed=seed) for seed in range(NUM)]
    return collections.Counter(tuple(done.token_ids) for done in generate(model, [prompt] * NUM, seeded))


NUM = 1000
SAMPLED: list[dict[str, Any]] = [
    {"repetition_penalty": 2.0},
    {"repetition_penalty": 0.4},
    {"presence_penalty": 2.0},
    {"presence_penalty": -2.0},
    {"frequency_penalty": 1.5},
    {"frequency_penalty": -1.5},
    {"logit_bias": {0: 1.5, 4: -2.0, END: 1.0}},
    {"allowed_token_ids": [0, 1, 5]},
    {"bad_words": ["ab", "ca", "dd", "bb", "abc"]},
    {"min_tokens": 2, "stop_token_ids": [0]},
    {"min_p": 0.25},
    {"typical_p": 0.6},
    {"min_p": 0.1, "typical_p": 0.9, "presence_penalty": 1.0, "bad_words": ["aa", "cb"], "stop_token_ids": [5]},
    {"top_k": 3, "repetition_penalty": 1.8, "frequency_penalty": -1.0, "min_tokens": 2, "logit_bias": {4: 1.0}},
    {"top_p": 0.8, "frequency_penalty": 2.0, "allowed_token_ids": [0, 4, 5, END], "temperature": 4.0},
]


@pytest.mark.slow
@pytest.mark.parametrize("given", SAMPLED, ids=str)
def test_each_setting_leaves_the_distribution_of_verified_that_of_ar(
    given: dict[str, Any], few_words: TwoTower, chi_square: Callable
) -> None:
    """All of a block is drafted, kept in part, and corrected; the prompt's tokens come again."""
    params = SamplingParams(**{"mode": "verified", "max_new_tokens": 3, "block_size": 3, "temperature": 3.0} | given)
    expected = exact(few_words, [0, 4], params)
    assert sum(expected.values()) == pytest.approx(1)
    found = chi_square(drawn(few_words, [0, 4], params), expected, NUM)
    assert found.degrees >= 4
    assert found.p_value > 1e-3

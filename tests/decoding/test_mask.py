"""The mask stands for a token that is not known yet: no mode writes it, no score counts it, no text names it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers

from twotower.backends.choose import pack_
from twotower.backends.native.build import library
from twotower.decoding.generate import generate
from twotower.decoding.modes import MODES
from twotower.decoding.params import SamplingParams
from twotower.decoding.prompt import text_ids, without_mask
from twotower.decoding.scoring import score
from twotower.engine.engine import Engine
from twotower.model.two_tower import TwoTower

# A machine without a C compiler has one backend less.
BACKENDS = ["reference", *(["native"] if library() is not None else [])]


@pytest.fixture(params=[0, 3, 11])
def tempted(request: pytest.FixtureRequest, tiny: Callable) -> TwoTower:
    """A model whose heads would give the mask nearly all probability: its row is another token's many times."""
    mask = request.param
    model = tiny("M*-E", vocab_size=12, mask_token_id=mask)
    with torch.no_grad():
        for head in (model.context_lm_head, model.lm_head):
            head.weight[mask] = 100 * head.weight[4]
    assert bool((model.context_lm_head.linear(torch.randn(64, 32)).argmax(-1) == mask).any())
    return model


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_mode_writes_it(backend: str, tempted: TwoTower) -> None:
    model, mask = tempted, tempted.config.mask_token_id
    pack_(model, backend)
    params = [
        SamplingParams(mode=mode, max_new_tokens=24, temperature=t, seed=1, **filters)
        for mode in MODES
        for t, filters in ((0.0, {}), (1.0, {}), (2.0, {"top_k": 12}), (1.0, {"top_p": 0.999999}))
    ]
    rules = ("confidence", "margin", "entropy", "fixed", "leftmost", "posterior", "remask")
    params += [SamplingParams(mode="diffusion", max_new_tokens=24, commit_rule=rule) for rule in rules]
    for run in (
        lambda: generate(model, [[5, 6]] * len(params), params),
        lambda: Engine(model).generate([[5, 6]] * len(params), params),
    ):
        for done in run():
            assert len(done.token_ids) == 24
            assert mask not in done.token_ids
            assert all(0 < p <= 1 for p in done.confidences)


def test_the_others_probabilities_add_up_to_1(tempted: TwoTower) -> None:
    mask = tempted.config.mask_token_id
    [found] = score(tempted, [[5, 6, 7]], num_top=12)
    for top in found.top:
        assert sum(math.exp(logprob) for _, logprob in top) == pytest.approx(1, abs=1e-6)
        assert top[-1] == (mask, -math.inf)


def test_a_given_mask_is_a_token_that_never_comes(tempted: TwoTower) -> None:
    mask = tempted.config.mask_token_id
    [found] = score(tempted, [[5, mask, 6]], [[7]])
    assert found.logprobs[1] == found.total == -math.inf
    assert not found.is_greedy[1]
    assert all(map(math.isfinite, found.logprobs[::2]))  # what stands before and after it is scored as ever


def test_its_name_in_a_text_is_text(tiny: Callable, byte_tokenizer: tokenizers.Tokenizer) -> None:
    model = tiny("*-", vocab_size=260)
    model.tokenizer = byte_tokenizer
    spelled = tuple(4 + byte for byte in b"<mask>")
    assert text_ids(model, "a<mask></s>", "text") == (4 + 97, *spelled, 2)
    assert text_ids(model, [3, 5], "text") == (3, 5)
    params = SamplingParams(mode="ar", max_new_tokens=4)
    [named], [bytewise] = (generate(model, [prompt], params) for prompt in ("<mask>", spelled))
    assert named.token_ids == bytewise.token_ids
    assert math.isfinite(score(model, ["<mask>"], ["a"])[0].total)


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"<unk>": 0, "a": 1, "mask": 2, "<": 3, ">": 4}, unk_token="<unk>"),
        models.Unigram(
            [("<unk>", 0.0), ("a", -1.0), ("mask", -1.0), ("<", -1.0), (">", -1.0), ("<mask>", -0.5)], unk_id=0
        ),
    ],
)
def test_a_text_has_the_tokens_that_it_had_before_there_was_a_mask(model: Any) -> None:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Punctuation()
    before = tokenizer.encode("a<mask>a").ids
    tokenizer.add_special_tokens(["<mask>", "<end>"])
    mask = tokenizer.token_to_id("<mask>")
    assert mask in tokenizer.encode("a<mask>a").ids
    assert without_mask(tokenizer, mask).encode("a<mask>a").ids == before
    assert without_mask(tokenizer, mask).encode("<end>").ids == tokenizer.encode("<end>").ids
    assert without_mask(tokenizer, 2) is tokenizer  # an ordinary token


@pytest.mark.parametrize("mode", ["ar", "verified"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_that_asks_for_it_ends_the_text(
    mode: Any, temperature: float, tiny: Callable, byte_tokenizer: tokenizers.Tokenizer
) -> None:
    pytest.importorskip("llguidance")
    model = tiny("*-", vocab_size=260, eos_token_id=2)
    model.tokenizer = byte_tokenizer
    params = SamplingParams(
        mode=mode, max_new_tokens=9, temperature=temperature, seed=0, grammar='start: "ab" <mask> "c"'
    )
    [done] = generate(model, ["x"], params)
    assert (done.text, done.token_ids[-1], done.finish_reason) == ("ab", 2, "stop")

"""The context tower's log-probabilities against its own logits."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from twotower.decoding.generate import generate
from twotower.decoding.params import SamplingParams
from twotower.decoding.scoring import ContextScorer, Scores, TokenScore, score
from twotower.errors import SettingError
from twotower.model.two_tower import TwoTower


def log_p(model: TwoTower, ids: list[int]) -> Tensor:
    """(t - 1, v): row i is of token i + 1."""
    return model.context_logits([ids])[0, :-1].double().log_softmax(-1)


@pytest.mark.parametrize("pattern", ["M*-E", "llama"])
def test_scores_are_the_context_towers_whatever_is_in_the_batch(pattern: str, tiny: Callable) -> None:
    model = tiny(pattern)
    prompts = [[5], [6, 7, 8], [9] * 300]
    texts = [[7, 8, 9, 4], [], list(range(4, 34)) * 9]
    for batch_size in (1, 2, 8):
        for prompt, text, found in zip(
            prompts, texts, score(model, texts, prompts, num_top=3, batch_size=batch_size), strict=True
        ):
            expected = log_p(model, prompt + text)[len(prompt) - 1 :]
            own = expected.gather(-1, torch.tensor(text, dtype=torch.long)[:, None])[:, 0]
            assert found.token_ids == tuple(text)
            # float32 logits and sums of 40 of them: 1e-6 of values below 10
            assert found.logprobs == pytest.approx(own.tolist(), abs=2e-5)
            assert found.is_greedy == tuple((expected.argmax(-1) == torch.tensor(text)).tolist())
            assert [i for top in found.top for i, _ in top] == expected.topk(3).indices.flatten().tolist()
            assert found.total == sum(found.logprobs)


def test_a_greedy_text_is_greedy_at_every_place(tiny: Callable) -> None:
    model = tiny("M*-E")
    [done] = generate(model, [[5, 6]], SamplingParams(mode="ar", max_new_tokens=20))
    assert all(score(model, [done.token_ids], [[5, 6]])[0].is_greedy)
    changed = [*done.token_ids[:-1], (done.token_ids[-1] + 1) % 40]
    assert score(model, [changed], [[5, 6]])[0].is_greedy[-2:] == (True, False)


def test_without_prompts_a_text_stands_after_bos(tiny: Callable) -> None:
    model = tiny("M*-E")
    assert score(model, [[5, 6]]) == score(model, [[5, 6]], [[model.config.bos_token_id]])
    assert score(model, []) == []
    assert score(model, [[]]) == [Scores(token_ids=(), logprobs=(), is_greedy=(), top=())]


def test_strings_are_tokenized_apart(tiny: Callable, byte_tokenizer: object) -> None:
    model = tiny("*-", vocab_size=260)
    model.tokenizer = byte_tokenizer
    assert score(model, ["é"], ["ab"]) == score(model, [[4 + byte for byte in "é".encode()]], [[4 + 97, 4 + 98]])


def test_tokens_that_come_piece_by_piece_are_scored_alike(tiny: Callable) -> None:
    model, ids = tiny("M*-E"), [4 + i * 7 % 36 for i in range(50)]
    scorer, whole = ContextScorer(model, num_top=2), []
    for first, last in ((0, 1), (1, 2), (2, 20), (20, 50)):
        for [tokens] in scorer.push([ids[first:last]], chunk=8):
            whole += tokens
    assert whole[0] == TokenScore(ids[0])
    assert [token.id for token in whole] == ids
    [expected] = score(model, [ids[1:]], [ids[:1]], num_top=2)
    # chunks of other lengths round differently
    assert [token.logprob for token in whole[1:]] == pytest.approx(expected.logprobs, abs=2e-5)
    assert [token.is_greedy for token in whole[1:]] == list(expected.is_greedy)


def test_what_can_not_be_scored_is_refused_by_name(tiny: Callable) -> None:
    model = tiny()
    for texts, prompts, name in (
        ("hello", None, "texts"),
        ([5, 6], None, "texts"),
        ([[5]], "hello", "prompts"),
        ([[5, 40]], None, "texts[0][1]"),
        ([[5]], [[True]], "prompts[0][0]"),
        (["a"], None, "texts[0]"),
    ):
        with pytest.raises(SettingError) as raised:
            score(model, texts, prompts)  # type: ignore[arg-type]
        assert raised.value.name == name
    with pytest.raises(ValueError, match="2 prompts for 1 texts"):
        score(model, [[5]], [[5], [6]])

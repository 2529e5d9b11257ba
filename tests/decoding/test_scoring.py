"""The context tower's log-probabilities against its own logits."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from twotower.decoding.generate import generate
from twotower.decoding.output import TokenScore
from twotower.decoding.params import SamplingParams
from twotower.decoding.scoring import PromptScores, Scores, score
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


@torch.inference_mode()
def test_a_prompt_is_scored_by_the_passes_that_absorb_it(tiny: Callable) -> None:
    model, ids = tiny("M*-E"), [4 + i * 7 % 36 for i in range(50)]
    scores = PromptScores(ids, 2)
    for pieces in ((1, 1, 18), (7, 20, 23)):  # from the start again, as after a preemption
        state = model.context_tower.initial_state(1, len(ids))
        for n in pieces:
            [first] = state.lengths
            passed = model.score(torch.tensor([ids[first : first + n]]), state)
            scores.take(model, passed.hidden[0], first)
            state = model.accept(passed, (n,))
        assert scores.is_complete == (sum(pieces) == len(ids))
    whole = scores.tokens()
    assert whole[0] == TokenScore(ids[0])
    assert [token.id for token in whole] == ids
    [expected] = score(model, [ids[1:]], [ids[:1]], num_top=2)
    # chunks of other lengths round differently
    assert [token.logprob for token in whole[1:]] == pytest.approx(expected.logprobs, abs=2e-5)
    assert [token.is_greedy for token in whole[1:]] == list(expected.is_greedy)
    assert [[i for i, _ in token.top] for token in whole[1:]] == [[i for i, _ in top] for top in expected.top]


def test_texts_of_one_prompt_absorb_it_once(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("M*-E")
    prompts, texts = [[5] * 60, [6] * 40, [5] * 60, [5] * 60], [[7, 8], [9], [], [8, 9, 4]]
    alone = [score(model, [text], [prompt], num_top=2) for text, prompt in zip(texts, prompts, strict=True)]
    taken, causal = [], model.context_tower.causal
    monkeypatch.setattr(model.context_tower, "causal", lambda ids, *rest: taken.append(ids.shape) or causal(ids, *rest))
    together = score(model, texts, prompts, num_top=2)
    # both prompts, and then of each text what stands before its last token
    assert taken == [(2, 60), (4, 2)]
    for found, [expected] in zip(together, alone, strict=True):
        assert found.token_ids == expected.token_ids
        assert found.logprobs == pytest.approx(expected.logprobs, abs=2e-5)  # other batches round differently
        assert found.is_greedy == expected.is_greedy


def test_only_some_logits_exist_at_a_time(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a pass are (b, s, v): with a large vocabulary far more than the states of its texts."""
    model = tiny("*-", vocab_size=9000)
    most, made = (1 << 21) // 9000, []
    head = model.context_lm_head.forward
    monkeypatch.setattr(model.context_lm_head, "forward", lambda x: made.append(x.shape[:-1].numel()) or head(x))
    score(model, [[5] * 200] * 3)
    assert max(made) == most
    # the prompts' last places, the texts of 1, and the 199 tokens behind the first of each text
    assert sum(made) == 1 + 3 * 199


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

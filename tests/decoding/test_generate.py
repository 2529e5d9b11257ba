import collections
import dataclasses
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers

from twotower.decoding.generate import generate, stream
from twotower.decoding.modes import MODES
from twotower.decoding.output import Generation
from twotower.decoding.params import COMMIT_RULES, SamplingParams
from twotower.model.two_tower import TwoTower

# Every byte is a token: 4 control tokens and 256 bytes.
VOCAB_SIZE = 260


@pytest.fixture(scope="session")
def model(tiny: Callable, byte_tokenizer: tokenizers.Tokenizer) -> Callable[..., TwoTower]:
    """A tiny model with the byte tokenizer: model("M*-E", seed=…)."""

    def make(pattern: str = "M*-E", **overrides: Any) -> TwoTower:
        made = tiny(pattern, vocab_size=VOCAB_SIZE, **overrides)
        made.tokenizer = byte_tokenizer
        return made

    return make


def outcome(g: Generation) -> tuple:
    """All of a result that does not depend on the clock."""
    return g.token_ids, g.commit_steps, g.finish_reason, g.text, g.stats.denoiser_calls, g.stats.context_calls


def requests(seed: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """16 ragged requests over every mode and commit rule."""
    rng = random.Random(seed)
    prompts, params = [], []
    for i in range(16):
        mode = "diffusion" if i < 8 else list(MODES)[i % len(MODES)]
        length = [0, 1, 2, 70][i % 4] if rng.random() < 0.5 else rng.randint(0, 40)
        prompts.append([rng.randrange(4, VOCAB_SIZE) for _ in range(length)])
        params.append(
            SamplingParams(
                mode=mode,
                commit_rule=COMMIT_RULES[i % len(COMMIT_RULES)] if mode == "diffusion" else "confidence",
                max_new_tokens=rng.choice([0, 1, 5, 17]),
                block_size=rng.choice([4, 8, 16]),
                steps_per_block=rng.choice([1, 3, 16]),
                confidence_threshold=rng.choice([0.1, 0.3, 0.8]),
                temperature=rng.choice([0.0, 0.6, 1.0]),
                top_k=rng.choice([None, 5]),
                top_p=rng.choice([None, 0.9]),
                seed=rng.randrange(2**63),
                ignore_eos=rng.random() < 0.3,
            )
        )
    return prompts, params


@pytest.mark.parametrize("pattern", ["M*-E", "llama"])
@pytest.mark.parametrize("seed", range(3))
def test_a_batch_is_each_request_alone(pattern: str, seed: int, model: Callable) -> None:
    """In float32: batching changes the last bits of logits, and these seeds hold no near tie that they would turn."""
    prompts, params = requests(seed)
    free = generate(model(pattern, seed=seed), prompts, params)
    seen = collections.Counter(t for g in free for t in g.token_ids[1:])
    m = model(pattern, seed=seed, eos_token_id=(2, seen.most_common(1)[0][0]))
    stopped = [i for i in range(0, 16, 2) if len(free[i].text) > 3]
    for i in stopped:
        params[i] = dataclasses.replace(params[i], stop=("never", free[i].text[2:4]))
    together = generate(m, prompts, params)
    assert {g.finish_reason for g in together} == {"stop", "length"}
    assert stopped
    assert all(together[i].finish_reason == "stop" for i in stopped)
    for prompt, p, batched in zip(prompts, params, together, strict=True):
        alone = generate(m, [prompt], p)[0]
        assert outcome(batched) == outcome(alone), p
        assert batched.confidences == pytest.approx(alone.confidences, rel=1e-3, abs=1e-5)
        assert len(batched.commit_steps) == len(batched.confidences) == len(batched.token_ids)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block_size", [1, 5])
def test_max_new_tokens_is_exact(mode: Any, block_size: int, model: Callable) -> None:
    params = [
        SamplingParams(mode=mode, max_new_tokens=count, block_size=block_size, temperature=temperature, seed=count)
        for count, temperature in ((0, 0.0), (1, 0.0), (1, 1.0), (2, 1.0), (5, 0.0), (6, 1.0), (16, 0.0), (17, 1.0))
    ]
    for p, result in zip(params, generate(model(), [[9, 8]] * len(params), params), strict=True):
        assert len(result.token_ids) == result.stats.num_tokens == p.max_new_tokens
        assert result.finish_reason == "length"


@pytest.mark.parametrize("mode", ["ar", "mock_ar", "verified"])
def test_a_shorter_run_is_a_prefix(mode: Any, model: Callable) -> None:
    """Not so for `diffusion`: the last block is shorter, so its tokens are others."""
    m = model()
    long = generate(m, [[9, 8]], SamplingParams(mode=mode, max_new_tokens=20))[0].token_ids
    for count in (1, 7, 19):
        assert generate(m, [[9, 8]], SamplingParams(mode=mode, max_new_tokens=count))[0].token_ids == long[:count]


@pytest.mark.parametrize("mode", MODES)
def test_an_end_token_ends_the_row_and_the_rest_of_its_block_goes(mode: Any, model: Callable) -> None:
    endless = SamplingParams(mode=mode, max_new_tokens=24, block_size=8)
    free = generate(model(), [[9, 8]], endless)[0]
    # the first token that occurs in the middle of a block for the first time
    at = next(i for i, t in enumerate(free.token_ids) if i % 8 in range(1, 7) and t not in free.token_ids[:i])
    end = free.token_ids[at]
    ended = model(eos_token_id=end)
    result = generate(ended, [[9, 8]], endless)[0]
    assert result.token_ids == free.token_ids[: at + 1]
    assert result.finish_reason == "stop"
    assert result.commit_steps == free.commit_steps[: at + 1]
    if mode in ("diffusion", "simulated_ar"):
        whole = SamplingParams(mode=mode, max_new_tokens=(at // 8 + 1) * 8, block_size=8)
        assert result.stats.denoiser_calls == generate(model(), [[9, 8]], whole)[0].stats.denoiser_calls
    ignored = generate(ended, [[9, 8]], dataclasses.replace(endless, ignore_eos=True))[0]
    assert outcome(ignored) == outcome(free)
    several = generate(model(eos_token_id=(2, end)), [[9, 8]], endless)[0]
    assert several.token_ids == result.token_ids


def test_an_end_token_is_in_the_ids_and_not_in_the_text(model: Callable) -> None:
    free = generate(model(), [[9, 8]], SamplingParams(mode="ar", max_new_tokens=12))[0]
    end = free.token_ids[6]
    m = model(eos_token_id=end)
    result = generate(m, [[9, 8]], SamplingParams(mode="ar", max_new_tokens=12))[0]
    kept = result.token_ids[:-1]
    assert result.token_ids[-1] == end
    assert end not in kept
    assert result.text == m.tokenizer.decode(kept)


@pytest.mark.parametrize(("mode", "temperature"), [("diffusion", 0.0), *((mode, 1.0) for mode in MODES)])
def test_a_stream_is_generate_piece_by_piece(mode: Any, temperature: float, model: Callable) -> None:
    m = model()
    p = SamplingParams(mode=mode, max_new_tokens=21, block_size=8, temperature=temperature, seed=5)
    expected = generate(m, ["Zoë 🦉"], p)[0]
    for every_step in (False, True):
        pieces = list(stream(m, "Zoë 🦉", p, every_step=every_step))
        assert "".join(map(str, pieces)) == expected.text
        assert [t for piece in pieces for t in piece.token_ids] == expected.token_ids
        assert outcome(pieces[-1].result) == outcome(expected)
        assert pieces[-1].finish_reason == "length"
        assert all(piece.result is None and piece.finish_reason is None for piece in pieces[:-1])


def test_every_step_gives_a_piece_for_every_step(model: Callable) -> None:
    m, p = model(), SamplingParams(max_new_tokens=20, block_size=8)
    pieces = list(stream(m, [9, 8], p, every_step=True))
    assert len(pieces) == pieces[-1].result.stats.denoiser_calls
    assert all(piece.block is not None for piece in pieces)
    assert [len(piece.block.ids) for piece in pieces][-1] == 4
    assert all(
        piece.block is None for piece in stream(m, [9, 8], SamplingParams(mode="ar", max_new_tokens=3), every_step=True)
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block_size", [1, 4])
def test_a_stop_string_ends_the_text_before_it_wherever_blocks_end(mode: Any, block_size: int, model: Callable) -> None:
    m = model()
    p = SamplingParams(mode=mode, max_new_tokens=20, block_size=block_size)
    free = generate(m, [[9, 8]], p)[0]
    for start, size in ((0, 1), (7, 3)):
        stop = free.text[start : start + size]
        at = free.text.find(stop)
        stopping = dataclasses.replace(p, stop=("never seen", stop, stop + "more"))
        result = generate(m, [[9, 8]], stopping)[0]
        assert result.text == free.text[:at]
        assert result.finish_reason == "stop"
        assert result.token_ids == free.token_ids[: len(result.token_ids)]
        assert stop in m.tokenizer.decode(result.token_ids)
        pieces = list(stream(m, [9, 8], stopping))
        assert (
            "".join(map(str, pieces)) == result.text
        )  # nothing of the stop string was given out before it was complete


def test_a_beginning_of_a_stop_string_is_given_out_in_the_end(model: Callable) -> None:
    m, p = model(), SamplingParams(mode="ar", max_new_tokens=12)
    text = generate(m, [[9, 8]], p)[0].text
    almost = dataclasses.replace(p, stop=(text[-3:] + "\0",))
    pieces = list(stream(m, [9, 8], almost))
    assert "".join(map(str, pieces)) == text
    assert pieces[-1].finish_reason == "length"


def test_rows_have_their_own_seeds(model: Callable) -> None:
    m = model()
    for mode in MODES:
        p = SamplingParams(mode=mode, max_new_tokens=8, temperature=1.0)
        seeded = [dataclasses.replace(p, seed=s) for s in (1, 1, 2, None, None)]
        rows = [g.token_ids for g in generate(m, [[9, 8]] * 5, seeded)]
        assert rows[0] == rows[1]
        assert len({tuple(r) for r in rows}) == 4
        assert generate(m, [[9, 8]], seeded[0])[0].token_ids == rows[0]


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_prompt_is_the_bos_token(mode: Any, model: Callable) -> None:
    m, p = model(), SamplingParams(mode=mode, max_new_tokens=5)
    results = generate(m, [[], [1], ""], p)
    assert outcome(results[0]) == outcome(results[1]) == outcome(results[2])
    with pytest.raises(ValueError, match="no bos_token_id; give at least one token"):
        generate(model(bos_token_id=None), [[]], p)


def test_a_string_prompt_is_its_tokens(model: Callable) -> None:
    m, p = model(), SamplingParams(mode="ar", max_new_tokens=5)
    text, ids = generate(m, ["hé", [4 + byte for byte in "hé".encode()]], p)
    assert outcome(text) == outcome(ids)


def test_bad_prompts_raise(model: Callable, tiny: Callable) -> None:
    m = model()
    with pytest.raises(ValueError, match="2 params for 3 prompts"):
        generate(m, [[5]] * 3, [SamplingParams()] * 2)
    bare = tiny()
    with pytest.raises(ValueError, match=r"no tokenizer\.json; give the prompt as token ids"):
        generate(bare, ["hello"])
    with pytest.raises(ValueError, match=r"stop is \('a',\), must be empty for a checkpoint without a tokenizer.json"):
        generate(bare, [[5]], SamplingParams(stop=("a",)))
    assert generate(bare, []) == []


def test_without_a_tokenizer_there_is_no_text(tiny: Callable) -> None:
    result = generate(tiny(), [[5]], SamplingParams(max_new_tokens=3))[0]
    assert result.text is None
    assert len(result.token_ids) == 3


def test_sampling_beyond_the_trained_block_size_warns(model: Callable) -> None:
    m = model(block_size=8)
    large = SamplingParams(block_size=9, max_new_tokens=1)
    warm = dataclasses.replace(large, temperature=0.5)
    small = SamplingParams(block_size=8, temperature=0.5, max_new_tokens=1)
    with pytest.warns(UserWarning, match="block_size 9 is larger than the 8"):
        generate(m, [[5], [5]], [small, warm])
    with pytest.warns(UserWarning, match="block_size 9 is larger than the 8"):
        list(stream(m, [5], warm))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(m, [[5]] * 3, [large, small, dataclasses.replace(warm, mode="verified")])


def test_calls_are_counted(model: Callable) -> None:
    m = model()

    def calls(**settings: Any) -> tuple[int, int]:
        stats = generate(m, [[9, 8]], SamplingParams(max_new_tokens=12, **settings))[0].stats
        assert 0 <= stats.seconds_to_first_token <= stats.seconds_total
        return stats.denoiser_calls, stats.context_calls

    assert calls(mode="ar") == (0, 12)  # the prompt's pass gives the first token
    assert calls(mode="mock_ar") == (12, 13)
    assert calls(mode="simulated_ar", block_size=4) == (12, 3)  # the last block is never absorbed
    assert calls(mode="diffusion", block_size=4, steps_per_block=1) == (3, 3)
    assert calls(mode="diffusion", block_size=4, steps_per_block=2, commit_rule="fixed") == (6, 3)
    # after the first token, which is drafted, there is room for the newest token alone
    assert calls(mode="verified", block_size=1) == (1, 13)


def test_texts_beyond_the_trained_positions_are_asked_for(model: Callable) -> None:
    m = model(carried={"max_position_embeddings": 10})
    generate(m, [[5, 6]], SamplingParams(max_new_tokens=8))
    beyond = SamplingParams(max_new_tokens=9)
    message = (
        "max_new_tokens is 9, must be at most 8 after a prompt of 2 tokens: .* trained for 10 positions; .*past_pos"
    )
    for run in (lambda: generate(m, [[5, 6]], beyond), lambda: list(stream(m, [5, 6], beyond))):
        with pytest.raises(ValueError, match=message):
            run()
    asked = dataclasses.replace(beyond, past_positions=True, ignore_eos=True)
    assert len(generate(m, [[5, 6]], asked)[0].token_ids) == 9
    unasked = generate(m, [[5, 6]], SamplingParams(mode="ar", ignore_eos=True))[0]
    assert len(unasked.token_ids) == 8  # what fits, as nobody asked for more

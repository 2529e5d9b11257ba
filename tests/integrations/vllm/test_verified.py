"""`verified` inside vLLM: drafts from n-grams and from the text, checked by vLLM, give the tokens of `ar`."""

import importlib.util

import pytest
import torch

import twotower
from twotower.errors import SettingError
from twotower.integrations.vllm.settings import DRAFTER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
SPECULATIVE = {"method": "custom_class", "model": DRAFTER, "num_speculative_tokens": 8}


@pytest.mark.parametrize(
    ("name", "drafter"),
    [
        ("stories", "ngram"),
        ("stories", "prompt,ngram"),
        ("llama", "prompt"),
        ("hybrid", "prompt"),
        ("M*-M*E", "prompt"),
    ],
)
def test_verified_alone_and_mixed_with_ar_gives_the_tokens_of_ar(
    name, drafter, engine, expected, prompts, ask, count
) -> None:
    running = engine(name, speculative_config=SPECULATIVE, additional_config={"twotower": {"drafter": drafter}})
    ids = prompts(6, most=20)
    ours = expected(name, ids, 60)
    assert ask(running, ids, 60) == ours
    drafted = count(running, "spec_decode_num_draft_tokens")
    assert drafted > 0
    # A random tower with experts repeats nothing that it has written: its drafts are all rejected.
    assert (count(running, "spec_decode_num_accepted_tokens") > 0) == (name != "M*-M*E")
    assert ask(running, ids[:1], 60) == ours[:1]
    assert ask(running, ids, 60, ["ar", "verified"] * 3) == ours


@pytest.mark.parametrize(
    ("name", "drafter"),
    [
        ("stories", "denoiser"),
        ("llama", "denoiser"),
        ("stories", "prompt,denoiser"),
        ("hybrid", "denoiser"),
        ("hybrid", "prompt,denoiser"),
        ("M*-M*E", "denoiser"),
    ],
)
def test_verified_with_drafts_from_the_denoiser_gives_the_tokens_of_ar_beside_other_modes(
    name, drafter, engine, expected, prompts, ask, count
) -> None:
    settings = {"twotower": {"drafter": drafter, "denoiser": True}}
    running = engine(name, speculative_config=SPECULATIVE, additional_config=settings)
    ids = prompts(6, most=20)
    ours, blocks = expected(name, ids, 60), expected(name, ids, 60, "diffusion")
    assert ask(running, ids, 60) == ours
    assert count(running, "spec_decode_num_draft_tokens") > 0
    # Random towers agree by chance alone.
    assert name == "M*-M*E" or count(running, "spec_decode_num_accepted_tokens") > 0
    assert ask(running, ids[:1], 60) == ours[:1]
    mixed = ask(running, ids, 60, ["ar", "verified", "diffusion"] * 2)
    assert mixed == [blocks[n] if n % 3 == 2 else ours[n] for n in range(6)]


@pytest.mark.parametrize("name", ["stories", "hybrid", "M*-"])
def test_requests_that_come_one_after_the_other_get_the_same_tokens(name, engine, expected, prompts) -> None:
    """Among them prompts of one token, which come while others are written, and one behind which few tokens fit."""
    from vllm import SamplingParams

    settings = {"twotower": {"drafter": "denoiser", "denoiser": True}}
    running = engine(name, speculative_config=SPECULATIVE, additional_config=settings).llm_engine
    ids = prompts(9, most=20)
    ids[3:6] = [one[:1] for one in ids[3:6]]
    ids[6] = (ids[6] * 250)[:250]
    most = [min(30, 256 - len(one)) for one in ids]
    modes = ["ar", "verified", "diffusion"] * 3
    found, waiting, step = {}, list(range(9)), 0
    while waiting or running.has_unfinished_requests():
        if waiting and step % 2 == 0:
            number = waiting.pop(0)
            params = SamplingParams(
                temperature=0,
                max_tokens=most[number],
                ignore_eos=True,
                detokenize=False,
                extra_args={"mode": modes[number]},
            )
            running.add_request(str(number), {"prompt_token_ids": ids[number]}, params)
        for output in running.step():
            if output.finished:
                found[int(output.request_id)] = list(output.outputs[0].token_ids)
        step += 1
    for number, mode in enumerate(modes):
        known = expected(name, [ids[number]], most[number], "ar" if mode == "verified" else mode)
        assert [found[number]] == known, number


@pytest.mark.parametrize(
    ("name", "prompt"), [("stories", "Once upon a time"), ("hybrid", "def glass(w, s):"), ("hybrid", "Sort: 3, 1, 2")]
)
def test_as_many_drafted_tokens_are_kept_as_in_our_own_verified(name, prompt, engine, ask, count) -> None:
    settings = {"twotower": {"drafter": "denoiser", "denoiser": True}}
    running = engine(name, speculative_config=SPECULATIVE | {"num_speculative_tokens": 15}, additional_config=settings)
    model = twotower.load(name, dtype="float32")
    ids = list(model.tokenizer.encode(prompt).ids)
    common = {"max_new_tokens": 100, "temperature": 0, "ignore_eos": True}
    [ours] = twotower.generate(model, [ids], twotower.SamplingParams(mode="verified", drafter="denoiser", **common))
    ask(running, [ids], 100)
    kept = sum(one.accepted for one in ours.stats.drafts)
    # The first block is another: ours begins before the first token, vLLM's behind it.
    assert abs(count(running, "spec_decode_num_accepted_tokens") - kept) <= 8


def test_a_draft_begins_at_the_recurrent_state_after_the_kept_tokens(engine, prompts, monkeypatch) -> None:
    from vllm import SamplingParams

    from twotower.integrations.vllm.seeding import CacheReader

    settings = {"twotower": {"drafter": "denoiser", "denoiser": True}}
    running, seen = engine("hybrid", speculative_config=SPECULATIVE, additional_config=settings), []
    read = CacheReader.state

    def watch(reader, rows, lengths, kept):
        seen.append((lengths[0], kept[0], read(reader, rows, lengths, kept)))
        return seen[-1][2]

    monkeypatch.setattr(CacheReader, "state", watch)
    model = twotower.load("hybrid", dtype="float32")
    ids = list(model.tokenizer.encode("def glass(w, s):").ids)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
    [output] = running.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
    whole = ids + list(output.outputs[0].token_ids)
    assert len({kept for _, kept, _ in seen}) > 1
    for length, _, state in seen:
        for ours, theirs in zip(model.prefill([whole[:length]]).mamba, state.mamba, strict=True):
            for a, b in ((ours.conv, theirs.conv), (ours.ssm, theirs.ssm)):
                # float32 has 24 bits; the same sums in another order
                torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


def test_requests_in_ar_get_no_drafts(engine, prompts, ask, count) -> None:
    running = engine("stories", speculative_config=SPECULATIVE, additional_config={"twotower": {"mode": "ar"}})
    ids = prompts(2)
    ask(running, ids, 30)
    ask(running, ids, 30, ["ar", "ar"])
    assert count(running, "spec_decode_num_draft_tokens") == 0
    ask(running, ids, 30, ["verified", "ar"])
    assert count(running, "spec_decode_num_draft_tokens") > 0


def test_a_schedule_by_batch_size_shortens_drafts_and_leaves_the_tokens(engine, expected, prompts, ask, count) -> None:
    schedule = {"num_speculative_tokens_per_batch_size": [[1, 2, 8], [3, 4, 1], [5, 8, 0]]}
    running = engine("stories", speculative_config=SPECULATIVE | schedule)
    ids = prompts(6, most=20)
    ours = expected("stories", ids, 60)
    longest = []
    for number in (2, 4, 6):
        before = [count(running, f"spec_decode_num_{what}") for what in ("drafts", "draft_tokens")]
        assert ask(running, ids[:number], 60) == ours[:number]
        after = [count(running, f"spec_decode_num_{what}") for what in ("drafts", "draft_tokens")]
        drafts, tokens = after[0] - before[0], after[1] - before[1]
        longest.append(tokens / max(drafts, 1))
    assert longest[0] > 1.5
    # A row whose neighbours have ended is in a smaller batch
    assert longest[1] < longest[0]
    assert longest[2] < longest[0]


def test_verified_gives_the_tokens_of_ar_through_known_beginnings_and_lost_places(
    engine, expected, prompts, ask, count
) -> None:
    running = engine("stories", speculative_config=SPECULATIVE, num_gpu_blocks_override=6)
    ids = prompts(6, most=100, seed=5)
    ours = expected("stories", ids, 120)
    assert ask(running, ids, 120) == ours
    assert ask(running, ids, 120) == ours
    assert count(running, "num_preemptions") > 0


@pytest.mark.parametrize("name", ["stories", "llama"])
def test_drafts_and_blocks_of_the_denoiser_follow_known_beginnings(name, engine, expected, prompts, ask, count) -> None:
    settings = {"twotower": {"drafter": "denoiser", "denoiser": True}}
    running = engine(name, speculative_config=SPECULATIVE, additional_config=settings, block_size=32)
    beginning = [token for part in prompts(40, seed=3) for token in part][:120]
    ids = [beginning + tail for tail in prompts(6, most=20, seed=4)]
    ours, blocks = expected(name, ids, 60), expected(name, ids, 60, "diffusion")
    ask(running, ids[:1], 8)
    mixed = ask(running, ids, 60, ["diffusion", "verified", "ar"] * 2)
    assert mixed == [ours[n] if n % 3 else blocks[n] for n in range(6)]
    assert count(running, "prefix_cache_hits") > 0
    assert count(running, "spec_decode_num_draft_tokens") > 0


def test_an_unknown_mode_is_refused_before_anything_runs(engine, prompts, ask) -> None:
    from vllm.exceptions import VLLMValidationError

    running = engine("stories")
    with pytest.raises(VLLMValidationError, match="mode is 'diffusion', must be ar"):
        ask(running, prompts(1), 4, ["diffusion"])
    with pytest.raises(VLLMValidationError, match="mode is 'verified', must be ar on this server"):
        ask(running, prompts(1), 4, ["verified"])


@pytest.mark.parametrize("name", ["hybrid", "M*-"])
def test_recurrent_states_follow_drafts_and_blocks_behind_prompts_in_chunks(
    name, engine, expected, prompts, ask
) -> None:
    settings = {"twotower": {"drafter": "denoiser", "denoiser": True}}
    running = engine(
        name,
        speculative_config=SPECULATIVE,
        additional_config=settings,
        max_num_batched_tokens=48,
    )
    ids = prompts(6, most=100, seed=5)
    ours, blocks = expected(name, ids, 120), expected(name, ids, 120, "diffusion")
    assert ask(running, ids, 120) == ours
    mixed = ask(running, ids, 120, ["diffusion", "verified", "ar"] * 2)
    assert mixed == [ours[n] if n % 3 else blocks[n] for n in range(6)]


@pytest.mark.parametrize("name", ["llama", "M*-"])
def test_the_denoiser_is_refused_beside_another_drafter(name, engine) -> None:
    with pytest.raises(ValueError, match=r'the denoiser needs "model": "twotower\..* others draft for rows that write'):
        engine(
            name,
            speculative_config={"method": "ngram", "num_speculative_tokens": 4},
            additional_config={"twotower": {"denoiser": True}},
        )


@pytest.mark.parametrize(
    ("name", "drafter", "words"),
    [
        ("stories", "denoiser", "must be of ngram and prompt on a server without the denoiser"),
        ("llama", "ngram", "must be another for a checkpoint without ngrams.npz"),
        ("hybrid", "denoiser", "must be of ngram and prompt on a server without the denoiser"),
    ],
)
def test_a_drafter_that_cant_draft_here_is_refused_at_the_start(name, drafter, words, engine) -> None:
    with pytest.raises((RuntimeError, SettingError), match=words):
        engine(name, speculative_config=SPECULATIVE, additional_config={"twotower": {"drafter": drafter}})

from typing import Any

import pytest

from twotower.decoding.modes import MODES
from twotower.decoding.output import GenerationStats
from twotower.decoding.params import COMMIT_RULES, SamplingParams
from twotower.errors import SettingError
from twotower.model.sampling_defaults import SamplingDefaults

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "bad", "allowed"),
    [
        ("mode", ["diffuse", "", None, 3], "must be one of ar, mock_ar, simulated_ar, diffusion, verified"),
        (
            "commit_rule",
            ["top", None],
            "must be one of confidence, margin, entropy, entropy_bound, fixed, leftmost, posterior, remask",
        ),
        ("max_new_tokens", [-1, 1.5, True, "8"], "must be an integer of at least 0"),
        ("block_size", [0, -4, 2.0, True, 65537, 10**400], r"must be an integer in \[1, 65536\]"),
        ("steps_per_block", [0, -1, "1", 65537, 2**63], r"must be an integer in \[1, 65536\]"),
        ("confidence_threshold", [-0.1, 1.1, NAN, INF, "0.5", True], r"must be a number in \[0, 1\]"),
        ("target_retention", [0, 1, -0.1, 1.1, NAN, "0.9", True], r"must be a number in \(0, 1\); verified keeps all"),
        ("temperature", [-1, 101, NAN, INF], r"must be a number in \[0, 100\]; 0 is greedy"),
        ("temperature", [1e-7, 1e-40], r"must be 0 or in \[1e-06, 100\]; 0 is greedy"),
        ("top_k", [0, -1, 2.5, True], "must be an integer of at least 1; leave it None to keep every token"),
        ("top_p", [-0.5, 1.5, NAN, "1"], r"must be a number in \[0, 1\]; leave it None to keep every token"),
        ("top_p", [0], r"must be a number in \(0, 1\]; temperature=0 is the greedy setting"),
        ("seed", [-1, 0.5, True, "a"], "must be an integer of at least 0"),
        ("seed", [2**63], r"must be in \[0, 2\*\*63\); take it modulo 2\*\*63"),
        ("stop", ["end", ("a", ""), (3,), None, 7], r"must be a list of texts that are not empty; write stop=\('…',\)"),
        ("ignore_eos", [1, None, "yes"], "must be True or False"),
        ("min_p", [-0.1, 1.1, NAN, "0.1", True], r"must be a number in \[0, 1\]"),
        ("typical_p", [0, -1, 1.1, NAN, True], r"must be a number in \(0, 1\]; 1 keeps every token"),
        ("repetition_penalty", [0, -1, 1001, NAN, INF, True], r"must be a number in \(0, 1000\]; 1 changes nothing"),
        ("repetition_penalty", [1e-7, 5e-324], r"must be in \[1e-06, 1000\]; 1 changes nothing"),
        ("presence_penalty", [-2.1, 2.1, NAN, None, True, "1"], r"must be a number in \[-2, 2\]"),
        ("frequency_penalty", [-2.1, 2.1, INF, None], r"must be a number in \[-2, 2\]"),
        ("min_tokens", [-1, 1.0, True, None], "must be an integer of at least 0"),
        ("truncate_prompt_tokens", [0, -1, 1.5, True], "must be an integer of at least 1"),
        ("skip_special_tokens", [1, None], "must be True or False"),
        ("include_stop_str_in_output", [1, None], "must be True or False"),
        ("priority", [1.0, None, True, "1"], "must be an integer"),
        ("cache_salt", ["", 5], "must be a text"),
    ],
)
def test_bad_values_raise_with_value_and_range(name: str, bad: list[Any], allowed: str) -> None:
    for value in bad:
        with pytest.raises(ValueError, match=allowed) as raised:
            SamplingParams(**{name: value})
        assert isinstance(raised.value, SettingError)
        assert raised.value.name == name
        assert raised.value.value is value


@pytest.mark.parametrize("mode", sorted(set(MODES) - {"diffusion"}))
@pytest.mark.parametrize("rule", sorted(set(COMMIT_RULES) - {"confidence"}))
def test_a_commit_rule_that_the_mode_would_not_read_raises(mode: Any, rule: Any) -> None:
    with pytest.raises(ValueError, match=f"'{rule}'.*'diffusion'.*drop it"):
        SamplingParams(mode=mode, commit_rule=rule)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target_retention": 0.9, "confidence_threshold": 0.8}, "beside confidence_threshold.*drop one"),
        ({"target_retention": 0.9, "commit_rule": "fixed"}, "with commit_rule 'fixed'.*drop one"),
        ({"target_retention": 0.9, "mode": "verified"}, "in mode 'verified'"),
        ({"target_retention": 0.9, "mode": "auto"}, "'auto' with allow_loss"),
        ({"entropy_bound": 0.1}, "only commit_rule='entropy_bound' reads it"),
        ({"entropy_bound": 0.1, "commit_rule": "entropy"}, "with commit_rule 'entropy'"),
    ],
)
def test_settings_of_commits_that_exclude_each_other_raise(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        SamplingParams(**given)


def test_what_a_target_or_a_bound_replaces_is_settled() -> None:
    target = SamplingParams(target_retention=0.9).settled(16, SamplingDefaults())
    assert (target.confidence_threshold, target.entropy_bound) == (None, None)
    assert target.settled(16, SamplingDefaults()) == target
    assert SamplingParams(commit_rule="entropy_bound").settled(16, SamplingDefaults()).entropy_bound == 0.1
    assert SamplingParams(target_retention=0.9, mode="auto", allow_loss=True).target_retention == 0.9


def test_edges_of_the_ranges_are_allowed() -> None:
    SamplingParams(max_new_tokens=0, block_size=1, steps_per_block=1, confidence_threshold=0, temperature=0)
    SamplingParams(confidence_threshold=1.0, temperature=1e-6, top_k=1, top_p=1.0, seed=0)
    SamplingParams(temperature=100, top_p=1e-9, seed=2**63 - 1, max_new_tokens=10**400)


def test_defaults_are_the_papers() -> None:
    p = SamplingParams().settled(16, SamplingDefaults())
    assert (p.mode, p.steps_per_block, p.confidence_threshold, p.commit_rule) == ("diffusion", 16, 0.8, "confidence")


def test_what_is_left_out_is_the_checkpoints_own() -> None:
    own = SamplingDefaults(temperature=0.7, top_k=20, top_p=0.8, max_new_tokens=512)
    filled = SamplingParams(
        block_size=8, temperature=0.7, top_k=20, top_p=0.8, max_new_tokens=512, confidence_threshold=0.8
    )
    assert SamplingParams().settled(8, own) == filled
    given = SamplingParams(block_size=3, temperature=0, top_k=5, top_p=1, max_new_tokens=0, confidence_threshold=0.5)
    assert given.settled(8, own) == given
    plain = SamplingParams().settled(8, SamplingDefaults())
    assert (plain.temperature, plain.top_k, plain.top_p, plain.max_new_tokens) == (0.0, None, None, 128)


def test_stop_may_be_a_list_and_params_stay_hashable() -> None:
    p = SamplingParams(stop=["a", "b"])
    assert p.stop == ("a", "b")
    assert hash(p) == hash(SamplingParams(stop=("a", "b")))


def test_tokens_per_denoiser_call() -> None:
    def stats(calls: int) -> GenerationStats:
        return GenerationStats(
            denoiser_calls=calls, context_calls=1, seconds_to_first_token=0.0, seconds_total=0.0, num_tokens=12
        )

    assert stats(4).tokens_per_denoiser_call == 3.0
    assert stats(0).tokens_per_denoiser_call == 0.0


@pytest.mark.parametrize(("denoiser", "context", "expected"), [(0, 12, 12 / 11), (6, 7, 1.0), (4, 1, 3.0), (0, 1, 0.0)])
def test_tokens_per_pass_counts_both_towers_but_not_the_prompt(denoiser: int, context: int, expected: float) -> None:
    seconds = {"seconds_to_first_token": 0.0, "seconds_total": 0.0}
    stats = GenerationStats(denoiser_calls=denoiser, context_calls=context, num_tokens=12, **seconds)
    assert stats.tokens_per_pass == pytest.approx(expected)

"""Scoring, accepting a prefix, and who sees whom."""

from collections.abc import Callable

import pytest
import torch

from twotower.model.tower import positionings
from twotower.model.two_tower import TwoTower
from twotower.ops.rope import Positioning

PATTERNS = ["M", "*", "G", "G*-", "S*-", "R*-", "M*-E", "MEM*MEM*E", "llama"]
# float64 in another order of sums; float32 likewise
EXACT, CLOSE = 1e-10, 1e-5
BLOCK = [[3, 7, 3, 3, 8]]


@pytest.mark.parametrize(
    ("pattern", "dtype", "tolerance"),
    [*((pattern, torch.float64, EXACT) for pattern in PATTERNS), ("M*-E", torch.float32, CLOSE)],
)
def test_accepting_any_prefix_is_a_fresh_prefill(
    pattern: str, dtype: torch.dtype, tolerance: float, tiny: Callable, ids: Callable, close: Callable
) -> None:
    model, tokens = tiny(pattern, dtype=dtype), ids(1, 23)
    state = model.prefill(tokens[:, :7], capacity=64)
    with torch.no_grad():
        for count in range(17):
            scored = model.score(tokens[:, 7:], state)
            accepted = model.accept(scored, (count,))
            fresh = model.prefill(tokens[:, : 7 + count])
            assert accepted.lengths == fresh.lengths
            for ours, theirs in zip(accepted.mamba, fresh.mamba, strict=True):
                close(ours.conv, theirs.conv, tolerance)
                close(ours.ssm, theirs.ssm, tolerance)
            close(model.denoise(BLOCK, accepted), model.denoise(BLOCK, fresh), tolerance)
            if count in (0, 1, 7, 16):
                logits = model.extend(tokens[:, :4], accepted).next_logits
                close(logits, model.extend(tokens[:, :4], fresh).next_logits, tolerance)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_marks_are_states_of_a_fresh_prefill(pattern: str, tiny: Callable, ids: Callable, close: Callable) -> None:
    model, tokens = tiny(pattern, dtype=torch.float64), ids(2, 90)
    state = model.prefill(tokens[:, :7])
    with torch.no_grad():
        scored = model.score(tokens[:, 7:], state, (1, 9, 70))
        whole = model.keep(scored, with_logits=True)
        close(whole.next_logits, model.prefill(tokens).next_logits, EXACT)
        for mark, mamba in scored.marks.items():
            fresh = model.prefill(tokens[:, : 7 + mark])
            for ours, theirs in zip(mamba, fresh.mamba, strict=True):
                close(ours.conv, theirs.conv, EXACT)
                close(ours.ssm, theirs.ssm, EXACT)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_may_accept_different_prefixes(pattern: str, tiny: Callable, ids: Callable, close: Callable) -> None:
    model, tokens, lengths = tiny(pattern, dtype=torch.float64), ids(4, 40), [20, 3, 11, 24]
    state = model.prefill(tokens[:, :24], lengths)
    block = ids(4, 16, seed=1)
    with torch.no_grad():
        scored = model.score(block, state)
        logits = model.scored_logits(scored)
        accepted = model.accept(scored, (0, 16, 1, 7))
    for row, (length, count) in enumerate(zip(lengths, (0, 16, 1, 7), strict=True)):
        whole = torch.cat((tokens[row : row + 1, :length], block[row : row + 1]), 1)
        close(logits[row], model.context_logits(whole)[0, length:], EXACT)
        fresh = model.prefill(whole[:, : length + count])
        close(model.denoise(BLOCK, accepted.select([row])), model.denoise(BLOCK, fresh), EXACT)


@pytest.mark.parametrize("tokens_scored", [1, 2, 64, 65, 130])
def test_scoring_any_number_of_tokens(tokens_scored: int, tiny: Callable, ids: Callable, close: Callable) -> None:
    """One token, a block, and more than a scan's chunk take different ways through the scan."""
    model, tokens = tiny("M*-E", dtype=torch.float64), ids(2, 5 + tokens_scored)
    with torch.no_grad():
        for counts in {(tokens_scored, tokens_scored), (tokens_scored, 0), (1, tokens_scored // 2)}:
            scored = model.score(tokens[:, 5:], model.prefill(tokens[:, :5]))
            accepted = model.accept(scored, counts)
            fresh = model.prefill(tokens, [5 + c for c in counts])
            for ours, theirs in zip(accepted.mamba, fresh.mamba, strict=True):
                close(ours.ssm, theirs.ssm, EXACT)
                close(ours.conv, theirs.conv, EXACT)
            close(model.denoise(BLOCK * 2, accepted), model.denoise(BLOCK * 2, fresh), EXACT)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_later_token_changes_no_earlier_context_logits(
    pattern: str, tiny: Callable, ids: Callable, close: Callable
) -> None:
    model, tokens = tiny(pattern, dtype=torch.float64), ids(1, 80)
    before = model.context_logits(tokens)
    for at in (1, 40, 63, 64, 79):
        changed = tokens.clone()
        changed[0, at] = (changed[0, at] + 1) % 40
        after = model.context_logits(changed)
        if "E" in pattern:  # another token goes to other experts, whose products then have other shapes
            close(after[:, :at], before[:, :at], EXACT)
        else:
            assert torch.equal(after[:, :at], before[:, :at])
        assert not torch.equal(after[:, at:], before[:, at:])


def moved_by_last(model: TwoTower, prompt: torch.Tensor) -> torch.Tensor:
    """Whether each of 6 block positions' logits change with the block's last token."""
    state = model.prefill(prompt)
    a, b = (model.denoise([[3, 9, 3, 3, 3, last]], state, 0.5) for last in (7, 8))
    return (a != b).any(-1)[0]


@pytest.mark.parametrize("pattern", ["*", "M*", "M*-E", "llama"])
def test_attention_in_a_block_looks_both_ways(pattern: str, tiny: Callable, ids: Callable) -> None:
    assert bool(moved_by_last(tiny(pattern, dtype=torch.float64), ids(1, 5)).all())


@pytest.mark.parametrize("pattern", ["M", "M-E"])
def test_mamba_in_a_block_looks_back_only(pattern: str, tiny: Callable, ids: Callable) -> None:
    assert moved_by_last(tiny(pattern, dtype=torch.float64), ids(1, 5)).tolist() == [False] * 5 + [True]


@pytest.mark.parametrize("pattern", ["M", "*"])
def test_a_block_reads_the_context(pattern: str, tiny: Callable, ids: Callable) -> None:
    model, prompt = tiny(pattern, dtype=torch.float64), ids(1, 20)
    logits = model.denoise(BLOCK, model.prefill(prompt))
    for at in (0, 19):
        changed = prompt.clone()
        changed[0, at] = (changed[0, at] + 1) % 40
        assert not torch.equal(model.denoise(BLOCK, model.prefill(changed)), logits)


def test_rope_sees_distances_and_not_places(tiny: Callable, ids: Callable, close: Callable) -> None:
    """Shifting everything by one token that nobody attends to changes nothing; shifting half of it does."""
    model = tiny("*", dtype=torch.float64, use_rope=True)
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    mixer = model.context_tower.layers[0].mixer
    scores = []
    for start in (0, 7):
        at = positionings(model.config, torch.arange(start, start + 6)[None], torch.float64)[0]
        q, k, *_ = mixer.project(x, at)
        scores.append(q[:, :2] @ k[:, :1].transpose(-1, -2))
    close(scores[1], scores[0], 1e-5)  # angles are float32, as in Hugging Face's
    q, k, *_ = mixer.project(x, Positioning(None, None))
    assert (q[:, :2] @ k[:, :1].transpose(-1, -2) - scores[0]).abs().max() > 0.1


@pytest.mark.parametrize("pattern", ["M*-E", "llama"])
def test_block_widths_hide_a_rows_padding(pattern: str, tiny: Callable, ids: Callable, close: Callable) -> None:
    model = tiny(pattern, dtype=torch.float64)
    state = model.prefill(ids(3, 9), [9, 4, 0])
    block, widths = ids(3, 16, seed=1), (5, 16, 1)
    with torch.no_grad():
        logits = model.denoiser_logits(block, state, (0.5,) * 3, widths)
        for row, width in enumerate(widths):
            alone = model.denoise(block[row : row + 1, :width], state.select([row]), 0.5)
            close(logits[row, :width], alone[0], EXACT)

"""Recurrent layers over drafts of which any number is kept, against the whole text, without vLLM."""

import random

import pytest
import torch
import torch.nn.functional as F

from twotower.integrations.vllm.drafted_states import convolve_drafts_, turns, without_drafts

CHANNELS, WIDTH, MOST = 5, 4, 6  # channels, width of the kernel, tokens of a pass


@pytest.mark.parametrize("with_bias", [True, False])
def test_passes_over_drafts_give_what_one_over_the_kept_tokens_gives(with_bias) -> None:
    generator = torch.Generator().manual_seed(0)
    rng = random.Random(0)
    weight = torch.randn(CHANNELS, WIDTH, generator=generator, dtype=torch.float64)
    bias = torch.randn(CHANNELS, generator=generator, dtype=torch.float64) if with_bias else None
    texts = [torch.randn(40, CHANNELS, generator=generator, dtype=torch.float64) for _ in range(2)]
    padded = [F.pad(text.t(), (WIDTH - 1, 0))[None] for text in texts]
    whole = [F.silu(F.conv1d(x, weight[:, None], bias, groups=CHANNELS))[0].t() for x in padded]
    state = torch.zeros(3, CHANNELS, WIDTH - 1 + MOST - 1, dtype=torch.float64)  # entries 2 and 1 are those of the rows
    done, accepted = [0, 0], [1, 1]
    while min(done) < 30:
        kept = [rng.randint(1, MOST) for _ in texts]
        lengths = [rng.randint(n, MOST) for n in kept]
        windows = []
        for row, text in enumerate(texts):
            draft = torch.randn(lengths[row], CHANNELS, generator=generator, dtype=torch.float64)
            right = text[done[row] : done[row] + kept[row]]
            draft[: len(right)] = right
            windows.append(draft)
        # Behind the rows one that doesn't count, as vLLM pads a batch
        x = torch.cat([*windows, torch.ones(1, CHANNELS, dtype=torch.float64)])
        starts = torch.tensor([0, lengths[0], sum(lengths), sum(lengths) + 1])
        out = convolve_drafts_(
            x,
            state,
            weight,
            bias,
            slots=torch.tensor([2, 1, 0]),
            num_accepted=torch.tensor([*accepted, 1]),
            starts=starts,
        )
        for row, text in enumerate(texts):
            count = min(kept[row], len(text) - done[row])
            found = out[starts[row] : starts[row] + count]
            torch.testing.assert_close(found, whole[row][done[row] : done[row] + count])
            done[row] += kept[row]
        accepted = kept
    assert not state[0].any()


def test_states_go_on_from_the_last_token_that_was_kept() -> None:
    """A recurrence that no two orders of tokens leave alike: state ← 2·state + token."""
    length, rng = 24, random.Random(1)
    texts = [[rng.randint(1, 9) for _ in range(length)] for _ in range(2)]
    whole = [[sum(n * 2 ** (at - i) for i, n in enumerate(text[: at + 1])) for at in range(length)] for text in texts]
    # Entries 1 to 6 and 7 to 12 are those of the rows, in no order; the third row doesn't count, the fourth is empty.
    own = [rng.sample(range(1 + MOST * row, 1 + MOST * (row + 1)), MOST) for row in range(2)]
    slots = torch.tensor([*own, [0] * MOST, [13] * MOST], dtype=torch.int32)
    state = torch.zeros(14, dtype=torch.int64)
    done, accepted = [0, 0], [0, 1]  # of a row that has just left its prompt vLLM says 0 or 1
    while min(done) < length:
        kept = [min(rng.randint(1, MOST), length - n) for n in done]
        lengths = [rng.randint(n, MOST) if n else 0 for n in kept]
        x = torch.zeros(sum(lengths) + 1, dtype=torch.int64)
        starts = torch.tensor([0, lengths[0], sum(lengths), sum(lengths) + 1, sum(lengths) + 1], dtype=torch.int32)
        for row, text in enumerate(texts):
            right = torch.tensor(text[done[row] : done[row] + kept[row]], dtype=torch.int64)
            x[int(starts[row]) : int(starts[row]) + len(right)] = right
        found = torch.zeros_like(x)
        order = turns(slots, torch.tensor([*accepted, 1, 1], dtype=torch.int32), starts)
        places = iter(order.tokens.tolist())
        for before, after in order.entries:
            for old, new in zip(before.tolist(), after.tolist(), strict=True):
                place = next(places)
                found[place] = state[new] = 2 * state[old] + x[place]
        assert not list(places)
        for row in range(2):
            first = int(starts[row])
            assert found[first : first + kept[row]].tolist() == whole[row][done[row] : done[row] + kept[row]]
            done[row] += kept[row]
        accepted = [n if n else old for n, old in zip(kept, accepted, strict=True)]
    assert state[0] == state[13] == 0


@pytest.mark.parametrize(
    ("num_accepted", "starts", "plain"),
    [
        ([1, 1], [0, 1, 2], True),
        ([0, 1], [0, 1, 2], True),
        ([1, 2], [0, 1, 2], False),
        ([1, 1], [0, 2, 3], False),
        ([1, 1], [0, 2, 2], False),
    ],
)
def test_rows_without_drafts_are_those_with_one_token_before_and_now(num_accepted, starts, plain) -> None:
    found = without_drafts(torch.tensor(num_accepted, dtype=torch.int32), torch.tensor(starts, dtype=torch.int32))
    assert found == plain

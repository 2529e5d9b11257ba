"""Recurrent layers over drafts of which any number is kept, against the whole text, without vLLM."""

import random

import pytest
import torch
import torch.nn.functional as F

from twotower.integrations.vllm.drafted_states import convolve_drafts_, scan_drafts_

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
    h, p, g, n, length = 4, 3, 2, 5, 24
    generator = torch.Generator().manual_seed(1)
    rng = random.Random(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, b, c, dt = draw(length, h, p), draw(length, g, n), draw(length, g, n), draw(length, h).exp()
    a, d = -draw(h).exp(), draw(h)
    whole, now = torch.empty(length, h, p), torch.zeros(h, p, n)
    for t in range(length):
        for head in range(h):
            own = head // (h // g)
            now[head] = (dt[t, head] * a[head]).exp() * now[head] + dt[t, head] * torch.outer(x[t, head], b[t, own])
            whole[t, head] = now[head] @ c[t, own] + d[head] * x[t, head]
    state = torch.zeros(1 + MOST + 1, h, p, n)
    slots = torch.tensor([[MOST, *range(1, MOST)], [0] * MOST])
    done, accepted = 0, 1
    while done < length:
        kept = min(rng.randint(1, MOST), length - done)
        wrong = rng.randint(0, MOST - kept)

        def window(table: torch.Tensor, done: int = done, kept: int = kept, wrong: int = wrong) -> torch.Tensor:
            # The row's tokens, wrong ones behind them, and a row that doesn't count
            return torch.cat((table[done : done + kept], draw(wrong + 1, *table.shape[1:]).abs()))

        out = torch.zeros(kept + wrong + 1, h, p)
        starts = torch.tensor([0, kept + wrong, kept + wrong + 1])
        scan_drafts_(
            state,
            window(x),
            window(dt),
            a,
            window(b),
            window(c),
            d,
            slots=slots,
            num_accepted=torch.tensor([accepted, 1]),
            starts=starts,
            out=out,
        )
        torch.testing.assert_close(out[:kept], whole[done : done + kept], rtol=1e-5, atol=1e-5)
        done, accepted = done + kept, kept
    assert not state[0].any()
    assert not state[MOST + 1].any()

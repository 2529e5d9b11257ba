import math

import pytest
import torch
from torch import Tensor

from twotower.ops.attention import ScoreRule, block_mask, cached_attention, causal_mask, seeded_attention

# The queries here are 6 numbers wide.
RULE = ScoreRule(6**-0.5)
LENGTHS = (1, 2, 5, 16, 17, 63, 64, 65, 130)


def naive(q: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """One query at a time over the keys it may see: q (h, s, p), key and value (k, t, p), visible (s, t) bool."""
    heads, s, width = q.shape
    out = torch.empty_like(q)
    for head in range(heads):
        kv = head // (heads // key.shape[0])
        for i in range(s):
            seen = visible[i].nonzero()[:, 0]
            scores = [float(q[head, i] @ key[kv, j]) / math.sqrt(width) for j in seen]
            top = max(scores)
            weights = [math.exp(v - top) for v in scores]
            out[head, i] = sum(w * value[kv, j] for w, j in zip(weights, seen, strict=True)) / sum(weights)
    return out


def tensors(*lengths: int, heads: int = 4, kv: int = 2) -> list[Tensor]:
    """A query (1, h, s, p), then keys and values (1, k, t, p) of each further length."""
    torch.manual_seed(sum(lengths))
    made = [torch.randn(1, heads, lengths[0], 6, dtype=torch.float64)]
    for length in lengths[1:]:
        made += torch.randn(2, 1, kv, length, 6, dtype=torch.float64).unbind()
    return made


@pytest.mark.parametrize("cached", LENGTHS)
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_cached_attention_is_the_loop(cached: int, kv: int) -> None:
    q, key, value = tensors(min(cached, 5), cached, kv=kv)
    s = q.shape[2]
    visible = torch.arange(cached) <= torch.arange(cached - s, cached)[:, None]
    bias = torch.zeros(s, cached, dtype=torch.float64).masked_fill(~visible, -torch.inf)[None, None]
    expected = naive(q[0], key[0], value[0], visible)
    torch.testing.assert_close(cached_attention(q, key, value, bias, RULE)[0], expected, rtol=1e-11, atol=1e-11)
    everything = naive(q[0], key[0], value[0], torch.ones_like(visible))
    torch.testing.assert_close(cached_attention(q, key, value, None, RULE)[0], everything, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("past", [0, *LENGTHS])
@pytest.mark.parametrize("block", [1, 5, 16])
def test_seeded_attention_is_the_loop_over_past_and_block(past: int, block: int) -> None:
    q, key, value, past_key, past_value = tensors(block, block, past)
    keys, values = torch.cat((past_key, key), 2), torch.cat((past_value, value), 2)
    expected = naive(q[0], keys[0], values[0], torch.ones(block, past + block, dtype=torch.bool))
    out = seeded_attention(q, key, value, past_key, past_value, None, RULE)
    torch.testing.assert_close(out[0], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("used", [0, 1, 40, 64])
def test_unused_places_do_not_change_a_bit(used: int) -> None:
    q, key, value, past_key, past_value = tensors(5, 5, 64)
    bias = torch.zeros(1, 1, 1, 69, dtype=torch.float64)
    bias[..., used:64] = -torch.inf
    out = seeded_attention(q, key, value, past_key, past_value, bias, RULE)
    past_key[:, :, used:], past_value[:, :, used:] = 1e6, -1e6
    assert torch.equal(seeded_attention(q, key, value, past_key, past_value, bias, RULE), out)
    visible = torch.cat((torch.arange(64) < used, torch.ones(5, dtype=torch.bool))).expand(5, -1)
    keys, values = torch.cat((past_key, key), 2), torch.cat((past_value, value), 2)
    torch.testing.assert_close(out[0], naive(q[0], keys[0], values[0], visible), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_caps_limit_the_scores_and_sinks_join_the_softmax_without_a_value(kv: int) -> None:
    q, key, value, past_key, past_value = tensors(5, 5, 9, kv=kv)
    rule = ScoreRule(0.7, 1.5, torch.randn(4, dtype=torch.float64))
    keys, values = torch.cat((past_key, key), 2), torch.cat((past_value, value), 2)
    expected = torch.empty_like(q)
    for head in range(4):
        scores = 1.5 * (q[0, head] @ keys[0, head // (4 // kv)].T * 0.7 / 1.5).tanh()
        weights = scores.exp() / (scores.exp().sum(-1, keepdim=True) + rule.sinks[head].exp())
        expected[0, head] = weights @ values[0, head // (4 // kv)]
    torch.testing.assert_close(seeded_attention(q, key, value, past_key, past_value, None, rule), expected)
    torch.testing.assert_close(cached_attention(q, keys, values, None, rule), expected)


@pytest.mark.parametrize(("window", "chunk"), [(3, None), (1, None), (None, 4), (5, 4)])
def test_masks_hide_what_is_out_of_reach(window: int | None, chunk: int | None) -> None:
    def reaches(place: int, key: int) -> bool:
        return (window is None or abs(place - key) < window) and (chunk is None or place // chunk == key // chunk)

    starts, widths, s, t = (6, 9), (5, 3), 5, 12
    options = {"window": window, "chunk": chunk}
    causal = causal_mask(starts, s, t + s, torch.float64, torch.device("cpu"), **options)
    block = block_mask(starts, widths, s, t, torch.float64, torch.device("cpu"), **options)
    assert block is not None
    for b, start in enumerate(starts):
        for i in range(s):
            seen = [j for j in range(t + s) if j <= start + i and reaches(start + i, j)]
            assert (causal[b, 0, i] == 0).nonzero().flatten().tolist() == seen
            padding = i >= widths[b]  # sees everything
            past = [j for j in range(t) if j < start and (padding or reaches(start + i, j))]
            own = [t + j for j in range(widths[b]) if padding or reaches(start + i, start + j)]
            assert (block[b, 0, i] == 0).nonzero().flatten().tolist() == past + own

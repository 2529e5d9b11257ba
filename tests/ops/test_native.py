"""Every C kernel against the reference op of the same name, and the property that sets them apart: a row's bits do not
depend on what shares its call."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from twotower.ops import attention, conv, linear, mlp, moe, norm, ssd, unmask
from twotower.ops.backend import Backend
from twotower.ops.native import attention as n_attention
from twotower.ops.native import build
from twotower.ops.native import conv as n_conv
from twotower.ops.native import linear as n_linear
from twotower.ops.native import mlp as n_mlp
from twotower.ops.native import moe as n_moe
from twotower.ops.native import norm as n_norm
from twotower.ops.native import ssd as n_ssd
from twotower.ops.native import unmask as n_unmask

pytestmark = pytest.mark.skipif(build.library() is None, reason="this machine has no C compiler")

# float32 sums in another order: some ulps of the largest term
CLOSE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-5}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def packed(weight: Tensor) -> linear.PackedWeight:
    found = linear.pack(weight, Backend.NATIVE)
    assert found is not None
    return found


def multiplied(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What rows are in a product with a weight of `dtype`."""
    rounds = dtype == torch.bfloat16 and n_linear.has_bf16_pairs()
    return x.bfloat16().float() if rounds else x


@pytest.fixture
def close(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """How close two products behind each other come to the reference, which is made to round what the C kernels do: a
    hidden value between two of bf16 may go to either."""
    if dtype == torch.float32 or not n_linear.has_bf16_pairs():
        return CLOSE

    def rounding(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        return linear.linear(multiplied(x, dtype), weight, bias)

    for module in (mlp, moe):
        monkeypatch.setattr(module, "linear", rounding)
    return {"rtol": 1e-2, "atol": 1e-2}


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 16, 17, 33])
@pytest.mark.parametrize("shape", [(1, 1), (16, 8), (33, 7), (40, 24), (130, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, x, bias = normal(*shape, dtype=dtype), normal(rows, shape[1]), normal(shape[0])
    expected = multiplied(x, dtype) @ weight.float().t()
    torch.testing.assert_close(linear.linear(x, packed(weight)), expected, **CLOSE)
    torch.testing.assert_close(linear.linear(x, packed(weight), bias), expected + bias, **CLOSE)


def test_linear_takes_columns_of_a_wider_table_and_more_dimensions() -> None:
    weight, wide = normal(20, 12), normal(2, 3, 30)
    x = wide[..., 5:17]
    torch.testing.assert_close(linear.linear(x, packed(weight)), x @ weight.t(), **CLOSE)


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 19])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mlp(rows: int, gated: bool, bias: bool, dtype: torch.dtype, close: dict[str, Any]) -> None:
    d, inner = 20, 37
    up, down = normal(inner * (1 + gated), d, dtype=dtype) / 4, normal(d, inner, dtype=dtype) / 4
    biases = (normal(up.shape[0]), normal(d)) if bias else (None, None)
    x = normal(2, rows, d)
    expected = mlp.mlp(x, up.float(), down.float(), *biases, gated=gated)
    actual = n_mlp.mlp(x, packed(up), packed(down), *biases, gated=gated)
    torch.testing.assert_close(actual, expected, **close)


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 5, 33), (3, 16, 64)])
def test_norms(shape: tuple[int, int, int]) -> None:
    b, _, d = shape
    x, weight = normal(*shape), normal(d)
    float32 = torch.float32
    torch.testing.assert_close(
        n_norm.rms_norm(x, weight, 1e-5, float32), norm.rms_norm(x, weight, 1e-5, float32), **CLOSE
    )
    every = normal(b, 3, 1, d)  # shift, scale and gate lie side by side
    shift, scale, _ = every.unbind(1)
    for norm_first in (True, False):
        arguments = (x, weight, 1e-5, shift, scale)
        actual = n_norm.modulated_rms_norm(*arguments, norm_first=norm_first, dtype=float32)
        expected = norm.modulated_rms_norm(*arguments, norm_first=norm_first, dtype=float32)
        torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize(("groups", "width"), [(1, 8), (2, 13), (4, 64)])
def test_gated_group_norm(groups: int, width: int) -> None:
    y, wide, weight = normal(2, 9, groups * width), normal(2, 9, groups * width + 7), normal(groups * width)
    z = wide[..., 3 : 3 + groups * width]
    expected = norm.gated_group_rms_norm(y, z, weight, groups, 1e-5)
    torch.testing.assert_close(n_norm.gated_group_rms_norm(y, z, weight, groups, 1e-5), expected, **CLOSE)


def test_silu_is_right_over_the_whole_range() -> None:
    x = torch.cat((torch.linspace(-200, 200, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 88.5, -88.5])))
    taps = torch.tensor([0.0, 1.0])[:, None].expand(2, x.numel()).contiguous()
    out = n_conv.conv_silu(x[None, None], torch.zeros(1, 1, x.numel()), taps, None)[0, 0]
    torch.testing.assert_close(out, torch.nn.functional.silu(x.double()).float(), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize(("s", "c", "w"), [(1, 5, 4), (2, 33, 2), (16, 40, 4), (37, 16, 3)])
def test_conv(s: int, c: int, w: int) -> None:
    x, past, taps, bias = normal(2, s, c + 9)[..., 4 : 4 + c], normal(2, w - 1, c), normal(w, c), normal(c)
    for b in (None, bias):
        torch.testing.assert_close(n_conv.conv_silu(x, past, taps, b), conv.conv_silu(x, past, taps, b), **CLOSE)


def scan_case(s: int, n: int) -> tuple[ssd.ScanInputs, Tensor, Tensor, Tensor]:
    """Inputs as a layer makes them: x, B and C are columns of one table."""
    b, h, p, g = 2, 4, 5, 2
    table = normal(b, s, h * p + 2 * g * n)
    x, B, C = table.split((h * p, g * n, g * n), dim=-1)
    dt = normal(b, s, h, seed=1).sigmoid() * 0.5
    inputs = ssd.ScanInputs(x.unflatten(-1, (h, p)), dt, B.unflatten(-1, (g, n)), C.unflatten(-1, (g, n)))
    return inputs, -normal(h).exp(), normal(h, seed=2), normal(b, h, p, n)


@pytest.mark.parametrize("s", [1, 2, 16, 17, 70])
@pytest.mark.parametrize("n", [5, 16, 32, 64, 100, 128, 256])
def test_ssd(s: int, n: int) -> None:
    inputs, A, D, state = scan_case(s, n)
    expected = ssd.ssd_scan(inputs, A, D, state)
    loose = {"rtol": 2e-4, "atol": 2e-4}  # sums over n terms and s tokens
    actual = n_ssd.ssd_scan(inputs, A, D, state)
    torch.testing.assert_close(actual.y, expected.y, **loose)
    torch.testing.assert_close(actual.state, expected.state, **loose)
    assert torch.equal(n_ssd.ssd_output(inputs, A, D, state), actual.y)
    assert torch.equal(n_ssd.ssd_state(inputs, A, state), actual.state)


def test_a_rows_first_tokens_give_the_state_that_they_give_alone() -> None:
    inputs, A, _, state = scan_case(6, 16)
    found = n_ssd.ssd_state(inputs, A, state, torch.tensor([4, 0]))
    first = ssd.ScanInputs(*(v[:1, :4] for v in inputs))
    assert torch.equal(found[:1], n_ssd.ssd_state(first, A, state[:1]))
    assert torch.equal(found[1], state[1])
    expected = ssd.ssd_state(inputs, A, state, torch.tensor([4, 0]))
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("s", [1, 2, 5])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_next_past(s: int, width: int) -> None:
    x, past = normal(3, s, 20)[..., 5:14], normal(3, width - 1, 9)
    for counts in (None, torch.tensor([0, s, s // 2])):
        assert torch.equal(n_conv.next_past(x, past, counts), conv.next_past(x, past, counts))


def test_a_token_with_dt_zero_leaves_the_state_to_the_bit() -> None:
    inputs, A, _, state = scan_case(6, 16)
    inputs.dt[:, 3:] = 0
    first = ssd.ScanInputs(*(v[:, :3] for v in inputs))
    assert torch.equal(n_ssd.ssd_state(inputs, A, state), n_ssd.ssd_state(first, A, state))


@pytest.mark.parametrize(("s", "heads", "kv", "p"), [(1, 4, 2, 8), (5, 4, 4, 48), (16, 8, 2, 64), (3, 2, 1, 6)])
def test_attention(s: int, heads: int, kv: int, p: int) -> None:
    b, t, starts, widths = 3, 64, (0, 7, 40), (1, s, max(1, s - 1))
    heads_of = normal(b, s, heads + 2 * kv, p)
    q, key, value = (v.transpose(1, 2) for v in heads_of.split((heads, kv, kv), dim=2))
    past_key, past_value = normal(2, b, kv, t, p).unbind()
    where = (s, t, torch.float32, torch.device("cpu"))
    masks = [module.causal_mask(starts, *where) for module in (attention, n_attention)]
    expected = attention.cached_attention(q, past_key, past_value, masks[0])
    actual = n_attention.cached_attention(q, past_key, past_value, masks[1])
    torch.testing.assert_close(actual, expected, **CLOSE)
    masks = [module.block_mask(starts, widths, *where) for module in (attention, n_attention)]
    expected = attention.seeded_attention(q, key, value, past_key, past_value, masks[0])
    actual = n_attention.seeded_attention(q, key, value, past_key, past_value, masks[1])
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("batch", [1, 2])
def test_rotate(batch: int) -> None:
    x, angle = normal(2, 5, 7, 12)[:, :, 1:6], normal(batch, 5, 1, 6)
    expected = attention.rotate(x, angle.cos(), angle.sin())
    torch.testing.assert_close(n_attention.rotate(x, angle.cos(), angle.sin()), expected, **CLOSE)


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2), (4, 1), (8, 3)])
@pytest.mark.parametrize("normalise", [True, False])
def test_route(groups: int, kept: int, normalise: bool) -> None:
    x, weight, bias = normal(19, 33), normal(16, 33).double(), normal(16).double()
    settings = {"num_active": 2, "num_groups": groups, "topk_groups": kept, "normalise": normalise}
    expected = moe.route(x, weight, bias, **settings, scaling_factor=2.5)
    actual = n_moe.route(x, weight, bias, **settings, scaling_factor=2.5)

    def dense(routing: moe.Routing) -> Tensor:
        return torch.zeros(19, 16, dtype=torch.float64).scatter_(1, routing.experts, routing.weights)

    torch.testing.assert_close(dense(actual), dense(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 2, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_experts(rows: int, dtype: torch.dtype, bias: bool, close: dict[str, Any]) -> None:
    e, f, d = 6, 20, 33
    up, down = normal(e, f, d, dtype=dtype) / 4, normal(e, f, d, seed=1, dtype=dtype) / 4
    biases = (normal(e, f), normal(e, d)) if bias else (None, None)
    x, choices = normal(rows, d), normal(rows, e).topk(2).indices
    routing = moe.Routing(choices, normal(rows, 2).double())
    plain = moe.ExpertWeights(up.float(), down.float(), (), (), *biases)
    panels = moe.ExpertWeights(
        n_linear.pack_panels(up), n_linear.pack_panels(down.transpose(1, 2).contiguous()), (), (), *biases
    )
    expected = moe.apply_experts(x, routing, plain)
    torch.testing.assert_close(n_moe.apply_experts(x, routing, panels), expected, **close)


def whole_and_parts(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """run over all rows of x is run over any part of them, to the bit."""
    whole = run(x)
    for first, last in itertools.combinations((0, 1, 3, 4, 9, x.shape[0]), 2):
        assert torch.equal(run(x[first:last]), whole[first:last])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_do_not_depend_on_its_company(dtype: torch.dtype) -> None:
    d, f, e = 24, 40, 4
    up, down = packed(normal(f, d, dtype=dtype)), packed(normal(d, f, dtype=dtype))
    whole_and_parts(lambda x: linear.linear(x, up), normal(17, d))
    whole_and_parts(lambda x: n_mlp.mlp(x, up, down, None, None, gated=False), normal(17, d))
    panels = n_linear.pack_panels(normal(e, f, d, dtype=dtype)), n_linear.pack_panels(normal(e, d, f, dtype=dtype))
    gate, bias = normal(e, d).double(), torch.zeros(e, dtype=torch.float64)

    def experts(x: Tensor) -> Tensor:
        settings = {"num_active": 2, "num_groups": 1, "topk_groups": 1, "normalise": True, "scaling_factor": 1.0}
        routing = n_moe.route(x, gate, bias, **settings)
        return n_moe.apply_experts(x, routing, moe.ExpertWeights(*panels))

    whole_and_parts(experts, normal(17, d))


def test_a_tokens_bits_do_not_depend_on_the_chunk_it_comes_in() -> None:
    inputs, A, D, state = scan_case(17, 16)
    whole = n_ssd.ssd_scan(inputs, A, D, state)
    for cut in (1, 5, 16):
        left = n_ssd.ssd_scan(ssd.ScanInputs(*(v[:, :cut] for v in inputs)), A, D, state)
        right = n_ssd.ssd_scan(ssd.ScanInputs(*(v[:, cut:] for v in inputs)), A, D, left.state)
        assert torch.equal(torch.cat((left.y, right.y), 1), whole.y)
        assert torch.equal(right.state, whole.state)


@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.1, 0.5)])
def test_time_steps(limit: tuple[float, float]) -> None:
    dt, bias = normal(2, 9, 40)[..., 3:10] * 20, normal(7)
    torch.testing.assert_close(n_ssd.time_steps(dt, bias, limit), ssd.time_steps(dt, bias, limit), **CLOSE)


@pytest.mark.parametrize("starts", [(0, 0), (5, 33), (64, 17)])
def test_attention_over_pages_is_attention_over_a_row_to_the_bit(starts: tuple[int, int]) -> None:
    """In any order of the pages; the reference gathers them first."""
    s, t, kv, p = 3, 96, 2, 24
    q, key, value = normal(2, 4, s, p), normal(2, kv, s, p), normal(2, kv, s, p, seed=1)
    past = [normal(2, kv, t, p, seed=n) for n in (2, 3)]
    pages = torch.randperm(12, generator=torch.Generator().manual_seed(0)).view(2, 6)
    pools = [torch.empty(12, 16, kv, p).transpose(1, 2) for _ in past]
    for pool, rows in zip(pools, past, strict=True):
        pool[pages] = rows.unflatten(2, (6, 16)).transpose(1, 2)
        assert torch.equal(attention.gather_pages(pool, pages), rows)
    causal = n_attention.causal_mask(starts, s, t, torch.float32, torch.device("cpu"))
    expected = n_attention.cached_attention(q, *past, causal)
    assert torch.equal(n_attention.cached_attention(q, *pools, causal, pages), expected)
    block = n_attention.block_mask(starts, (3, 2), s, t, torch.float32, torch.device("cpu"))
    expected = n_attention.seeded_attention(q, key, value, *past, block)
    assert torch.equal(n_attention.seeded_attention(q, key, value, *pools, block, pages), expected)


@pytest.mark.parametrize("shape", [(1,), (2, 7), (3, 5, 64), (1, 16, 1030), (2, 131_072)])
def test_best(shape: tuple[int, ...]) -> None:
    logits = (normal(*shape) * 4).round(decimals=1)  # with equal values, of which the first counts
    logits[..., -1] = -torch.inf if shape[-1] > 1 else 3.0
    found, expected = n_unmask.best(logits), unmask.best(logits)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(n_unmask.argmax(logits), unmask.argmax(logits))
    assert torch.equal(found.logits, expected.logits)
    torch.testing.assert_close(found.log_sum, logits.double().logsumexp(-1).float(), rtol=1e-6, atol=1e-6)
    rows = logits.flatten(0, -2) if len(shape) > 1 else logits[None]
    for row, log_sum in zip(rows, found.log_sum.reshape(-1), strict=True):
        assert torch.equal(n_unmask.best(row).log_sum, log_sum)


@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
def test_best_of_what_is_no_distribution(strange: float) -> None:
    logits = normal(3, 40)
    logits[1] = strange
    logits[2, 35] = max(strange, 0.0) if strange == strange else strange
    found, expected = n_unmask.best(logits), unmask.best(logits)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert torch.equal(n_unmask.argmax(logits), unmask.argmax(logits))


@pytest.mark.parametrize("s", [1, 4, 16, 300])
@pytest.mark.parametrize("leftmost", [True, False])
@pytest.mark.parametrize("with_threshold", [True, False])
def test_commit(s: int, leftmost: bool, with_threshold: bool) -> None:
    for seed in range(20):
        sure = normal(5, s, seed=seed).sigmoid().mul(20).round() / 20  # with equal ones
        sure[:, ::7] = torch.nan if seed % 4 == 3 else 0.5
        masked = normal(5, s, seed=seed + 100) > torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])[:, None]
        left = torch.tensor([3, 1, 16, 0, 4]) + seed % 3
        threshold = torch.tensor([0.5, 0.9, 0.0, 1.0, 0.7]) if with_threshold else None
        found = n_unmask.commit(sure, masked, left, threshold, leftmost=leftmost)
        assert torch.equal(found, unmask.commit(sure, masked, left, threshold, leftmost=leftmost))


def test_fix() -> None:
    def coins(seed: int) -> Tensor:
        return normal(4, 17, seed=seed) > 0

    ids = [normal(4, 17, seed=seed).mul(9).long() for seed in range(3)]
    places = unmask.BlockPlaces(ids[0], coins(3), normal(4, 17, seed=4), ids[1])
    step = torch.tensor([3, 0, 5, 1])
    arguments = (places, coins(5), coins(6), ids[2], normal(4, 17, seed=7), step, 39)
    for ours, theirs in zip(n_unmask.fix(*arguments), unmask.fix(*arguments), strict=True):
        assert torch.equal(ours, theirs)

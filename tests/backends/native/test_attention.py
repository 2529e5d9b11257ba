"""Attention in C against plain float64 loops: causal and block, keys side by side and in pages, with every option."""

import ctypes
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from twotower.backends.native import build
from twotower.backends.native.call import filled, function
from twotower.backends.native.pack import has_bf16_pairs

pytestmark = pytest.mark.skipif(build.library() is None, reason="this machine has no C compiler")

SIZE = 16  # of a page
OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 1},
    {"window": 7},
    {"chunk": 11},
    {"softcap": 1.5},
    {"sinks": True},
    {"slopes": True},
    {"window": 9, "slopes": True, "sinks": True},
    {"window": 40, "chunk": 64, "softcap": 4.0, "sinks": True, "scale": 0.7},
]


class Case(NamedTuple):
    """Queries, keys and values of whole texts, (b, t, heads, p); row b's last s tokens are new."""

    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor
    slopes: Tensor
    starts: list[int]
    widths: list[int]
    s: int


def make(starts: list[int], s: int, heads: int, kv: int, p: int, widths: list[int] | None = None) -> Case:
    torch.manual_seed(0)
    b, t = len(starts), max(starts) + s
    query, key, value = (torch.randn(b, t, n, p) for n in (heads, kv, kv))
    return Case(query, key, value, torch.randn(heads), torch.rand(heads), starts, widths or [s] * b, s)


def expected(case: Case, causal: bool, scale: float, window: int, chunk: int, softcap: float, **more: bool) -> Tensor:
    """(b, s, heads, p) in float64, one query at a time."""
    heads, kv, p = case.query.shape[2], case.key.shape[2], case.query.shape[3]
    out = torch.zeros(len(case.starts), case.s, heads, p, dtype=torch.float64)
    for row, (start, width) in enumerate(zip(case.starts, case.widths, strict=True)):
        place = torch.arange(start + case.s)
        for i in range(case.s):
            at = start + i
            visible = place <= at if causal else place < start + width
            if window:
                visible &= (place - at).abs() < window
            if chunk:
                visible &= place // chunk == at // chunk
            for head in range(heads):
                key, value = (x[row, : start + case.s, head * kv // heads].double() for x in (case.key, case.value))
                score = key[visible] @ case.query[row, at, head].double() * scale
                if softcap:
                    score = softcap * (score / softcap).tanh()
                if more["slopes"]:
                    score = score - case.slopes[head].double() * (place[visible] - at).abs()
                if more["sinks"]:
                    score = torch.cat((score, case.sinks[head : head + 1].double()))
                weights = score.softmax(0)[: int(visible.sum())]
                out[row, i, head] = weights @ value[visible]
    return out


def attention(
    case: Case,
    *,
    causal: bool = True,
    pages: bool = False,
    threads: int = 1,
    sinks: bool = False,
    slopes: bool = False,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Tensor:
    """(b, s, heads, p) by C over a cache of `dtype`.

    A causal pass finds the new keys in the cache; NaN lies where no query may read.
    """
    b, t, heads, p = case.query.shape
    kv = case.key.shape[2]
    query, key, value = (
        torch.stack([x[row, n : n + case.s] for row, n in enumerate(case.starts)])
        for x in (case.query, case.key, case.value)
    )
    past = []
    for new in (case.key, case.value):
        cache = torch.full((b, kv, -(-t // SIZE) * SIZE, p), torch.nan, dtype=dtype)
        for row, start in enumerate(case.starts):
            end = start + case.s if causal else start
            first = max(0, start - options["window"] + 1) if options.get("window") else 0
            cache[row, :, first:end] = new[row, first:end].transpose(0, 1)
        past.append(cache)
    given = {"query": query, "key": key, "value": value}
    sizes = {"b": b, "s": case.s, "heads": heads, "kv_heads": kv, "p": p, "causal": causal, "threads": threads}
    sizes["bf16"] = dtype == torch.bfloat16
    if pages:  # row b's pages lie in reverse order among all, (pages, SIZE, kv, p) in memory
        given["pages"] = torch.arange(past[0].shape[2] // SIZE * b).flip(0).view(b, -1)
        sizes |= {"num_pages": given["pages"].shape[1], "page_size": SIZE}
        pool = [x.unflatten(2, (-1, SIZE)).permute(0, 2, 3, 1, 4).flatten(0, 1).flip(0).contiguous() for x in past]
        past = [x.transpose(1, 2) for x in pool]
    out = torch.empty(b, case.s, heads, p)
    given |= {"past_key": past[0], "past_value": past[1], "out": out}
    given |= {"starts": torch.tensor(case.starts), "ends": torch.tensor(case.widths)}
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        sizes |= {f"{name}_batch": tensor.stride(0), f"{name}_token": tensor.stride(1)}
    sizes |= dict(zip(("past_batch", "past_head", "past_token"), past[0].stride(), strict=False))
    what = filled("AttentionPass", **sizes, **{name: tensor.data_ptr() for name, tensor in given.items()})
    rules = {"sinks": case.sinks.data_ptr() if sinks else None, "slopes": case.slopes.data_ptr() if slopes else None}
    options = {"scale": p**-0.5} | rules | options
    how = filled("AttentionOptions", **options)
    function("tt_attention")(ctypes.addressof(what), ctypes.addressof(how))
    return out


def check(
    case: Case, causal: bool, options: dict[str, Any], tolerance: float, dtype: torch.dtype = torch.float32
) -> None:
    """Both layouts of the keys give the same bits, and those are the loop's up to `tolerance`."""
    p = case.query.shape[3]
    told = {"scale": p**-0.5, "window": 0, "chunk": 0, "softcap": 0.0, "sinks": False, "slopes": False} | options
    key, value = (x.to(dtype).float() for x in (case.key, case.value))
    query = case.query.to(dtype).float() if has_bf16_pairs() else case.query
    want = expected(Case(query, key, value, *case[3:]), causal, **told)
    got = attention(case, causal=causal, dtype=dtype, **options)
    for row, width in enumerate(case.widths):
        torch.testing.assert_close(got[row, :width].double(), want[row, :width], rtol=tolerance, atol=tolerance)
        assert got.isfinite().all()  # what is not valid is finite, or the experts of a later layer could not be chosen
    assert torch.equal(attention(case, causal=causal, dtype=dtype, pages=True, **options), got)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv", "p"), [(4, 2, 8), (6, 1, 20), (3, 3, 140)])
def test_it_is_a_plain_loops(heads: int, kv: int, p: int, causal: bool, options: dict[str, Any]) -> None:
    # float32 sums of 100 terms
    check(make([83, 0, 30], 17, heads, kv, p, widths=[17, 17, 5]), causal, options, 2e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_bits_depend_on_neither_threads_nor_batch_nor_chunk(options: dict[str, Any]) -> None:
    """A token gives the same alone, in a block, and in a long chunk; a row the same in any batch."""
    case = make([0, 0], 150, 6, 2, 64)
    whole = attention(case, **options)
    assert torch.equal(attention(case, threads=2, **options), whole)
    for first, last in ((0, 3), (3, 4), (70, 86), (149, 150)):
        part = case._replace(starts=[first, first], s=last - first)
        assert torch.equal(attention(part, **options), whole[:, first:last])
        alone = part._replace(query=case.query[:1], key=case.key[:1], value=case.value[:1], starts=[first])
        assert torch.equal(attention(alone, **options), whole[:1, first:last])
    block = case._replace(starts=[100, 37], s=16, widths=[16, 9])
    together = attention(block, causal=False, **options)
    assert torch.equal(attention(block, causal=False, threads=2, **options), together)
    for row, start in enumerate(block.starts):
        own = {"query": case.query[row:][:1], "key": case.key[row:][:1], "value": case.value[row:][:1]}
        alone = block._replace(**own, starts=[start], widths=[block.widths[row]])
        assert torch.equal(attention(alone, causal=False, **options), together[row : row + 1])


# Tiles of 512 keys with a window or a chunk that begins and ends inside of them
LONG: list[dict[str, Any]] = [
    {},
    {"window": 600, "softcap": 2.0},
    {"chunk": 520, "sinks": True, "scale": 0.7},
    {"window": 700, "slopes": True, "softcap": 2.0},
]
either_cache = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@either_cache
@pytest.mark.parametrize("options", LONG, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv", "p"), [(6, 2, 64), (4, 1, 7), (2, 2, 140)])
def test_tiles_of_many_keys_are_a_plain_loops(
    heads: int, kv: int, p: int, causal: bool, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """The rows lie on both sides of 512 keys, from which on they are tiled; in a cache of bf16 all are."""
    # float32 sums of 1,000 terms; weights of a mixture are rounded to bf16 where its products are of bf16
    tolerance = 2e-5 if dtype == torch.float32 else 8e-3
    check(make([1030, 0, 508], 6, heads, kv, p, widths=[6, 6, 3]), causal, options, tolerance, dtype)


@either_cache
@pytest.mark.parametrize("options", LONG, ids=lambda o: "-".join(o) or "plain")
def test_bits_of_tiles_depend_on_neither_threads_nor_batch_nor_chunk(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    case = make([500, 500], 600, 6, 2, 64)
    told = {"dtype": dtype} | options
    whole = attention(case, **told)
    assert torch.equal(attention(case, threads=2, **told), whole)
    for first, last in ((500, 501), (505, 521), (1023, 1024), (1020, 1036), (1099, 1100)):
        part = case._replace(starts=[first, first], s=last - first)
        assert torch.equal(attention(part, **told), whole[:, first - 500 : last - 500])
        alone = part._replace(query=case.query[:1], key=case.key[:1], value=case.value[:1], starts=[first])
        assert torch.equal(attention(alone, threads=2, **told), whole[:1, first - 500 : last - 500])
    block = case._replace(starts=[1020, 637], s=16, widths=[16, 9])
    together = attention(block, causal=False, **told)
    assert torch.equal(attention(block, causal=False, threads=2, **told), together)
    alone = block._replace(query=case.query[1:], key=case.key[1:], value=case.value[1:], starts=[637], widths=[9])
    assert torch.equal(attention(alone, causal=False, threads=2, **told), together[1:])


def test_a_part_of_a_head_can_be_rotated() -> None:
    torch.manual_seed(0)
    b, s, heads, p, turned = 2, 3, 5, 14, 6
    x = torch.randn(b, s, heads, p)
    angle = torch.randn(b, s, turned // 2)
    out = torch.empty_like(x)
    cos, sin = angle.cos(), angle.sin()
    pointers = [x.data_ptr(), s * heads * p, heads * p, cos.data_ptr(), sin.data_ptr()]
    function("tt_rotate")(*pointers, cos.stride(0), b, s, heads, p, turned, out.data_ptr())
    first, second, rest = x.split((turned // 2, turned // 2, p - turned), dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    want = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)  # a product and a sum may be rounded at once

"""One call over all layers gives the bits of the layers called one by one, and is not made where it would miss one."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from twotower.model.mlp import MLP
from twotower.model.pages import PAGE_SIZE, PagedKeys
from twotower.model.state import ContextState
from twotower.model.two_tower import TwoTower
from twotower.ops.backend import Backend
from twotower.ops.native import build

pytestmark = pytest.mark.skipif(build.library() is None, reason="this machine has no C compiler")

BIASES = {"use_bias": True, "attention_bias": True, "mlp_bias": True}
PATTERNS: list[tuple[str, dict[str, Any]]] = [
    ("M*-E", {}),
    ("EM*M-*", BIASES),
    ("M", {}),
    ("*", {"use_rope": True}),
    ("llama", {}),
    ("-E", {"expert_num_groups": 2, "expert_topk_groups": 1}),
]
either_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
any_pattern = pytest.mark.parametrize(("pattern", "config"), PATTERNS)


def one_by_one(model: TwoTower, run: Callable[[], Any]) -> Any:
    """run() with every layer's own modules."""
    towers = (model.context_tower, model.denoiser_tower)
    fused = [tower.fused for tower in towers]
    assert all(fused)
    for tower in towers:
        tower.fused = None
    try:
        return run()
    finally:
        for tower, whole in zip(towers, fused, strict=True):
            tower.fused = whole


def same(one: object, other: object) -> None:
    """The same bits in all tensors of two nested tuples or dicts; key buffers are compared by what reads them."""
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor)
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert isinstance(other, dict)
        same(tuple(one.items()), tuple(other.items()))
    elif isinstance(one, tuple | list):
        assert isinstance(other, tuple | list)
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same(a, b)
    elif not isinstance(one, ContextState):
        assert one == other


def prefilled(model: TwoTower, tokens: Tensor, lengths: list[int]) -> ContextState:
    return model.prefill(tokens, lengths, capacity=tokens.shape[1] + 96)


@either_dtype
@any_pattern
def test_a_block(pattern: str, config: dict[str, Any], dtype: torch.dtype, tiny: Callable, ids: Callable) -> None:
    model = tiny(pattern, dtype=dtype, **config)
    model.pack_(Backend.NATIVE)
    with torch.inference_mode():
        for lengths, widths in (([70, 5, 0], (16, 16, 16)), ([40, 40, 40], (16, 3, 1))):
            state = prefilled(model, ids(3, 70), lengths)
            for t in ((1.0, 0.5, 0.25), None):
                run = functools.partial(model.denoiser_logits, ids(3, 16), state, t, widths)
                same(run(), one_by_one(model, run))


@either_dtype
@any_pattern
@pytest.mark.parametrize("s", [1, 5, 16, 100])
@pytest.mark.parametrize("marks", [(), (1,), (0, 3, 4)])
def test_causal(
    pattern: str,
    config: dict[str, Any],
    dtype: torch.dtype,
    s: int,
    marks: tuple[int, ...],
    tiny: Callable,
    ids: Callable,
) -> None:
    model, tokens = tiny(pattern, dtype=dtype, **config), ids(2, 30)
    model.pack_(Backend.NATIVE)
    marks = tuple(mark for mark in marks if mark <= s)

    def run() -> tuple[tuple[Any, ...], ContextState, Tensor]:
        scored = model.score(ids(2, s, seed=1), prefilled(model, tokens, [30, 13]), marks)
        ends = [scored.advance(None if n is None else torch.tensor(n)) for n in (None, [s, s], [0, s // 2])]
        state = model.keep(scored, (s, s - 1), with_logits=True)
        return (scored.hidden, scored.marks, ends), state, model.denoiser_logits(ids(2, 4), state, (0.5, 1.0))

    with torch.inference_mode():
        fused, plain = run(), one_by_one(model, run)
    same(fused, plain)
    same(fused[1].mamba, plain[1].mamba)
    same(fused[1].next_logits, plain[1].next_logits)


@any_pattern
def test_keys_in_pages(pattern: str, config: dict[str, Any], tiny: Callable, ids: Callable) -> None:
    model = tiny(pattern, **config)
    model.pack_(Backend.NATIVE)

    def run() -> tuple[Tensor, ...]:
        empty = model.context_tower.initial_state(2)
        shapes = [(20, PAGE_SIZE, k.shape[1], k.shape[3]) for k in empty.buffer.keys]
        keys, values = ([torch.zeros(shape).transpose(1, 2) for shape in shapes] for _ in range(2))
        tables: tuple[list[int], ...] = ([9, 4, 7, 1], [3, 8])  # the second row's padding goes to page 0
        state = dataclasses.replace(empty, buffer=PagedKeys(keys, values, tables, (0, 0)) if keys else empty.buffer)
        state = model.absorb(ids(2, 50), state, (50, 20), with_logits=True)
        state = model.absorb(ids(2, 3), state, (3, 2), with_logits=True)
        return model.denoiser_logits(ids(2, 16), state, (1.0, 0.5)), state.next_logits, *(v[1:] for v in keys)

    with torch.inference_mode():
        same(run(), one_by_one(model, run))


def test_hooks_and_new_parts_are_seen(tiny: Callable, ids: Callable) -> None:
    model = tiny("M*-E")
    model.pack_(Backend.NATIVE)
    state = model.prefill(ids(1, 20))
    block = ids(1, 8)
    before = model.denoise(block, state)
    seen: list[Tensor] = []
    mlp = model.denoiser_tower.layers[2].mixer
    assert isinstance(mlp, MLP)
    hook = mlp.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert torch.equal(model.denoise(block, state), before)
    assert len(seen) == 1
    hook.remove()
    assert torch.equal(model.denoise(block, state), before)
    assert len(seen) == 1
    other = tiny("M*-E", seed=5)
    other.pack_(Backend.NATIVE)
    model.denoiser_tower.layers[2].mixer = other.denoiser_tower.layers[2].mixer
    changed = model.denoise(block, state)
    assert not torch.equal(changed, before)
    model.denoiser_tower.layers[2].mixer = mlp
    assert torch.equal(model.denoise(block, state), before)


def test_a_packed_model_can_be_copied(tiny: Callable, ids: Callable) -> None:
    model = tiny("M*-E")
    model.pack_(Backend.NATIVE)
    twin = copy.deepcopy(model)
    state = model.prefill(ids(1, 20))
    before = model.denoise(ids(1, 8), state)
    assert torch.equal(twin.denoise(ids(1, 8), twin.prefill(ids(1, 20))), before)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(model.denoise(ids(1, 8), state), before)
    assert not torch.equal(twin.denoise(ids(1, 8), twin.prefill(ids(1, 20))), before)

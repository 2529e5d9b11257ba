"""What the released code computed, through the public API: at batch 1 everything must agree."""

from collections.abc import Callable

import pytest
import torch

from twotower.backends.native.build import library
from twotower.model.state import ContextState
from twotower.model.two_tower import TwoTower

# float32 on another machine, other kernels and another order of sums: 1e-4 of the tensor's largest magnitude
TOLERANCE = 1e-4

# None is unpacked; a machine without a C compiler has one backend less
BACKENDS = [None, "reference", *(["native"] if library() is not None else [])]
pytestmark = [pytest.mark.parametrize("case", ["hybrid", "dense"]), pytest.mark.parametrize("backend", BACKENDS)]


def test_context_logits(case: str, backend: str | None, golden: Callable, close: Callable) -> None:
    model, tensors, _ = golden(case, backend)
    close(model.context_logits(tensors["long_ids"]), tensors["context_logits"], TOLERANCE)


def test_prefill(case: str, backend: str | None, golden: Callable, close: Callable) -> None:
    model, tensors, _ = golden(case, backend)
    state = model.prefill(tensors["prompt_ids"])
    close(state.next_logits, tensors["prefill.last_logits"], TOLERANCE)
    assert_state(model, state, tensors, "prefill", close)


def test_extend(case: str, backend: str | None, golden: Callable, close: Callable) -> None:
    model, tensors, _ = golden(case, backend)
    state = model.extend(tensors["extend.block_ids"], model.prefill(tensors["prompt_ids"]))
    assert_state(model, state, tensors, "extend", close)


@pytest.mark.parametrize("k", range(4))
def test_denoise(case: str, backend: str | None, k: int, golden: Callable, close: Callable) -> None:
    model, tensors, _ = golden(case, backend)
    state = model.prefill(tensors["prompt_ids"])
    block, expected = tensors[f"denoise.{k}.block_ids"], tensors[f"denoise.{k}.logits"]
    close(model.denoise(block, state, tensors[f"denoise.{k}.t"]), expected, TOLERANCE)


def test_mock_ar_logits(case: str, backend: str | None, golden: Callable, close: Callable) -> None:
    model, tensors, _ = golden(case, backend)
    prompt = tensors["prompt_ids"]
    state = model.prefill(prompt[:, :-1])
    with torch.no_grad():
        logits = model.denoiser_logits(prompt[:, -1:], state, None)
    close(logits[:, 0], tensors["mock_ar.first_logits"], TOLERANCE)


def assert_state(model: TwoTower, state: ContextState, tensors: dict, name: str, close: Callable) -> None:
    mamba, attention = iter(state.mamba), iter(zip(state.buffer.keys, state.buffer.values, strict=True))
    for i, kind in enumerate(model.config.pattern):
        if kind == "M":
            conv, ssm = next(mamba)
            # the released state keeps one row more than is needed, channels first
            close(conv.transpose(1, 2), tensors[f"{name}.{i}.conv_state"][:, :, 1:], TOLERANCE)
            close(ssm, tensors[f"{name}.{i}.ssm_state"], TOLERANCE)
        elif kind == "*":
            key, value = next(attention)
            close(key[:, :, : state.length], tensors[f"{name}.{i}.key"], TOLERANCE)
            close(value[:, :, : state.length], tensors[f"{name}.{i}.value"], TOLERANCE)

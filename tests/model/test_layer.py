from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from twotower.model.time_conditioning import Modulation
from twotower.ops.norm import rms_norm


def modulation(width: int) -> Modulation:
    torch.manual_seed(0)
    return Modulation(*torch.randn(3, 1, 1, width, dtype=torch.float64).unbind())


@pytest.mark.parametrize("kind", "M*-E")
def test_modulation_comes_before_the_norm_of_m_and_attention_and_after_the_others(
    kind: str, tiny: Callable, close: Callable
) -> None:
    layer = tiny(kind, dtype=torch.float64).denoiser_tower.layers[0]
    x, m = torch.randn(2, 5, 32, dtype=torch.float64), modulation(32)

    def modulate(y: Tensor) -> Tensor:
        return y * (1 + m.scale) + m.shift

    def norm(y: Tensor) -> Tensor:
        return rms_norm(y, layer.norm.weight, 1e-5, torch.float64)

    expected = norm(modulate(x)) if kind in "M*" else modulate(norm(x))
    close(layer.enter(x, m, torch.float64), expected, 1e-12)
    assert torch.equal(layer.enter(x, None, torch.float64), norm(x))


def test_the_gate_scales_the_mixer_without_a_one(tiny: Callable, close: Callable) -> None:
    layer = tiny("*", dtype=torch.float64).denoiser_tower.layers[0]
    x, mixed, m = torch.randn(2, 5, 32).double(), torch.randn(2, 5, 32).double(), modulation(32)
    close(layer.leave(x, mixed, m), x + m.gate * mixed, 1e-12)
    assert torch.equal(layer.leave(x, mixed, None), x + mixed)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("pattern", ["M*E-", "llama"])
def test_residual_in_fp32_keeps_the_stream_in_float32(wide: bool, pattern: str, tiny: Callable, ids: Callable) -> None:
    model = tiny(pattern, dtype=torch.bfloat16, residual_in_fp32=wide)
    seen = []

    def watch(enter: Callable) -> Callable:
        return lambda x, *rest: seen.append(x.dtype) or enter(x, *rest)

    for layer in (*model.context_tower.layers, *model.denoiser_tower.layers):
        layer.enter = watch(layer.enter)
    state = model.prefill(ids(1, 5))
    logits = model.denoise([[3, 5, 3]], state)
    assert set(seen) == {torch.float32 if wide else torch.bfloat16}
    assert len(seen) == 2 * len(model.config.pattern)
    assert logits.dtype == torch.float32
    assert logits.isfinite().sum() == 3 * 39  # all but the mask's


def test_residual_in_fp32_is_more_exact(tiny: Callable, ids: Callable) -> None:
    errors = []
    for wide in (False, True):
        model = tiny("*-" * 6, dtype=torch.bfloat16, residual_in_fp32=wide)
        exact = tiny("*-" * 6, dtype=torch.float64)
        for name, tensor in exact.released_tensors().items():
            tensor.copy_(model.released_tensors()[name])
        difference = model.context_logits(ids(2, 20)) - exact.context_logits(ids(2, 20))
        errors.append(difference.square().nanmean().item())  # the mask's is nan
    assert errors[1] < errors[0]

import logging

import pytest
import torch

from twotower.ops import backend
from twotower.ops.backend import Backend, LinearBackend, activation_dtype, choose_backend, linear_backend


@pytest.fixture(autouse=True)
def _fresh_choice() -> None:
    linear_backend.cache_clear()


def test_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=backend.__name__):
        first = linear_backend("cpu", torch.float32)
        assert linear_backend("cpu", torch.float32) is first
    assert [record.getMessage() for record in caplog.records] == [
        f"linear layers of torch.float32 on cpu: {first.value}"
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_other_devices_use_plain_products(dtype: torch.dtype) -> None:
    assert linear_backend("cuda", dtype) is LinearBackend.TORCH
    assert activation_dtype("cuda", dtype) == dtype


def test_bf16_follows_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "cpu_has_bf16_matmul", lambda: True)
    if torch.backends.mkldnn.is_available():
        assert linear_backend("cpu", torch.bfloat16) is LinearBackend.ONEDNN
        assert activation_dtype("cpu", torch.bfloat16) == torch.bfloat16
    linear_backend.cache_clear()
    monkeypatch.setattr(backend, "cpu_has_bf16_matmul", lambda: False)
    if torch.backends.mkldnn.is_available() and "fbgemm" in torch.backends.quantized.supported_engines:
        assert linear_backend("cpu", torch.bfloat16) is LinearBackend.FBGEMM_FP16
        assert activation_dtype("cpu", torch.bfloat16) == torch.float32


def test_float64_stays_plain() -> None:
    assert linear_backend("cpu", torch.float64) is LinearBackend.TORCH
    assert activation_dtype("cpu", torch.float64) == torch.float64


def test_without_onednn_everything_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    backend.cpu_has_bf16_matmul.cache_clear()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert linear_backend("cpu", dtype) is LinearBackend.TORCH
    backend.cpu_has_bf16_matmul.cache_clear()
    linear_backend.cache_clear()


def test_a_backend_asked_for_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("cuda", torch.bfloat16, Backend.REFERENCE) is Backend.REFERENCE
    with pytest.raises(ValueError, match=r"'native' with torch\.bfloat16 on cuda, must be bfloat16 or float32 on cpu"):
        choose_backend("cuda", torch.bfloat16, Backend.NATIVE)
    with pytest.raises(ValueError, match=r"'native' with torch\.float64 on cpu"):
        choose_backend("cpu", torch.float64, Backend.NATIVE)
    monkeypatch.setattr(backend, "library", lambda: None)
    with pytest.raises(ValueError, match="needs a C compiler"):
        choose_backend("cpu", torch.float32, Backend.NATIVE)


def test_native_is_chosen_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "library", lambda: object())
    assert choose_backend("cpu", torch.float32) is Backend.NATIVE
    assert choose_backend("cpu", torch.bfloat16) is Backend.NATIVE
    assert choose_backend("cpu", torch.float64) is Backend.REFERENCE
    assert choose_backend("cuda", torch.float32) is Backend.REFERENCE
    monkeypatch.setattr(backend, "library", lambda: None)
    assert choose_backend("cpu", torch.float32) is Backend.REFERENCE


def test_native_weights_go_with_float32_activations() -> None:
    assert linear_backend("cpu", torch.bfloat16, Backend.NATIVE) is LinearBackend.NATIVE
    assert activation_dtype("cpu", torch.bfloat16, Backend.NATIVE) == torch.float32

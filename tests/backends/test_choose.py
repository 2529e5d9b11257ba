import logging

import pytest
import torch

from twotower.backends import choose
from twotower.backends.choose import choose_backend
from twotower.errors import SettingError


@pytest.fixture
def _compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "library", lambda: object())


@pytest.fixture
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "library", lambda: None)


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize(
    ("device", "dtype", "name"),
    [
        ("cpu", torch.float32, "native"),
        ("cpu", torch.bfloat16, "native"),
        ("cpu", torch.float64, "reference"),
        ("cuda", torch.float32, "reference"),
    ],
)
def test_native_is_chosen_where_it_can_run(device: str, dtype: torch.dtype, name: str) -> None:
    found = choose_backend(device, dtype)
    assert found.name == name
    assert f"{str(dtype).removeprefix('torch.')} on {device}" in found.reason


@pytest.mark.usefixtures("_no_compiler")
def test_without_a_compiler_the_reason_says_so() -> None:
    found = choose_backend("cpu", torch.float32)
    assert found.name == "reference"
    assert "needs a C compiler" in found.reason


@pytest.mark.usefixtures("_no_compiler")
@pytest.mark.parametrize(
    ("device", "dtype", "wanted", "says"),
    [
        ("cuda", torch.bfloat16, "native", "runs bfloat16 on cuda.*native runs bfloat16 and float32 on cpu"),
        ("cpu", torch.float64, "native", "runs float64 on cpu"),
        ("cpu", torch.float32, "native", "native needs a C compiler; install cc, gcc or clang"),
        ("cpu", torch.float32, "triton", "'triton', must be one of reference, native"),
    ],
)
def test_a_backend_asked_for_must_be_there(device: str, dtype: torch.dtype, wanted: str, says: str) -> None:
    with pytest.raises(SettingError, match=says) as caught:
        choose_backend(device, dtype, wanted)
    assert (caught.value.name, caught.value.value) == ("backend", wanted)
    assert choose_backend(device, dtype, "reference").name == "reference"


@pytest.mark.usefixtures("_compiler")
def test_a_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    choose._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger=choose.__name__):
        for _ in range(2):
            choose_backend("cpu", torch.float32)
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == ["backend native"]

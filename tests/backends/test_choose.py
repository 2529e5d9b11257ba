import ctypes
import logging
import warnings
from collections.abc import Callable

import pytest
import torch

import twotower
from twotower.backends import choose
from twotower.backends.choose import choose_backend
from twotower.backends.native.build import Kernels
from twotower.errors import SettingError
from twotower.model.two_tower import TwoTower


@pytest.fixture
def _compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "kernels", lambda: Kernels(ctypes.CDLL(None), "built in for x86-64-v3"))


@pytest.fixture
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Kernels(None, problem="there is no C compiler (cc, gcc, clang)", remedy="install gcc")
    monkeypatch.setattr(choose, "kernels", lambda: told)
    choose._advise.cache_clear()


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
    assert ("built in for x86-64-v3" in found.reason) == (name == "native")
    assert found.advice == ""


@pytest.mark.usefixtures("_no_compiler")
def test_without_a_compiler_the_reason_says_so() -> None:
    found = choose_backend("cpu", torch.float32)
    assert found.name == "reference"
    assert "there is no C compiler (cc, gcc, clang)" in found.reason
    assert found.advice.endswith("there is no C compiler (cc, gcc, clang); install gcc")


@pytest.mark.usefixtures("_no_compiler")
@pytest.mark.parametrize(
    ("device", "dtype", "wanted", "says"),
    [
        ("cuda", torch.bfloat16, "native", "runs bfloat16 on cuda.*native runs bfloat16 and float32 on cpu"),
        ("cpu", torch.float64, "native", "runs float64 on cpu"),
        ("cpu", torch.float32, "native", "there is no C compiler.*; install gcc, or leave backend out"),
        ("cpu", torch.float32, "triton", "'triton', must be one of reference, native"),
    ],
)
def test_a_backend_asked_for_must_be_there(device: str, dtype: torch.dtype, wanted: str, says: str) -> None:
    with pytest.raises(SettingError, match=says) as caught:
        choose_backend(device, dtype, wanted)
    assert (caught.value.name, caught.value.value) == ("backend", wanted)
    assert choose_backend(device, dtype, "reference").name == "reference"


@pytest.mark.usefixtures("_no_compiler")
def test_a_process_is_told_once_that_it_decodes_slowly_and_what_to_do(tiny: Callable[..., TwoTower]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            choose.pack_(tiny("llama"))
    [warning] = caught
    assert str(warning.message) == (
        f"decoding on this CPU is {choose.SLOWDOWN}, and verified is ar up to rounding alone, because the C kernels "
        "can't run here: "
        "there is no C compiler (cc, gcc, clang); install gcc"
    )


@pytest.mark.usefixtures("_no_compiler")
def test_the_warning_names_the_line_that_opens_the_model() -> None:
    with pytest.warns(UserWarning, match="install gcc") as caught:
        twotower.load()
    assert caught[0].filename == __file__


@pytest.mark.usefixtures("_no_compiler")
def test_nobody_is_warned_who_asked_for_the_reference_or_has_what_the_kernels_lack(
    tiny: Callable[..., TwoTower],
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose.pack_(tiny("llama"), "reference")
        choose.pack_(tiny("llama", dtype=torch.float64))
        choose.pack_(tiny("S-"))
        choose_backend("cuda", torch.bfloat16)


@pytest.mark.usefixtures("_compiler")
def test_a_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    choose._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger=choose.__name__):
        for _ in range(2):
            choose_backend("cpu", torch.float32)
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == ["backend native"]

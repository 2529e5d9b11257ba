from pathlib import Path

import pytest
import torch

import twotower
from twotower.checkpoints import save
from twotower.errors import SettingError


@pytest.fixture
def saved(tmp_path: Path, tiny) -> Path:
    save(tiny(), tmp_path)
    return tmp_path


def dtype_and_device(model):
    weight = model.released_tensors()["lm_head.weight"]
    return weight.dtype, weight.device


def test_dtypes_devices_and_paths_may_be_strings_or_objects(saved):
    wanted = (torch.bfloat16, torch.device("cpu"))
    assert dtype_and_device(twotower.load(str(saved), dtype="bfloat16", device="cpu", pack=False)) == wanted
    objects = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    assert dtype_and_device(twotower.load(saved, **objects, pack=False)) == wanted
    assert dtype_and_device(twotower.load(saved, pack=False))[0] == torch.float32


def test_each_tower_has_its_device(saved):
    model = twotower.load(saved, context_device="meta", denoiser_device=torch.device("cpu"), pack=False)
    assert (model.context_device.type, model.denoiser_device.type) == ("meta", "cpu")


@pytest.mark.parametrize("dtype", ["int8", "half", torch.int64])
def test_a_dtype_that_no_model_is_held_in_is_named(dtype):
    with pytest.raises(SettingError, match=r"dtype is .*, must be one of float64, float32, bfloat16, float16"):
        twotower.load(dtype=dtype)


@pytest.mark.parametrize("name", ["device", "context_device", "denoiser_device"])
@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_named(name, device):
    with pytest.raises(SettingError, match=f"{name} is '{device}', must be a device of this machine"):
        twotower.load(**{name: device})


def test_backends_that_cannot_run_are_named():
    with pytest.raises(SettingError, match="backend is 'fast', must be one of reference, native"):
        twotower.load(backend="fast")
    with pytest.raises(SettingError, match="backend is 'reference', must be left out with pack=False"):
        twotower.load(backend="reference", pack=False)

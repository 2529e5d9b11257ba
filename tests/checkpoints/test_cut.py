import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from twotower.checkpoints import init, load_model, save
from twotower.config import TwoTowerConfig
from twotower.errors import SettingError

# Where tensors of the denoiser's layers have their number
LAYERS = ("denoiser_tower.layers.", "scale_shift_tables.")


@pytest.fixture
def whole(tiny: Callable, tmp_path: Path) -> Path:
    save(tiny("MEM*-*", block_size=8), tmp_path / "whole")
    return tmp_path / "whole"


def layer_of(name: str) -> int | None:
    found = [name.removeprefix(prefix).split(".")[0] for prefix in LAYERS if name.startswith(prefix)]
    return int(found[0]) if found else None


def test_layers_that_stay_and_all_else_are_those_of_the_checkpoint(whole: Path, tmp_path: Path) -> None:
    init(whole, tmp_path / "cut", denoiser_layers="1,2,5")
    before, after = (load_file(path / "model.safetensors") for path in (whole, tmp_path / "cut"))
    assert set(after) == {name for name in before if layer_of(name) in (None, 1, 2, 5)}
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    added = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert added == json.loads((whole / "config.json").read_text()) | {"denoiser_layers": [1, 2, 5]}
    model = load_model(tmp_path / "cut")
    assert [layer.index for layer in model.denoiser_tower.stack] == [1, 2, 5]
    save(model, tmp_path / "again")
    for file in (tmp_path / "cut").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_a_checkpoint_cut_to_all_of_its_layers_is_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    init(whole, tmp_path / "all", denoiser_layers="all")
    for file in whole.iterdir():
        assert (tmp_path / "all" / file.name).read_bytes() == file.read_bytes()


def test_block_size_and_dtype_may_change_and_routers_keep_theirs(whole: Path, tmp_path: Path) -> None:
    init(whole, tmp_path / "cut", denoiser_layers=(0, 1), block_size=4, dtype="bfloat16")
    assert TwoTowerConfig.from_json(tmp_path / "cut" / "config.json").block_size == 4
    stored = load_file(tmp_path / "cut" / "model.safetensors")
    assert stored["denoiser_tower.layers.0.mixer.in_proj.weight"].dtype == torch.bfloat16
    assert stored["denoiser_tower.layers.1.mixer.gate.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "holds two towers already; give a single-tower model, or the denoiser_layers .* such as spread:2"),
        ({"denoiser_layers": "spread:2", "seed": 1}, "seed is 1, must be left out"),
        ({"denoiser_layers": "spread:2", "mask_token_id": 3}, "mask_token_id is 3, must be left out"),
        ({"denoiser_layers": "spread:2", "keep_tokens": [5]}, "keep_tokens is .5., must be left out"),
        ({"denoiser_layers": "spread:2", "block_size": 0}, "block_size is 0, must be at least 1"),
        ({"denoiser_layers": "first:9"}, r"denoiser_layers is 'first:9', must be .*K in \[1, 4\]"),
        ({"denoiser_layers": "1,4"}, r"denoiser_layers is \[1, 4\], must have one of \[0, 2, 3, 5\]"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_written(
    options: dict[str, Any], message: str, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        init(whole, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_lost_its_list_of_layers_is_refused(whole: Path, tmp_path: Path) -> None:
    init(whole, tmp_path / "cut", denoiser_layers="last:2")
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    for layers in (None, [0, 2]):
        (tmp_path / "cut" / "config.json").write_text(json.dumps(config | {"denoiser_layers": layers}))
        with pytest.raises(ValueError, match=r"missing: denoiser_tower\.layers\.0\."):
            load_model(tmp_path / "cut")


def test_a_backbone_gives_its_layers_to_the_denoiser(llama: Any, tmp_path: Path) -> None:
    init(llama.directory, tmp_path / "out", denoiser_layers="last:1", block_size=4)
    model = load_model(tmp_path / "out")
    assert (model.config.denoiser_layers, model.config.block_size) == ((2, 3), 4)
    for ours, theirs in zip(model.denoiser_tower.stack, model.context_tower.stack[2:], strict=True):
        pairs = zip(ours.released_tensors().items(), theirs.released_tensors().items(), strict=True)
        assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    with pytest.raises(SettingError, match=r"K in \[1, 2\]"):
        init(llama.directory, tmp_path / "other", denoiser_layers="spread:3")


def test_quantised_weights_are_cut_as_the_floats_that_they_stand_for(whole: Path, tmp_path: Path) -> None:
    """FP8 with one factor per weight, in a file of quantisation settings of its own."""
    stored = load_file(whole / "model.safetensors")
    for name in [n for n in stored if n.endswith("_proj.weight")]:
        stored[f"{name}_scale"] = (stored[name].abs().max() / 448).float()
        stored[name] = (stored[name] / stored[f"{name}_scale"]).to(torch.float8_e4m3fn)
    save_file(stored, whole / "model.safetensors")
    (whole / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    init(whole, tmp_path / "cut", denoiser_layers="spread:2", dtype="float32")
    full = load_model(whole, dtype=torch.float32).released_tensors()
    cut = load_model(tmp_path / "cut").released_tensors()
    assert len(cut) < len(full)
    assert all(torch.equal(tensor, full[name]) for name, tensor in cut.items())

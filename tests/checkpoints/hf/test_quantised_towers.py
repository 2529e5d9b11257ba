"""Two towers of which one is stored in 8 bits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import twotower
from twotower.checkpoints.hf.two_towers import load_denoiser_
from twotower.model.two_tower import TwoTower


def test_a_quantised_tower_is_read_as_floats_and_saved_as_such(tiny, tmp_path) -> None:
    twotower.save(tiny("*-"), tmp_path)
    name = "context_tower.layers.0.mixer.q_proj.weight"
    tensors = load_file(tmp_path / "model.safetensors")
    scale = tensors[name].abs().amax(1, keepdim=True) / 127
    tensors |= {name: (tensors[name] / scale).round().to(torch.int8), f"{name}_scale": scale}
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    model = twotower.load(tmp_path, dtype="float32", pack=False)
    assert torch.equal(model.released_tensors()[name], tensors[name] * scale)
    twotower.save(model, tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())


def test_a_denoiser_alone_is_read_beside_a_context_tower_that_is_elsewhere(tiny, tmp_path) -> None:
    twotower.save(tiny("M*-"), tmp_path)
    whole = twotower.load(tmp_path, dtype="float32", pack=False)
    model = TwoTower(whole.config, dtype=torch.float32, context_device="meta")
    load_denoiser_(model, tmp_path)
    names = [name for name in whole.released_tensors() if not name.startswith("context_")]
    assert 0 < len(names) < len(whole.released_tensors())
    for name in names:
        assert torch.equal(model.released_tensors()[name], whole.released_tensors()[name])
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if n != names[-1]}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"for its denoiser, do not fit its config \(1 missing: {names[-1]}"):
        load_denoiser_(model, tmp_path)

"""Converted backbones against transformers' own models: logits, to 1e-4 (float32, other orders of summation)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from twotower.checkpoints import init, load_model

TOLERANCE = 1e-4


def ids_for(model: Any) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (2, 37), generator=torch.Generator().manual_seed(0))


def assert_same_logits(source: Any, out: Path, **options: Any) -> None:
    init(source.directory, out, **options)
    model, ids = load_model(out), ids_for(source.model)
    with torch.no_grad():
        expected = source.model(ids).logits
    if model.config.mask_token_id < expected.shape[-1]:  # a token that the family keeps free
        expected[..., model.config.mask_token_id] = -torch.inf
    found = model.context_logits(ids)[..., : expected.shape[-1]]
    largest = expected.nan_to_num(neginf=0).abs().max().item()
    assert expected.nan_to_num(neginf=0).std() > 0.5, "logits near zero would agree whatever was loaded"
    torch.testing.assert_close(found, expected, atol=TOLERANCE * largest, rtol=0)
    # The mask takes nothing from the others: token 0 and all of them are as probable as before.
    probable = model.context_logits(ids).softmax(-1)
    torch.testing.assert_close(
        probable[..., : expected.shape[-1]], expected.softmax(-1), atol=TOLERANCE * largest, rtol=0
    )
    torch.testing.assert_close(probable.sum(-1), torch.ones(ids.shape))
    # The denoiser is the same backbone, so its logits for a block of one token, which sees nothing later, are the same.
    state = model.prefill(ids[:, :-1])
    last = model.denoise(ids[:, -1:], state, t=0.5)[:, 0, : expected.shape[-1]]
    torch.testing.assert_close(last, expected[:, -1], atol=TOLERANCE * largest, rtol=0)


def test_llama(llama: Any, tmp_path: Path) -> None:
    assert_same_logits(llama, tmp_path / "out")


def test_qwen2_with_tied_head_and_biases(qwen2: Any, tmp_path: Path) -> None:
    assert_same_logits(qwen2, tmp_path / "out")


@pytest.mark.parametrize("prefix", ["backbone.", "model."])
def test_nemotron_h_with_every_layer_kind(nemotron_h: Any, tmp_path: Path, prefix: str) -> None:
    # transformers clamps dt at time_step_min, the released model at time_step_limit, which starts at 0.
    for layer in nemotron_h.model.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, float("inf"))
    source = tmp_path / "source"
    source.mkdir()
    tensors = load_file(nemotron_h.directory / "model.safetensors")
    assert any(name.startswith("backbone.") for name in tensors), "transformers now writes another prefix"
    renamed = {name.replace("backbone.", prefix): tensor for name, tensor in tensors.items()}
    save_file(renamed, source / "model.safetensors")
    (source / "config.json").write_bytes((nemotron_h.directory / "config.json").read_bytes())
    assert_same_logits(nemotron_h._replace(directory=source), tmp_path / "out")

"""Model directories as people have them, through `init`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import twotower
from twotower.checkpoints import init

Changed = Callable[[Any, Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]], Path]
IDS = torch.arange(9)[None]


@pytest.fixture
def changed(tmp_path: Path) -> Changed:
    """A copy of a source's directory with its config and tensors changed."""

    def make(source: Any, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> Path:
        out = tmp_path / "source"
        out.mkdir()
        config = json.loads((source.directory / "config.json").read_text())
        tensors = load_file(source.directory / "model.safetensors")
        change(config, tensors)
        (out / "config.json").write_text(json.dumps(config))
        save_file(tensors, out / "model.safetensors")
        return out

    return make


@pytest.mark.parametrize("same", [True, False])
def test_a_head_stored_although_tied_is_read_if_it_differs(
    qwen2: Any, changed: Changed, tmp_path: Path, same: bool
) -> None:
    def add_head(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding.clone() if same else embedding * 2

    source = changed(qwen2, add_head)
    init(source, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source)
    ours = twotower.load(tmp_path / "out")
    assert ours.config.tie_word_embeddings == same
    torch.testing.assert_close(ours.context_logits(IDS)[..., :273], theirs(IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_head_that_is_neither_stored_nor_tied_is_missed(llama: Any, changed: Changed, tmp_path: Path) -> None:
    source = changed(llama, lambda c, t: t.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"has no lm_head\.weight, and its config\.json does not say that"):
        init(source, tmp_path / "out")


def test_names_without_the_models_prefix(qwen2: Any, changed: Changed, tmp_path: Path) -> None:
    def rename(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    init(changed(qwen2, rename), tmp_path / "out")
    init(qwen2.directory, tmp_path / "usual")
    found, usual = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "usual"))
    assert found.keys() == usual.keys()
    assert all(torch.equal(found[name], usual[name]) for name in found)


def test_a_quantised_model_is_the_model_of_its_dequantised_weights(
    llama: Any, changed: Changed, tmp_path: Path
) -> None:
    """Fine-grained FP8, as DeepSeek and Qwen publish it; the embedding, norms and head are not quantised."""
    theirs = transformers.LlamaForCausalLM(llama.model.config).eval()
    theirs.load_state_dict(llama.model.state_dict())

    def quantise(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        method = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
        config.update(quantization_config=method, dtype="bfloat16")
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            blocks = tensors[name].unflatten(0, (-1, 16)).unflatten(2, (-1, 16))
            scale = blocks.abs().amax((1, 3)) / 448
            rounded = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            theirs.get_parameter(name).data = (rounded.float() * scale[:, None, :, None]).view_as(tensors[name])
            tensors |= {name: rounded.view_as(tensors[name]), f"{name}_scale_inv": scale}

    source = changed(llama, quantise)
    init(source, tmp_path / "out", dtype="float32")
    ours = twotower.load(tmp_path / "out").context_logits(IDS)[..., :273]
    torch.testing.assert_close(ours, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    init(source, tmp_path / "narrow")
    tensors = load_file(tmp_path / "narrow" / "model.safetensors")
    assert tensors["context_tower.layers.0.mixer.q_proj.weight"].dtype == torch.bfloat16

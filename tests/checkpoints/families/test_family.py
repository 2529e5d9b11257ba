"""Which tensors of a folder are the decoder's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import twotower
from twotower.checkpoints.families.known import find_family, text_settings

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}
MROPE = {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [1, 1, 2]}


def sees(name: str) -> Any:
    """A model of images and text."""
    if name == "gemma3":
        config = transformers.Gemma3Config(
            text_config=TEXT | {"head_dim": 16, "sliding_window": 12}, vision_config=VISION, mm_tokens_per_image=4
        )
        return transformers.Gemma3ForConditionalGeneration(config)
    if name == "llava":
        vision = VISION | {"model_type": "clip_vision_model"}
        config = transformers.LlavaConfig(text_config=TEXT | {"model_type": "llama"}, vision_config=vision)
        return transformers.LlavaForConditionalGeneration(config)
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32}
    config = transformers.Qwen2VLConfig(text_config=TEXT | {"rope_parameters": MROPE}, vision_config=vision)
    return transformers.Qwen2VLForConditionalGeneration(config)


@pytest.mark.parametrize("name", ["gemma3", "llava", "qwen2_vl"])
def test_of_a_model_that_sees_the_decoder_is_taken(name: str, tmp_path: Path, same_logits: Callable) -> None:
    torch.manual_seed(0)
    model = sees(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="see or hear, which are no part of the backbone and are left out: .* more"):
        twotower.init(tmp_path / "theirs", tmp_path / "ours")
    ids = torch.randint(3, 60, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits
    same_logits(twotower.load(tmp_path / "ours").context_logits(ids), expected)


@pytest.mark.parametrize(
    ("model_type", "text"),
    [
        ("gemma3", {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}),
        ("llava", {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-05}),
        ("mistral3", {"model_type": "mistral", "num_hidden_layers": 40, "sliding_window": None}),
        ("mistral3", {"model_type": "ministral3", "hidden_size": 3072, "num_hidden_layers": 26}),
        ("llama4", {"model_type": "llama4_text", "num_hidden_layers": 8, "interleave_moe_layer_step": 2}),
    ],
)
def test_sizes_that_text_config_leaves_out_are_those_of_transformers(model_type: str, text: dict[str, Any]) -> None:
    raw = text_settings({"model_type": model_type, "text_config": text})
    whole = transformers.AutoConfig.for_model(
        text["model_type"], **{k: v for k, v in text.items() if k != "model_type"}
    )
    family, filled = find_family(raw), whole.to_dict()
    assert {**family.fields(raw)} == {**family.fields(filled)}
    assert raw["vocab_size"] == filled["vocab_size"]


def test_names_without_a_prefix_and_further_layers(
    open_family: Callable, tmp_path: Path, same_logits: Callable
) -> None:
    """As a base model is saved, with the head beside it and layers that predict further tokens behind the last one."""
    opened = open_family("llama")
    tensors = {name.removeprefix("model."): t for name, t in load_file(opened.source / "model.safetensors").items()}
    tensors |= {"layers.4.eh_proj.weight": torch.zeros(2, 2), "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    (tmp_path / "config.json").write_bytes((opened.source / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"left out: layers\.4\.eh_proj\.weight$"):
        twotower.init(tmp_path, tmp_path / "ours")
    same_logits(twotower.load(tmp_path / "ours").context_logits(opened.ids), opened.logits)


def test_more_layers_than_tensors_are_refused_at_once(tmp_path: Path) -> None:
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 10**9}))
    with pytest.raises(ValueError, match=r"num_hidden_layers 1000000000, but there are only 21 tensors"):
        twotower.init(tmp_path / "theirs", tmp_path / "ours")

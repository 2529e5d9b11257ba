"""Nemotron-H's config.json in every form that it was published in, and its tensors under their prefixes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from twotower.checkpoints import init
from twotower.checkpoints.families.nemotron_h import read_one_tower_config
from twotower.checkpoints.initialise import open_backbone
from twotower.config import TwoTowerConfig

MTP = "has tensors that predict further tokens, see or hear, which are no part of the backbone and are left out: "

BIASES = {
    "backbone.layers.3.mixer.up_proj.bias": torch.ones(48),
    "backbone.layers.3.mixer.down_proj.bias": torch.ones(32),
    "backbone.layers.1.mixer.shared_experts.up_proj.bias": torch.ones(24),
    "backbone.layers.1.mixer.shared_experts.down_proj.bias": torch.ones(32),
}


@pytest.fixture
def changed(nemotron_h: Any, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the model's directory with some keys of config.json replaced (by None: removed), and tensors added."""

    def make(keys: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> Path:
        source = tmp_path / "source"
        source.mkdir()
        config = json.loads((nemotron_h.directory / "config.json").read_text()) | keys
        (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if keys.get(k, v) is not None}))
        stored = load_file(nemotron_h.directory / "model.safetensors")
        save_file(stored | (tensors or {}), source / "model.safetensors")
        return source

    return make


def test_the_mask_is_token_3_where_the_tokenizer_keeps_it_free(changed: Callable[..., Path], tmp_path: Path) -> None:
    source = changed({})
    names = ("<unk>", "<s>", "</s>", "<SPECIAL_3>")
    for special, mask, size in ((True, 3, 48), (False, 48, 49), (None, 48, 49)):
        if special is not None:
            tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({name: i for i, name in enumerate(names)}, []))
            tokenizer.add_tokens([tokenizers.AddedToken(name, special=special) for name in names])
            tokenizer.save(str(source / "tokenizer.json"))
        else:
            (source / "tokenizer.json").unlink()
        init(source, tmp_path / "out")
        config = TwoTowerConfig.from_json(tmp_path / "out" / "config.json")
        assert (config.mask_token_id, config.vocab_size, config.pattern) == (mask, size, "ME*-M")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sliding_window": 64}, "sliding_window is 64 in config.json, must be null"),
        ({"layers_block_type": ["mamba", "gdn"]}, r"layers_block_type has \['gdn'\]"),
        ({"hybrid_override_pattern": "ME*-*"}, r"layers_block_type says 'ME\*-M', hybrid_override_pattern 'ME\*-\*'"),
        ({"mlp_hidden_act": "swish"}, "mlp_hidden_act is 'swish', must be one of relu2"),
    ],
)
def test_what_would_be_another_model_is_refused(
    changed: Callable[..., Path], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_backbone(changed(keys))


@pytest.mark.parametrize(
    "keys",
    [
        {"quantization_config": None, "sliding_window": None, "unsloth_version": "2026.1", "is_encoder_decoder": False},
        {"_attn_implementation": "sdpa", "id2label": {"0": "LABEL_0"}, "rope_parameters": {"rope_type": "default"}},
        {"hidden_act": "relu2", "rms_norm_eps": 1e-5, "norm_eps": 1e-5, "num_query_groups": 2},
        {"layers_block_type": None, "hybrid_override_pattern": "ME*-M"},
        {"layers_block_type": None, "hybrid_override_pattern": "ME|*-|M", "num_hidden_layers": 5},
        {"head_dim": None, "attention_head_dim": 8},
        {"head_dim": None, "kv_channels": 8},
        {"n_groups": None, "mamba_num_groups": 2, "ssm_state_size": None, "mamba_state_dim": 8},
        {"n_routed_experts": None, "num_local_experts": 4},
        {"layer_norm_epsilon": None, "norm_eps": 1e-5, "time_step_limit": [0.0, float("inf")]},
    ],
    ids=lambda keys: ",".join(keys),
)
def test_every_published_form_is_the_same_model(
    changed: Callable[..., Path], nemotron_h: Any, keys: dict[str, Any]
) -> None:
    assert open_backbone(changed(keys)).config == open_backbone(nemotron_h.directory).config


def test_another_name_of_a_key_counts(changed: Callable[..., Path]) -> None:
    assert open_backbone(changed({"layer_norm_epsilon": None, "rms_norm_eps": 1e-3})).config.layer_norm_epsilon == 1e-3


@pytest.mark.parametrize(
    ("keys", "tensors"),
    [
        ({"layers_block_type": None, "hybrid_override_pattern": "ME*-M/*E"}, ()),
        ({"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}, ("mtp.layers.0.norm.weight",)),
        ({}, ("model.mtp.layers.0.norm.weight",)),
    ],
)
def test_layers_for_multi_token_prediction_are_left_out_with_a_warning(
    changed: Callable[..., Path], nemotron_h: Any, keys: dict[str, Any], tensors: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=MTP):
        init(changed(keys, {name: torch.ones(32) for name in tensors}), tmp_path / "with")
    init(nemotron_h.directory, tmp_path / "without")
    with_heads, without = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without"))
    assert with_heads == without


def test_a_tensor_under_two_prefixes(changed: Callable[..., Path]) -> None:
    source = changed({}, {"model.norm_f.weight": torch.ones(32)})
    with pytest.raises(ValueError, match="a tensor is there under two of the prefixes"):
        open_backbone(source)


def test_a_config_to_train_from_may_not_misspell_a_key(changed: Callable[..., Path]) -> None:
    """It may be written by hand; a config beside weights is made by a program and has keys of all kinds."""
    source = changed({"hiden_size": 3})
    with pytest.raises(ValueError, match=r"unknown keys \['hiden_size'\]"):
        read_one_tower_config(source)
    assert open_backbone(source).config.hidden_size == 32


def test_a_config_to_train_from_as_transformers_writes_it(nemotron_h: Any) -> None:
    assert read_one_tower_config(nemotron_h.directory).pattern == "ME*-M"


def test_biases_that_transformers_leaves_out_are_zeros(changed: Callable[..., Path], nemotron_h: Any) -> None:
    """Its attention and its experts have none, whatever the config says."""
    opened = open_backbone(changed({"attention_bias": True, "mlp_bias": True}, BIASES))
    found = dict(opened.stream())
    for name in ("layers.2.mixer.o_proj.bias", "layers.1.mixer.experts.3.up_proj.bias"):
        assert not found[name].any()
        assert opened.specs[name].shape == found[name].shape
    assert found["layers.3.mixer.up_proj.bias"].all()

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from twotower.config import CARRIED_KEYS, TwoTowerConfig
from twotower.rope import AttentionType

GOLDEN = Path(__file__).parent / "golden"

VALID: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "pattern": "M*-E",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "mamba_state_size": 8,
    "mamba_num_groups": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "expert_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}


def raw(**changed: Any) -> dict[str, Any]:
    """A small config.json's content."""
    return {"vocab_size": 40, "hidden_size": 32, "hybrid_override_pattern": "-", "intermediate_size": 8} | changed


@pytest.mark.parametrize("case", ["hybrid", "dense"])
def test_a_released_file_read_and_written_is_the_same_bytes(case: str, tmp_path: Path) -> None:
    original = GOLDEN / case / "config.json"
    assert b"Infinity" in original.read_bytes()  # which is not JSON, but released
    config = TwoTowerConfig.from_json(original)
    assert config.time_step_limit == (0.0, float("inf"))
    config.to_json(tmp_path / "config.json")
    assert (tmp_path / "config.json").read_bytes() == original.read_bytes()


def test_every_field_survives_a_file(tmp_path: Path) -> None:
    config = TwoTowerConfig(
        **VALID
        | {
            "use_rope": True,
            "denoiser_layers": (1, 3),
            "eos_token_id": (2, 7),
            "block_size": 8,
            "time_step_limit": (0.1, 2.0),
            "mask_token_id": 5,
        }
    )
    config.to_json(tmp_path / "config.json")
    assert TwoTowerConfig.from_json(tmp_path / "config.json") == config


def test_a_changed_field_changes_its_key_and_nothing_else() -> None:
    original = json.loads((GOLDEN / "hybrid" / "config.json").read_text())
    config = TwoTowerConfig.from_dict(original)
    changed = dataclasses.replace(config, rope_theta=500.0, block_size=8, pattern="M*").to_dict()
    expected = original | {
        "rope_theta": 500.0,
        "hybrid_override_pattern": "M*",
        "num_hidden_layers": 2,
        "block_size": 8,
    }
    assert changed == expected
    assert list(changed) == [*original, "block_size"]


def test_unknown_keys_raise_and_carried_keys_do_not() -> None:
    with pytest.raises(ValueError, match=r"unknown keys \['hiden_size', 'rope'\].*'hidden_size'.*correct the spelling"):
        TwoTowerConfig.from_dict(raw(hiden_size=3, rope=1))
    for key in sorted(CARRIED_KEYS - {"num_hidden_layers", "mamba_hidden_act"}):
        source = raw(**{key: "anything"})
        assert TwoTowerConfig.from_dict(source).to_dict() == source


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "hybrid_override_pattern"])
def test_missing_keys_raise(key: str) -> None:
    source = raw()
    del source[key]
    with pytest.raises(ValueError, match=rf"lacks \['{key}'\]"):
        TwoTowerConfig.from_dict(source)


def test_depth_must_be_the_patterns() -> None:
    assert TwoTowerConfig.from_dict(raw(num_hidden_layers=1)).num_layers == 1
    with pytest.raises(ValueError, match="num_hidden_layers is 2 but hybrid_override_pattern has 1 characters"):
        TwoTowerConfig.from_dict(raw(num_hidden_layers=2))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0, must be at least 1"),
        ({"hidden_size": -1}, "hidden_size is -1, must be at least 1"),
        ({"block_size": 0}, "block_size is 0, must be at least 1"),
        ({"pattern": ""}, "hybrid_override_pattern is empty, must name at least one layer"),
        ({"pattern": "MX*"}, r"hybrid_override_pattern has \['X'\], allowed are \['M', 'G', 'S', 'R', "),
        ({"mask_token_id": 40}, r"mask_token_id is 40, must be in \[0, 40\)"),
        ({"mask_token_id": -1}, r"mask_token_id is -1, must be in \[0, 40\)"),
        ({"denoiser_layers": ()}, r"denoiser_layers is \[\], must be null or ascending, different indices"),
        ({"denoiser_layers": (1, 0)}, r"denoiser_layers is \[1, 0\], must be null or ascending"),
        ({"denoiser_layers": (1, 1)}, r"denoiser_layers is \[1, 1\], must be null or ascending"),
        ({"denoiser_layers": (0, 4)}, r"denoiser_layers is \[0, 4\], must be .* of layers in \[0, 3\]"),
        ({"denoiser_layers": (-1, 0)}, r"denoiser_layers is \[-1, 0\], must be .* of layers in \[0, 3\]"),
        ({"denoiser_layers": (2, 3)}, r"denoiser_layers is \[2, 3\], must have one of \[0, 1\], the layers that read"),
        ({"denoiser_layers": (True,)}, r"denoiser_layers is \(True,\), must be a list or null"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon is 0.0, must be above 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, must be at least 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0, must be at least 1"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 must be a multiple of num_key_value_heads 3"),
        ({"head_dim": 0}, "head_dim is 0, must be at least 1"),
        ({"head_dim": 7, "use_rope": True}, "RoPE turns pairs, 8 of head_dim 7, must be some"),
        ({"intermediate_size": 0}, "intermediate_size is 0, must be at least 1"),
        ({"mlp_hidden_act": "swish"}, "mlp_hidden_act is 'swish', must be one of relu2, relu, silu, gelu"),
        ({"mlp_hidden_act": "xielu"}, "mlp_hidden_act is 'xielu', must be another with gated_mlp or experts"),
        ({"kv_lora_rank": 4}, "qk_rope_head_dim is 0, must be at least 1"),
        ({"kv_lora_rank": 4, "qk_rope_head_dim": 4, "v_head_dim": 12}, "head_dim is 8, must be at least 12"),
        ({"alibi_slopes": (0.5,)}, "alibi_slopes has 1 numbers, must have 4 or none"),
        ({"clip_qkv": 0.0}, "clip_qkv is 0.0, must be above 0"),
        ({"qk_norm_behind_rope": True}, "qk_norm_behind_rope is true, must be false without qk_norm"),
        ({"qk_norm": "head", "qk_norm_bias": True}, "qk_norm_bias is true, must be false .* with norm_type 'rms'"),
        ({"attention_types": (AttentionType(query_growth=0.1),)}, "query_period is 0, must be at least 1"),
        ({"attention_types": (AttentionType(query_offset=-1),)}, "query_offset is -1, must be at least 0"),
        ({"glu_limit": 0.0}, "glu_limit is 0.0, must be null or above 0"),
        ({"router": "top"}, "router is 'top', must be one of sigmoid, softmax"),
        ({"moe_latent_size": -1}, "moe_latent_size is -1, must be at least 0"),
        (
            {"shared_expert_gate": True, "shared_expert_intermediate_size": 0},
            "shared_expert_gate needs moe_shared_expert_intermediate_size above 0",
        ),
        ({"mamba_num_heads": 0}, "mamba_num_heads is 0, must be at least 1"),
        ({"mamba_head_dim": 0}, "mamba_head_dim is 0, must be at least 1"),
        ({"mamba_state_size": 0}, "ssm_state_size is 0, must be at least 1"),
        ({"mamba_num_groups": 0}, "n_groups is 0, must be at least 1"),
        ({"mamba_num_groups": 3}, "mamba_num_heads 4 must be a multiple of n_groups 3"),
        ({"conv_kernel": 1}, "conv_kernel is 1, must be at least 2"),
        ({"time_step_limit": (2.0, 1.0)}, r"time_step_limit is \(2.0, 1.0\), must be 0 <= low < high"),
        ({"time_step_limit": (-1.0, 1.0)}, r"time_step_limit is \(-1.0, 1.0\), must be 0 <= low < high"),
        ({"carried": {"mamba_hidden_act": "gelu"}}, "mamba_hidden_act is 'gelu', must be 'silu'"),
        ({"num_experts": 0}, "n_routed_experts is 0, must be at least 1"),
        ({"expert_intermediate_size": 0}, "moe_intermediate_size is 0, must be at least 1"),
        ({"shared_expert_intermediate_size": -1}, "moe_shared_expert_intermediate_size is -1, must be at least 0"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok is 9, must be in \[1, 8\]"),
        ({"num_experts_per_tok": 0}, r"num_experts_per_tok is 0, must be in \[1, 8\]"),
        ({"expert_num_groups": 0}, "n_group is 0, must be at least 1"),
        ({"expert_num_groups": 3}, "n_routed_experts 8 must be a multiple of n_group 3"),
        ({"expert_topk_groups": 2}, r"topk_group is 2, must be in \[1, 1\]"),
    ],
)
def test_bad_values_raise_with_value_and_range(changed: dict[str, Any], message: str) -> None:
    TwoTowerConfig(**VALID)
    with pytest.raises(ValueError, match=message):
        TwoTowerConfig(**VALID | changed)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"head_dim is 0.*; conv_kernel is 1"):
        TwoTowerConfig(**VALID | {"head_dim": 0, "conv_kernel": 1})


def test_sizes_of_absent_layers_do_not_matter() -> None:
    TwoTowerConfig(vocab_size=40, hidden_size=32, pattern="-", intermediate_size=8)
    TwoTowerConfig(vocab_size=40, hidden_size=32, pattern="*", num_attention_heads=1, num_key_value_heads=1, head_dim=2)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not JSON"), ("[1]", "holds a list, not an object"), ("", "is not JSON")]
)
def test_a_file_that_is_no_config_raises(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"{message}.*download it again") as raised:
        TwoTowerConfig.from_json(file)
    assert str(file) in str(raised.value)


def test_derived_values() -> None:
    config = TwoTowerConfig(**VALID)
    assert (config.num_layers, config.mamba_width, config.conv_width) == (4, 32, 32 + 2 * 2 * 8)
    assert config.eos_token_ids == (2,)
    assert dataclasses.replace(config, eos_token_id=None).eos_token_ids == ()
    assert TwoTowerConfig.from_dict(raw(eos_token_id=[2, 7])).eos_token_ids == (2, 7)


def test_a_config_is_a_value() -> None:
    assert TwoTowerConfig(**VALID) == TwoTowerConfig(**VALID, carried={"torch_dtype": "bfloat16"})
    assert hash(TwoTowerConfig(**VALID)) == hash(TwoTowerConfig(**VALID))
    with pytest.raises(dataclasses.FrozenInstanceError):
        TwoTowerConfig(**VALID).hidden_size = 3

"""Values in config.json that are of the wrong kind or mean nothing, in every family, and keys that are missing."""

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from twotower.checkpoints.families.family import open_family
from twotower.checkpoints.families.known import FAMILIES, find_family
from twotower.checkpoints.families.settings import checked
from twotower.checkpoints.hf.tensor_files import TensorSpec
from twotower.config import TwoTowerConfig

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2}
DEEPSEEK = {"num_key_value_heads": 8, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
DEEPSEEK |= {"v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
DEEPSEEK |= {"n_group": 1, "topk_group": 1}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
LINEAR |= {"linear_value_head_dim": 16, "head_dim": 16}
SHARED = {"shared_expert_intermediate_size": 48}
# What a family needs to be small, and settings without which some keys would not be read
SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "codegen": GPT | {"rotary_dim": 8},
    "dbrx": {"d_model": 64, "n_heads": 4, "n_layers": 3, "attn_config": {"rope_theta": 500.0, "kv_n_heads": 2}}
    | {"ffn_config": {"ffn_hidden_size": 48}, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "deepseek_v2": DEEPSEEK | {"q_lora_rank": None, "topk_method": "group_limited_greedy"},
    "deepseek_v3": DEEPSEEK | {"q_lora_rank": 32},
    "falcon": {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 128},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_heads": 4},
    "gpt_oss": LOCAL,
    "gptj": GPT | {"rotary_dim": 8},
    "granitemoe": LOCAL,
    "hunyuan_v1_dense": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "granitemoehybrid": MAMBA | LOCAL | {"layer_types": ["mamba", "attention"] * 2},
    "granitemoeshared": LOCAL | {"shared_intermediate_size": 48},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "jamba": EXPERTS | {"attn_layer_offset": 1, "attn_layer_period": 2},
    "llama4_text": LOCAL | {"intermediate_size_mlp": 96},
    "mamba2": {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 2},
    "mixtral": LOCAL | {"sliding_window": 12},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 3},
    "olmoe": EXPERTS,
    "opt": {"ffn_dim": 96},
    "qwen2": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
    "qwen2_moe": EXPERTS | SHARED,
    "qwen3_5_moe_text": EXPERTS | LINEAR | SHARED,
    "qwen3_5_text": LINEAR,
    "qwen3_moe": EXPERTS,
    "qwen3_next": EXPERTS | LINEAR | SHARED,
    "recurrent_gemma": {"lru_width": 96},
}
OWN_NAMES = ("codegen", "dbrx", "gpt2", "gpt_bigcode", "gptj", "mpt")  # for what SIZES has
# Configs of models that see, whose classes in transformers make no decoder
SEEING = ("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen3_vl_text")
KINDS = sorted({name for family in FAMILIES for name in family.model_types} - set(SEEING))
# What all configs of transformers have and no model reads
UNREAD = transformers.PreTrainedConfig().to_dict().keys() - {"tie_word_embeddings", "dtype", "model_type"}
BAD: tuple[Any, ...] = (-1, 0, 2.5, "4", [4, "x"], {"a": 1}, None, True, 10**12, math.nan)


class Headers:
    """The tensors of a model that transformers makes, without their content."""

    def __init__(self, config: Any) -> None:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        self.specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in model.state_dict().items()}

    def stream(self, names: Any) -> Iterator[tuple[str, Tensor]]:
        raise AssertionError("opening a model reads headers only")


def config_of(kind: str) -> Any:
    sizes = {key: value for key, value in SIZES.items() if kind not in OWN_NAMES or key == "vocab_size"}
    return transformers.AutoConfig.for_model(kind, **copy.deepcopy(sizes | SETTINGS.get(kind, {})))


def content(config: Any) -> dict[str, Any]:
    """All of config.json, with what transformers leaves out because it is usual."""

    def number(entry: dict[str, Any]) -> Any:
        return float(entry["__float__"]) if set(entry) == {"__float__"} else entry

    raw = json.loads(config.to_json_string(use_diff=False), object_hook=number)
    return {key: value for key, value in raw.items() if key not in ("id2label", "label2id")}


def opened(raw: dict[str, Any], headers: Headers) -> TwoTowerConfig:
    return open_family(find_family(raw), raw, headers, None, {}).config


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_value_of_any_key_is_refused_by_name_or_changes_nothing(kind: str) -> None:
    config = config_of(kind)
    raw, headers = content(config), Headers(config)
    opened(raw, headers)
    objects = [raw, *(value for value in raw.values() if isinstance(value, dict))]
    places = [(holder, key) for holder in objects for key in holder if key not in UNREAD]
    for holder, key in places:
        good = holder[key]
        for bad in BAD:
            if type(bad) is type(good) and isinstance(bad, bool | str | dict):
                continue
            holder[key] = bad
            try:
                opened(raw, headers)
            except ValueError as error:
                # Null is as missing; and no shared expert is refused by the tensor that is there
                named = key in str(error) or bad is None or (bad == 0 and key == "shared_intermediate_size")
                if not named:
                    pytest.fail(f"{key} {bad!r}: {error}")
        holder[key] = good


@pytest.mark.parametrize("kind", KINDS)
def test_missing_keys_have_the_values_that_transformers_gives_them(kind: str) -> None:
    """Or, if they are sizes, are refused by name."""
    raw = content(config_of(kind))
    for key in set(raw) - {"model_type", "bos_token_id", "eos_token_id", "max_position_embeddings"}:
        missing = {name: value for name, value in raw.items() if name != key}
        try:
            usual = content(transformers.AutoConfig.for_model(**copy.deepcopy(missing)))
        except (ValueError, TypeError, StrictDataclassError):  # transformers' own
            continue
        try:
            found, expected = fields(missing), fields(usual)
        except ValueError as error:
            if key not in str(error):
                pytest.fail(f"{key}: {error}")
        else:
            assert found == expected, key


def fields(raw: dict[str, Any]) -> dict[str, Any]:
    """What a family makes of config.json, but for a field that says nothing beside others."""
    found = {**find_family(raw).fields(checked(raw))}
    if not found.get("use_rope"):
        found.pop("rope_theta", None)
    return found

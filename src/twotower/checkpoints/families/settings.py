"""Which values the keys of config.json files may have. A key means the same in all families that have it."""

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# A product of two sizes is then still a number of elements
_MOST = 2**31 - 1
# That of float32
_LARGEST = 3.4e38
# More heads, groups or experts than any model has; some families declare each one
_MOST_PARTS = 2**16


class _Rule(NamedTuple):
    allows: Callable[[Any], bool]
    text: str


def _whole(least: int, most: int) -> _Rule:
    return _Rule(
        lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most,
        f"a whole number in [{least}, {most}]",
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _either(rule: _Rule, *others: Any) -> _Rule:
    return _Rule(
        lambda value: (isinstance(value, str) and value in others) or rule.allows(value),
        f"{rule.text} or {' or '.join(map(repr, others))}",
    )


def _listed(rule: _Rule, kind: str) -> _Rule:
    return _Rule(lambda value: isinstance(value, list | tuple) and all(map(rule.allows, value)), f"a list of {kind}")


_FACTOR = _Rule(_is_number, "a finite number")
_POSITIVE = _Rule(lambda value: _is_number(value) and value > 0, "a finite number above 0")
_SHARE = _Rule(lambda value: _is_number(value) and 0 < value <= 1, "a number above 0 and at most 1")
_LIMIT = _Rule(lambda value: _is_number(value) or value in (math.inf,), "a number")
_FLAG = _Rule(lambda value: isinstance(value, bool), "true or false")
_TEXT = _Rule(lambda value: isinstance(value, str), "a text")
_TEXTS = _listed(_TEXT, "texts")
_OBJECT = _Rule(lambda value: isinstance(value, Mapping), "an object")
_LAYER = _whole(0, _MOST)
_TOKEN = _whole(-1, _MOST)  # -1 is none
_TOKENS = _Rule(lambda value: _TOKEN.allows(value) or _listed(_TOKEN, "").allows(value), f"{_TOKEN.text}, or a list")
_PARTS = _whole(0, _MOST_PARTS)
_LISTED = _Rule(_PARTS.allows, f"{_PARTS.text}, the same for all layers if it is listed for each")

_WORDS: tuple[tuple[_Rule, str], ...] = (
    (
        _whole(1, _MOST),
        "num_hidden_layers n_layer num_layers n_layers vocab_size hidden_size intermediate_size head_dim n_embd "
        "n_embed n_inner d_model ffn_dim ffn_hidden_size intermediate_size_mlp expansion_ratio "
        "max_position_embeddings n_positions max_seq_len seq_length original_max_position_embeddings window_size "
        "attention_window_size attention_chunk_size floor_scale no_rope_layer_interval interleave_moe_layer_step "
        "decoder_sparse_step full_attention_interval attn_layer_period expert_layer_period kv_lora_rank "
        "qk_rope_head_dim qk_nope_head_dim v_head_dim state_size expand conv_kernel mamba_d_state mamba_d_conv "
        "mamba_expand mamba_d_ssm linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim lru_width "
        "conv1d_width word_embed_proj_dim",
    ),
    (
        _whole(1, _MOST_PARTS),
        "num_attention_heads n_head num_heads n_heads num_key_value_heads num_kv_heads kv_n_heads mamba_n_heads "
        "mamba_n_groups n_groups linear_num_value_heads linear_num_key_heads",
    ),
    # Where they count, families ask for more than 0
    (
        _whole(0, _MOST),
        "sliding_window max_window_layers moe_intermediate_size shared_expert_intermediate_size q_lora_rank "
        "rotary_dim shared_intermediate_size first_k_dense_replace n_shared_experts attn_layer_offset "
        "expert_layer_offset",
    ),
    (
        _PARTS,
        "num_local_experts n_routed_experts moe_num_experts moe_top_k num_experts_per_tok experts_per_token n_group "
        "topk_group",
    ),
    (_LISTED, "num_experts moe_topk"),
    (_either(_whole(1, _MOST), "auto"), "mamba_d_head time_step_rank mamba_dt_rank"),
    (
        _POSITIVE,
        "layer_norm_eps layer_norm_epsilon rms_norm_eps norm_eps norm_epsilon mixer_rms_eps rope_theta "
        "rotary_emb_base rope_local_base_freq factor query_pre_attn_scalar logits_scaling alibi_bias_max "
        "low_freq_factor high_freq_factor beta_fast beta_slow attention_factor swiglu_limit softmax_scale "
        "moe_normalize_expert_weights logit_scale attn_logit_softcapping final_logit_softcapping logits_soft_cap "
        "embedding_multiplier residual_multiplier attention_multiplier lm_head_multiplier attention_in_multiplier "
        "attention_out_multiplier key_multiplier ssm_in_multiplier ssm_out_multiplier routed_scaling_factor alpha",
    ),
    (_SHARE, "partial_rotary_factor rotary_pct"),
    (_FACTOR, "clip_qkv mscale mscale_all_dim llama_4_scaling_beta attn_scale"),
    (
        _FLAG,
        "tie_word_embeddings attention_bias mlp_bias use_bias bias use_conv_bias mamba_conv_bias mamba_proj_bias "
        "use_qkv_bias qkv_bias attention_out_bias use_sliding_window norm_topk_prob qk_layernorm use_qk_norm "
        "use_parallel_residual multi_query new_decoder_architecture parallel_attn scale_attn_weights "
        "scale_attn_by_inverse_layer_idx residual_in_fp32 mamba_rms_norm mamba_norm_before_gate rope_interleave "
        "attn_temperature_tuning truncate",
    ),
    (
        _TEXT,
        "model_type hidden_act hidden_activation activation_function activation hybrid_override_pattern "
        "position_embedding_type topk_method rope_type type dtype torch_dtype",
    ),
    (_OBJECT, "rope_scaling rope_parameters attn_config ffn_config ffn_act_fn full_attention sliding_attention"),
    (_TEXTS, "layer_types layers_block_type block_types _block_types"),
    (_listed(_LAYER, "whole numbers"), "no_rope_layers mlp_only_layers attn_layer_indices moe_layers"),
    (_listed(_FACTOR, "finite numbers"), "ssm_multipliers mlp_multipliers short_factor long_factor"),
    (_listed(_LIMIT, "numbers"), "time_step_limit"),
    (_TOKENS, "bos_token_id eos_token_id pad_token_id"),
)
_RULES = {key: rule for rule, keys in _WORDS for key in keys.split()}
# By null these say that there is none, or that another key counts; by null others say nothing.
_NULLS = frozenset(
    (
        "attention_chunk_size",
        "attn_logit_softcapping",
        "bos_token_id",
        "eos_token_id",
        "final_logit_softcapping",
        "head_dim",
        "logits_soft_cap",
        "mamba_d_ssm",
        "moe_normalize_expert_weights",
        "n_shared_experts",
        "num_key_value_heads",
        "pad_token_id",
        "q_lora_rank",
        "sliding_window",
    )
)


def checked(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json, or an object in it, without the keys that say nothing.

    Raises ValueError for a value that a key of this name can't have, so that families can compute with what they read.
    """
    found = {}
    for key, value in raw.items():
        rule = _RULES.get(key)
        if rule is _LISTED and isinstance(value, list) and len(value) > 0 and value.count(value[0]) == len(value):
            value = value[0]
        if value is None and key not in _NULLS:
            continue
        if value is not None and rule is not None and not rule.allows(value):
            raise ValueError(f"config.json has {key} {reprlib.repr(value)}, must be {rule.text}; correct it")
        found[key] = checked(value) if rule is _OBJECT and value is not None else value
    return found

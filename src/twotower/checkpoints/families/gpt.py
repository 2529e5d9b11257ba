"""GPT-2 and the decoders made after it: GPT-BigCode, GPT-Neo, OPT, GPT-J and CodeGen."""

from typing import Any

from torch import Tensor

from twotower.checkpoints.families.decoder import (
    activation,
    by_kv_heads,
    by_layer_types,
    copies,
    half_rotated,
    half_rotation,
    one_type,
    projections,
    refuse,
    rows,
)
from twotower.checkpoints.families.family import Family, Part, Parts, Settings, need, whole
from twotower.config import TwoTowerConfig
from twotower.rope import AttentionType, Rope


def _fields(raw: Settings) -> dict[str, Any]:
    """LayerNorms, biases everywhere, an ungated MLP and as many KV heads as heads."""
    width, heads = need(raw, "n_embd", "hidden_size"), need(raw, "n_head", "num_attention_heads", "num_heads")
    return {
        "hidden_size": width,
        "pattern": "*-" * need(raw, "n_layer", "num_hidden_layers", "num_layers"),
        "norm_type": "layer",
        "norm_bias": True,
        "layer_norm_epsilon": raw.get("layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", True)),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "attention_bias": True,
        "intermediate_size": raw.get("n_inner") or 4 * width,
        "mlp_hidden_act": activation(raw, "gelu_new", ("activation_function",)),
        "mlp_bias": True,
    }


def _gpt2(raw: Settings) -> dict[str, Any]:
    return _with_table(raw) | {"attention_scale_by_depth": bool(raw.get("scale_attn_by_inverse_layer_idx", False))}


def _with_table(raw: Settings) -> dict[str, Any]:
    scale = None if raw.get("scale_attn_weights", True) else 1.0
    return _fields(raw) | {"num_positions": raw.get("n_positions", 1024), "attention_scale": scale}


def _gpt2_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    """GPT-2 stores its weights transposed (inputs first), and queries, keys and values as one."""

    def transposed(*names: str) -> Part:
        def part(tensor: Tensor, suffix: str) -> dict[str, Tensor]:
            pieces = tensor.chunk(len(names), dim=-1)
            return {
                f"{name}.{suffix}": piece.t() if piece.ndim == 2 else piece
                for name, piece in zip(names, pieces, strict=True)
            }

        return part

    return _NORMS | {
        "attn.c_attn": transposed("0.mixer.q_proj", "0.mixer.k_proj", "0.mixer.v_proj"),
        "attn.c_proj": transposed("0.mixer.o_proj"),
        "mlp.c_fc": transposed("1.mixer.up_proj"),
        "mlp.c_proj": transposed("1.mixer.down_proj"),
    }


def _gpt_bigcode(raw: Settings) -> dict[str, Any]:
    fields = _with_table(raw)
    return fields | {"num_key_value_heads": 1} if raw.get("multi_query", True) else fields


def _gpt_bigcode_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    """Queries, keys and values are one tensor: all queries first, or with a KV head for each head by heads."""
    p, heads = config.head_dim, config.num_attention_heads
    shared = rows([f"0.mixer.{name}_proj" for name in "qkv"], [heads * p, p, p])
    return (
        _NORMS
        | _MLP
        | {
            "attn.c_attn": shared if raw.get("multi_query", True) else by_kv_heads(config),
            "attn.c_proj": "0.mixer.o_proj",
        }
    )


def _gpt_neo(raw: Settings) -> dict[str, Any]:
    """Layers by turns as `attention_types` lists them; scores aren't scaled."""
    kinds = {"global": AttentionType(), "local": AttentionType(window=raw.get("window_size", 256))}
    fields = _fields({**raw, "n_inner": raw.get("intermediate_size")})
    return fields | {
        "num_positions": raw.get("max_position_embeddings", 2048),
        "attention_scale": 1.0,
        **by_layer_types(_listed_types(raw), kinds),
    }


def _listed_types(raw: Settings) -> list[str]:
    """For each layer its type, from pairs of a list of types and how often it comes."""
    listed, found = raw.get("attention_types") or [[["global", "local"], need(raw, "num_layers") // 2]], []
    for entry in listed if isinstance(listed, list) else [listed]:
        match entry:
            case [list(names), int(count)] if count <= need(raw, "num_layers"):
                found += list(map(str, names)) * count
            case _:
                raise ValueError(
                    f"config.json has attention_types {listed!r}, must be like [[['global'], 1]]; correct it"
                )
    return found


def _gpt_neo_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    return _NORMS | _MLP | projections("attn.attention", "out_proj")


def _opt(raw: Settings) -> dict[str, Any]:
    width = need(raw, "hidden_size")
    allowed = {"do_layer_norm_before": (True,), "_remove_final_layer_norm": (False,), "enable_bias": (True,)}
    refuse(raw, word_embed_proj_dim=(None, width), layer_norm_elementwise_affine=(True,), **allowed)
    fields = _fields({"activation_function": "relu", **raw, "n_inner": need(raw, "ffn_dim")})
    return fields | {"num_positions": need(raw, "max_position_embeddings")}


def _opt_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    return projections("self_attn", "out_proj") | {
        "self_attn_layer_norm": "0.norm",
        "final_layer_norm": "1.norm",
        "fc1": "1.mixer.up_proj",
        "fc2": "1.mixer.down_proj",
    }


def _without_two_rows(tensor: Tensor, suffix: str) -> dict[str, Tensor]:
    """OPT's first position has row 2 of its table."""
    return {f"position_embeddings.{suffix}": tensor[2:]}


def _gptj(raw: Settings) -> dict[str, Any]:
    """RoPE turns the first `rotary_dim` numbers of a head, and attention's projections have no biases."""
    fields = _fields({"tie_word_embeddings": False, **raw})
    part = whole(raw, "rotary_dim", 64) / fields["head_dim"]
    kind = AttentionType(rope_parameters=Rope(partial_rotary_factor=part))
    return fields | {"attention_bias": False, "head_bias": True, "parallel": "*-"} | one_type(kind)


def _gptj_block(config: TwoTowerConfig, raw: Settings) -> Parts:
    """One norm serves both layers, and RoPE turns neighbouring pairs. In CodeGen four parts of a tensor have queries,
    values and keys of a quarter of the heads each."""
    turned = raw.get("rotary_dim", 64)

    def quarters(tensor: Tensor, suffix: str) -> dict[str, Tensor]:
        query, value, key = (part.flatten(0, 1) for part in tensor.unflatten(0, (4, 3, -1)).unbind(1))
        query, key = (half_rotated(part, config.num_attention_heads, turned) for part in (query, key))
        return {f"0.mixer.{name}_proj.{suffix}": part for name, part in (("q", query), ("k", key), ("v", value))}

    rotated = {
        f"attn.{name}_proj": half_rotation(f"0.mixer.{name}_proj", config.num_attention_heads, turned) for name in "qk"
    }
    return (
        projections("attn", "out_proj")
        | rotated
        | {
            "ln_1": copies("0.norm", "1.norm"),
            "attn.qkv_proj": quarters,
            "mlp.fc_in": "1.mixer.up_proj",
            "mlp.fc_out": "1.mixer.down_proj",
        }
    )


_NORMS: dict[str, Part] = {"ln_1": "0.norm", "ln_2": "1.norm"}
_MLP: dict[str, Part] = {"mlp.c_fc": "1.mixer.up_proj", "mlp.c_proj": "1.mixer.down_proj"}
_REST: dict[str, Part] = {"wte": "embeddings", "wpe": "position_embeddings", "ln_f": "norm_f", "lm_head": "lm_head"}
_OPT_REST: dict[str, Part] = {
    "embed_tokens": "embeddings",
    "embed_positions": _without_two_rows,
    "final_layer_norm": "norm_f",
    "lm_head": "lm_head",
}
# Masks and tables of positions that older files hold
_MASKS = r"\.(attn|attention)\.(bias|masked_bias|causal_mask|embed_positions)$"
FAMILIES = (
    Family(model_types=("gpt2",), fields=_gpt2, block=_gpt2_block, rest=_REST, layers_name="h", ignored=_MASKS),
    Family(
        model_types=("gpt_bigcode",),
        fields=_gpt_bigcode,
        block=_gpt_bigcode_block,
        rest=_REST,
        layers_name="h",
        ignored=_MASKS,
    ),
    Family(
        model_types=("gpt_neo",),
        fields=_gpt_neo,
        block=_gpt_neo_block,
        rest=_REST,
        layers_name="h",
        zeros=("q_proj.bias", "k_proj.bias", "v_proj.bias"),
        ignored=_MASKS,
    ),
    Family(
        model_types=("gptj", "codegen"),
        fields=_gptj,
        block=_gptj_block,
        rest=_REST,
        layers_name="h",
        ignored=_MASKS,
    ),
    Family(model_types=("opt",), fields=_opt, block=_opt_block, rest=_OPT_REST),
)

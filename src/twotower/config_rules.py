"""Which values a model's configuration may have."""

import dataclasses
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin

if TYPE_CHECKING:  # `config` imports this module
    from twotower.config import TwoTowerConfig

# Beyond any size; a tensor of so many rows has still a number of elements
_MOST = 2**40
# More experts than any model has; a file may have tensors for each
_MOST_EXPERTS = 2**16

LAYER_KINDS = "MGSR*-E"
# The kinds through which a denoiser reads the context
SEEDED_KINDS = "MGSR*"
# How hidden values of MLPs are computed and how experts are chosen, see `ops.mlp.Activation` and `ops.moe.route`
ACTIVATIONS = ("relu2", "relu", "silu", "gelu", "gelu_tanh", "quick_gelu", "xielu")
ROUTERS = ("sigmoid", "softmax")

# Our field -> the released file's key, where they differ.
FILE_KEYS = {
    "pattern": "hybrid_override_pattern",
    "mamba_state_size": "ssm_state_size",
    "mamba_num_groups": "n_groups",
    "expert_num_groups": "n_group",
    "expert_topk_groups": "topk_group",
    "num_experts": "n_routed_experts",
    "expert_intermediate_size": "moe_intermediate_size",
    "shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
}


def config_problems(c: "TwoTowerConfig") -> list[str]:
    """One sentence for each field whose value is not allowed, with the names of config.json."""
    found = [
        f"{FILE_KEYS.get(f.name, f.name)} is {getattr(c, f.name)!r}, must be {_words(f.type)}"
        for f in dataclasses.fields(c)
        if not _is_of(f.type, getattr(c, f.name))
    ]
    if found:
        return found

    def need(ok: bool, text: str) -> None:
        if not ok:
            found.append(text)

    def positive(*names: str) -> None:
        for name in names:
            need(getattr(c, name) >= 1, f"{FILE_KEYS.get(name, name)} is {getattr(c, name)}, must be at least 1")

    positive("vocab_size", "hidden_size", "block_size")
    need(bool(c.pattern), "hybrid_override_pattern is empty, must name at least one layer")
    strange = sorted(set(c.pattern) - set(LAYER_KINDS))
    need(not strange, f"hybrid_override_pattern has {strange}, allowed are {list(LAYER_KINDS)}")
    need(0 <= c.mask_token_id < c.vocab_size, f"mask_token_id is {c.mask_token_id}, must be in [0, {c.vocab_size})")
    need(c.layer_norm_epsilon > 0, f"layer_norm_epsilon is {c.layer_norm_epsilon}, must be above 0")
    need(c.norm_type in ("rms", "layer"), f"norm_type is {c.norm_type!r}, must be 'rms' or 'layer'")
    need(c.norm_type == "layer" or not c.norm_bias, "norm_bias is true, must be false with norm_type 'rms'")
    need(c.pre_norm or c.post_norm, "pre_norm and post_norm are false, must not both be")
    need(c.num_positions >= 0, f"num_positions is {c.num_positions}, must be at least 0")
    scales = ("attention_output_scale", "mlp_output_scale", "mamba_output_scale", "glu_gate_scale")
    caps = ("logit_softcap", "attention_softcap", "clip_qkv")
    for name in ("embedding_scale", "residual_scale", "logit_scale", "attention_scale", *scales, *caps):
        value = getattr(c, name)
        need(value is None or value > 0, f"{name} is {value}, must be above 0")
    strange = sorted(set(c.parallel) - set(LAYER_KINDS))
    need(not strange and len(c.parallel) != 1, f"parallel is {c.parallel!r}, must be two or more of {LAYER_KINDS}")
    found += _denoiser_problems(c)
    if "*" in c.pattern:
        found += _attention_problems(c)
        positive("num_attention_heads", "num_key_value_heads", "head_dim")
        if c.num_key_value_heads >= 1:
            need(
                c.num_attention_heads % c.num_key_value_heads == 0,
                f"num_attention_heads {c.num_attention_heads} must be a multiple of num_key_value_heads "
                f"{c.num_key_value_heads}",
            )
    if "-" in c.pattern:
        positive("intermediate_size")
    need(
        c.mlp_hidden_act in ACTIVATIONS,
        f"mlp_hidden_act is {c.mlp_hidden_act!r}, must be one of {', '.join(ACTIVATIONS)}",
    )
    # Its two learnt numbers belong to one ungated MLP: no model has them for gates or for stacked experts.
    plain = c.mlp_hidden_act != "xielu" or not (c.gated_mlp or "E" in c.pattern)
    need(plain, "mlp_hidden_act is 'xielu', must be another with gated_mlp or experts")
    need(c.glu_limit is None or c.glu_limit > 0, f"glu_limit is {c.glu_limit}, must be null or above 0")
    found += _recurrent_problems(c) if set("MGSR") & set(c.pattern) else []
    if "E" in c.pattern:
        found += _expert_problems(c)
    return found


def _is_of(kind: Any, value: object) -> bool:
    """Whether a value is of the annotated kind; whole numbers are numbers, and neither is true or false."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(_is_of(one, value) for one in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_of(args[0], item) for item in value)
    if dataclasses.is_dataclass(kind):
        fields = dataclasses.fields(kind)
        return type(value) is kind and all(_is_of(f.type, getattr(value, f.name)) for f in fields)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MOST
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def _words(kind: Any) -> str:
    names = {
        int: f"a whole number of at most {_MOST}",
        float: "a number",
        bool: "true or false",
        str: "a text",
        type(None): "null",
    }
    if get_origin(kind) is UnionType:
        return " or ".join(map(_words, get_args(kind)))
    return names.get(kind, "a list" if get_origin(kind) is tuple else "an object")


def _denoiser_problems(c: "TwoTowerConfig") -> list[str]:
    layers, last = c.denoiser_layers, len(c.pattern) - 1
    if layers is None:
        return []
    shown = list(layers)
    if not layers or shown != sorted(set(layers)) or shown[0] < 0 or shown[-1] > last:
        return [f"denoiser_layers is {shown}, must be null or ascending, different indices of layers in [0, {last}]"]
    kinds = {c.pattern[i] for i in layers}
    if set(SEEDED_KINDS) & set(c.pattern) and not set(SEEDED_KINDS) & kinds:
        reading = [i for i, kind in enumerate(c.pattern) if kind in SEEDED_KINDS]
        return [f"denoiser_layers is {shown}, must have one of {reading}, the layers that read the context"]
    return []


def _attention_problems(c: "TwoTowerConfig") -> list[str]:
    found = [problem for kind in c.attention_kinds for problem in kind.problems(c.head_dim)]
    if c.qk_norm not in (None, "head", "each", "all"):
        found.append(f"qk_norm is {c.qk_norm!r}, must be null, 'head', 'each' or 'all'")
    if c.qk_norm_bias and (c.qk_norm is None or c.norm_type == "rms"):
        found.append("qk_norm_bias is true, must be false without qk_norm or with norm_type 'rms'")
    if len(c.alibi_slopes) not in (0, c.num_attention_heads):
        found.append(f"alibi_slopes has {len(c.alibi_slopes)} numbers, must have {c.num_attention_heads} or none")
    if c.qk_norm_behind_rope and c.qk_norm is None:
        found.append("qk_norm_behind_rope is true, must be false without qk_norm")
    found += _latent_problems(c) if c.kv_lora_rank else []
    digits = set("0123456789"[: len(c.attention_types)])
    num_layers = c.pattern.count("*")
    if c.attention_pattern and (len(c.attention_pattern) != num_layers or set(c.attention_pattern) - digits):
        found.append(
            f"attention_pattern is {c.attention_pattern!r}, must have one digit per attention layer ({num_layers}), "
            f"each the index of one of {len(c.attention_types)} attention_types"
        )
    if len(c.attention_types) > 1 and not c.attention_pattern:
        found.append(f"attention_pattern is empty, must choose among {len(c.attention_types)} attention_types")
    return found


def _recurrent_problems(c: "TwoTowerConfig") -> list[str]:
    found = []

    def need(ok: bool, text: str) -> None:
        if not ok:
            found.append(text)

    wanted = {
        "mamba_num_heads": "MGSR",
        "mamba_head_dim": "MGSR",
        "mamba_state_size": "MGS",
        "mamba_num_groups": "MG",
        "mamba_dt_rank": "S",
    }
    for name, kinds in wanted.items():
        ok = getattr(c, name) >= 1 or not set(kinds) & set(c.pattern)
        need(ok, f"{FILE_KEYS.get(name, name)} is {getattr(c, name)}, must be at least 1")
    need(c.conv_kernel >= 2, f"conv_kernel is {c.conv_kernel}, must be at least 2")
    if c.mamba_num_groups >= 1 and {"M", "G"} & set(c.pattern):
        need(
            c.mamba_num_heads % c.mamba_num_groups == 0,
            f"mamba_num_heads {c.mamba_num_heads} must be a multiple of n_groups {c.mamba_num_groups}",
        )
    limit = c.time_step_limit
    need(
        len(limit) == 2 and 0 <= limit[0] < limit[1],
        f"time_step_limit is {limit}, must be 0 <= low < high, two numbers",
    )
    norms = (None, "after_gate", "before_gate")
    need(c.mamba_norm in norms, f"mamba_norm is {c.mamba_norm!r}, must be null, 'after_gate' or 'before_gate'")
    need(len(c.mamba_scales) in (0, 5), f"mamba_scales is {c.mamba_scales}, must be five factors: z, x, B, C, dt")
    epsilon = c.mamba_inner_epsilon
    need(epsilon is None or epsilon > 0, f"mamba_inner_epsilon is {epsilon}, must be null or above 0")
    act = c.carried.get("mamba_hidden_act", "silu")
    need(act == "silu", f"mamba_hidden_act is {act!r}, must be 'silu'")
    return found


def _latent_problems(c: "TwoTowerConfig") -> list[str]:
    names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    found = [f"{name} is {getattr(c, name)}, must be at least 1" for name in names if getattr(c, name) < 1]
    if c.q_lora_rank < 0:
        found.append(f"q_lora_rank is {c.q_lora_rank}, must be at least 0")
    width = max(c.qk_rope_head_dim + c.qk_nope_head_dim, c.v_head_dim)
    if c.head_dim < width:
        found.append(f"head_dim is {c.head_dim}, must be at least {width}, the width of keys and of values")
    if c.num_key_value_heads != c.num_attention_heads:
        found.append(f"num_key_value_heads is {c.num_key_value_heads}, must be {c.num_attention_heads} with latents")
    ropes = [kind.rope_parameters for kind in c.attention_kinds]
    if any(rope is None or rope.turned(c.head_dim) != c.qk_rope_head_dim for rope in ropes):
        found.append(f"RoPE turns another part of head_dim {c.head_dim} than qk_rope_head_dim {c.qk_rope_head_dim}")
    if c.qk_norm is not None:
        found.append(f"qk_norm is {c.qk_norm!r}, must be null with latents")
    return found


def _expert_problems(c: "TwoTowerConfig") -> list[str]:
    found = []

    def need(ok: bool, text: str) -> None:
        if not ok:
            found.append(text)

    need(c.num_experts <= _MOST_EXPERTS, f"n_routed_experts is {c.num_experts}, must be at most {_MOST_EXPERTS}")
    for name in ("num_experts", "expert_intermediate_size", "expert_num_groups"):
        need(getattr(c, name) >= 1, f"{FILE_KEYS[name]} is {getattr(c, name)}, must be at least 1")
    shared = c.shared_expert_intermediate_size
    need(shared >= 0, f"moe_shared_expert_intermediate_size is {shared}, must be at least 0")
    need(shared > 0 or not c.shared_expert_gate, "shared_expert_gate needs moe_shared_expert_intermediate_size above 0")
    need(c.moe_latent_size >= 0, f"moe_latent_size is {c.moe_latent_size}, must be at least 0")
    need(c.router in ROUTERS, f"router is {c.router!r}, must be one of {', '.join(ROUTERS)}")
    need(
        1 <= c.num_experts_per_tok <= c.num_experts,
        f"num_experts_per_tok is {c.num_experts_per_tok}, must be in [1, {c.num_experts}]",
    )
    if c.expert_num_groups >= 1:
        need(
            c.num_experts % c.expert_num_groups == 0,
            f"n_routed_experts {c.num_experts} must be a multiple of n_group {c.expert_num_groups}",
        )
    need(
        1 <= c.expert_topk_groups <= c.expert_num_groups,
        f"topk_group is {c.expert_topk_groups}, must be in [1, {c.expert_num_groups}]",
    )
    if c.expert_num_groups >= 1:
        kept = c.num_experts // c.expert_num_groups * c.expert_topk_groups
        need(
            c.num_experts_per_tok <= kept,
            f"num_experts_per_tok is {c.num_experts_per_tok}, must be at most the {kept} of topk_group groups",
        )
    return found

"""llama.cpp's architectures with Mamba-2 layers or gated delta nets."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from twotower.checkpoints.gguf.architecture import (
    BLOCK,
    MIXES,
    PARTIAL,
    REST,
    SCALES,
    TURNED,
    Architecture,
    experts,
)
from twotower.checkpoints.gguf.dense import granite_scales
from twotower.checkpoints.gguf.mixtures import EXPERTS, qwen_experts, shared_width
from twotower.checkpoints.gguf.names import Change, Joined, Undo, blocks, each, flat, less_one, nothing, turned, whole
from twotower.checkpoints.gguf.reader import GgufFile

# What the converter writes where the model's config.json says no number of positions
_ANY_LENGTH = 2**20


def logarithm(name: str, *, flattened: bool = True) -> Undo:
    """Rates of decay, which the model stores as logarithms of what is negated here."""

    def undo(tensor: Tensor, suffix: str, raw: Mapping[str, Any]) -> dict[str, Tensor]:
        if not tensor.is_meta and not (tensor < 0).all():
            raise ValueError("it must be below 0 everywhere")
        # In float64, so that the model's exponential gives the file's number, to the rounding of float32.
        found = tensor.double().neg().log().to(tensor.dtype)
        return {name: found.flatten() if flattened else found}

    return undo


def taps(name: str) -> Undo:
    """A convolution's taps (c, k), each channel by itself, which the model stores as (c, 1, k)."""
    return lambda tensor, suffix, raw: {f"{name}.{suffix}": tensor.unsqueeze(1) if suffix == "weight" else tensor}


def _mamba(prefix: str) -> dict[str, Undo]:
    return {
        "ssm_in": f"{prefix}.in_proj",
        "ssm_conv1d": taps(f"{prefix}.conv1d"),
        "ssm_dt": whole(f"{prefix}.dt_bias"),
        "ssm_a": logarithm(f"{prefix}.A_log"),
        "ssm_d": flat(f"{prefix}.D", suffixed=False),
        "ssm_norm": flat(f"{prefix}.norm"),
        "ssm_out": f"{prefix}.out_proj",
    }


def _weight(name: str) -> Undo:
    """A norm, whose name does not always end in "weight"."""
    return lambda tensor, suffix, raw: {f"{name}.weight": tensor}


def with_gate(gate: str, name: str) -> Joined:
    """Rows of `up`, or of all experts', behind those of the gate."""
    return Joined(gate, lambda up, gated, raw: {f"{name}.weight": torch.cat((gated, up), dim=-2)})


def _kinds(file: GgufFile, raw: Mapping[str, Any], **kinds: str) -> list[str]:
    """The kind of each layer: that of the first of these tensors that it has. Raises ValueError for one without."""
    having = {stem: set(blocks(file, stem)) for stem in kinds}
    found = []
    for i in range(raw["num_hidden_layers"]):
        stem = next((stem for stem in kinds if i in having[stem]), None)
        if stem is None:
            raise ValueError(f"{file.path} has none of blk.{i}.{{{', '.join(kinds)}}}, one of which a layer needs")
        found.append(kinds[stem])
    return found


def _sizes(file: GgufFile) -> tuple[int, int]:
    """The number of Mamba heads, or of a delta net's value heads, and the width of one."""
    heads = file.count("ssm.time_step_rank", least=1)
    inner = file.count("ssm.inner_size", least=1)
    if inner % heads:
        raise file.wrong("ssm.inner_size", f"a multiple of the {heads} heads")
    return heads, inner // heads


def positions(raw: Mapping[str, Any]) -> int | None:
    count: int | None = raw["max_position_embeddings"]
    return None if count == _ANY_LENGTH else count


def biased(file: GgufFile, stem: str) -> bool:
    return any(f"blk.{i}.{stem}.bias" in file.tensors for i in blocks(file, stem))


def _mamba2(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    heads, width = _sizes(file)
    return {
        "model_type": "mamba2",
        "layer_norm_epsilon": raw["rms_norm_eps"],
        "num_heads": heads,
        "head_dim": width,
        "state_size": file.count("ssm.state_size", least=1),
        "n_groups": file.count("ssm.group_count", least=1),
        "conv_kernel": file.count("ssm.conv_kernel", least=1),
        "use_conv_bias": biased(file, "ssm_conv1d"),
        "use_bias": biased(file, "ssm_in"),
        "max_position_embeddings": positions(raw),
    }


def _mamba_beside_attention(file: GgufFile) -> dict[str, Any]:
    """Mamba-2's settings in the words of Bamba."""
    heads, width = _sizes(file)
    return {
        "mamba_n_heads": heads,
        "mamba_d_head": width,
        "mamba_d_ssm": heads * width,
        "mamba_d_state": file.count("ssm.state_size", least=1),
        "mamba_n_groups": file.count("ssm.group_count", least=1),
        "mamba_d_conv": file.count("ssm.conv_kernel", least=1),
        "mamba_conv_bias": biased(file, "ssm_conv1d"),
        "mamba_proj_bias": biased(file, "ssm_in"),
        "mlp_bias": biased(file, "ffn_up"),
    }


def is_bamba(file: GgufFile) -> bool:
    """Whether a file of the architecture granitehybrid, with RoPE and nothing of Granite's, is Bamba's."""
    own = any(file.setting(key) for key in SCALES + MIXES)
    return file.flag("rope.scaling.finetuned", True) and not own


def _bamba(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The model turns half of each head, whatever the file says."""
    kinds = _kinds(file, raw, attn_q="attention", ssm_in="mamba")
    return _mamba_beside_attention(file) | {
        "model_type": "bamba",
        "attn_layer_indices": [i for i, kind in enumerate(kinds) if kind == "attention"],
        "attention_bias": biased(file, "attn_q"),
        "rope_parameters": raw["rope_parameters"] | {"partial_rotary_factor": 0.5},
    }


def _granite_hybrid(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Granite 4. Without experts the shared MLP is the only one."""
    mixed = experts(file) if file.setting("expert_count") else {"num_local_experts": 0}
    return (
        _mamba_beside_attention(file)
        | granite_scales(file, raw)
        | mixed
        | {
            "model_type": "granitemoehybrid",
            "layer_types": _kinds(file, raw, attn_q="attention", ssm_in="mamba"),
            "position_embedding_type": "rope" if file.flag("rope.scaling.finetuned", True) else "nope",
            "attention_bias": biased(file, "attn_q"),
            "shared_intermediate_size": shared_width(file) if mixed["num_local_experts"] else raw["intermediate_size"],
            "max_position_embeddings": positions(raw),
        }
    )


def _falcon_h1(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The converter multiplies the weights by the model's factors. A norm follows the gate, as in llama.cpp."""
    return _mamba_beside_attention(file) | {
        "model_type": "falcon_h1",
        "mamba_rms_norm": bool(blocks(file, "ssm_norm")),
        "mamba_norm_before_gate": False,
    }


def _nemotron_h(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Each layer is one mixer."""
    heads, width = _sizes(file)
    pattern = "".join(_kinds(file, raw, ssm_in="M", attn_q="*", ffn_gate_inp="E", ffn_up="-"))
    latents = (t.shape[0] for name, t in file.tensors.items() if name.endswith("ffn_latent_down.weight"))
    found = {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": pattern,
        "layer_norm_epsilon": raw.get("rms_norm_eps", raw.get("layer_norm_eps")),
        "attention_bias": biased(file, "attn_q"),
        "mlp_bias": biased(file, "ffn_up"),
        "mamba_num_heads": heads,
        "mamba_head_dim": width,
        "ssm_state_size": file.count("ssm.state_size", least=1),
        "n_groups": file.count("ssm.group_count", least=1),
        "conv_kernel": file.count("ssm.conv_kernel", least=1),
        "use_conv_bias": biased(file, "ssm_conv1d"),
        "use_bias": biased(file, "ssm_in"),
        "max_position_embeddings": positions(raw),
    }
    if "E" not in pattern:
        return found
    return (
        found
        | experts(file)
        | {
            "intermediate_size": raw["intermediate_size"],
            "moe_shared_expert_intermediate_size": shared_width(file),
            "n_group": file.count("expert_group_count", 1) or 1,
            "topk_group": file.count("expert_group_used_count", 1) or 1,
            "norm_topk_prob": file.flag("expert_weights_norm", False),
            "routed_scaling_factor": file.number("expert_weights_scale", 0.0) or 1.0,
            "moe_latent_size": next(latents, 0),
        }
    )


def _delta_net(file: GgufFile, raw: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    heads, width = _sizes(file)
    mixed = qwen_experts(file, raw, normalise=True) if file.setting("expert_count") else {"num_experts": 0}
    return mixed | {
        "model_type": model_type,
        "layer_types": _kinds(file, raw, ssm_a="linear_attention", attn_q="full_attention"),
        "linear_num_value_heads": heads,
        "linear_value_head_dim": width,
        "linear_num_key_heads": file.count("ssm.group_count", least=1, most=heads),
        "linear_key_head_dim": file.count("ssm.state_size", least=1),
        "linear_conv_kernel_dim": file.count("ssm.conv_kernel", least=1),
        "attention_bias": biased(file, "attn_q"),
    }


def _qwen3_next(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    return _delta_net(file, raw, "qwen3_next")


def _qwen35(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    return _delta_net(file, raw, "qwen3_5_text")


def _qwen35_moe(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    return _delta_net(file, raw, "qwen3_5_moe_text")


def _by_key_heads(undo: Undo, *, skipped: int = 0, columns: bool = False) -> Change:
    """Rows or columns by value heads, of which the converter has put the first of each key head in front, then the
    second ones. `skipped` times as many rows as all key heads have come before."""

    def change(tensor: Tensor, suffix: str, raw: Mapping[str, Any]) -> Mapping[str, Tensor]:
        keys, values = raw["linear_num_key_heads"], raw["linear_num_value_heads"]
        first = skipped * keys * raw["linear_key_head_dim"]
        x = tensor.t() if columns else tensor
        heads = x[first:].unflatten(0, (values // keys, keys, -1)).transpose(0, 1).flatten(0, 2)
        x = torch.cat((x[:first], heads))
        x = x.t() if columns else x
        if isinstance(undo, str):
            return {f"{undo}.{suffix}": x}
        assert not isinstance(undo, Joined)
        return undo(x, suffix, raw)

    return change


_BAMBA: dict[str, Undo] = {
    "ffn_norm": _weight("pre_ff_layernorm"),
    "ffn_gate": "feed_forward.gate_proj",
    "ffn_up": "feed_forward.up_proj",
    "ffn_down": "feed_forward.down_proj",
}
_GRANITE: dict[str, Undo] = {
    "ffn_gate": nothing,
    "ffn_up": with_gate("ffn_gate", "shared_mlp.input_linear"),
    "ffn_down": "shared_mlp.output_linear",
    "ffn_gate_shexp": nothing,
    "ffn_up_shexp": with_gate("ffn_gate_shexp", "shared_mlp.input_linear"),
    "ffn_down_shexp": "shared_mlp.output_linear",
    "ffn_gate_inp": "block_sparse_moe.router.layer",
    "ffn_gate_exps": nothing,
    "ffn_up_exps": with_gate("ffn_gate_exps", "block_sparse_moe.input_linear"),
    "ffn_gate_up_exps": "block_sparse_moe.input_linear",
    "ffn_down_exps": "block_sparse_moe.output_linear",
}
_NEMOTRON_H: dict[str, Undo] = _mamba("mixer") | {
    "attn_norm": "norm",
    "attn_q": turned("mixer.q_proj", "num_attention_heads"),
    "attn_k": turned("mixer.k_proj", "num_key_value_heads"),
    "attn_v": "mixer.v_proj",
    "attn_output": "mixer.o_proj",
    "ffn_up": "mixer.up_proj",
    "ffn_down": "mixer.down_proj",
    "ffn_gate_inp": "mixer.gate",
    "exp_probs_b": whole("mixer.gate.e_score_correction_bias"),
    "ffn_up_exps": each("mixer.experts.{}.up_proj"),
    "ffn_down_exps": each("mixer.experts.{}.down_proj"),
    "ffn_up_shexp": "mixer.shared_experts.up_proj",
    "ffn_down_shexp": "mixer.shared_experts.down_proj",
    "ffn_latent_down": "mixer.fc1_latent_proj",
    "ffn_latent_up": "mixer.fc2_latent_proj",
}
_BACKBONE: dict[str, Undo] = {
    "token_embd": "backbone.embeddings",
    "output_norm": "backbone.norm_f",
    "output": "lm_head",
}
_LESS_ONE_REST: dict[str, Undo] = REST | {"output_norm": less_one("model.norm")}
_DELTA: dict[str, Undo] = {
    "attn_norm": less_one("input_layernorm"),
    "attn_q_norm": less_one("self_attn.q_norm"),
    "attn_k_norm": less_one("self_attn.k_norm"),
    "post_attention_norm": less_one("post_attention_layernorm"),
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_in": "linear_attn.in_proj_qkvz",  # of older files, in place of the two before
    "ssm_ba": "linear_attn.in_proj_ba",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_conv1d": taps("linear_attn.conv1d"),
    "ssm_dt": whole("linear_attn.dt_bias"),
    "ssm_a": logarithm("linear_attn.A_log"),
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_REORDERED: dict[str, Undo] = {
    "attn_qkv": _by_key_heads(_DELTA["attn_qkv"], skipped=2),
    "ssm_conv1d": _by_key_heads(_DELTA["ssm_conv1d"], skipped=2),
    **{name: _by_key_heads(_DELTA[name]) for name in ("attn_gate", "ssm_beta", "ssm_alpha", "ssm_dt", "ssm_a")},
    "ssm_out": _by_key_heads(_DELTA["ssm_out"], columns=True),
}
_QWEN35 = BLOCK | EXPERTS | _DELTA | _REORDERED

BAMBA = Architecture(settings=_bamba, block=BLOCK | TURNED | _mamba("mamba") | _BAMBA, reads=PARTIAL)
HYBRIDS: Mapping[str, Architecture] = {
    "mamba2": Architecture(
        settings=_mamba2,
        block=_mamba("mixer") | {"attn_norm": "norm"},
        rest=_BACKBONE,
        layers="backbone.layers",
        attends=False,
        rotates=False,
    ),
    "granitehybrid": Architecture(
        settings=_granite_hybrid, block=BLOCK | TURNED | _mamba("mamba") | _GRANITE, reads=SCALES + MIXES + PARTIAL
    ),
    "falcon-h1": Architecture(
        settings=_falcon_h1,
        block=BLOCK | _mamba("mamba") | _BAMBA,
    ),
    "nemotron_h": Architecture(
        settings=_nemotron_h, block=_NEMOTRON_H, rest=_BACKBONE, layers="backbone.layers", reads=PARTIAL, rotates=False
    ),
    "nemotron_h_moe": Architecture(
        settings=_nemotron_h,
        block=_NEMOTRON_H,
        rest=_BACKBONE,
        layers="backbone.layers",
        reads=MIXES + PARTIAL,
        rotates=False,
    ),
    "qwen3next": Architecture(
        settings=_qwen3_next, block=BLOCK | EXPERTS | _DELTA, rest=_LESS_ONE_REST, reads=MIXES + PARTIAL
    ),
    "qwen35": Architecture(settings=_qwen35, block=_QWEN35, rest=_LESS_ONE_REST, reads=PARTIAL),
    "qwen35moe": Architecture(settings=_qwen35_moe, block=_QWEN35, rest=_LESS_ONE_REST, reads=MIXES + PARTIAL),
}

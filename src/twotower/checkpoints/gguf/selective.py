"""llama.cpp's architectures with Mamba-1 layers: Mamba, FalconMamba and Jamba."""

from collections.abc import Mapping, Sequence
from typing import Any

from twotower.checkpoints.gguf.architecture import BLOCK, MIXES, REST, Architecture, experts
from twotower.checkpoints.gguf.hybrids import biased, logarithm, positions, taps
from twotower.checkpoints.gguf.names import Undo, blocks, each, whole
from twotower.checkpoints.gguf.reader import GgufFile


def _mamba(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    """With norms of step sizes, B and C it is FalconMamba; llama.cpp has the same epsilon in all norms."""
    normed = file.flag("ssm.dt_b_c_rms", False)
    return {
        "model_type": "falcon_mamba" if normed else "mamba",
        "layer_norm_epsilon": raw["rms_norm_eps"],
        "mixer_rms_eps": raw["rms_norm_eps"],
        "intermediate_size": file.count("ssm.inner_size", least=1),
        "state_size": file.count("ssm.state_size", least=1),
        "time_step_rank": file.count("ssm.time_step_rank", least=1),
        "conv_kernel": file.count("ssm.conv_kernel", least=1),
        "use_conv_bias": biased(file, "ssm_conv1d"),
        "use_bias": biased(file, "ssm_in"),
        "max_position_embeddings": positions(raw),
    }


def _jamba(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Any]:
    inner, width = file.count("ssm.inner_size", least=1), raw["hidden_size"]
    if inner % width:
        raise file.wrong("ssm.inner_size", f"a multiple of the width {width}")
    mixed = blocks(file, "ffn_gate_inp")
    found = experts(file) if mixed else {"num_experts": 1}
    return found | {
        "model_type": "jamba",
        "intermediate_size": raw["intermediate_size"],
        **_places(file, raw, "attn_layer", blocks(file, "attn_q")),
        **_places(file, raw, "expert_layer", mixed),
        "mamba_expand": inner // width,
        "mamba_d_state": file.count("ssm.state_size", least=1),
        "mamba_dt_rank": file.count("ssm.time_step_rank", least=1),
        "mamba_d_conv": file.count("ssm.conv_kernel", least=1),
        "mamba_conv_bias": biased(file, "ssm_conv1d"),
        "mamba_proj_bias": biased(file, "ssm_in"),
    }


def _places(file: GgufFile, raw: Mapping[str, Any], name: str, found: Sequence[int]) -> dict[str, int]:
    """The period and the offset of layers of a kind. Raises ValueError for layers that have none."""
    count = raw["num_hidden_layers"]
    offset = found[0] if found else count
    period = found[1] - offset if len(found) > 1 else count + 1
    if (offset >= period and found) or list(found) != list(range(offset, count, period)):
        raise ValueError(
            f"{file.path} has {name}s {list(found)}, must be as far apart from each other; take another model"
        )
    return {f"{name}_period": period, f"{name}_offset": offset}


def _mixer(prefix: str) -> dict[str, Undo]:
    return {
        "ssm_in": f"{prefix}.in_proj",
        "ssm_conv1d": taps(f"{prefix}.conv1d"),
        "ssm_x": f"{prefix}.x_proj",
        "ssm_dt": f"{prefix}.dt_proj",
        "ssm_a": logarithm(f"{prefix}.A_log", flattened=False),
        "ssm_d": whole(f"{prefix}.D"),
        "ssm_out": f"{prefix}.out_proj",
    }


_JAMBA: dict[str, Undo] = {
    "ssm_dt_norm": "mamba.dt_layernorm",
    "ssm_b_norm": "mamba.b_layernorm",
    "ssm_c_norm": "mamba.c_layernorm",
    "ffn_norm": "pre_ff_layernorm",
    "ffn_gate": "feed_forward.gate_proj",
    "ffn_up": "feed_forward.up_proj",
    "ffn_down": "feed_forward.down_proj",
    "ffn_gate_inp": "feed_forward.router",
    "ffn_gate_exps": each("feed_forward.experts.{}.gate_proj"),
    "ffn_up_exps": each("feed_forward.experts.{}.up_proj"),
    "ffn_down_exps": each("feed_forward.experts.{}.down_proj"),
}
_MAMBA_REST: dict[str, Undo] = {
    "token_embd": "backbone.embeddings",
    "output_norm": "backbone.norm_f",
    "output": "lm_head",
}
SELECTIVE: Mapping[str, Architecture] = {
    "mamba": Architecture(
        settings=_mamba,
        block=_mixer("mixer") | {"attn_norm": "norm"},
        rest=_MAMBA_REST,
        layers="backbone.layers",
        attends=False,
        rotates=False,
    ),
    "jamba": Architecture(
        settings=_jamba,
        block=BLOCK | _mixer("mamba") | _JAMBA,
        rest=REST | {"output_norm": "model.final_layernorm"},
        reads=MIXES,
        rotates=False,
    ),
}

"""What llama.cpp's architectures have in common: a file's settings and tensors in Hugging Face's words.

Each architecture follows llama.cpp's converter (conversion/*.py) backwards; what the converter leaves out of the file
is what llama.cpp computes with (src/models/*.cpp).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from twotower.checkpoints.gguf.names import Undo, fused, turned
from twotower.checkpoints.gguf.reader import GgufFile

# Settings that change what is computed. An architecture that does not read one that a file has is refused.
SWITCHES = (
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "attention.sliding_window",
    "attention.temperature_scale",
    "attn_logit_softcapping",
    "embedding_scale",
    "expert_count",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
)
# Sizes that must follow from others, unless an architecture reads them
SIZES = ("attention.value_length", "rope.dimension_count")

WINDOW = ("attention.sliding_window",)
MIXES = ("expert_count",)
SCALES = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
PARTIAL = ("rope.dimension_count",)
_HEADS, _KV_HEADS = "num_attention_heads", "num_key_value_heads"

BLOCK: dict[str, Undo] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
BLOCK |= {"attn_qkv": fused(BLOCK["attn_q"], BLOCK["attn_k"], BLOCK["attn_v"])}
REST: dict[str, Undo] = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
TURNED: dict[str, Undo] = {
    "attn_q": turned("self_attn.q_proj", _HEADS),
    "attn_k": turned("self_attn.k_proj", _KV_HEADS),
}
TURNED |= {"attn_qkv": fused(TURNED["attn_q"], TURNED["attn_k"], BLOCK["attn_v"])}

# The settings that a file's config.json has beside the usual ones, which they may replace
SettingsOf = Callable[[GgufFile, Mapping[str, Any]], Mapping[str, Any]]


def _none_given(file: GgufFile) -> Mapping[str, Tensor]:
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """How a file is a Hugging Face model. `settings` gives further keys of config.json, of which `model_type` names the
    family, and may replace those that all architectures have; `reads` are the `SWITCHES` and `SIZES` that it heeds.
    `given` are tensors that the file has as metadata. Without `attends` and `rotates` the file need not say how many
    heads there are and how RoPE turns them."""

    settings: SettingsOf
    block: Mapping[str, Undo] = dataclasses.field(default_factory=lambda: BLOCK)
    rest: Mapping[str, Undo] = dataclasses.field(default_factory=lambda: REST)
    layers: str = "model.layers"
    reads: tuple[str, ...] = ()
    given: Callable[[GgufFile], Mapping[str, Tensor]] = _none_given
    attends: bool = True
    rotates: bool = True


def plain(model_type: str) -> SettingsOf:
    """The settings of an architecture that is a family without further ones."""
    return lambda file, raw: {"model_type": model_type}


def windows(file: GgufFile, period: int) -> dict[str, Any]:
    """The window, and which layers have it: as the file says, or all but every `period`-th."""
    count = file.count("block_count")
    pattern = file.setting("attention.sliding_window_pattern", period)
    if not isinstance(pattern, list):
        period = file.count("attention.sliding_window_pattern", period, least=1)
        pattern = [(i + 1) % period != 0 for i in range(count)]
    if len(pattern) < count or not all(isinstance(slides, bool | int) for slides in pattern):
        raise file.wrong("attention.sliding_window_pattern", f"a number, or true or false for each of {count} layers")
    types = ["sliding_attention" if slides else "full_attention" for slides in pattern[:count]]
    return {"sliding_window": file.count("attention.sliding_window"), "layer_types": types}


def experts(file: GgufFile) -> dict[str, Any]:
    """The experts of a mixture, under all of the names that families have for their number."""
    stack = next((t for name, t in file.tensors.items() if name.endswith("ffn_down_exps.weight")), None)
    if stack is None or len(stack.shape) != 3:
        raise ValueError(f"{file.path} lacks blk.0.ffn_down_exps.weight, its experts; convert the model again")
    count, _, width = stack.shape
    if file.count("expert_count", count) != count:
        raise file.wrong("expert_count", f"{count}, as {stack.name} has", "convert the model again")
    return {
        "num_local_experts": count,
        "num_experts": count,
        "n_routed_experts": count,
        "num_experts_per_tok": file.count("expert_used_count", least=1, most=count),
        "intermediate_size": width,
        "moe_intermediate_size": width,
    }

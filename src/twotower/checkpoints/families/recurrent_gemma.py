"""RecurrentGemma: blocks of an RG-LRU or of local attention, each with an MLP."""

from typing import Any

import torch

from twotower.checkpoints.families.decoder import REST, decoder_fields, one_type, read_rope, refuse
from twotower.checkpoints.families.family import Family, Part, Parts, Settings, whole
from twotower.config import TwoTowerConfig
from twotower.rope import AttentionType

_KINDS = {"recurrent": "R", "attention": "*"}


def _recurrent_gemma(raw: Settings) -> dict[str, Any]:
    """Norms multiply by 1 + weight, embeddings are scaled by √width rounded to bfloat16, and `intermediate_size` counts
    both halves of the gated MLP. Of attention's projections the last has a bias in any case; then all have one here."""
    refuse(raw, embeddings_scale_by_sqrt_dim=(True,))
    count, hidden, heads = (whole(raw, key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    types = raw.get("block_types") or raw.get("_block_types") or ["recurrent", "recurrent", "attention"]
    if not isinstance(types, list) or any(name not in _KINDS for name in types):
        raise ValueError(f"config.json has block_types {types!r}, must be a list of {' and '.join(_KINDS)}; correct it")
    width = whole(raw, "lru_width", hidden)
    if width % heads:
        raise ValueError(
            f"config.json has lru_width {width}, must be a multiple of num_attention_heads {heads}; correct it"
        )
    rope = read_rope(raw, part=0.5)
    refuse({"rope_type": rope.rope_type}, rope_type=("default",))
    given = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, **raw}
    return decoder_fields(given) | {
        "pattern": "".join(_KINDS[types[i % len(types)]] + "-" for i in range(count)),
        "use_rope": False,
        "norm_offset": 1.0,
        "embedding_scale": torch.tensor(hidden**0.5).bfloat16().item(),
        "logit_softcap": raw.get("logits_soft_cap", 30.0),
        "attention_bias": True,
        "intermediate_size": whole(raw, "intermediate_size") // 2,
        "mlp_bias": True,
        "mamba_num_heads": heads,
        "mamba_head_dim": width // heads,
        "conv_kernel": whole(raw, "conv1d_width", 4),
        "use_bias": True,
        **one_type(AttentionType(window=whole(raw, "attention_window_size", 2048), rope_parameters=rope)),
    }


def _block(config: TwoTowerConfig, raw: Settings) -> Parts:
    parts: dict[str, Part] = {"temporal_pre_norm": "0.norm", "channel_pre_norm": "1.norm"}
    parts |= {f"temporal_block.{name}_proj": f"0.mixer.{name}_proj" for name in "qkvo"}
    parts |= {f"temporal_block.linear_{name}": f"0.mixer.linear_{name}" for name in "xy"}
    parts |= {"temporal_block.linear_out": "0.mixer.out_proj", "temporal_block.conv_1d": "0.mixer.conv1d"}
    parts |= {"temporal_block.rg_lru.recurrent_param": "0.mixer.recurrent_param"}
    for gate in ("input_gate", "recurrent_gate"):
        parts |= {f"temporal_block.rg_lru.{gate}_{part}": f"0.mixer.{gate}.{part}" for part in ("weight", "bias")}
    return parts | {f"mlp_block.{name}_proj": f"1.mixer.{name}_proj" for name in ("gate", "up", "down")}


FAMILIES = (
    Family(
        model_types=("recurrent_gemma",),
        fields=_recurrent_gemma,
        block=_block,
        rest=REST | {"final_norm": "norm_f"},
        zeros=("q_proj.bias", "k_proj.bias", "v_proj.bias"),
    ),
)

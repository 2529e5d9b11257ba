"""config.json of two towers as vLLM's Nemotron-H layers read it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from twotower.config import TwoTowerConfig
from twotower.config_rules import FILE_KEYS

# The name in our checkpoints and the released ones, and the two names under which vLLM knows their context tower: one
# with recurrent states, one without.
RELEASED = "NemotronHTwoTowerForCausalLM"
HYBRID, TRANSFORMER = "TwoTowerHybridForCausalLM", "TwoTowerTransformerForCausalLM"

# What transformers and vLLM put into a config or read from one, which is no property of the towers
_THEIRS = frozenset(("quantization_config", "compression_config", "rope_parameters", "name_or_path", "_commit_hash"))

# Fields that the layers in this package, or vLLM's own, read
_READ = frozenset(
    (
        "vocab_size",
        "hidden_size",
        "pattern",
        "layer_norm_epsilon",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "mask_token_id",
        "block_size",
        "denoiser_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "use_rope",
        "rope_theta",
        "intermediate_size",
        "mlp_hidden_act",
        "gated_mlp",
        "mamba_num_heads",
        "mamba_head_dim",
        "mamba_state_size",
        "mamba_num_groups",
        "conv_kernel",
        "use_conv_bias",
        "num_experts",
        "num_experts_per_tok",
        "expert_intermediate_size",
        "shared_expert_intermediate_size",
        "expert_num_groups",
        "expert_topk_groups",
        "norm_topk_prob",
        "routed_scaling_factor",
        "carried",
    )
)
# Fields of kinds of layers that are refused
_OTHER_KINDS = frozenset(("mamba_dt_rank", "mamba_inner_epsilon"))


def for_vllm(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a two-tower config.json with the names and values that vLLM's Nemotron-H code reads.

    Raises ValueError for a config that is broken, and for a tower that vLLM's layers can't compute.
    """
    config = TwoTowerConfig.from_dict({key: value for key, value in raw.items() if key not in _THEIRS})
    problems = not_served(config)
    if problems:
        raise ValueError(
            f"vLLM's layers can't compute this context tower: {'; '.join(problems)}; serve it with twotower serve"
        )
    recurrent = "M" in config.pattern
    defaults = {
        FILE_KEYS.get(f.name, f.name): getattr(config, f.name)
        for f in dataclasses.fields(config)
        if f.name in _READ - {"carried", "denoiser_layers"}
    }
    return {
        **defaults,
        **raw,
        "architectures": [HYBRID if recurrent else TRANSFORMER],
        # Which vLLM multiplies by the width; the width in our files is that of all together
        "n_shared_experts": int(config.shared_expert_intermediate_size > 0),
    }


def not_served(config: TwoTowerConfig) -> list[str]:
    """One sentence for each setting that vLLM's layers, as this package uses them, don't have; empty if all is well."""
    found = []
    strange = sorted(set(config.pattern) - set("M*-E"))
    if strange:
        found.append(f"hybrid_override_pattern has {strange}, must be of M, *, - and E")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in _READ | _OTHER_KINDS and value != field.default:
            found.append(f"{FILE_KEYS.get(field.name, field.name)} is {value!r}, must be {field.default!r}")
    activation = "silu" if config.gated_mlp else "relu2"
    if set("-E") & set(config.pattern) and config.mlp_hidden_act != activation:
        found.append(f"mlp_hidden_act is {config.mlp_hidden_act!r}, must be {activation!r}")
    if "E" in config.pattern and config.gated_mlp:
        found.append("gated_mlp is true, must be false with experts")
    return found

"""Single-tower Nemotron-H models, whose tensors have our names under another prefix.

Only keys of config.json that the family's code reads can change what a model computes: they are mapped, or refused
where our towers compute something else. All other keys describe how a model was trained, saved or served and are left
out. What code of somebody's own computes beside that shows in tensors that nothing here has a place for.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twotower.checkpoints.backbone import Backbone, tower_shapes
from twotower.checkpoints.families.family import TensorSource
from twotower.checkpoints.families.settings import checked
from twotower.checkpoints.hf.config_file import read_raw_config
from twotower.checkpoints.hf.tensor_files import TensorSpec
from twotower.config import CARRIED_KEYS, TwoTowerConfig
from twotower.config_rules import FILE_KEYS

# The token that the family's tokenizers keep free, which the released two-tower models use as the mask.
MASK_TOKEN_ID = 3

# What stands in a pattern before layers for multi-token prediction
MTP_MARK = "/"
_PREFIXES = ("backbone.", "model.", "language_model.backbone.", "language_model.model.")
# transformers has renamed the kinds of layer; released files have either name.
_LAYER_KINDS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-", "moe": "E"}
# The released key <- the names that it has in other files: of transformers, of Megatron-LM and of older releases. The
# released key wins, then the first of the others.
_OTHER_NAMES = {
    "head_dim": ("attention_head_dim", "kv_channels"),
    "layer_norm_epsilon": ("norm_eps", "rms_norm_eps"),
    "mlp_hidden_act": ("hidden_act",),
    "num_key_value_heads": ("num_query_groups",),
    "mamba_num_heads": ("mamba_n_heads",),
    "mamba_head_dim": ("mamba_d_head",),
    "ssm_state_size": ("mamba_state_dim", "mamba_d_state"),
    "n_groups": ("mamba_num_groups", "mamba_n_groups"),
    "conv_kernel": ("mamba_d_conv",),
    "use_conv_bias": ("mamba_conv_bias",),
    "time_step_limit": ("mamba_dt_limit",),
    "n_routed_experts": ("num_local_experts",),
}
_LAYER_KEYS = ("layers_block_type", "layer_types", "hybrid_override_pattern")
# What the released code takes where the file names none, whatever the width and the number of heads.
_HEAD_DIM = 128
# Keys that say what the pattern of the layers says, or how the file was written.
_DROPPED = ("auto_map", "layers_block_type", "layer_types", "num_hidden_layers", "transformers_version")
# What transformers writes for a model of this family beside the keys that we carry
_TRANSFORMERS_KEYS = (
    "is_encoder_decoder",
    "moe_shared_expert_overlap",
    "mtp_hybrid_override_pattern",
    "mtp_layers_block_type",
    "num_nextn_predict_layers",
    "output_router_logits",
    "return_dict",
)
# Keys that change what the model computes, in a way that our towers don't follow.
_REFUSED = ("sliding_window",)


def open_nemotron_h(
    raw: Mapping[str, Any], source: TensorSource, tokenizer: str | None, documents: Mapping[str, bytes]
) -> Backbone:
    """The Nemotron-H model whose config.json, written by the released code or by transformers, is `raw`.

    Layers for multi-token prediction (`mtp.*`) are skipped: they are not part of the backbone. Raises ValueError for a
    setting under which the model computes something that our towers don't.
    """
    known = {FILE_KEYS.get(f.name, f.name) for f in dataclasses.fields(TwoTowerConfig)} | CARRIED_KEYS
    kept = {key: value for key, value in ({"head_dim": _HEAD_DIM} | _released_keys(raw)).items() if key in known}
    config = TwoTowerConfig.from_dict({**kept, "architectures": ["NemotronHTwoTowerForCausalLM"]})
    names: dict[str, str] = {}
    heads = []
    for name in source.specs:
        prefix = next((p for p in _PREFIXES if name.startswith(p)), "")
        ours = name.removeprefix(prefix)
        if name.startswith("mtp.") or ours.startswith("mtp."):
            heads.append(name)
        elif not (name == "lm_head.weight" and config.tie_word_embeddings):
            names[name] = ours
    if len(set(names.values())) != len(names):
        raise ValueError(f"a tensor is there under two of the prefixes {list(_PREFIXES)}; keep one of them")
    beyond = (raw.get("hybrid_override_pattern") or "").partition(MTP_MARK)[2]

    specs = {ours: source.specs[name] for name, ours in names.items()}
    zeros = _missing_biases(config, specs)

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in source.stream(names):
            yield names[name], tensor
        for name, spec in zeros.items():
            yield name, torch.zeros(spec.shape, dtype=spec.dtype)

    return Backbone(
        config=config,
        specs=specs | zeros,
        stream=stream,
        tokenizer=tokenizer,
        documents=documents,
        mask_token_id=raw.get("mask_token_id", _free_token(tokenizer)),
        skipped=tuple(heads) or ((f"{MTP_MARK}{beyond} of the pattern",) if beyond else ()),
    )


def _missing_biases(config: TwoTowerConfig, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The biases of attention, or of routed experts, if the file has none of them: transformers' layers lack them."""
    missing: dict[str, TensorSpec] = {}
    for kind in (r"\.experts\..*\.bias$", r"\.[qkvo]_proj\.bias$"):
        wanted = {name: shape for name, shape in tower_shapes(config).items() if re.search(kind, name)}
        if "embeddings.weight" in specs and not set(wanted) & set(specs):
            missing |= {name: TensorSpec(specs["embeddings.weight"].dtype, shape) for name, shape in wanted.items()}
    return missing


def _free_token(tokenizer: str | None) -> int | None:
    """The token that the family keeps free, where the model has its tokenizer: there it is a control token."""
    added = json.loads(tokenizer).get("added_tokens", []) if tokenizer else []
    return next((MASK_TOKEN_ID for token in added if token["id"] == MASK_TOKEN_ID and token["special"]), None)


def read_one_tower_config(directory: Path) -> TwoTowerConfig:
    """The config.json of a model to be trained from nothing, as we or transformers write it for a Nemotron-H model.

    Raises FileNotFoundError without one, ValueError for a setting that our towers don't compute or, since this file may
    be written by hand, a key that neither we nor transformers know.
    """
    raw = _released_keys(read_raw_config(directory))
    return TwoTowerConfig.from_dict({key: value for key, value in raw.items() if key not in _TRANSFORMERS_KEYS})


def _released_keys(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the released keys for what its code reads. Raises ValueError for what our towers don't compute.

    A key that is null says nothing, except for tokens, of which there may be none.
    """
    layers = checked({key: raw[key] for key in _LAYER_KEYS if key in raw})
    refused = [f"{key} is {raw[key]}" for key in _REFUSED if raw.get(key)]
    if refused:
        raise ValueError(f"{'; '.join(refused)} in config.json, must be null: our towers don't compute that")
    kept = {k: v for k, v in raw.items() if k not in _DROPPED and (v is not None or k.endswith("_token_id"))}
    for key, others in _OTHER_NAMES.items():
        found = [kept.pop(name) for name in others if name in kept]
        if found:
            kept.setdefault(key, found[0])
    kept["hybrid_override_pattern"] = _pattern(layers)
    return kept


def _pattern(raw: Mapping[str, Any]) -> str:
    """One character per layer, from layers_block_type or from a pattern with marks of Megatron-LM: | between stages of
    a pipeline, and / before each group of layers for multi-token prediction."""
    kinds = raw.get("layers_block_type") or raw.get("layer_types") or ()
    strange = sorted(set(kinds) - set(_LAYER_KINDS))
    if strange:
        raise ValueError(f"layers_block_type has {strange}, allowed are {list(_LAYER_KINDS)}")
    listed = "".join(_LAYER_KINDS[kind] for kind in kinds)
    pattern = (raw.get("hybrid_override_pattern") or "").split(MTP_MARK)[0].replace("|", "")
    if listed and pattern and listed != pattern:
        raise ValueError(f"layers_block_type says {listed!r}, hybrid_override_pattern {pattern!r}; they must agree")
    return listed or pattern

"""Single-tower Nemotron-H directories, whose tensors have our names under another prefix."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from twotower.checkpoints.backbone import Backbone
from twotower.checkpoints.hf.config_file import read_raw_config
from twotower.checkpoints.hf.tensor_files import scan
from twotower.checkpoints.hf.tokenizer_file import read_tokenizer_text
from twotower.config import TwoTowerConfig

# The token that the family keeps free, which the released two-tower models use as the mask.
MASK_TOKEN_ID = 3

_PREFIXES = ("backbone.", "model.")
# transformers has renamed the kinds of layer; released files have either name.
_LAYER_KINDS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-", "moe": "E"}
# Keys of transformers' config.json that do not change what is computed, or repeat what another key says.
_DROPPED = (
    "auto_map",
    "layers_block_type",
    "layer_types",
    "num_hidden_layers",
    "rms_norm_eps",
    "moe_shared_expert_overlap",
    "moe_latent_size",
    "output_router_logits",
    "mtp_layers_block_type",
    "mtp_hybrid_override_pattern",
    "num_nextn_predict_layers",
    "transformers_version",
)


def open_nemotron_h(directory: Path, raw: Mapping[str, Any], documents: Mapping[str, bytes]) -> Backbone:
    """Opens a Nemotron-H directory, written by the released code or by transformers, whose config.json is `raw`.

    Multi-token prediction heads (`mtp.*`) are left out: they are not part of the backbone. Raises ValueError for a
    setting under which the model computes something that our towers don't.
    """
    config = _config({**raw, "architectures": ["NemotronHTwoTowerForCausalLM"]})
    files = scan(directory)
    names: dict[str, str] = {}
    for name in files.specs:
        prefix = next((p for p in _PREFIXES if name.startswith(p)), "")
        if not name.startswith("mtp.") and not (name == "lm_head.weight" and config.tie_word_embeddings):
            names[name] = name.removeprefix(prefix)
    if len(set(names.values())) != len(names):
        raise ValueError(f"{directory} has a tensor under both prefixes {list(_PREFIXES)}; keep one of them")

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in files.stream(names):
            yield names[name], tensor

    specs = {ours: files.specs[name] for name, ours in names.items()}
    return Backbone(
        config=config,
        specs=specs,
        stream=stream,
        tokenizer=read_tokenizer_text(directory),
        documents=documents,
        mask_token_id=raw.get("mask_token_id", MASK_TOKEN_ID),
    )


def read_one_tower_config(directory: Path) -> TwoTowerConfig:
    """The config.json of a model to be trained from nothing, as we or transformers write it for a Nemotron-H model.

    Raises FileNotFoundError without one, ValueError for a setting that our towers don't compute.
    """
    return _config(read_raw_config(directory))


def _config(raw: Mapping[str, Any]) -> TwoTowerConfig:
    for key in ("moe_latent_size", "sliding_window"):
        if raw.get(key) is not None:
            raise ValueError(f"{key} is {raw[key]} in config.json, must be null: our towers don't compute that")
    kept: dict[str, Any] = {key: value for key, value in raw.items() if key not in _DROPPED}
    if "hybrid_override_pattern" not in kept:
        kinds = raw.get("layers_block_type", raw.get("layer_types", []))
        strange = sorted(set(kinds) - set(_LAYER_KINDS))
        if strange:
            raise ValueError(f"layers_block_type has {strange}, allowed are {list(_LAYER_KINDS)}")
        kept["hybrid_override_pattern"] = "".join(_LAYER_KINDS[kind] for kind in kinds)
    if "head_dim" not in kept and "attention_head_dim" in kept:
        kept["head_dim"] = kept["attention_head_dim"]
    return TwoTowerConfig.from_dict(kept)

"""Single-tower Nemotron-H directories: the tensors have our names under another prefix."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from twotower.checkpoints.backbone import Backbone
from twotower.checkpoints.hf.config_file import CONFIG_FILE, config_bytes, with_stored_dtype
from twotower.checkpoints.hf.tensor_files import TensorSpec, scan
from twotower.checkpoints.hf.tensor_writer import write_tensors
from twotower.checkpoints.hf.tokenizer_file import TOKENIZER_FILE
from twotower.config import TwoTowerConfig
from twotower.model.one_tower import OneTower

MASK_TOKEN_ID = 3

_PREFIXES = ("backbone.", "model.")
# transformers renamed the kinds of layer once; both names are in released files.
_LAYER_KINDS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-", "moe": "E"}
# Keys of transformers that say nothing about the layers, or say it a second time.
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
    """Opens a Nemotron-H directory, whose config.json is `raw`, as the released code or transformers wrote it.

    The heads that predict several tokens ahead (`mtp.*`) are no part of the backbone and stay out. Raises ValueError
    for a switch that computes something else.
    """
    config = _config(raw)
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
    tokenizer = directory / "tokenizer.json"
    return Backbone(
        config=config,
        specs=specs,
        stream=stream,
        tokenizer=tokenizer.read_text(encoding="utf-8") if tokenizer.exists() else None,
        documents=documents,
        mask_token_id=raw.get("mask_token_id", MASK_TOKEN_ID),
    )


def save_backbone(
    config: TwoTowerConfig,
    tensors: Iterable[tuple[str, Tensor]],
    path: str | Path,
    dtype: torch.dtype,
    *,
    tokenizer: tokenizers.Tokenizer | None = None,
    documents: Mapping[str, bytes] | None = None,
) -> None:
    """Writes the released tensors of a `OneTower`, which come one at a time, and further `documents` by file name as a
    single-tower directory of `dtype` that `open_nemotron_h` reads; the parts that no model rounds are float32."""
    with torch.device("meta"):
        rounded = OneTower(config, dtype=dtype).released_tensors()
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in rounded.items()}
    written = dict(documents or {})
    if tokenizer is not None:
        written[TOKENIZER_FILE] = tokenizer.to_str(pretty=True).encode()
    written[CONFIG_FILE] = config_bytes(with_stored_dtype(config, dtype))
    write_tensors(path, specs, ((n, tensor.to(specs[n].dtype)) for n, tensor in tensors), documents=written)


def _config(raw: Mapping[str, Any]) -> TwoTowerConfig:
    for key in ("moe_latent_size", "sliding_window"):
        if raw.get(key) is not None:
            raise ValueError(f"{key} is {raw[key]} in config.json, must be null; this backbone computes something else")
    kept: dict[str, Any] = {key: value for key, value in raw.items() if key not in _DROPPED}
    if "hybrid_override_pattern" not in kept:
        kinds = raw.get("layers_block_type", raw.get("layer_types", []))
        strange = sorted(set(kinds) - set(_LAYER_KINDS))
        if strange:
            raise ValueError(f"layers_block_type has {strange}, allowed are {list(_LAYER_KINDS)}")
        kept["hybrid_override_pattern"] = "".join(_LAYER_KINDS[kind] for kind in kinds)
    if "head_dim" not in kept and "attention_head_dim" in kept:
        kept["head_dim"] = kept["attention_head_dim"]
    return TwoTowerConfig.from_dict(kept | {"architectures": ["NemotronHTwoTowerForCausalLM"]})

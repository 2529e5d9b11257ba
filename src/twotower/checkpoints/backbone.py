"""What every kind of single-tower model file is opened as, before it becomes two towers."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from twotower.checkpoints.hf.tensor_files import TensorSpec
from twotower.config import TwoTowerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backbone:
    """A single-tower model: what its tensors are, and a pass over them.

    `specs` names the tensors as inside a tower (`embeddings.weight`, `layers.{i}…`, `norm_f.weight`), and
    `lm_head.weight`; `stream` yields each of them once, in any order, on the CPU. `tokenizer` is the text of a
    tokenizer.json, `documents` are further files worth carrying over. `mask_token_id` is the token that this family
    keeps free for the mask, if any.
    """

    config: TwoTowerConfig
    specs: Mapping[str, TensorSpec]
    stream: Callable[[], Iterator[tuple[str, Tensor]]]
    tokenizer: str | None
    documents: Mapping[str, bytes]
    mask_token_id: int | None = None


def llama_config(
    *,
    num_llama_layers: int,
    rms_norm_eps: float,
    rope_theta: float,
    **fields: Any,
) -> TwoTowerConfig:
    """The config of a Llama-family backbone: each of its layers is an attention and a gated MLP layer of ours."""
    raw = {
        "architectures": ["NemotronHTwoTowerForCausalLM"],
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "*-" * num_llama_layers,
        "layer_norm_epsilon": rms_norm_eps,
        "use_rope": True,
        "rope_theta": rope_theta,
        "gated_mlp": True,
        "mlp_hidden_act": "silu",
    }
    return TwoTowerConfig.from_dict(raw | fields)


def half_rotation_rows(weight: Tensor, num_heads: int) -> Tensor:
    """Reorders a query or key projection (h·p, …) from interleaved RoPE, pairs (0, 1), (2, 3)…, to ours, (i, i + p/2).

    Attention only sees products of queries and keys, so reordering both alike changes nothing.
    """
    pairs = weight.unflatten(0, (num_heads, -1, 2))  # (h, p/2, 2, …)
    return pairs.transpose(1, 2).flatten(0, 2)

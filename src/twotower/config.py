"""The model's configuration: one frozen dataclass, read from and written to the released `config.json`."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

LAYER_KINDS = "M*-E"

# Keys of released and Hugging Face configs that change nothing about inference. They are kept and written back, so
# that a config read and written again is byte for byte the same. A key that is neither here nor a field raises: if it
# were ignored, a misspelt key would give a wrong model without a word.
CARRIED_KEYS = frozenset(
    (
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "chunk_size",
        "dtype",
        "expand",
        "hidden_dropout",
        "initializer_range",
        "layers_block_type",
        "mamba_ssm_cache_dtype",
        "max_position_embeddings",
        "model_type",
        "n_shared_experts",
        "norm_eps",
        "num_hidden_layers",
        "num_logits_to_keep",
        "num_query_groups",
        "pad_token_id",
        "partial_rotary_factor",
        "rescale_prenorm_residual",
        "sliding_window",
        "time_step_floor",
        "time_step_max",
        "time_step_min",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "use_mamba_kernels",
        "mamba_proj_bias",
        "mamba_hidden_act",
        "attention_head_dim",
        "conversion_source",
    )
)

# Our field -> the released file's key, where they differ.
_FILE_KEYS = {
    "pattern": "hybrid_override_pattern",
    "mamba_state_size": "ssm_state_size",
    "mamba_num_groups": "n_groups",
    "expert_num_groups": "n_group",
    "expert_topk_groups": "topk_group",
    "num_experts": "n_routed_experts",
    "expert_intermediate_size": "moe_intermediate_size",
    "shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoTowerConfig:
    """Shapes and switches of a two-tower model; both towers have the same (arXiv 2606.26493; layers as Nemotron-H's).

    Of the whole tower: `vocab_size`, the width `hidden_size`, and `pattern`, which has one character per layer: `M`
    Mamba-2, `*` attention, `-` MLP, `E` experts. `layer_norm_epsilon` is that of every RMSNorm; `residual_in_fp32`
    keeps the sum of the layers in float32; `tie_word_embeddings` makes the head the embedding. `bos_token_id`,
    `eos_token_id` (one or several) and `mask_token_id` are the special tokens. `block_size` is the block
    length that the denoiser was trained at. `carried` is the config.json that this one was read from; its keys that
    inference does not read are written back unchanged. Raises ValueError that lists every field that is not allowed.

    Of `*`: `num_attention_heads` of width `head_dim`, which share `num_key_value_heads`; `attention_bias`; rotary
    positions with `use_rope` and `rope_theta`. Of `-`: its width `intermediate_size`, its activation `mlp_hidden_act`,
    which experts have too, `mlp_bias`, and `gated_mlp`. `use_rope` and `gated_mlp` turn the pattern `*-*-…` into a
    Llama-family backbone.

    Of `M`: `mamba_num_heads` of width `mamba_head_dim`, with states of width `mamba_state_size` and `mamba_num_groups`
    of B and C; a convolution over `conv_kernel` tokens, with a bias if `use_conv_bias`; `use_bias` in the projections;
    step sizes clamped to `time_step_limit`. Of `E`: `num_experts` of width `expert_intermediate_size`, of which each
    token uses `num_experts_per_tok`, beside a shared expert of width `shared_expert_intermediate_size`; the chosen lie
    in `expert_topk_groups` of `expert_num_groups`; their weights sum to `routed_scaling_factor` if `norm_topk_prob`.
    """

    vocab_size: int
    hidden_size: int
    pattern: str
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    mask_token_id: int = 3
    block_size: int = 16
    # `*`
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    attention_bias: bool = False
    use_rope: bool = False
    rope_theta: float = 10000.0
    # `-`, and the experts of `E`
    intermediate_size: int = 0
    mlp_hidden_act: str = "relu2"
    mlp_bias: bool = False
    gated_mlp: bool = False
    # `M`
    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    mamba_state_size: int = 0
    mamba_num_groups: int = 1
    conv_kernel: int = 4
    use_conv_bias: bool = True
    use_bias: bool = False
    time_step_limit: tuple[float, float] = (0.0, float("inf"))
    # `E`
    num_experts: int = 0
    num_experts_per_tok: int = 0
    expert_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    expert_num_groups: int = 1
    expert_topk_groups: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    carried: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ValueError("invalid config: " + "; ".join(problems))

    @property
    def num_layers(self) -> int:
        """Layers of one tower."""
        return len(self.pattern)

    @property
    def mamba_width(self) -> int:
        """Inner width of a Mamba-2 layer, h·p."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_width(self) -> int:
        """Channels of the convolution: x, B and C, h·p + 2·g·n."""
        return self.mamba_width + 2 * self.mamba_num_groups * self.mamba_state_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text; `eos_token_id` is one, several or None."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """A config from the content of a released config.json.

        Raises ValueError that names the keys that are unknown or missing, or the values that are not allowed.
        """
        by_file_key = {_FILE_KEYS.get(f.name, f.name): f.name for f in dataclasses.fields(cls)}
        del by_file_key["carried"]
        unknown = sorted(set(raw) - set(by_file_key) - CARRIED_KEYS)
        if unknown:
            raise ValueError(
                f"config has unknown keys {unknown}; known keys are {sorted(by_file_key)} and the ignored "
                f"{sorted(CARRIED_KEYS)}; correct the spelling or remove them"
            )
        missing = [k for k in ("vocab_size", "hidden_size", "hybrid_override_pattern") if k not in raw]
        if missing:
            raise ValueError(f"config lacks {missing}; a two-tower config.json needs them")
        depth = raw.get("num_hidden_layers", len(raw["hybrid_override_pattern"]))
        if depth != len(raw["hybrid_override_pattern"]):
            raise ValueError(
                f"num_hidden_layers is {depth} but hybrid_override_pattern has {len(raw['hybrid_override_pattern'])} "
                "characters; they must be equal"
            )
        known = {name: raw[key] for key, name in by_file_key.items() if key in raw}
        known = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
        # All keys are carried, in the file's order, so that writing gives the same bytes.
        return cls(**known, carried=dict(raw))

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json: the keys of `carried` in their order with this config's values, then every other
        field that is not at its default."""
        ours: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            if f.name != "carried":
                value = getattr(self, f.name)
                ours[_FILE_KEYS.get(f.name, f.name)] = list(value) if isinstance(value, tuple) else value
        if not self.carried:
            return {"architectures": ["NemotronHTwoTowerForCausalLM"], "model_type": "nemotron_h"} | ours
        defaults = {_FILE_KEYS.get(f.name, f.name): f.default for f in dataclasses.fields(self) if f.name != "carried"}
        out = {key: ours.get(key, value) for key, value in self.carried.items()}
        if "num_hidden_layers" in out:
            out["num_hidden_layers"] = self.num_layers
        for key, value in ours.items():
            if key not in out and (tuple(value) if isinstance(value, list) else value) != defaults[key]:
                out[key] = value
        return out

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Reads a config.json file. `Infinity` is accepted: it is not JSON, but the released file has it.

        Raises FileNotFoundError, and ValueError as `from_dict` does.
        """
        try:
            raw = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}; download it again") from error
        if not isinstance(raw, dict):
            raise ValueError(f"{path} holds a {type(raw).__name__}, not an object; download it again")
        return cls.from_dict(raw)

    def to_json(self, path: str | Path) -> None:
        """Writes `to_dict` to a file, as the released config.json is written."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1))


def _problems(c: TwoTowerConfig) -> list[str]:
    """One sentence for each field whose value is not allowed, with the names of config.json."""
    found = []

    def need(ok: bool, text: str) -> None:
        if not ok:
            found.append(text)

    def positive(*names: str) -> None:
        for name in names:
            need(getattr(c, name) >= 1, f"{_FILE_KEYS.get(name, name)} is {getattr(c, name)}, must be at least 1")

    positive("vocab_size", "hidden_size", "block_size")
    need(bool(c.pattern), "hybrid_override_pattern is empty, must name at least one layer")
    strange = sorted(set(c.pattern) - set(LAYER_KINDS))
    need(not strange, f"hybrid_override_pattern has {strange}, allowed are {list(LAYER_KINDS)}")
    need(0 <= c.mask_token_id < c.vocab_size, f"mask_token_id is {c.mask_token_id}, must be in [0, {c.vocab_size})")
    need(c.layer_norm_epsilon > 0, f"layer_norm_epsilon is {c.layer_norm_epsilon}, must be above 0")
    if "*" in c.pattern:
        positive("num_attention_heads", "num_key_value_heads", "head_dim")
        if c.num_key_value_heads >= 1:
            need(
                c.num_attention_heads % c.num_key_value_heads == 0,
                f"num_attention_heads {c.num_attention_heads} must be a multiple of num_key_value_heads "
                f"{c.num_key_value_heads}",
            )
        need(not c.use_rope or c.head_dim % 2 == 0, f"head_dim is {c.head_dim}, must be even with use_rope")
    if "-" in c.pattern:
        positive("intermediate_size")
    allowed = ("silu",) if c.gated_mlp else ("relu2",)
    need(
        c.mlp_hidden_act in allowed,
        f"mlp_hidden_act is {c.mlp_hidden_act!r}, must be {allowed[0]!r} with gated_mlp={c.gated_mlp}",
    )
    if "M" in c.pattern:
        positive("mamba_num_heads", "mamba_head_dim", "mamba_state_size", "mamba_num_groups")
        need(c.conv_kernel >= 2, f"conv_kernel is {c.conv_kernel}, must be at least 2")
        if c.mamba_num_groups >= 1:
            need(
                c.mamba_num_heads % c.mamba_num_groups == 0,
                f"mamba_num_heads {c.mamba_num_heads} must be a multiple of n_groups {c.mamba_num_groups}",
            )
        limit = c.time_step_limit
        need(
            len(limit) == 2 and 0 <= limit[0] < limit[1],
            f"time_step_limit is {limit}, must be 0 <= low < high, two numbers",
        )
        act = c.carried.get("mamba_hidden_act", "silu")
        need(act == "silu", f"mamba_hidden_act is {act!r}, must be 'silu'")
    if "E" in c.pattern:
        positive("num_experts", "expert_intermediate_size", "expert_num_groups", "shared_expert_intermediate_size")
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
        need(not c.gated_mlp, "gated_mlp with experts is not a released layout; use '-' layers for gated MLPs")
    return found

"""The model's configuration: one frozen dataclass, read from and written to the released `config.json`."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from twotower.config_rules import FILE_KEYS, SEEDED_KINDS, config_problems
from twotower.rope import AttentionType, Rope

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
        "quantization_config",
        "compression_config",
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoTowerConfig:
    """Shapes and switches of a two-tower model; both towers have the same (arXiv 2606.26493; layers as Nemotron-H's).

    `denoiser_layers`, ascending indices into the pattern, are the layers that the denoiser has; None, the released
    form, are all. Each is seeded by the context tower's layer of the same index. A layer that is left out adds nothing.

    Of the whole tower: `vocab_size`, the width `hidden_size`, and `pattern`, which has one character per layer: `M`
    Mamba-2, `G` gated delta net, `S` Mamba-1, `R` RG-LRU, `*` attention, `-` MLP, `E` experts. `layer_norm_epsilon` is
    that of every norm; `residual_in_fp32` keeps the sum of the layers in float32; `tie_word_embeddings` makes the
    head's weight the embedding, and `head_bias` gives the head a bias. `bos_token_id`, `eos_token_id` (one or several)
    and `mask_token_id` are the special tokens. `block_size` is the block length that the denoiser was trained at.
    `carried` is the config.json that this one was read from; its keys that inference does not read are written back
    unchanged. Raises ValueError that lists every field that is not allowed.

    Other families differ from Nemotron-H in these: `norm_type` is "rms", or "layer" for LayerNorm, with `norm_bias`;
    `embedding_norm` puts a norm behind the embeddings; `norm_offset` is added to every norm's weight. A layer has a
    norm before its mixer (`pre_norm`), behind it (`post_norm`), or both. `embedding_scale` multiplies embeddings,
    `residual_scale` what a layer adds, beside `attention_output_scale`, `mlp_output_scale` and `mamba_output_scale` for
    the layers of one kind, `logit_scale` logits, which `logit_softcap` c then limits to c·tanh(logits / c).
    `num_positions` rows are a table of learnt positions that is added to the embeddings. Where the kinds of `parallel`
    follow each other in the pattern, they read the same residual stream: "*-" makes every MLP read what the attention
    before it reads.

    Of `*`: `num_attention_heads` of width `head_dim`, which share `num_key_value_heads`; `attention_bias`. Scores are
    multiplied by `attention_scale`, by default head_dim^-0.5, which `attention_scale_by_depth` divides by n in the n-th
    attention layer, and limited by `attention_softcap` as logits are; `alibi_slopes` are as in `ops.attention`;
    `attention_sinks` adds to each head's softmax one learnt score without a value; `attention_gate` multiplies what
    heads read by the sigmoid of a projection of the layer's input. `qk_norm` puts a norm on queries and
    keys: of each head with one weight ("head") or a weight per head ("each"), or of all heads together ("all"), with a
    bias if `qk_norm_bias`. `qk_norm_behind_rope` puts it behind RoPE, and only into layers with RoPE. Queries, keys and
    values are clamped to ±`clip_qkv`, behind a norm in front of RoPE.
    With a `kv_lora_rank` keys and values are made of latents, and `q_lora_rank`, `qk_rope_head_dim`, `qk_nope_head_dim`
    and `v_head_dim` are as in `LatentProjection`.
    `attention_types` has the settings that differ between layers, and `attention_pattern` one digit per `*` layer, the
    index of its type; without types all layers see everything, with RoPE where `use_rope` says so, by `rope_theta`.

    Of `-`: its width `intermediate_size`, and what experts have too: the activation `mlp_hidden_act`, `mlp_bias`, and
    `gated_mlp`, where `glu_limit`, `glu_offset` and `glu_gate_scale` are as in `ops.mlp.Activation`. `use_rope` and
    `gated_mlp` turn the pattern `*-*-…` into a Llama-family backbone.

    Of `M`: `mamba_num_heads` of width `mamba_head_dim`, with states of width `mamba_state_size` and `mamba_num_groups`
    of B and C; a convolution over `conv_kernel` tokens, with a bias if `use_conv_bias`; `use_bias` in the projections;
    step sizes clamped to `time_step_limit`. Its output is multiplied by silu(z) before an RMSNorm of each group
    (`mamba_norm` "after_gate"), behind it ("before_gate"), or without a norm (None). `mamba_scales` are five factors of
    what the input projection makes: z, x, B, C and step sizes.

    Of `G`: the first four of these, where heads are those of values, groups those of keys and queries, and the state's
    width is that of keys; and `conv_kernel`.

    Of `S`: channels h·p of `mamba_num_heads` and `mamba_head_dim`, states of width `mamba_state_size` for each;
    `conv_kernel`, `use_conv_bias`, `use_bias` and `time_step_limit` as of `M`; step sizes of rank `mamba_dt_rank`;
    RMSNorms of step sizes, B and C with `mamba_inner_epsilon`, without it none. Of `R`: `mamba_num_heads` blocks of
    `mamba_head_dim` channels, whose gates read their own block; `conv_kernel`, `use_conv_bias` and `use_bias`.

    Of `E`: `num_experts` of width `expert_intermediate_size`, of which each token uses `num_experts_per_tok`, beside a
    shared expert of width `shared_expert_intermediate_size` (0: none), weighed by a sigmoid if `shared_expert_gate`;
    the chosen lie in `expert_topk_groups` of `expert_num_groups`; their weights sum to `routed_scaling_factor` if
    `norm_topk_prob`. `router` makes scores of logits, with a `router_bias` or not. `weigh_expert_inputs` multiplies an
    expert's input by its weight, not its output. `moe_latent_size` is the width that experts work in, where that is not
    `hidden_size` (0).
    """

    vocab_size: int
    hidden_size: int
    pattern: str
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = False
    tie_word_embeddings: bool = False
    head_bias: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    mask_token_id: int = 3
    block_size: int = 16
    denoiser_layers: tuple[int, ...] | None = None
    embedding_norm: bool = False
    norm_type: str = "rms"
    norm_bias: bool = False
    norm_offset: float = 0.0
    pre_norm: bool = True
    post_norm: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    num_positions: int = 0
    parallel: str = ""
    # `*`
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    attention_bias: bool = False
    attention_scale: float | None = None
    attention_scale_by_depth: bool = False
    attention_softcap: float | None = None
    alibi_slopes: tuple[float, ...] = ()
    attention_sinks: bool = False
    attention_gate: bool = False
    attention_output_scale: float = 1.0
    qk_norm: str | None = None
    qk_norm_bias: bool = False
    qk_norm_behind_rope: bool = False
    clip_qkv: float | None = None
    kv_lora_rank: int = 0
    q_lora_rank: int = 0
    qk_rope_head_dim: int = 0
    qk_nope_head_dim: int = 0
    v_head_dim: int = 0
    attention_types: tuple[AttentionType, ...] = ()
    attention_pattern: str = ""
    use_rope: bool = False
    rope_theta: float = 10000.0
    # `-`, and the experts of `E`
    intermediate_size: int = 0
    mlp_hidden_act: str = "relu2"
    mlp_bias: bool = False
    gated_mlp: bool = False
    glu_limit: float | None = None
    glu_offset: float = 0.0
    glu_gate_scale: float = 1.0
    mlp_output_scale: float = 1.0
    # `M`
    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    mamba_state_size: int = 0
    mamba_num_groups: int = 1
    conv_kernel: int = 4
    use_conv_bias: bool = True
    use_bias: bool = False
    time_step_limit: tuple[float, float] = (0.0, float("inf"))
    mamba_norm: str | None = "after_gate"
    mamba_scales: tuple[float, ...] = ()
    mamba_output_scale: float = 1.0
    # `S`
    mamba_dt_rank: int = 0
    mamba_inner_epsilon: float | None = None
    # `E`
    num_experts: int = 0
    num_experts_per_tok: int = 0
    expert_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    expert_num_groups: int = 1
    expert_topk_groups: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    router: str = "sigmoid"
    router_bias: bool = False
    weigh_expert_inputs: bool = False
    moe_latent_size: int = 0
    shared_expert_gate: bool = False
    carried: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        problems = config_problems(self)
        if problems:
            raise ValueError("invalid config: " + "; ".join(problems))

    @property
    def trained_positions(self) -> int | None:
        """How many tokens the texts had, at most, that the backbone was trained on, if config.json says so."""
        found = self.carried.get("max_position_embeddings")
        return found if type(found) is int else self.num_positions or None

    @property
    def num_layers(self) -> int:
        """Layers of one tower."""
        return len(self.pattern)

    @property
    def denoiser_indices(self) -> tuple[int, ...]:
        """For each layer of the denoiser in order the index in the pattern of the context tower's layer that seeds
        it."""
        return tuple(range(self.num_layers)) if self.denoiser_layers is None else self.denoiser_layers

    @property
    def last_seeding_layer(self) -> int:
        """The index of the last layer through which the denoiser reads the context, -1 without any."""
        return max([-1, *(i for i in self.denoiser_indices if self.pattern[i] in SEEDED_KINDS)])

    def layer_scale(self, kind: str) -> float:
        """What multiplies the output of a layer of this kind before it is added to the residual stream."""
        own = {"*": self.attention_output_scale, "-": self.mlp_output_scale, "M": self.mamba_output_scale}
        return self.residual_scale * own.get(kind, 1.0)

    @property
    def attention_kinds(self) -> tuple[AttentionType, ...]:
        """The different settings of attention layers: `attention_types`, or the one that `use_rope` describes."""
        if self.attention_types:
            return self.attention_types
        return (AttentionType(rope_parameters=Rope(rope_theta=self.rope_theta) if self.use_rope else None),)

    def rope_length(self, length: int) -> int:
        """The least number of tokens for which RoPE in every layer turns as it does in texts of `length` tokens; 0 for
        most models, whose RoPE is the same for all texts."""
        ropes = [kind.rope_parameters for kind in self.attention_kinds]
        return max(0 if rope is None else rope.length_class(length) for rope in ropes)

    @property
    def attention_indices(self) -> tuple[int, ...]:
        """For each `*` layer in order the index of its settings in `attention_kinds`."""
        return tuple(map(int, self.attention_pattern or "0" * self.pattern.count("*")))

    @property
    def joins(self) -> tuple[bool, ...]:
        """For each layer whether it reads the residual stream that the layer before it reads; see `parallel`."""
        found = [False] * self.num_layers
        place = self.pattern.find(self.parallel) if self.parallel else -1
        while place >= 0:
            end = place + len(self.parallel)
            found[place + 1 : end] = [True] * (len(self.parallel) - 1)
            place = self.pattern.find(self.parallel, end)
        return tuple(found)

    @property
    def mamba_width(self) -> int:
        """Inner width of a recurrent layer, h·p."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_width(self) -> int:
        """Channels of the convolution in `M` and `G` layers: x, B and C, h·p + 2·g·n."""
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
        by_file_key = {FILE_KEYS.get(f.name, f.name): f.name for f in dataclasses.fields(cls)}
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
        if "attention_types" in known:
            known["attention_types"] = tuple(map(AttentionType.from_dict, known["attention_types"]))
        # All keys are carried, in the file's order, so that writing gives the same bytes.
        return cls(**known, carried=dict(raw))

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json: the keys of `carried` in their order with this config's values, then every other
        field that is not at its default."""
        ours: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            if f.name != "carried":
                value = getattr(self, f.name)
                ours[FILE_KEYS.get(f.name, f.name)] = _in_file(value)
        if not self.carried:
            return {"architectures": ["NemotronHTwoTowerForCausalLM"], "model_type": "nemotron_h"} | ours
        fields = (f for f in dataclasses.fields(self) if f.name != "carried")
        defaults = {FILE_KEYS.get(f.name, f.name): _in_file(f.default) for f in fields}
        out = {key: ours.get(key, value) for key, value in self.carried.items()}
        if "num_hidden_layers" in out:
            out["num_hidden_layers"] = self.num_layers
        for key, value in ours.items():
            if key not in out and value != defaults[key]:
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


def _in_file(value: Any) -> Any:
    """A field's value as JSON has it."""
    if isinstance(value, tuple):
        return [_in_file(entry) for entry in value]
    return value.to_dict() if isinstance(value, AttentionType) else value

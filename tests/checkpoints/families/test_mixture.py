"""Mixtures of experts, made small and random by transformers and written by it, against its own logits."""

from pathlib import Path
from typing import Any

import pytest
import torch

import twotower
from twotower.checkpoints import init

transformers = pytest.importorskip("transformers", minversion="5")

VOCABULARY = 160
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # large enough for each layer to matter
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
FEW = {"num_experts": 8, "num_experts_per_tok": 3}
LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
# Layer 2 of 3 has no RoPE; chunks and the periods of its scale are shorter than the text
LLAMA4 = {"head_dim": 16, "intermediate_size_mlp": 56, "attention_chunk_size": 24, "floor_scale": 20, "attn_scale": 0.4}
LLAMA4 |= {"no_rope_layer_interval": 3, "interleave_moe_layer_step": 2}
GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.6, "attention_multiplier": 0.2}
DBRX: dict[str, Any] = {"d_model": 48, "n_heads": 4, "n_layers": 3}
DBRX |= {
    "attn_config": {"rope_theta": 500.0, "kv_n_heads": 1, "clip_qkv": 0.5},
    "rope_parameters": {"rope_theta": 500.0},
}
DBRX |= {"ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 6, "moe_top_k": 3}}
NEMOTRON = {
    "layers_block_type": ["mamba", "moe", "attention", "mlp", "moe"],
    "head_dim": 12,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 16,
    # transformers clamps step sizes from below by this, the released code by `time_step_limit`, which is 0
    "time_step_min": 1e-9,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 56,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", LOCAL),
    ("mixtral", LOCAL | {"num_experts_per_tok": 1, "sliding_window": 20, "tie_word_embeddings": True}),
    ("mixtral", LOCAL | {"num_experts_per_tok": 6, "hidden_act": "gelu_pytorch_tanh", "head_dim": 20}),
    ("qwen3_moe", MOE | {"head_dim": 16}),
    ("qwen3_moe", MOE | {"head_dim": 20, "num_key_value_heads": 1, "norm_topk_prob": True, "decoder_sparse_step": 2}),
    ("qwen3_moe", MOE | {"mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 20}),
    ("qwen2_moe", MOE | {"shared_expert_intermediate_size": 72}),
    ("qwen2_moe", MOE | {"shared_expert_intermediate_size": 24, "qkv_bias": False, "norm_topk_prob": True}),
    ("qwen2_moe", MOE | {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2}),
    ("olmoe", FEW),
    ("olmoe", FEW | {"norm_topk_prob": True, "rope_parameters": YARN}),
    ("olmoe", FEW | {"clip_qkv": 0.5}),
    ("hunyuan_v1_moe", {"num_experts": 6, "moe_topk": [2, 2, 2], "head_dim": 16}),
    ("hunyuan_v1_moe", {"num_experts": 1, "num_key_value_heads": 1, "head_dim": 20, "attention_bias": True}),
    ("llama4_text", LLAMA4 | LOCAL),
    ("llama4_text", LLAMA4 | {"num_local_experts": 4, "rope_parameters": LLAMA3, "attention_bias": True}),
    ("llama4_text", LLAMA4 | LOCAL | {"use_qk_norm": False, "no_rope_layers": [0, 1, 0], "moe_layers": [0]}),
    ("llama4_text", LLAMA4 | LOCAL | {"attention_chunk_size": None, "attn_temperature_tuning": False}),
    ("llama4_text", LLAMA4 | LOCAL | {"layer_types": ["full_attention", "chunked_attention", "chunked_attention"]}),
    ("dbrx", DBRX),
    (
        "dbrx",
        DBRX | {"ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 6, "moe_normalize_expert_weights": None}},
    ),
    ("granitemoe", LOCAL | GRANITE),
    ("granitemoeshared", LOCAL | GRANITE | {"shared_intermediate_size": 56, "tie_word_embeddings": True}),
    ("granitemoeshared", LOCAL | GRANITE),
    ("gpt_oss", LOCAL | {"head_dim": 16, "sliding_window": 20}),
    ("gpt_oss", LOCAL | {"head_dim": 20, "num_key_value_heads": 1, "num_experts_per_tok": 6, "swiglu_limit": 0.3}),
    ("nemotron_h", NEMOTRON | {"moe_latent_size": 20, "n_group": 4, "topk_group": 2}),
    ("nemotron_h", NEMOTRON | {"moe_latent_size": 60, "mlp_bias": True}),
    ("deepseek_v2", DEEPSEEK | {"q_lora_rank": None}),
    ("deepseek_v2", DEEPSEEK | {"v_head_dim": 28, "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}}),
    ("deepseek_v2", DEEPSEEK | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 3.0}),
    ("deepseek_v3", DEEPSEEK | {"attention_bias": True, "rope_interleave": False}),
    (
        "deepseek_v3",
        DEEPSEEK | {"norm_topk_prob": False, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
]


def saved(kind: str, settings: dict[str, Any], folder: Path) -> Any:
    """A random model of transformers in float32, whose biases and norms count, and its folder as transformers writes
    it."""
    sizes = SIZES | settings
    if "layers_block_type" in sizes:
        del sizes["num_hidden_layers"]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **sizes)).float()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.ndim == 1 and "inv_freq" not in name:
                tensor.add_(0.1 * torch.randn_like(tensor))
    model.save_pretrained(folder)
    return model.eval()


def logits(model: Any, ids: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids, use_cache=False).logits
    if mask_token_id < VOCABULARY:  # a token that the family keeps free
        found[..., mask_token_id] = -torch.inf
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_logits_are_transformers_and_verified_is_ar(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved(kind, settings, tmp_path / "source")
    init(tmp_path / "source", tmp_path / "out")
    ids = torch.randint(4, VOCABULARY, (2, 70), generator=torch.Generator().manual_seed(1))
    for backend in ("reference", "native"):
        model = twotower.load(tmp_path / "out", backend=backend)
        expected = logits(theirs, ids, model.config.mask_token_id)
        found = model.context_logits(ids)[..., :VOCABULARY]
        largest = expected.nan_to_num(neginf=0).abs().max().item()
        torch.testing.assert_close(found, expected, atol=1e-5 * largest, rtol=0)
    settings = {"max_new_tokens": 16, "ignore_eos": True}
    one, two = (
        twotower.generate(model, ids[:1, :30].tolist(), twotower.SamplingParams(mode=mode, **settings))
        for mode in ("ar", "verified")
    )
    assert one[0].token_ids == two[0].token_ids


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a model with its experts stacked, as transformers 5 holds them."""
    rest = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for i in range(SIZES["num_hidden_layers"]):
        prefix = f"model.layers.{i}.mlp.experts"
        gates, ups, downs = (
            torch.stack([tensors[f"{prefix}.{j}.{part}_proj.weight"] for j in range(8)])
            for part in ("gate", "up", "down")
        )
        rest |= {f"{prefix}.gate_up_proj": torch.cat((gates, ups), dim=1), f"{prefix}.down_proj": downs}
    return rest


def test_experts_may_be_stacked(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved("qwen3_moe", MOE, tmp_path / "one")
    (tmp_path / "stack").mkdir()
    (tmp_path / "stack" / "config.json").write_bytes((tmp_path / "one" / "config.json").read_bytes())
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    save_file(stacked(tensors), tmp_path / "stack" / "model.safetensors")
    for name in ("one", "stack"):
        init(tmp_path / name, tmp_path / f"{name}_out")
    first, second = ((tmp_path / f"{name}_out" / "model.safetensors").read_bytes() for name in ("one", "stack"))
    assert first == second


def test_layers_with_different_numbers_of_experts_are_refused(tmp_path: Path) -> None:
    saved("hunyuan_v1_moe", {"num_experts": 6, "moe_topk": [2, 3, 2], "head_dim": 16}, tmp_path / "source")
    with pytest.raises(
        ValueError, match=r"moe_topk \[2, 3, 2\], must be a whole number in .*, the same for all layers"
    ):
        init(tmp_path / "source", tmp_path / "out")

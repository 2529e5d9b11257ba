"""Opens a tiny random model of each family with `init` and compares it to transformers, which has made it.

    python benchmarks/families.py [--markdown] [PART-OF-A-NAME ...]

Needs the dev extra. Prints one JSON line per family, or a table. Of each model, whose weights are drawn large enough
for attention to be sharp and for every norm and bias to count, as float32:

- `difference`: the largest between its logits and the context tower's over 2 texts of 48 tokens, as a part of the
  largest logit, by PyTorch; and `native`, by the C backend, or what that lacks.
- `verified is ar`: whether mode `verified` writes the 24 tokens that `ar` writes, after 5 and after 40 tokens.
- `gguf`: the difference of a GGUF file of the same weights, written as llama.cpp's converter writes it; where the
  format has no words for a setting, of a model with another one (`IN_FILES`). "no" where llama.cpp does not have the
  family or the setting.
"""

import argparse
import importlib.util
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # read on import

import torch
import transformers
from torch import Tensor

import twotower

TOKENS, WINDOW = 48, 12
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {"rope_type": "longrope", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 24}
LONGROPE |= {"short_factor": [1.0 + j / 8 for j in range(8)], "long_factor": [2.0 + j for j in range(8)]}
GEMMA = {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": WINDOW}
GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
DEEPSEEK = {"num_key_value_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
DEEPSEEK |= {"v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
DEEPSEEK |= {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
NEMOTRON = {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "time_step_min": 1e-9}
NEMOTRON |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16}
NEMOTRON |= {"moe_shared_expert_intermediate_size": 48, "chunk_size": 16}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}

# Name -> model_type and what it sets beside SIZES
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama 3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "Llama, YaRN": ("llama", {"rope_parameters": YARN}),
    "Llama, dynamic RoPE": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0},
            "max_position_embeddings": 24,
        },
    ),
    "Mistral": ("mistral", {"sliding_window": WINDOW, "head_dim": 24}),
    "Ministral": ("ministral", {"sliding_window": WINDOW, "head_dim": 24}),
    "Qwen 2": ("qwen2", {}),
    "Qwen 2, windows": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "Qwen 3": ("qwen3", {"head_dim": 24}),
    "SmolLM 3": ("smollm3", {}),
    "Granite": ("granite", GRANITE),
    "Seed-OSS": ("seed_oss", {"head_dim": 24}),
    "Phi 3": ("phi3", {"sliding_window": WINDOW}),
    "Phi 3, LongRoPE": ("phi3", {"rope_parameters": LONGROPE, "sliding_window": None}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", {"sliding_window": WINDOW}),
    "EXAONE 3": ("exaone", {}),
    "EXAONE 4": ("exaone4", {"sliding_window": WINDOW}),
    "Gemma": ("gemma", {"head_dim": 24}),
    "Gemma 2": ("gemma2", GEMMA | {"attn_logit_softcapping": 5.0}),
    "Gemma 3": ("gemma3_text", GEMMA | {"num_hidden_layers": 6}),
    "GLM 4": ("glm4", {"head_dim": 16}),
    "GPT-2": ("gpt2", GPT),
    "GPT-NeoX, Pythia": ("gpt_neox", {}),
    "StableLM": ("stablelm", {"qk_layernorm": True, "use_qkv_bias": True}),
    "Cohere": ("cohere", {"use_qk_norm": True, "logit_scale": 0.25}),
    "Cohere 2": ("cohere2", {"sliding_window": WINDOW}),
    "Nemotron, Minitron": ("nemotron", {}),
    "Apertus": ("apertus", {}),
    "Starcoder 2": ("starcoder2", {"sliding_window": WINDOW}),
    "Falcon": ("falcon", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "GPT-Neo": (
        "gpt_neo",
        {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_heads": 4, "window_size": WINDOW},
    ),
    "ERNIE 4.5": ("ernie4_5", {"head_dim": 24}),
    "VaultGemma": ("vaultgemma", GEMMA),
    "OPT": ("opt", {"ffn_dim": 96}),
    "GPT-BigCode": ("gpt_bigcode", GPT),
    "OLMo": ("olmo", {}),
    "Arcee": ("arcee", {}),
    "Helium": ("helium", {"head_dim": 16}),
    "GLM": ("glm", {"head_dim": 24}),
    "Mixtral": ("mixtral", LOCAL | {"sliding_window": None}),
    "Qwen 2 MoE": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 48}),
    "Qwen 3 MoE": ("qwen3_moe", EXPERTS | {"head_dim": 24}),
    "OLMoE": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "GraniteMoE": ("granitemoe", LOCAL | GRANITE),
    "gpt-oss": ("gpt_oss", LOCAL | {"head_dim": 24, "sliding_window": WINDOW}),
    "DeepSeek V2": ("deepseek_v2", DEEPSEEK | {"q_lora_rank": None}),
    "DeepSeek V3": ("deepseek_v3", DEEPSEEK | {"q_lora_rank": 32}),
    "Llama 4": (
        "llama4_text",
        LOCAL | {"head_dim": 16, "intermediate_size_mlp": 96, "attention_chunk_size": WINDOW, "floor_scale": 10},
    ),
    "Ministral 3": ("ministral3", {"head_dim": 24, "rope_parameters": YARN | {"llama_4_scaling_beta": 0.3}}),
    "Phi 1, Phi 2": ("phi", {}),
    "GPT-J": ("gptj", GPT | {"rotary_dim": 8}),
    "CodeGen": ("codegen", GPT | {"rotary_dim": 8}),
    "BLOOM": ("bloom", {"n_layer": 3, "n_head": 4}),
    "MPT": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 3, "attn_config": {"clip_qkv": 6.0}}),
    "HunYuan": ("hunyuan_v1_dense", {"head_dim": 24}),
    "HunYuan MoE": ("hunyuan_v1_moe", {"head_dim": 24, "num_experts": 4, "moe_topk": 2}),
    "DBRX": (
        "dbrx",
        {"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 128}
        | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 6.0, "rope_theta": 10000.0}}
        | {"ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    ),
    "Nemotron-H": ("nemotron_h", NEMOTRON | {"layers_block_type": ["mamba", "mlp", "attention", "moe"]}),
    # Drawn as others are: these draw weights five times as large
    "Mamba": ("mamba", {"state_size": 16, "initializer_range": 0.02}),
    "FalconMamba": ("falcon_mamba", {"state_size": 16, "initializer_range": 0.02}),
    "Mamba 2": (
        "mamba2",
        {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 2, "initializer_range": 0.02},
    ),
    "Granite 4": (
        "granitemoehybrid",
        MAMBA | LOCAL | {"shared_intermediate_size": 48, "layer_types": ["mamba", "attention"] * 2},
    ),
    "Bamba": ("bamba", MAMBA | {"attn_layer_indices": [1]}),
    "Falcon-H1": ("falcon_h1", MAMBA | {"mamba_d_ssm": 128}),
    "Jamba": ("jamba", EXPERTS | {"attn_layer_offset": 1, "attn_layer_period": 2}),
    "RecurrentGemma": ("recurrent_gemma", {"attention_window_size": WINDOW, "lru_width": 96}),
    "Qwen3-Next": ("qwen3_next", EXPERTS | LINEAR | {"head_dim": 16, "shared_expert_intermediate_size": 48}),
}
# Settings that the format has no words for; without a model of others there is no file
NOT_WRITTEN = ("Llama, dynamic RoPE", "Qwen 2, windows")
IN_FILES: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": None},
    "Starcoder 2": {"sliding_window": None},
    "Falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "FalconMamba": {"mixer_rms_eps": 1e-5},  # one epsilon for all norms
    "GLM": {"head_dim": 16, "rms_norm_eps": 1e-5},
    "Phi 3, LongRoPE": {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 32}}
    | {"original_max_position_embeddings": 32},
    "Qwen 3 MoE": {"norm_topk_prob": True},
    "Llama 4": {"attention_chunk_size": 8192, "floor_scale": 8192},
}
# What a row has -> the column of the table
COLUMNS = {
    "family": "family",
    "model_type": "`model_type`",
    "difference": "difference",
    "verified is ar": "`verified` = `ar`",
    "native": "C backend",
    "gguf": "GGUF",
}


def make(name: str, folder: Path, others: Mapping[str, Any]) -> Any:
    """transformers' model, with other settings than the usual ones if there are any, saved to a folder."""
    model_type, settings = MODELS[name]
    settings = settings | others
    own_names = ("gpt2", "gpt_bigcode", "gptj", "codegen", "mpt", "dbrx")
    sizes = {key: value for key, value in SIZES.items() if model_type not in own_names or key == "vocab_size"}
    config = transformers.AutoConfig.for_model(model_type, **json.loads(json.dumps(sizes | settings)))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1 or "norm" in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(5)
    model.save_pretrained(folder)
    return model


def compare(name: str, folder: Path) -> dict[str, Any]:
    """One line of the table."""
    row: dict[str, Any] = {"family": name, "model_type": MODELS[name][0]}
    theirs = make(name, folder / "theirs", {})
    ids = torch.randint(3, SIZES["vocab_size"], (2, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids, use_cache=False).logits
    try:
        twotower.init(folder / "theirs", folder / "ours")
    except ValueError as error:
        return row | {"error": str(error)}
    model = twotower.load(folder / "ours", backend="reference")
    row["difference"] = difference(model, ids, expected)
    row["verified is ar"] = all(verified_is_ar(model, ids[0, :n].tolist()) for n in (5, 40))
    fastest = twotower.load(folder / "ours")
    choice = fastest.backends["context tower"]
    lacks = choice.reason.partition("native lacks ")[2].partition(" (")[0]
    row["native"] = difference(fastest, ids, expected) if choice.name == "native" else lacks or choice.reason
    if name in IN_FILES:
        theirs = make(name, folder / "others", IN_FILES[name])
        with torch.no_grad():
            expected = theirs(ids, use_cache=False).logits
    row["gguf"] = "no" if name in NOT_WRITTEN else from_gguf(theirs, folder, ids, expected)
    return row


def difference(model: twotower.TwoTower, ids: Tensor, expected: Tensor) -> float:
    """Of all tokens but the mask."""
    found = model.context_logits(ids)[..., : expected.shape[-1]]
    real = found.isfinite()
    return ((found - expected)[real].abs().max() / expected.abs().max()).item()


def verified_is_ar(model: twotower.TwoTower, prompt: list[int]) -> bool:
    # Dynamic RoPE is for texts past the model's positions.
    params = [
        twotower.SamplingParams(mode=mode, max_new_tokens=24, ignore_eos=True, past_positions=True)
        for mode in ("ar", "verified")
    ]
    one, other = (twotower.generate(model, [prompt], p)[0].token_ids for p in params)
    return one == other


def from_gguf(theirs: Any, folder: Path, ids: Tensor, expected: Tensor) -> float | str:
    """The difference of a GGUF file's model, or "no"."""
    file = Path(__file__).parents[1] / "tests" / "checkpoints" / "gguf" / "conftest.py"
    spec = importlib.util.spec_from_file_location("gguf_writer", file)
    assert spec is not None
    assert spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    try:
        written = writer.write_model(folder / "model.gguf", theirs)
        twotower.init(written, folder / "from_gguf")
    except (StopIteration, ValueError, AttributeError, TypeError, AssertionError):  # the writer's, or a refusal
        return "no"
    return difference(twotower.load(folder / "from_gguf", backend="reference"), ids, expected)


def rows(wanted: list[str]) -> Iterator[dict[str, Any]]:
    for name in MODELS:
        if not wanted or any(part.lower() in name.lower() for part in wanted):
            with tempfile.TemporaryDirectory() as folder:
                yield compare(name, Path(folder))


def in_table(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {row['family']} | `{row['model_type']}` | not opened | | | |"
    cells = [f"{value:.0e}" if isinstance(value, float) else value for value in map(row.get, COLUMNS)]
    cells[1], cells[3] = f"`{cells[1]}`", "yes" if cells[3] else "no"
    cells[4] = cells[4] if isinstance(row["native"], float) else f"PyTorch: {cells[4]}"
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="print a table")
    parser.add_argument("names", nargs="*", help="parts of families' names")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    if arguments.markdown:
        print("| " + " | ".join(COLUMNS.values()) + " |\n|" + "---|" * len(COLUMNS))
    for row in rows(arguments.names):
        if not arguments.markdown:
            print(json.dumps(row), flush=True)
        else:
            print(in_table(row), flush=True)


if __name__ == "__main__":
    main()

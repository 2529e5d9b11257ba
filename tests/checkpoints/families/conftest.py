"""Tiny random models of every family of decoders, made by transformers and opened by us."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor

import twotower
from twotower.model.two_tower import TwoTower

VOCAB = 97
WINDOW = 12  # shorter than the texts of 40 tokens
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Queries grow at 8, 16, 24, … of the 40 tokens
MINISTRAL3 = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 16.0, "original_max_position_embeddings": 8}
MINISTRAL3 |= {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3}
# The settings of each family that matter, beside the sizes: one model of each is tried in every way.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"head_dim": 16, "sliding_window": WINDOW},
    "ministral": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": {"head_dim": 16},
    "smollm3": {"tie_word_embeddings": False},
    "seed_oss": {"head_dim": 16, "attention_out_bias": False},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "phi3": {"partial_rotary_factor": 0.5, "sliding_window": WINDOW},
    "olmo2": {},
    "olmo3": {"sliding_window": WINDOW},
    "exaone4": {"sliding_window": WINDOW},
    "gemma2": {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 20, "num_hidden_layers": 6},
    "glm4": {"head_dim": 16, "num_key_value_heads": 1},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_inner": 80},
    "gpt_neox": {},
    "stablelm": {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True},
    "cohere": {"use_qk_norm": True, "logit_scale": 0.25},
    "cohere2": {"sliding_window": WINDOW},
    "nemotron": {"head_dim": 16},
    "apertus": {},
    "gemma": {"head_dim": 16},
    "arcee": {},
    "helium": {"head_dim": 8},
    "glm": {"head_dim": 16},
    "starcoder2": {"sliding_window": WINDOW},
    "olmo": {},
    "opt": {"ffn_dim": 48},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_heads": 4, "window_size": WINDOW},
    "exaone": {},
    "ernie4_5": {"head_dim": 16},
    "vaultgemma": {
        "head_dim": 16,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 5.0,
    },
    "gpt_bigcode": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "phi": {"qk_layernorm": True},
    "gptj": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
    "codegen": {"n_embd": 64, "n_layer": 3, "n_head": 8, "n_positions": 128, "rotary_dim": 4},
    "hunyuan_v1_dense": {"head_dim": 16},
    "bloom": {"n_layer": 3, "n_head": 4, "seq_length": 128},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 128, "attn_config": {"clip_qkv": 6.0}},
    "ministral3": {"head_dim": 16, "rope_parameters": MINISTRAL3},
    "llama4_text": {
        "head_dim": 16,
        "attention_chunk_size": WINDOW,
        "floor_scale": 10,
        "intermediate_size_mlp": 56,
        "interleave_moe_layer_step": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
}
NAMES_OF_ITS_OWN = ("gpt2", "gpt_bigcode", "gptj", "codegen", "mpt", "dbrx")  # for what SIZES has
Edit = Callable[[dict[str, Any]], Any]


class Opened(NamedTuple):
    """transformers' model and ours, which `init` made of its folder `source`: run by the reference, and by the fastest
    backend that runs it here. `logits` (2, 40, VOCAB) are transformers' for `ids` (2, 40)."""

    theirs: Any
    source: Path
    folder: Path
    ours: TwoTower
    fastest: TwoTower
    ids: Tensor
    logits: Tensor


def loud(model: Any, factor: float) -> None:
    """Weights under which attention is sharp, MLPs bend and every bias and norm counts: what transformers draws makes a
    model nearly linear, in which a cap, a sink or an offset hardly shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(factor)


@pytest.fixture(scope="session")
def open_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Opened]:
    """open_family("qwen3", head_dim=16, …) with changes to SIZES makes a model of this type and opens it; `edit`
    changes config.json as somebody else might have written it, and both read that."""
    made: dict[str, Opened] = {}

    def make(
        model_type: str, *, edit: Edit | None = None, length: int = 40, factor: float = 10, **settings: Any
    ) -> Opened:
        sizes = {} if model_type in NAMES_OF_ITS_OWN else SIZES
        config = transformers.AutoConfig.for_model(
            model_type, **copy.deepcopy(sizes | {"vocab_size": VOCAB} | settings)
        )
        torch.manual_seed(0)
        theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        loud(theirs, factor)
        source = tmp_path_factory.mktemp(model_type)
        theirs.save_pretrained(source)
        if edit is not None:
            content = json.loads((source / "config.json").read_text())
            edit(content)
            (source / "config.json").write_text(json.dumps(content))
            theirs = transformers.AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
        folder = tmp_path_factory.mktemp("ours") / "model"
        twotower.init(source, folder)
        ids = torch.randint(3, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            logits = theirs(ids, use_cache=False).logits
        ours, fastest = twotower.load(folder, backend="reference"), twotower.load(folder)
        return Opened(theirs, source, folder, ours, fastest, ids, logits)

    def cached(model_type: str, *, edit: Edit | None = None, **settings: Any) -> Opened:
        key = repr((model_type, sorted(settings.items())))
        if edit is not None or key not in made:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # transformers' about configs
                opened = make(model_type, edit=edit, **settings)
            if edit is not None:
                return opened
            made[key] = opened
        return made[key]

    return cached


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest, open_family: Callable[..., Opened]) -> Opened:
    return open_family(request.param, **FAMILIES[request.param])


@pytest.fixture(scope="session", params=[name for name in FAMILIES if name != "gpt_neo"])
def maskable_family(request: pytest.FixtureRequest, open_family: Callable[..., Opened]) -> Opened:
    """Each family but GPT-Neo, whose layers in transformers make their masks themselves."""
    return open_family(request.param, **FAMILIES[request.param])


@pytest.fixture(scope="session")
def same_logits() -> Callable[..., None]:
    """Asserts that our logits for some vocabulary are transformers', to 1e-5 of their scale: float32, summed in another
    order."""

    def check(found: Tensor, expected: Tensor) -> None:
        found = found[..., : expected.shape[-1]]
        assert found.shape == expected.shape
        assert expected.std() > 0.05 * expected.abs().max(), "logits that hardly differ would agree whatever was loaded"
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()

    return check

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from twotower.checkpoints import init, load_model
from twotower.checkpoints.gguf.model import open_gguf
from twotower.checkpoints.initialise import open_backbone

Kind = gguf.GGMLQuantizationType
Write = Callable[..., Path]

TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}

# Every architecture with what is its own, and Llama's scaled RoPE.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "llama linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    "llama yarn": {"rope_parameters": YARN},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "smollm3": {},
    "granite": {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22}
    | {"attention_multiplier": 0.0625},
    "phi3": {"sliding_window": 8},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 7},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True},
    "olmoe": {"num_experts": 3, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8},
    "olmo2": {},
    "olmo3": {"sliding_window": 8},
    "exaone4": {"sliding_window": 8},
    "exaone4 full": {"sliding_window": None, "layer_types": ["full_attention"] * 4},
    "glm4": {"head_dim": 8},
    "seed_oss": {"head_dim": 16, "attention_bias": True, "attention_out_bias": False},
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True},
    "stablelm parallel": {"use_parallel_residual": True},
    "cohere": {},
    "cohere2": {"sliding_window": 8},
    "nemotron": {},
    "gpt_neox": {},
    "gpt_neox serial": {"use_parallel_residual": False},
    "gpt2": {},
}


def tiny(name: str) -> Any:
    """A random model, whose norms and biases of one count."""
    settings = TINY | MODELS[name]
    if name == "gpt2":
        settings = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(name.split()[0], bos_token_id=1, eos_token_id=2, **settings)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def add_ends(writer: gguf.GGUFWriter) -> None:
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_the_model_of_its_folder(tmp_path: Path, write: Write, name: str) -> None:
    model = tiny(name)
    model.save_pretrained(tmp_path / "folder")
    found, expected = open_backbone(write(model, extra=add_ends)), open_backbone(tmp_path / "folder")
    theirs = dict(expected.stream())
    ours = dict(found.stream())
    assert set(ours) == set(theirs)
    for key, tensor in ours.items():
        assert found.specs[key] == (tensor.dtype, tuple(tensor.shape)), key
        # Subtracting the 1 that the converter adds to a norm loses what the sum has lost.
        bound = 2e-7 if name.startswith(("gemma", "nemotron")) and "norm" in key else 0.0
        assert (tensor - theirs[key]).abs().max() <= bound, key
    for field in dataclasses.fields(found.config):
        if field.name != "carried":
            assert getattr(found.config, field.name) == getattr(expected.config, field.name), field.name


def test_biases_of_queries_keys_and_values_alone_are_kept(tmp_path: Path, write: Write, qwen2: Any) -> None:
    """As in InternLM and other models that are converted to the architecture `llama`."""
    c = qwen2.model.config
    biased = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{key: getattr(c, key) for key in TINY}, attention_bias=True, rope_theta=500.0)
    )
    for layer in biased.model.layers:
        del layer.self_attn.o_proj.bias
        torch.nn.Module.register_parameter(layer.self_attn.o_proj, "bias", None)
    tensors = dict(open_gguf(write(biased)).stream())
    state = biased.state_dict()
    assert torch.equal(tensors["layers.0.mixer.q_proj.bias"], state["model.layers.0.self_attn.q_proj.bias"])
    assert not tensors["layers.0.mixer.o_proj.bias"].any()


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.F16, torch.float16), (Kind.BF16, torch.bfloat16)])
def test_half_precision_is_kept(tmp_path: Path, llama: Any, write: Write, kind: Kind, dtype: torch.dtype) -> None:
    specs = open_gguf(write(llama.model, kind)).specs
    assert specs["layers.0.mixer.q_proj.weight"] == (dtype, (32, 32))
    assert specs["layers.0.norm.weight"] == (torch.float32, (32,))
    init(write(llama.model, kind), tmp_path / "out")
    found = load_model(tmp_path / "out").released_tensors()
    expected = llama.model.state_dict()["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(found["denoiser_tower.layers.3.mixer.down_proj.weight"], expected.to(dtype))


# Largest error as a part of a block's largest magnitude: half a step, and a whole one for Q4_0, which clips.
@pytest.mark.parametrize(("kind", "bound"), [(Kind.Q8_0, 0.5 / 127), (Kind.Q4_0, 1 / 8), (Kind.Q4_1, 1 / 15)])
def test_quantised_tensors_are_within_a_step(llama: Any, write: Write, kind: Kind, bound: float) -> None:
    found = dict(open_gguf(write(llama.model, kind)).stream())
    for theirs, ours in [
        ("model.layers.1.mlp.down_proj.weight", "layers.3.mixer.down_proj.weight"),
        ("model.layers.0.self_attn.k_proj.weight", "layers.0.mixer.k_proj.weight"),
        ("model.embed_tokens.weight", "embeddings.weight"),
    ]:
        expected = llama.model.state_dict()[theirs]
        assert found[ours].dtype == torch.float32
        largest = expected.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1)
        error = (found[ours] - expected).abs()
        assert (error <= bound * largest * 1.15).all(), "127 times a float16 scale's rounding is a tenth of a step"
        assert error.max() > 0.3 * (bound * largest).min()


def test_without_the_gguf_package(llama: Any, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(llama.model)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'twotower\[gguf\]'"):
        open_gguf(path)


def test_architecture_is_checked(llama: Any, write: Write) -> None:
    with pytest.raises(ValueError, match=r"has the architecture 'rwkv7', must be one of apertus, .*starcoder2"):
        open_gguf(write(llama.model, arch="rwkv7"))


@pytest.mark.parametrize(
    ("own", "named"),
    [
        ({"attention.clamp_kqv": 8.0}, "llama.attention.clamp_kqv 8.0"),
        ({"attention.scale": 0.5}, "llama.attention.scale 0.5"),
        ({"logit_scale": 0.5}, "llama.logit_scale 0.5"),
        ({"attention.causal": False}, "attention to later positions"),
        ({"attention.value_length": 4}, "llama.attention.value_length 4 beside heads of 8"),
        ({"rope.dimension_count": 4}, "llama.rope.dimension_count 4 beside heads of 8"),
    ],
)
def test_what_computes_something_else_is_refused(llama: Any, write: Write, own: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"computes something that our towers don't: .*{named}"):
        open_gguf(write(llama.model, **own))


def test_a_window_in_a_file_of_llama_is_mistrals(llama: Any, write: Write) -> None:
    config = open_gguf(write(llama.model, **{"attention.sliding_window": 16})).config
    assert [kind.window for kind in config.attention_kinds] == [16]


def test_missing_metadata(write_metadata: Write) -> None:
    path = write_metadata(lambda w: w.add_block_count(1))
    with pytest.raises(ValueError, match=r"lacks llama\.embedding_length, .*token_embd\.weight, .*rms_epsilon"):
        open_gguf(path)


def test_unknown_tensors_are_named(tmp_path: Path, llama: Any, write: Write) -> None:
    path = write(llama.model, extra=lambda w: w.add_tensor("blk.0.attn_sinks.weight", np.ones(8, np.float32)))
    with pytest.raises(ValueError, match=r"1 unexpected: blk\.0\.attn_sinks\.weight"):
        init(path, tmp_path / "out")


def test_more_tokens_than_embeddings_are_refused(llama: Any, write: Write) -> None:
    path = write(llama.model, extra=lambda w: w.add_token_list([f"t{i}" for i in range(300)]))
    with pytest.raises(ValueError, match="has 300 tokens but 273 embeddings"):
        open_gguf(path)

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

import twotower
from twotower.checkpoints import init, load_model
from twotower.checkpoints.gguf.model import open_gguf
from twotower.checkpoints.gguf.reader import read_gguf
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

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
LONGROPE = {"rope_type": "longrope", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE |= {"short_factor": [1.0, 1.25, 1.5, 2.0], "long_factor": [2.0, 3.0, 4.0, 5.0]}
DEEPSEEK = {"num_key_value_heads": 4, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
DEEPSEEK |= {"v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK |= {"n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
MAMBA2 = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2}
FALCON_H1 = {"embedding_multiplier": 3.0, "lm_head_multiplier": 0.5, "key_multiplier": 0.7}
FALCON_H1 |= {"attention_in_multiplier": 1.3, "attention_out_multiplier": 0.6, "ssm_in_multiplier": 1.2}
FALCON_H1 |= {"ssm_out_multiplier": 0.8, "ssm_multipliers": [0.9, 1.1, 0.7, 1.3, 0.5], "mlp_multipliers": [0.8, 1.4]}
FALCON_H1 |= {"mamba_rms_norm": True, "mamba_norm_before_gate": False}
MSCALE = {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.25}
JAMBA = {"attn_layer_period": 4, "attn_layer_offset": 1, "mamba_d_state": 5, "mamba_dt_rank": 3}
HYBRID = ["linear_attention", "full_attention"] * 2
GRANITE = {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22}
GRANITE |= {"attention_multiplier": 0.0625, "shared_intermediate_size": 24}
# transformers' own scan has a least step, which the released code has not.
NEMOTRON = {
    "time_step_min": 1e-9,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 2,
    "head_dim": 16,
}
NEMOTRON |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2}
NEMOTRON |= {"topk_group": 1, "moe_shared_expert_intermediate_size": 24, "moe_latent_size": 16, "chunk_size": 16}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "head_dim": 8}
DELTA |= {"linear_value_head_dim": 12, "shared_expert_intermediate_size": 24}

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
    "llama llama3": {"rope_parameters": LLAMA3},
    "phi3 longrope": {"sliding_window": None, "rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
    "gemma": {"head_dim": 16},
    "olmo": {},
    "arcee": {},
    "ernie4_5": {"head_dim": 16},
    "glm": {"head_dim": 8, "rms_norm_eps": 1e-5},
    "apertus": {},
    "starcoder2": {"sliding_window": None},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "gpt_bigcode": {},
    "mistral": {"sliding_window": None},
    "deepseek_v2": DEEPSEEK | {"q_lora_rank": None},
    "deepseek_v2 groups": DEEPSEEK
    | {"q_lora_rank": 16, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}
    | {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}, "routed_scaling_factor": 3.0},
    "deepseek_v3": DEEPSEEK | {"q_lora_rank": 16, "n_group": 2, "topk_group": 1},
    "mamba2": MAMBA2,
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "granitemoehybrid": MAMBA | GRANITE | {"layer_types": HYBRID, "num_local_experts": 3, "num_experts_per_tok": 2},
    "granitemoehybrid dense": MAMBA | GRANITE | {"layer_types": HYBRID, "num_local_experts": 0},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64, "head_dim": 8} | FALCON_H1,
    "nemotron_h": NEMOTRON | {"layers_block_type": ["mamba", "mlp", "attention", "mlp"]},
    "nemotron_h moe": NEMOTRON | {"layers_block_type": ["mamba", "moe", "attention", "moe"]},
    "qwen3_next": DELTA | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "qwen3_5_text": DELTA,
    "mamba": {"state_size": 5, "time_step_rank": 3, "use_bias": True, "tie_word_embeddings": False},
    "falcon_mamba": {"state_size": 5, "time_step_rank": 3, "intermediate_size": 64, "mixer_rms_eps": 1e-5},
    "jamba": JAMBA | {"expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 3},
    "jamba without experts": JAMBA | {"num_experts": 1, "attn_layer_offset": 3},
    "ministral3": {"head_dim": 16, "rope_parameters": YARN | MSCALE},
    "llama4_text": {"head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 3, "num_experts_per_tok": 2}
    | {"interleave_moe_layer_step": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "phi": {"partial_rotary_factor": 0.5, "num_key_value_heads": 4, "intermediate_size": 128},
    "bloom": {"n_layer": 2, "n_head": 4, "seq_length": 32},
    "bloom six": {"n_layer": 2, "n_head": 6, "hidden_size": 48, "seq_length": 48},
    "mpt": {"d_model": 48, "n_heads": 6, "n_layers": 2, "max_seq_len": 64, "attn_config": {"clip_qkv": 0.5}},
    "dbrx": {"d_model": 32, "n_heads": 4, "n_layers": 2, "attn_config": {"clip_qkv": 0.5, "rope_theta": 500.0}}
    | {"ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 3, "moe_top_k": 2}},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 3, "moe_topk": 2},
    "qwen3_5_moe_text": DELTA | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


# Families to whose norms the converter adds 1
ADDED = ("gemma", "nemotron", "qwen3_next", "qwen3_5")


# What is the same model in other words: RoPE's scaling as a tensor, factors within the weights
SAID_OTHERWISE = ("llama llama3", "phi3 longrope", "apertus", "falcon_h1", "nemotron_h", "nemotron_h moe")


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


@pytest.mark.parametrize("name", [name for name in MODELS if name not in SAID_OTHERWISE])
def test_a_file_is_the_model_of_its_folder(tmp_path: Path, write: Write, name: str) -> None:
    model = tiny(name)
    model.save_pretrained(tmp_path / "folder")
    found, expected = open_backbone(write(model, extra=add_ends)), open_backbone(tmp_path / "folder")
    theirs = dict(expected.stream())
    ours = dict(found.stream())
    assert set(ours) == set(theirs)
    for key, tensor in ours.items():
        assert found.specs[key] == (tensor.dtype, tuple(tensor.shape)), key
        # Subtracting the 1 that the converter adds to a norm loses what the sum has lost; a logarithm of an exponential
        # is within the rounding of both.
        bound = 2e-7 if ("norm" in key and name.startswith(ADDED)) or key.endswith("A_log") else 0.0
        assert (tensor - theirs[key]).abs().max() <= bound, key
    for field in dataclasses.fields(found.config):
        if field.name != "carried":
            assert getattr(found.config, field.name) == getattr(expected.config, field.name), field.name


@pytest.mark.parametrize("name", SAID_OTHERWISE)
def test_a_file_has_the_logits_of_its_folder(tmp_path: Path, write: Write, name: str) -> None:
    """And writes the same by `verified` as by `ar`."""
    model = tiny(name)
    init(write(model, extra=add_ends), tmp_path / "out")
    found = twotower.load(tmp_path / "out", backend="reference")
    ids = torch.randint(3, 40, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    difference = (found.context_logits(ids)[..., :40] - expected).abs().max()
    # Float32's rounding of sums in another order.
    assert difference <= 1e-5 * expected.abs().max()
    params = [twotower.SamplingParams(mode=mode, max_new_tokens=12, ignore_eos=True) for mode in ("ar", "verified")]
    one, other = (twotower.generate(found, [ids[0, :20].tolist()], p)[0].token_ids for p in params)
    assert one == other


@pytest.mark.parametrize("name", ["deepseek_v3", "falcon_h1", "granitemoehybrid", "nemotron_h moe", "qwen3_5_text"])
def test_a_quantised_file_is_the_model_of_its_rounded_weights(write: Write, name: str) -> None:
    """As the gguf package dequantises them: written as floats, they are the same model."""
    path = write(tiny(name), Kind.Q8_0)
    assert Kind.Q8_0 in {tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}
    assert_same_tensors(path, rewritten(path, lambda tensors: tensors))


Arrays = dict[str, np.ndarray]


def rewritten(path: Path, change: Callable[[Arrays], Arrays]) -> Path:
    """Another file with the same metadata, and what `change` makes of the tensors, dequantised."""
    theirs, other = gguf.GGUFReader(path), path.with_name("other.gguf")
    writer = gguf.GGUFWriter(other, read_gguf(path).metadata["general.architecture"])
    for key, field in theirs.fields.items():
        if not key.startswith(("GGUF.", "general.")):
            kind, *entries = field.types
            writer.add_key_value(key, field.contents(), kind, entries[-1] if entries else None)
    tensors = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in theirs.tensors}
    for name, tensor in change(tensors).items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return other


def assert_same_tensors(one: Path, other: Path) -> None:
    found, expected = (dict(open_gguf(path).stream()) for path in (one, other))
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def _unsplit(tensors: Arrays) -> Arrays:
    """Keys and values of DeepSeek's latents as converters wrote them before 2025: as the model has them."""
    found = {}
    for name, tensor in tensors.items():
        if ".attn_v_b." in name:
            keys = tensors[name.replace("attn_v_b", "attn_k_b")].swapaxes(1, 2)
            both = np.concatenate((keys, tensor), axis=1)
            found[name.replace("attn_v_b", "attn_kv_b")] = both.reshape(-1, both.shape[-1])
        elif ".attn_k_b." not in name:
            found[name] = tensor
    return found


def _fused(tensors: Arrays) -> Arrays:
    """Queries, keys and values as one, as the converter writes them with --fuse-qkv."""
    found = {name: tensor for name, tensor in tensors.items() if not any(f".attn_{part}." in name for part in "qkv")}
    for name in tensors:
        if ".attn_q." in name:
            parts = [tensors[name.replace("attn_q", f"attn_{part}")] for part in "qkv"]
            found[name.replace("attn_q", "attn_qkv")] = np.concatenate(parts)
    return found


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("deepseek_v2", _unsplit),
        ("deepseek_v3", _unsplit),
        ("llama", _fused),
        ("qwen2", _fused),
        ("qwen3", _fused),
        ("mixtral", _fused),
        ("ministral3", _fused),
        ("jamba", _fused),
        ("llama4_text", _fused),
        ("gpt_oss", _fused),
    ],
)
def test_older_and_fused_forms_are_the_same_model(write: Write, name: str, change: Callable[[Arrays], Arrays]) -> None:
    path = write(tiny(name), extra=add_ends)
    other = rewritten(path, change)
    assert {t.name for t in gguf.GGUFReader(other).tensors} != {t.name for t in gguf.GGUFReader(path).tensors}
    assert_same_tensors(path, other)


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


@pytest.mark.parametrize("name", ["deepseek_v3", "falcon_h1", "granitemoehybrid", "mamba2", "qwen3_next"])
def test_sizes_that_can_not_be_true_are_refused_by_file_and_key(
    write: Write, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A number far too large, a negative one, another type: before anything is made of it."""
    path = write(tiny(name), extra=add_ends)
    file = read_gguf(path)
    for key in (f"{file.architecture}.block_count", f"{file.architecture}.embedding_length"):
        for bad in ("x", -1, 0, 2**40, 2**31 - 1, [1, 2, 3], 1.5, True):
            changed = dataclasses.replace(file, metadata={**file.metadata, key: bad})
            monkeypatch.setattr("twotower.checkpoints.gguf.model.read_gguf", lambda path, changed=changed: changed)
            with pytest.raises(ValueError, match=rf"model\.gguf has {key}"):
                open_gguf(path)


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

"""Tiny single-tower models, written to files by transformers and other libraries where these can."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
import torch
import transformers

# After 3 control and 256 byte tokens; best first. "ca" can only be made through "ca" itself, " abc" in two ways.
PIECES = [" a", "ab", " ab", "abc", " abc", "  ", "ca", "bca", " ", "a", "b", "c", "é", "\u6f22"]
VOCAB_SIZE = 3 + 256 + len(PIECES)


class Source(NamedTuple):
    """A single-tower model in memory and the directory that transformers saved it to."""

    directory: Path
    model: Any


@pytest.fixture(scope="session")
def golden_directory() -> Path:
    return Path(__file__).parents[1] / "golden"


def _saved(directory: Path, model: Any) -> Source:
    model.eval().save_pretrained(directory)
    return Source(directory, model)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Source:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        initializer_range=0.3,  # the default 0.02 would make any two models agree to 1e-4
    )
    return _saved(tmp_path_factory.mktemp("llama"), transformers.LlamaForCausalLM(config))


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Tied head, biases on queries, keys and values, another base of RoPE."""
    torch.manual_seed(2)
    config = transformers.Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        rope_theta=500.0,
        initializer_range=0.3,
    )
    model = transformers.Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return _saved(tmp_path_factory.mktemp("qwen2"), model)


@pytest.fixture(scope="session")
def nemotron_h(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Every kind of layer."""
    torch.manual_seed(3)
    config = transformers.NemotronHConfig(
        vocab_size=48,
        hidden_size=32,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        ssm_state_size=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=2,
        n_routed_experts=4,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=24,
        routed_scaling_factor=2.5,
        initializer_range=0.3,
        rescale_prenorm_residual=False,
    )
    model = transformers.NemotronHForCausalLM(config)
    for name, tensor in model.state_dict().items():
        if name.endswith(("e_score_correction_bias", "dt_bias", "conv1d.bias")):
            tensor.normal_(std=0.5)
    return _saved(tmp_path_factory.mktemp("nemotron_h"), model)


@pytest.fixture(scope="session")
def pieces() -> list[str]:
    return PIECES


@pytest.fixture(scope="session")
def llama2c_vocabulary() -> Callable[..., bytes]:
    """A llama2.c tokenizer of 3 control tokens, 256 bytes and PIECES, scored in their order."""

    def make(byte_form: Callable[[int], bytes] = lambda value: bytes([value])) -> bytes:
        tokens = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(byte_form(value) for value in range(256))]
        tokens += [piece.encode() for piece in PIECES]
        scores = [0.0] * 259 + [-float(i) for i in range(len(PIECES))]
        entries = [struct.pack("<fi", s, len(t)) + t for t, s in zip(tokens, scores, strict=True)]
        return struct.pack("<i", 7) + b"".join(entries)

    return make


@pytest.fixture(scope="session")
def interleaved() -> Callable[[np.ndarray, int], np.ndarray]:
    """What llama.cpp's and llama2.c's exporters do to transformers' query and key rows (there called permute)."""

    def permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
        rows, columns = weight.shape
        halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
        return halves.swapaxes(1, 2).reshape(rows, columns)

    return permute


@pytest.fixture(scope="session")
def llama2c_bytes(llama: Source, interleaved: Callable[[np.ndarray, int], np.ndarray]) -> Callable[..., bytes]:
    """The `llama` model in llama2.c's format, without its tokenizer."""

    def make(*, tied: bool = False) -> bytes:
        c, state = llama.model.config, {k: v.float().numpy() for k, v in llama.model.state_dict().items()}
        vocab_size = c.vocab_size if tied else -c.vocab_size
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        sizes = (c.hidden_size, c.intermediate_size, c.num_hidden_layers, heads, kv_heads, vocab_size, 64)

        def layers(name: str) -> list[np.ndarray]:
            return [state[f"model.layers.{i}.{name}.weight"] for i in range(c.num_hidden_layers)]

        arrays = [state["model.embed_tokens.weight"], *layers("input_layernorm")]
        arrays += [interleaved(w, heads) for w in layers("self_attn.q_proj")]
        arrays += [interleaved(w, kv_heads) for w in layers("self_attn.k_proj")]
        arrays += layers("self_attn.v_proj") + layers("self_attn.o_proj") + layers("post_attention_layernorm")
        arrays += layers("mlp.gate_proj") + layers("mlp.down_proj") + layers("mlp.up_proj")
        arrays += [state["model.norm.weight"], np.full(64 * c.hidden_size // heads, np.nan, "<f4")]
        arrays += [] if tied else [state["lm_head.weight"]]
        return struct.pack("<7i", *sizes) + b"".join(a.astype("<f4").tobytes() for a in arrays)

    return make


@pytest.fixture
def write_metadata(tmp_path: Path) -> Callable[..., Path]:
    """Writes a GGUF file with metadata alone, and perhaps tensors."""

    def make(extra: Callable[[gguf.GGUFWriter], None], name: str = "metadata.gguf", **options: Any) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, "llama", **options)
        extra(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    return make

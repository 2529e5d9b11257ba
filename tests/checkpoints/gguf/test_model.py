import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from twotower.checkpoints import init, load_model, load_tokenizer
from twotower.checkpoints.gguf.model import open_gguf

Kind = gguf.GGMLQuantizationType
Write = Callable[..., Path]

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    body, part = name.rsplit(".", 1)
    if not body.startswith("model.layers."):
        return f"{NAMES[body]}.{part}"
    _, _, i, rest = body.split(".", 3)
    return f"blk.{i}.{NAMES[rest]}.{part}"


@pytest.fixture
def write(tmp_path: Path, interleaved: Callable[[np.ndarray, int], np.ndarray]) -> Write:
    """Writes a transformers model as llama.cpp's converter does: matrices as `kind`, vectors as F32."""

    def make(
        model: Any, kind: Kind = Kind.F32, extra: Callable[[gguf.GGUFWriter], None] = lambda w: None, arch: str = ""
    ) -> Path:
        c, path = model.config, tmp_path / "model.gguf"
        architecture = arch or c.model_type
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_block_count(c.num_hidden_layers)
        writer.add_context_length(c.max_position_embeddings)
        writer.add_embedding_length(c.hidden_size)
        writer.add_feed_forward_length(c.intermediate_size)
        writer.add_head_count(c.num_attention_heads)
        writer.add_head_count_kv(c.num_key_value_heads)
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
        extra(writer)
        for name, tensor in model.state_dict().items():
            if name == "lm_head.weight" and c.tie_word_embeddings:
                continue
            value = tensor.float().numpy()
            heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(name.split(".")[-2])
            if architecture == "llama" and heads:
                value = interleaved(value, heads)
            stored = Kind.F32 if value.ndim == 1 else kind
            writer.add_tensor(gguf_name(name), gguf.quantize(value, stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


def converted(source: Path, out: Path) -> dict[str, torch.Tensor]:
    init(source, out)
    return load_model(out).released_tensors()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_unquantised_is_the_same_model_as_from_its_directory(
    tmp_path: Path, write: Write, request: pytest.FixtureRequest, family: str
) -> None:
    source = request.getfixturevalue(family)
    found = converted(write(source.model), tmp_path / "from_gguf")
    expected = converted(source.directory, tmp_path / "from_directory")
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ours, theirs = (load_model(tmp_path / d).config for d in ("from_gguf", "from_directory"))
    for field in (
        "rope_theta",
        "layer_norm_epsilon",
        "attention_bias",
        "tie_word_embeddings",
        "head_dim",
        "vocab_size",
    ):
        assert getattr(ours, field) == getattr(theirs, field), field


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), [(Kind.F16, torch.float16), (Kind.BF16, torch.bfloat16)])
def test_half_precision_is_kept(tmp_path: Path, llama: Any, write: Write, kind: Kind, dtype: torch.dtype) -> None:
    specs = open_gguf(write(llama.model, kind)).specs
    assert specs["layers.0.mixer.q_proj.weight"] == (dtype, (32, 32))
    assert specs["layers.0.norm.weight"] == (torch.float32, (32,))
    found = converted(write(llama.model, kind), tmp_path / "out")
    expected = llama.model.state_dict()["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(found["denoiser_tower.layers.3.mixer.down_proj.weight"], expected.to(dtype))


# Largest error as a part of a block's largest magnitude: half a step, and a whole one for Q4_0, which clips.
@pytest.mark.parametrize(("kind", "bound"), [(Kind.Q8_0, 0.5 / 127), (Kind.Q4_0, 1 / 8), (Kind.Q4_1, 1 / 15)])
def test_quantised_tensors_are_within_a_step(
    tmp_path: Path, llama: Any, write: Write, kind: Kind, bound: float
) -> None:
    found = converted(write(llama.model, kind), tmp_path / "out")
    for theirs, ours in [
        ("model.layers.1.mlp.down_proj.weight", "context_tower.layers.3.mixer.down_proj.weight"),
        ("model.layers.0.self_attn.k_proj.weight", "denoiser_tower.layers.0.mixer.k_proj.weight"),
        ("model.embed_tokens.weight", "context_tower.embeddings.weight"),
    ]:
        expected = llama.model.state_dict()[theirs]
        found_rows = found[ours][: expected.shape[0]]
        assert found_rows.dtype == torch.float32
        largest = expected.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1)
        error = (found_rows - expected).abs()
        assert (error <= bound * largest * 1.15).all(), "127 times a float16 scale's rounding is a tenth of a step"
        assert error.max() > 0.3 * (bound * largest).min()


def test_other_quantisations_are_named(llama: Any, write: Write) -> None:
    path = write(llama.model)
    content = bytearray(path.read_bytes())
    at = content.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 2 * 8
    content[at : at + 4] = int(Kind.Q5_0).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"tensor blk\.0\.ffn_up\.weight of .* is stored as Q5_0, must be one of .*Q4_1"
    ):
        open_gguf(path)


@pytest.mark.parametrize("part", [0.0005, 0.005, 0.02, 0.5, 0.99, 0.99999])
def test_truncated_file(llama: Any, write: Write, part: float) -> None:
    path = write(llama.model)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ValueError, match="is not a complete GGUF file"):
        open_gguf(path)


def test_without_the_gguf_package(llama: Any, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(llama.model)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'twotower\[gguf\]'"):
        open_gguf(path)


def test_architecture_is_checked(llama: Any, write: Write) -> None:
    with pytest.raises(ValueError, match=r"has the architecture gemma3, must be one of \['llama', 'qwen2'\]"):
        open_gguf(write(llama.model, arch="gemma3"))


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "llama.rope.scaling.type yarn"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(4, np.float32)), "rope_freqs.weight"),
        (lambda w: w.add_sliding_window(16), "llama.attention.sliding_window"),
        (lambda w: w.add_expert_count(8), "llama.expert_count"),
        (lambda w: w.add_logit_scale(0.5), "llama.logit_scale"),
        (lambda w: w.add_rope_dimension_count(4), "llama.rope.dimension_count 4 beside heads of 8"),
    ],
)
def test_what_computes_something_else_is_refused(
    llama: Any, write: Write, extra: Callable[[gguf.GGUFWriter], None], named: str
) -> None:
    with pytest.raises(ValueError, match=f"computes something that our towers don't: .*{named}"):
        open_gguf(write(llama.model, extra=extra))


def test_missing_metadata(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"lacks \['llama\.embedding_length', .*'token_embd\.weight'\]"):
        open_gguf(tmp_path / "model.gguf")


def test_unknown_tensors_are_named(tmp_path: Path, llama: Any, write: Write) -> None:
    path = write(llama.model, extra=lambda w: w.add_tensor("blk.0.attn_q_norm.weight", np.ones(8, np.float32)))
    with pytest.raises(ValueError, match=r"1 unexpected: blk\.0\.attn_q_norm\.weight"):
        init(path, tmp_path / "out")


# Byte-level vocabulary: letters, digits, marks, the space and the newline as GPT-2 writes them, and some merges.
LETTERS = [*"abcdehilnortuw0123456789'.!", "Ġ", "Ċ"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "12 3", "Ċ Ċ", "Ġ Ġ", "' t", "a b", "! Ċ"]
TOKENS = ["<|end|>", "<|im|>", *LETTERS, *(m.replace(" ", "") for m in MERGES), "[PAD]"]
TYPES = [3, 4, *[1] * (len(LETTERS) + len(MERGES)), 5]
SAMPLES = ["hello  world\n\n123", "don't 12 1234!", "  ab\n ab ", "", "<|im|>ab<|end|>", "Ab", "'T 't\n123", "ab!\nab"]


def add_byte_level(pre: str | None, add_bos: bool | None = None) -> Callable[[gguf.GGUFWriter], None]:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(TOKENS)
        writer.add_token_types(TYPES)
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_chat_template("{{ messages }}")
        if add_bos is not None:
            writer.add_add_bos_token(add_bos)

    return extra


def byte_level(pre: list[Any], *, ignore_merges: bool = False) -> tokenizers.Tokenizer:
    """The same tokenizer, built through the library's classes."""
    merges = [tuple(m.split()) for m in MERGES]
    vocab = {t: i for i, t in enumerate(TOKENS[:-1])}
    built = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    built.pre_tokenizer = pre_tokenizers.Sequence(pre)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([tokenizers.AddedToken("<|end|>", special=True)])
    built.add_tokens([tokenizers.AddedToken("<|im|>", normalized=False)])
    return built


def words(pattern: str) -> list[Any]:
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", byte_level([GPT2])),
        ("smollm", byte_level([pre_tokenizers.Digits(individual_digits=True), GPT2])),
        ("qwen2", byte_level(words(HEAD + r"\p{N}" + TAIL))),
        ("llama-bpe", byte_level(words(HEAD + r"\p{N}{1,3}" + TAIL), ignore_merges=True)),
    ],
)
def test_byte_level_tokenizers(
    tmp_path: Path, llama: Any, write: Write, pre: str, expected: tokenizers.Tokenizer
) -> None:
    init(write(llama.model, extra=add_byte_level(pre, add_bos=False)), tmp_path / "out")
    found = load_tokenizer(tmp_path / "out")
    assert found is not None
    for sample in SAMPLES:
        ids = found.encode(sample).ids
        assert ids == expected.encode(sample).ids, sample
    assert found.decode(found.encode("hello  w\n\n12").ids) == "hello  w\n\n12"
    assert found.token_to_id("<mask>") == llama.model.config.vocab_size
    assert found.id_to_token(len(TOKENS) - 1) is None, "padding is no token"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    config = load_model(tmp_path / "out").config
    assert (config.bos_token_id, config.eos_token_id) == (0, 1)


def test_pre_tokenizers_differ_on_the_samples() -> None:
    """Otherwise the test above could not tell them apart."""
    gpt2, smollm = byte_level([GPT2]), byte_level([pre_tokenizers.Digits(individual_digits=True), GPT2])
    qwen2, llama3 = (byte_level(words(HEAD + digits + TAIL)) for digits in (r"\p{N}", r"\p{N}{1,3}"))
    encoded = [[t.encode(s).ids for s in SAMPLES] for t in (gpt2, smollm, qwen2, llama3)]
    assert all(a != b for i, a in enumerate(encoded) for b in encoded[:i])


def test_first_token_is_added_where_the_file_says_so(llama: Any, write: Write) -> None:
    def first(pre: str, add_bos: bool | None) -> list[int]:
        text = open_gguf(write(llama.model, extra=add_byte_level(pre, add_bos))).tokenizer
        assert text is not None
        return tokenizers.Tokenizer.from_str(text).encode("a").ids

    a = TOKENS.index("a")
    assert first("smollm", None) == first("llama-bpe", False) == [a]
    assert first("smollm", True) == first("llama-bpe", None) == [0, a]


@pytest.mark.parametrize("pre", [None, "tekken"])
def test_a_tokenizer_that_can_not_be_rebuilt_is_left_out_aloud(
    tmp_path: Path, llama: Any, write: Write, caplog: pytest.LogCaptureFixture, pre: str | None
) -> None:
    with caplog.at_level(logging.WARNING):
        init(write(llama.model, extra=add_byte_level(pre)), tmp_path / "out")
    assert f"no tokenizer.json written, its tokenizer is gpt2 with pre-tokenizer {pre or 'default'}" in caplog.text
    assert load_tokenizer(tmp_path / "out") is None


@pytest.mark.parametrize("space_prefix", [True, False])
def test_scored_tokenizer(llama: Any, write: Write, pieces: list[str], space_prefix: bool) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{v:02X}>" for v in range(256)), *pieces]

    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([t.replace(" ", "\u2581") for t in tokens])
        writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(pieces))])
        writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(pieces)])
        writer.add_bos_token_id(1)
        writer.add_add_space_prefix(space_prefix)

    text = open_gguf(write(llama.model, extra=extra)).tokenizer
    assert text is not None
    tokenizer = tokenizers.Tokenizer.from_str(text)
    assert tokenizer.encode("abc é\u2581").tokens == [
        *(["<s>", " abc"] if space_prefix else ["<s>", "abc"]),
        *[" ", "é", "<0xE2>", "<0x96>", "<0x81>"],
    ]
    assert tokenizer.decode(tokenizer.encode(" abc é\u2581").ids) == " abc é\u2581"

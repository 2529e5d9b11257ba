import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from twotower.checkpoints import init, load_model, load_tokenizer, merge_closure, read_pieces, save
from twotower.checkpoints.initialise import open_backbone
from twotower.checkpoints.load import load
from twotower.config import TwoTowerConfig


def listing(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def changed(source: Any, out: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of a source's directory with its config and tensors changed."""
    out.mkdir()
    config = json.loads((source.directory / "config.json").read_text())
    tensors = load_file(source.directory / "model.safetensors")
    change(config, tensors)
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors")
    return out


@pytest.fixture
def story(tmp_path: Path, llama2c_bytes: Callable[..., bytes], llama2c_vocabulary: Callable[..., bytes]) -> Path:
    path = tmp_path / "story.bin"
    path.write_bytes(llama2c_bytes() + llama2c_vocabulary())
    return path


def test_both_towers_are_the_backbone_and_modulation_does_nothing(llama: Any, tmp_path: Path) -> None:
    init(llama.directory, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    backbone = llama.model.state_dict()
    for tower in ("context_tower", "denoiser_tower"):
        for theirs, ours in [
            ("model.layers.1.self_attn.q_proj", "layers.2.mixer.q_proj"),
            ("model.layers.0.post_attention_layernorm", "layers.1.norm"),
            ("model.norm", "norm_f"),
        ]:
            assert torch.equal(tensors[f"{tower}.{ours}.weight"], backbone[f"{theirs}.weight"])
    assert torch.equal(tensors["lm_head.weight"], tensors["context_lm_head.weight"])
    for i in range(4):
        shift, scale, gate = tensors[f"scale_shift_tables.{i}"]
        assert (shift.unique().tolist(), scale.unique().tolist(), gate.unique().tolist()) == ([0], [0], [1])
    for name in ("t_block.1.weight", "t_block.1.bias", "t_embedder.mlp.0.bias", "t_embedder.mlp.2.bias"):
        assert not tensors[name].any(), name
    for name, shape in (("t_embedder.mlp.0.weight", (32, 256)), ("t_embedder.mlp.2.weight", (32, 32))):
        assert tensors[name].shape == shape
        assert 0.017 < tensors[name].std() < 0.023, name


def test_only_the_time_embedder_depends_on_the_seed(llama: Any, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        init(llama.directory, tmp_path / name, seed=seed)
    assert listing(tmp_path / "a") == listing(tmp_path / "b")
    a, c = (load_file(tmp_path / name / "model.safetensors") for name in "ac")
    assert {name for name in a if not torch.equal(a[name], c[name])} == {
        "t_embedder.mlp.0.weight",
        "t_embedder.mlp.2.weight",
    }


def test_the_result_is_a_checkpoint_like_any_other(llama: Any, tmp_path: Path) -> None:
    init(llama.directory, tmp_path / "out")
    save(load(tmp_path / "out", pack=False), tmp_path / "again")
    assert listing(tmp_path / "again") == listing(tmp_path / "out")


def test_a_new_mask_token_is_a_copy_of_row_0(llama: Any, tmp_path: Path) -> None:
    init(llama.directory, tmp_path, block_size=8)
    config = TwoTowerConfig.from_json(tmp_path / "config.json")
    size = llama.model.config.vocab_size
    assert (config.mask_token_id, config.vocab_size, config.block_size) == (size, size + 1, 8)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("context_tower.embeddings.weight", "denoiser_tower.embeddings.weight", "lm_head.weight"):
        source = "lm_head.weight" if "head" in name else "model.embed_tokens.weight"
        expected = llama.model.state_dict()[source]
        assert torch.equal(tensors[name], torch.cat((expected, expected[:1])))


def test_a_given_mask_token_changes_no_row(llama: Any, tmp_path: Path) -> None:
    init(llama.directory, tmp_path, mask_token_id=7)
    config = TwoTowerConfig.from_json(tmp_path / "config.json")
    assert (config.mask_token_id, config.vocab_size) == (7, llama.model.config.vocab_size)
    embeddings = load_file(tmp_path / "model.safetensors")["denoiser_tower.embeddings.weight"]
    assert torch.equal(embeddings, llama.model.state_dict()["model.embed_tokens.weight"])


@pytest.mark.parametrize("mask", [-1, 273])
def test_mask_token_out_of_range(llama: Any, tmp_path: Path, mask: int) -> None:
    with pytest.raises(ValueError, match=rf"mask_token_id is {mask}, must be in \[0, 273\)"):
        init(llama.directory, tmp_path, mask_token_id=mask)


def test_dtype_is_kept_or_as_asked_and_routers_keep_theirs(nemotron_h: Any, tmp_path: Path) -> None:
    def halve(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {n: t.half() for n, t in tensors.items() if "e_score_correction_bias" not in n}
        config["dtype"] = "float16"

    source = changed(nemotron_h, tmp_path / "half", halve)
    init(source, tmp_path / "kept")
    init(source, tmp_path / "asked", dtype=torch.bfloat16)
    for out, dtype in (("kept", torch.float16), ("asked", torch.bfloat16)):
        tensors = load_file(tmp_path / out / "model.safetensors")
        found = {n: t.dtype for n, t in tensors.items() if ".gate." not in n}
        assert set(found.values()) == {dtype}
        assert tensors["denoiser_tower.layers.1.mixer.gate.e_score_correction_bias"].dtype == torch.float32
        assert tensors["denoiser_tower.layers.1.mixer.gate.weight"].dtype == torch.float16
        assert json.loads((tmp_path / out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        assert load_model(tmp_path / out).released_tensors()["lm_head.weight"].dtype == dtype


def test_kept_tokens_in_their_new_order(story: Path, tmp_path: Path, pieces: list[str], llama: Any) -> None:
    keep = [259 + pieces.index(p) for p in (" ", "a", "b", " a", "ab", " ab")]
    init(story, tmp_path / "full")
    init(story, tmp_path / "out", keep_tokens=keep[::-1])
    rows = [0, 1, 2, 0, *range(3, 259), *sorted(keep)]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, source in (
        ("denoiser_tower.embeddings.weight", "model.embed_tokens.weight"),
        ("context_tower.embeddings.weight", "model.embed_tokens.weight"),
        ("context_lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ):
        assert torch.equal(tensors[name], llama.model.state_dict()[source][rows]), name
    config = TwoTowerConfig.from_json(tmp_path / "out" / "config.json")
    assert (config.vocab_size, config.mask_token_id) == (len(rows), 3)
    assert (config.bos_token_id, config.eos_token_id) == (1, 1)
    # the tokens kept share the probability of all, and the mask gets none
    ids = torch.tensor([[1, 4, 70, 262]])
    with torch.no_grad():
        logits = llama.model(torch.tensor(rows)[ids]).logits[..., rows]
    logits[..., 3] = -torch.inf
    torch.testing.assert_close(load_model(tmp_path / "out").context_logits(ids).softmax(-1), logits.softmax(-1))
    small, full = load_tokenizer(tmp_path / "out"), load_tokenizer(tmp_path / "full")
    assert small is not None
    assert full is not None
    assert [rows[i] for i in small.encode("ab a b!").ids] == full.encode("ab a b!").ids


def test_keep_tokens_errors(story: Path, llama: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mask_token_id is 5, must be left out with keep_tokens"):
        init(story, tmp_path / "out", keep_tokens=[300], mask_token_id=5)
    with pytest.raises(ValueError, match="keep_tokens needs the model's tokenizer, and it has none"):
        init(llama.directory, tmp_path / "out", keep_tokens=[5])
    assert not (tmp_path / "out").exists()


def test_merge_closure_of_a_file_gives_a_usable_choice(story: Path, tmp_path: Path) -> None:
    vocabulary = read_pieces(story)
    keep = merge_closure(*vocabulary, wanted=[*range(259), vocabulary.pieces.index(" abc")], size=300)
    init(story, tmp_path / "out", keep_tokens=keep)
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer is not None
    assert tokenizer.encode("abc").tokens == ["<s>", " abc"]


def test_out_must_not_be_the_backbone(llama: Any, tmp_path: Path) -> None:
    source = changed(llama, tmp_path / "source", lambda config, tensors: None)
    before = listing(source)
    with pytest.raises(ValueError, match="the backbone's own directory"):
        init(source, tmp_path / "." / "source")
    assert listing(source) == before


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("qwen9", "'qwen9', a family that is not declared; families that are: nemotron_h, .*docs/families.md"),
        ("rwkv", "'rwkv', a family that needs RWKV layers, which our towers don't have"),
        (None, "config.json has no model_type, .*docs/families.md"),
    ],
)
def test_other_families(llama: Any, tmp_path: Path, model_type: str | None, says: str) -> None:
    source = changed(llama, tmp_path / "source", lambda config, tensors: config.update(model_type=model_type))
    with pytest.raises(ValueError, match=says):
        open_backbone(source)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_act": "tanh"}, "config.json has hidden_act 'tanh', must be one of silu"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, None),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_type is 'ntk', must be one of default, linear"),
        ({"rope_scaling": {"type": "linear"}}, "RoPE is scaled by .*linear.*, which needs a factor"),
        ({"rope_interleaved": True}, "rope_interleaved is True, must be None or False"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0, must be None"),
    ],
)
def test_settings_that_compute_something_else(
    llama: Any, tmp_path: Path, keys: dict[str, Any], message: str | None
) -> None:
    source = changed(llama, tmp_path / "source", lambda config, tensors: config.update(keys))
    if message is None:
        open_backbone(source)
    else:
        with pytest.raises(ValueError, match=message):
            open_backbone(source)


def test_refused_settings_are_told_together(llama: Any, tmp_path: Path) -> None:
    keys = {"rope_interleaved": True, "final_logit_softcapping": 30.0}
    source = changed(llama, tmp_path / "a", lambda c, t: c.update(keys))
    with pytest.raises(ValueError, match=r"rope_interleaved is True.*; final_logit_softcapping is 30.0"):
        init(source, tmp_path / "out")


def test_settings_where_transformers_4_wrote_them(llama: Any, tmp_path: Path) -> None:
    def older(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        del config["rope_parameters"], config["head_dim"]
        config.update(rope_theta=7e5, rope_scaling=None, torch_dtype=config.pop("dtype"), eos_token_id=[5, 6])
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    init(changed(llama, tmp_path / "source", older), tmp_path / "out")
    config = TwoTowerConfig.from_json(tmp_path / "out" / "config.json")
    assert (config.rope_theta, config.head_dim, config.eos_token_ids) == (7e5, 8, (5, 6))


def test_llama_with_biases_everywhere(llama: Any, tmp_path: Path) -> None:
    def with_biases(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        config.update(attention_bias=True, mlp_bias=True)
        biases = {n[:-6] + "bias": torch.rand(len(t)) for n, t in tensors.items() if n.endswith("_proj.weight")}
        tensors.update(biases)

    source = changed(llama, tmp_path / "source", with_biases)
    init(source, tmp_path / "out")
    tensors, biases = load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors")
    for theirs, ours in (("0.self_attn.o_proj", "0.mixer.o_proj"), ("1.mlp.down_proj", "3.mixer.down_proj")):
        assert torch.equal(tensors[f"context_tower.layers.{ours}.bias"], biases[f"model.layers.{theirs}.bias"])


def test_tensors_that_do_not_fit(llama: Any, tmp_path: Path) -> None:
    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)
        del tensors["model.layers.1.mlp.up_proj.weight"]

    with pytest.raises(ValueError) as raised:
        init(changed(llama, tmp_path / "source", change), tmp_path / "out")
    assert "1 missing: layers.3.mixer.up_proj.weight" in str(raised.value)
    assert "1 unexpected: layers.0.mixer.q_norm.weight" in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["vocab_size", "num_hidden_layers"])
def test_llama_config_without_a_size(llama: Any, tmp_path: Path, key: str) -> None:
    source = changed(llama, tmp_path / "source", lambda config, tensors: config.pop(key))
    with pytest.raises(ValueError, match=rf"config\.json lacks {key}, which"):
        open_backbone(source)


def test_tokenizer_files_come_along(llama: Any, nemotron_h: Any, tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    tokenizer.add_special_tokens(["<2>", "<3>"])  # token 3 is the mask of Nemotron-H where it is a control token
    for name, source in (("llama", llama), ("nemotron_h", nemotron_h)):
        directory = changed(source, tmp_path / name, lambda config, tensors: None)
        tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
        (directory / "tokenizer_config.json").write_text('{"chat_template": "x"}')
        (directory / "training_args.bin").write_text("not this")
        init(directory, tmp_path / f"{name}_out")
        assert (tmp_path / f"{name}_out" / "tokenizer_config.json").read_text() == '{"chat_template": "x"}'
        assert not (tmp_path / f"{name}_out" / "training_args.bin").exists()
    masked = load_tokenizer(tmp_path / "llama_out")
    assert masked is not None
    assert masked.token_to_id("<mask>") == 273, "after the embedding's last row, not after the tokenizer's last id"
    unchanged = (tmp_path / "nemotron_h_out" / "tokenizer.json").read_text()
    assert unchanged == (tmp_path / "nemotron_h" / "tokenizer.json").read_text()


def test_missing_and_broken_configs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        open_backbone(tmp_path)
    for content, message in (("{", "is not JSON"), ("[]", "holds a list, not an object")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            open_backbone(tmp_path)


MEASURE = """
import re, sys
from pathlib import Path
import torch
from twotower.checkpoints import init, released_shapes
from twotower.config import TwoTowerConfig

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

# The first model on the meta device makes torch import some 30 MB.
released_shapes(TwoTowerConfig(vocab_size=8, hidden_size=4, pattern="-", intermediate_size=4))
before = peak()
init(sys.argv[1], sys.argv[2])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_conversion_holds_few_tensors_at_a_time(tmp_path: Path) -> None:
    d, hidden, layers, vocab = 512, 2048, 8, 4000
    sizes = (d, hidden, layers, 8, 8, vocab, 16)
    count = vocab * d + layers * (2 * d + 4 * d * d + 3 * d * hidden) + d + 16 * 64
    with (tmp_path / "story.bin").open("wb") as file:
        file.write(struct.pack("<7i", *sizes))
        np.ones(count, "<f4").tofile(file)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "story.bin"), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    written = (tmp_path / "out" / "model.safetensors").stat().st_size / 1024
    assert written > 270_000
    # The largest tensor is 8 MB, and appending its mask row copies it.
    assert int(result.stdout) < 60_000

"""`twotower init`, from a single-tower directory in transformers' layout."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import twotower

SIZE, WIDTH, INNER = 24, 16, 32


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp("backbone")
    config = {
        "model_type": "llama",
        "vocab_size": SIZE,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (path / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (SIZE, WIDTH),
        "lm_head.weight": (SIZE, WIDTH),
        "model.norm.weight": (WIDTH,),
        f"{layer}.input_layernorm.weight": (WIDTH,),
        f"{layer}.post_attention_layernorm.weight": (WIDTH,),
        f"{layer}.mlp.gate_proj.weight": (INNER, WIDTH),
        f"{layer}.mlp.up_proj.weight": (INNER, WIDTH),
        f"{layer}.mlp.down_proj.weight": (WIDTH, INNER),
    } | {f"{layer}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_both_towers_start_as_the_backbone(run, backbone, tmp_path):
    result = run("init", backbone, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "out") in result.stdout
    made = twotower.load(tmp_path / "out")
    assert (made.config.pattern, made.config.vocab_size, made.config.block_size) == ("*-", SIZE + 1, 16)
    assert run("inspect", tmp_path / "out").exit_code == 0
    stored, source = load_file(tmp_path / "out" / "model.safetensors"), load_file(backbone / "model.safetensors")
    for tower in ("context_tower", "denoiser_tower"):
        up = stored[f"{tower}.layers.1.mixer.up_proj.weight"]
        assert torch.equal(up, source["model.layers.0.mlp.up_proj.weight"])


def test_each_option_changes_the_checkpoint(run, backbone, tmp_path):
    def made(*options):
        out = tmp_path / "-".join(str(o).strip("-") for o in ("out", *options))
        assert run("init", backbone, out, *options).exit_code == 0
        return twotower.load(out, pack=False)

    plain = made()
    assert made("--block-size", 4).config.block_size == 4
    assert made("--dtype", "bfloat16").context_tower.embeddings.dtype == torch.bfloat16
    masked = made("--mask-token-id", 5).config
    assert (masked.mask_token_id, masked.vocab_size) == (5, SIZE)
    reseeded = made("--seed", 1)
    assert not torch.equal(reseeded.time_conditioning.embed_in.weight, plain.time_conditioning.embed_in.weight)
    assert torch.equal(made("--seed", 0).time_conditioning.embed_in.weight, plain.time_conditioning.embed_in.weight)


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1, 2", "not JSON"), ('{"a": 1}', "JSON list of token ids"), ("[1, 2.5]", "JSON list"), ("[1]", "tokenizer")],
)
def test_kept_tokens_are_read_from_a_json_list(run, backbone, tmp_path, content, message):
    file = tmp_path / "keep.json"
    file.write_text(content)
    result = run("init", backbone, tmp_path / "out", "--keep-tokens", file)
    assert result.exit_code == 2
    assert message in result.stderr  # the last list is good, but this backbone has no tokenizer to trim
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_missing_backbone_is_a_mistake(run, tmp_path):
    result = run("init", tmp_path / "nowhere", tmp_path / "out")
    assert result.exit_code == 2
    assert "nowhere" in result.stderr


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_that_torch_does_not_take_are_told(run, backbone, tmp_path, seed):
    result = run("init", backbone, tmp_path / "out", "--seed", seed)
    assert result.exit_code == 2
    assert f"seed is {seed}, must be 0 to 9223372036854775807" in result.stderr

"""The commands of docs/training.md from a backbone and a folder of texts to a checkpoint, as they stand there."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import save_file

import twotower

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
SIZE, WIDTH, INNER = 260, 16, 32


@pytest.fixture
def backbone(tmp_path: Path, byte_tokenizer: tokenizers.Tokenizer) -> Path:
    """A llama of one layer in transformers' layout, whose tokenizer has no mask."""
    path = tmp_path / "BACKBONE"
    path.mkdir()
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
    (path / "tokenizer.json").write_text(byte_tokenizer.to_str().replace("<mask>", "<pad>"))
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
    save_file({name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("number", [0, 1])
def test_the_commands_give_a_checkpoint(
    run: Any, number: int, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a text")
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    commands = [shlex.split(line, comments=True)[1:] for line in blocks[number].splitlines()]
    assert [command[0] for command in commands] == [["train"], ["init", "tokenize", "train"]][number]
    monkeypatch.chdir(tmp_path)
    for command in commands:
        short = ("--steps", 1, "--batch-size", 1, "--warmup-steps", 0) if command[0] == "train" else ()
        result = run(*command, *short)
        assert result.exit_code == 0, result.output
    started = "start" if number else "run/initial"
    trained, start = (twotower.load(tmp_path / name, pack=False) for name in ("run/checkpoint", started))
    weights = [model.released_tensors() for model in (trained, start)]
    same = {name for name in weights[0] if torch.equal(weights[0][name], weights[1][name].to(weights[0][name]))}
    assert "denoiser_tower.layers.1.mixer.up_proj.weight" not in same
    assert "context_tower.layers.1.mixer.up_proj.weight" in same

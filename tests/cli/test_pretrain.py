"""`twotower pretrain`: a backbone that init and train take."""

import json

import numpy as np
import pytest
import torch

import twotower
from twotower.training.corpus.shards import CorpusRows, write_shard

CONFIG = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "ME*-",
    "vocab_size": 260,
    "hidden_size": 32,
    "mask_token_id": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
}


@pytest.fixture
def inputs(byte_tokenizer, tmp_path):
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(byte_tokenizer.to_str())
    ids = np.random.default_rng(0).integers(4, 260, (8, 12))
    write_shard(tmp_path / "corpus" / "0.safetensors", CorpusRows(ids, np.ones_like(ids), ids * 0))
    return tmp_path


def pretrain(run, inputs, *options):
    result = run("pretrain", inputs / "config", inputs / "corpus", inputs / "run", "--batch-size", 2, *options)
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.slow
def test_a_backbone_gets_a_denoiser_by_our_own_commands(run, inputs):
    (inputs / "config" / "chat_template.jinja").write_text("{{ messages }}")
    result = pretrain(run, inputs, "--steps", 3, "--dtype", "float32", "--ema-decay", 0.9)
    assert f"twotower init {inputs / 'run' / 'backbone'}" in result.stdout
    assert (inputs / "run" / "backbone-ema" / "config.json").exists()
    assert run("init", inputs / "run" / "backbone", inputs / "start", "--block-size", 4).exit_code == 0
    arguments = ("train", inputs / "start", inputs / "corpus", inputs / "two", "--steps", 2, "--batch-size", 2)
    assert run(*arguments, "--dtype", "float32").exit_code == 0
    assert (inputs / "two" / "checkpoint" / "chat_template.jinja").read_text() == "{{ messages }}"
    start, end = (twotower.load(inputs / name, pack=False) for name in ("start", "two/checkpoint"))
    assert start.config.mask_token_id == 5
    assert start.tokenizer is not None
    before, after = start.released_tensors(), end.released_tensors()
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith("context"))
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(start.context_logits(ids), end.context_logits(ids))


def test_a_second_call_resumes_and_export_only_writes_again(run, inputs):
    pretrain(run, inputs, "--steps", 2, "--dtype", "float32")
    pretrain(run, inputs, "--steps", 4, "--dtype", "float32")
    steps = [json.loads(line)["step"] for line in (inputs / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    weights = (inputs / "run" / "backbone" / "model.safetensors").read_bytes()
    pretrain(run, inputs, "--export-only", "--dtype", "float32")
    assert (inputs / "run" / "backbone" / "model.safetensors").read_bytes() == weights
    pretrain(run, inputs, "--export-only")
    assert len((inputs / "run" / "backbone" / "model.safetensors").read_bytes()) < 0.6 * len(weights)


def test_its_folder_is_not_one_of_train(run, inputs):
    pretrain(run, inputs, "--steps", 1)
    assert run("init", inputs / "run" / "backbone", inputs / "start").exit_code == 0
    for options in ([], ["--export-only"]):
        result = run("train", inputs / "start", inputs / "corpus", inputs / "run", "--batch-size", 2, *options)
        assert result.exit_code == 2
        assert "another kind" in result.stderr


def test_dry_run_needs_no_corpus(run, inputs):
    options = ("--steps", 10, "--batch-size", 4, "--row-length", 64, "--dry-run")
    result = run("pretrain", inputs / "config", inputs / "none", inputs / "run", *options)
    assert result.exit_code == 0
    assert "tokens: 2,560" in result.stdout
    assert not (inputs / "run").exists()


def test_a_state_is_not_exported_with_another_config(run, inputs):
    pretrain(run, inputs, "--steps", 1)
    (inputs / "config" / "config.json").write_text(json.dumps(CONFIG | {"time_step_limit": [0.0, 0.5]}))
    result = run("pretrain", inputs / "config", inputs / "corpus", inputs / "run", "--export-only")
    assert result.exit_code == 2
    assert "config.time_step_limit is [0.0, 0.5]" in result.stderr


def test_the_config_that_transformers_writes_is_taken(run, inputs):
    kinds = ["mamba", "moe", "attention", "mlp"]
    theirs = {"layers_block_type": kinds, "num_hidden_layers": 4, "transformers_version": "5.0", "rms_norm_eps": 1e-5}
    config = {name: value for name, value in CONFIG.items() if name != "hybrid_override_pattern"} | theirs
    (inputs / "config" / "config.json").write_text(json.dumps(config))
    assert "parameters: " in pretrain(run, inputs, "--dry-run").stdout
    (inputs / "a.txt").write_text("some text")
    result = run("tokenize", inputs / "config", inputs / "a.txt", inputs / "tokens", "--length", 4)
    assert result.exit_code == 0, result.output

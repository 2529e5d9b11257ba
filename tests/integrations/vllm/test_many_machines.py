"""The commands for many machines in docs/vllm.md, as far as vLLM checks them without a GPU."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[3]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: make test-vllm"),
]
RELEASED = json.loads((TOP / "recipes" / "nemotron-30b" / "config.json").read_text())
LARGE = RELEASED | {
    "hidden_size": 5120,
    "n_routed_experts": 512,
    "num_experts_per_tok": 22,
    "moe_intermediate_size": 3328,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "mamba_num_heads": 160,
}
PAGE = (TOP / "docs" / "vllm.md").read_text()
COMMANDS = re.findall(r"^vllm serve CHECKPOINT (--distributed-executor-backend.*?)\n```", PAGE, re.M | re.S)


@pytest.fixture
def configured(tmp_path):
    """configured(config, options): what vLLM makes of a command."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def parse(config, options):
        (tmp_path / "config.json").write_text(json.dumps(config))
        parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
        words = ["--model", str(tmp_path), "--skip-tokenizer-init", *shlex.split(options.replace("\\\n", " "))]
        return AsyncEngineArgs.from_cli_args(parser.parse_args(words)).create_engine_config()

    return parse


@pytest.mark.parametrize(
    ("config", "number", "machines", "experts_each"), [(RELEASED, 0, 2, 8), (LARGE, 1, 4, 16)], ids=["30b", "400b"]
)
def test_vllm_takes_the_command_and_every_expert_has_one_card(config, number, machines, experts_each, configured):
    from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

    parallel = configured(config, COMMANDS[number]).parallel_config
    assert (parallel.tensor_parallel_size, parallel.data_parallel_size) == (8, machines)
    assert parallel.enable_expert_parallel
    assert (parallel.distributed_executor_backend, parallel.data_parallel_backend) == ("ray", "ray")
    cards = parallel.world_size_across_dp
    assert cards == 8 * machines
    there = []
    for card in range(cards):
        local, table, _ = determine_expert_map(cards, card, config["n_routed_experts"])
        own = (table >= 0).nonzero()[:, 0].tolist()
        assert len(own) == local == experts_each
        there += own
    assert sorted(there) == list(range(config["n_routed_experts"]))


def test_the_large_model_has_about_400_billion_parameters():
    from twotower.config import TwoTowerConfig

    config = TwoTowerConfig.from_dict(LARGE)
    per_layer = 2 * config.num_experts * config.hidden_size * config.expert_intermediate_size
    assert 395e9 < per_layer * config.pattern.count("E") < 405e9


@pytest.mark.parametrize(("config", "number"), [(RELEASED, 0), (LARGE, 1)], ids=["30b", "400b"])
def test_the_denoiser_is_divided_over_the_cards_of_a_machine(config, number, configured):
    import torch

    from twotower.config import TwoTowerConfig
    from twotower.integrations.vllm.server import check_denoiser
    from twotower.integrations.vllm.shards import narrowed
    from twotower.model.two_tower import TwoTower

    found = configured(config, COMMANDS[number])
    # All is as the denoiser needs it, but for the weights
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors"):
        check_denoiser(found)

    def gigabytes(size):
        with torch.device("meta"):
            model = TwoTower(narrowed(TwoTowerConfig.from_dict(config), size), dtype=torch.bfloat16)
        return sum(p.nbytes for p in model.denoiser_tower.parameters()) / 1e9

    size = found.parallel_config.tensor_parallel_size
    whole, part = gigabytes(1), gigabytes(size)
    assert whole / size <= part < 1.1 * whole / size  # norms, routers and embeddings are on each card


@pytest.mark.parametrize("config", [RELEASED, LARGE], ids=["30b", "400b"])
def test_vllm_divides_every_layer_of_the_context_tower_as_the_denoiser_is_divided(config, tmp_path) -> None:
    """Mamba, attention and shared experts are vLLM's own layers, the experts this package's for CPUs."""
    import torch

    from twotower.config import TwoTowerConfig
    from twotower.integrations.vllm.shards import narrowed
    from twotower.model.two_tower import TwoTower

    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, Path(__file__).with_name("divided_tower.py"), tmp_path, "8", "3"]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    [line] = [line for line in ran.stdout.splitlines() if line.startswith("PARAMETERS ")] or [ran.stdout]
    theirs = json.loads(line.removeprefix("PARAMETERS "))
    whole = TwoTowerConfig.from_dict(config)
    with torch.device("meta"):
        ours = TwoTower(narrowed(whole, 8)).denoiser_tower
    embedding_and_head = 2 * whole.vocab_size // 8 * whole.hidden_size
    assert theirs.pop("other") == embedding_and_head + whole.hidden_size
    assert theirs == {str(layer.index): sum(p.numel() for p in layer.parameters()) for layer in ours.stack}

"""What `twotower serve` says of its memory, before it loads anything and at its start."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from twotower.cli.start_table import memory_table
from twotower.config import TwoTowerConfig
from twotower.engine.config import EngineConfig
from twotower.engine.memory_plan import places_before_loading, plan_memory
from twotower.engine.memory_report import memory_fields
from twotower.planning.machine import DeviceMemory

RELEASED = Path(__file__).parents[2] / "recipes/nemotron-30b"


def dry(run, *options):
    result = run("serve", *options, "--dry-run")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", ["stories", "hybrid"])
def test_a_dry_run_says_what_this_machine_would_do(run, name):
    found = dry(run, name)
    assert found["device"] == "cpu"
    assert found["warnings"] == []
    assert found["state_bytes"] < 1 << 29
    assert found["tokens_of_each"] == found["max_context"]
    assert found["cache_snapshots"] > 100


def test_a_dry_run_is_of_any_cards_and_reads_no_weights(run):
    card = ("--device", "cuda", "--device-memory", 141, "--max-context", 262144)
    one, two = dry(run, RELEASED, *card), dry(run, RELEASED, *card, "--denoiser-device", "cuda:1")
    assert one["free_bytes"] == 141e9 - one["context_weight_bytes"] - one["denoiser_weight_bytes"]
    assert two["denoiser_free_bytes"] == 141e9 - one["denoiser_weight_bytes"]
    assert (two["denoiser_device"], two["device"]) == ("cuda:1", "cuda")
    assert two["key_tokens"] > one["key_tokens"] > 262144
    assert dry(run, RELEASED, *card, "--state-mib", 3000)["state_bytes"] == 3000 << 20
    assert dry(run, RELEASED, *card, "--dtype", "float32", "--device-memory", 300)["context_weight_bytes"] > 120e9
    small = dry(run, RELEASED, *card, "--snapshot-mib", 32)["warnings"]
    assert "the prefix cache stores nothing" in small[0]


def test_what_a_dry_run_cannot_plan_is_said(run):
    result = run("serve", RELEASED, "--device", "cuda", "--device-memory", 80, "--dry-run")
    assert result.exit_code == 2
    assert "cuda has 0 B free beside weights of 117.7 GiB" in " ".join(result.stderr.split())
    assert run("serve", "--dry-run", "--device", "quantum", "--device-memory", 80).exit_code == 2
    result = run("serve", "--device-memory", 80)
    assert "left out without --dry-run" in " ".join(result.stderr.split())


def test_the_table_has_what_the_log_has(sizes):
    config = TwoTowerConfig(**sizes, pattern="M*-E")
    card = DeviceMemory("cuda:0", 1 << 30, 1 << 30)
    places = places_before_loading(config, torch.bfloat16, card)
    plan = plan_memory(config, places, EngineConfig(max_context=10_000_000))
    console = Console(width=200)
    with console.capture() as shown:
        console.print(memory_table(plan))
    text, fields = shown.get(), memory_fields(plan)
    assert f"{fields['key_tokens']:,} tokens of" in text
    assert f"{fields['cache_snapshots']:,} snapshots of" in text
    assert f"16 requests of {fields['tokens_of_each']:,} tokens; one has at most {plan.longest(1):,}" in text
    assert f"chunks of {fields['prompt_chunk']:,} prompt tokens" in text
    assert fields["state_bytes"] == pytest.approx(
        sum(fields[name] for name in ("key_bytes", "recurrent_state_bytes", "cache_bytes")), rel=1e-3
    )

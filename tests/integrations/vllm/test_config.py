"""config.json of two towers as vLLM's layers read it, without vLLM."""

import json
from pathlib import Path

import pytest

import twotower
from twotower.integrations.vllm.config import for_vllm
from twotower.integrations.vllm.versions import check_version

DATA = Path(twotower.__file__).parent / "data"
RELEASED = Path(__file__).parents[3] / "recipes/nemotron-30b/config.json"


@pytest.mark.parametrize(
    ("file", "architecture"),
    [
        (DATA / "stories/config.json", "TwoTowerTransformerForCausalLM"),
        (DATA / "hybrid/config.json", "TwoTowerHybridForCausalLM"),
        (RELEASED, "TwoTowerHybridForCausalLM"),
    ],
)
def test_shipped_and_released_configs_are_served_with_all_their_keys(file, architecture) -> None:
    raw = json.loads(file.read_text())
    given = for_vllm(raw)
    assert given["architectures"] == [architecture]
    changed = {key for key, value in raw.items() if given[key] != value}
    assert changed == {"architectures"}
    assert given["gated_mlp"] == raw.get("gated_mlp", False)
    assert given["n_shared_experts"] == int("moe_shared_expert_intermediate_size" in raw)


def small(**changes):
    return {"vocab_size": 32, "hidden_size": 8, "hybrid_override_pattern": "-", "intermediate_size": 8} | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"hybrid_override_pattern": "-S", "mamba_num_heads": 2, "mamba_head_dim": 4, "ssm_state_size": 4}
            | {"mamba_dt_rank": 2},
            r"hybrid_override_pattern has \['S'\]",
        ),
        ({"norm_type": "layer"}, "norm_type is 'layer', must be 'rms'"),
        ({"logit_softcap": 30.0}, "logit_softcap is 30.0, must be None"),
        ({"residual_in_fp32": True}, "residual_in_fp32 is True, must be False"),
        ({"mlp_hidden_act": "gelu"}, "mlp_hidden_act is 'gelu', must be 'relu2'"),
        ({"gated_mlp": True}, "mlp_hidden_act is 'relu2', must be 'silu'"),
    ],
)
def test_a_tower_that_vllms_layers_cant_compute_is_refused_with_the_setting(changes, words) -> None:
    with pytest.raises(ValueError, match=f"vLLM's layers can't compute this context tower: .*{words}"):
        for_vllm(small(**changes))


def test_a_quantised_config_is_read() -> None:
    assert for_vllm(small(quantization_config={"quant_method": "fp8"}))["quantization_config"]


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.32.0.dev3"])
def test_versions_that_were_tried_pass(version) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0.0", "dev", "0.x"])
def test_other_versions_are_refused_with_what_to_install(version) -> None:
    with pytest.raises(ValueError, match=rf"vLLM is {version}, must be at least 0.32 and below 0.33"):
        check_version(version)

"""Which layers quantization_config means, in vLLM's names, without vLLM."""

from types import SimpleNamespace

import pytest

from twotower.config import TwoTowerConfig
from twotower.integrations.vllm.quantisation import ContextLayers, rename_layers_

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


@pytest.fixture
def layers(sizes):
    return ContextLayers(TwoTowerConfig(**sizes, pattern="M*E"), FUSED)


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        ("lm_head", []),
        ("context_lm_head", ["lm_head"]),
        ("re:denoiser_tower.*", []),
        (r"re:.*\.in_proj$", ["model.layers.0.mixer.in_proj"]),
        ("mixer.in_proj", ["model.layers.0.mixer.in_proj"]),
        ("context_tower.layers.1.mixer.q_proj", ["model.layers.1.mixer.q_proj"]),
        (r"re:.*\.1\.mixer\.[qkv]_proj", [f"model.layers.1.mixer.{n}_proj" for n in ("q", "k", "v", "qkv")]),
        ("context_tower.embeddings", ["model.embed_tokens"]),
    ],
)
def test_an_entry_means_layers_of_the_context_tower_alone(entry, names, layers) -> None:
    assert layers.named(entry) == names


def test_experts_that_are_all_left_out_are_left_out_together(layers) -> None:
    assert layers.named("context_tower.layers.2*")[-1] == "model.layers.2.mixer.experts"
    assert "model.layers.2.mixer.experts" not in layers.named("re:.*experts.*up_proj")


def test_settings_by_layer_keep_classes_and_lose_the_denoiser(layers) -> None:
    reading = SimpleNamespace(ignore=["lm_head", "context_lm_head"], target_scheme_map={"Linear": 1, "re:denoiser": 2})
    rename_layers_(reading, layers)
    assert reading.ignore == ["lm_head"]
    assert reading.target_scheme_map == {"Linear": 1}


def test_gptq_with_only_the_denoisers_layers_quantises_nothing_of_the_context_tower(layers) -> None:
    reading = SimpleNamespace(
        modules_in_block_to_quantize=["denoiser_tower.layers.1.mixer.q_proj"], dynamic={"-:context_tower.*in_proj": {}}
    )
    rename_layers_(reading, layers)
    assert reading.modules_in_block_to_quantize == ["denoiser_tower.layers.1.mixer.q_proj"]
    assert reading.dynamic == {r"-:model\.layers\.0\.mixer\.in_proj$": {}}


def test_a_bare_star_means_every_layer(layers) -> None:
    every = layers.named("re:.*")
    assert {"lm_head", "model.embed_tokens", "model.layers.1.mixer.qkv_proj", "model.layers.2.mixer.experts"} <= {
        *every
    }
    assert layers.named("*") == every
    lists = ("ignore", "ignored_layers", "exclude_modules", "modules_to_not_convert", "modules_in_block_to_quantize")
    for name in lists:
        reading = SimpleNamespace(**{name: ["*"]})
        rename_layers_(reading, layers)
        assert getattr(reading, name) == every

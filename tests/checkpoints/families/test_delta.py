"""Families of gated delta nets against transformers, in float32.

With weights ten times as large as drawn, transformers' logits and ours are 4e-5 of their scale apart, and either as far
from ours in float64: keys of length 1 make much of small differences. So these are three times as large."""

from collections.abc import Callable
from typing import Any

import pytest

import twotower

LINEAR = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 3,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_next", LINEAR | EXPERTS),
    (
        "qwen3_next",
        LINEAR
        | EXPERTS
        | {
            "layer_types": ["full_attention", *["linear_attention"] * 3],
            "mlp_only_layers": [1],
            "attention_bias": True,
        },
    ),
    ("qwen3_5_text", LINEAR | {"tie_word_embeddings": True}),
    ("qwen3_5_moe_text", LINEAR | EXPERTS),
]
LENGTH = 150  # beyond two pieces of the scan


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: model[0])
def opened(request: pytest.FixtureRequest, open_family: Callable) -> Any:
    model_type, settings = request.param
    return open_family(model_type, length=LENGTH, factor=3, max_position_embeddings=256, **settings)


def test_logits_are_those_of_transformers(opened: Any, same_logits: Callable) -> None:
    same_logits(opened.ours.context_logits(opened.ids), opened.logits)


def test_so_they_are_token_by_token_and_in_blocks(opened: Any, same_logits: Callable) -> None:
    state = opened.ours.prefill(opened.ids[:, :30], capacity=LENGTH)
    for end in (31, 32, 48, 55, 120, LENGTH):
        same_logits(state.next_logits, opened.logits[:, state.length - 1])
        state = opened.ours.extend(opened.ids[:, state.length : end], state)
    same_logits(state.next_logits, opened.logits[:, -1])


def test_the_denoiser_starts_as_the_backbone(opened: Any, same_logits: Callable) -> None:
    """Of a block of one token, which sees nothing later, it gives the backbone's logits."""
    state = opened.ours.prefill(opened.ids[:, :-1], capacity=LENGTH)
    same_logits(opened.ours.denoise(opened.ids[:, -1:], state, t=0.5)[:, 0], opened.logits[:, -1])


@pytest.mark.parametrize("by", ["ours", "fastest"])
def test_verified_text_is_the_backbones_and_the_engines(by: str, opened: Any) -> None:
    model = getattr(opened, by)
    prompt = opened.ids[0, :20].tolist()
    params = [
        twotower.SamplingParams(mode=mode, max_new_tokens=20, ignore_eos=True)
        for mode in ("ar", "verified", "diffusion")
    ]
    texts = [twotower.generate(model, [prompt], p)[0].token_ids for p in params]
    assert texts[0] == texts[1]
    engine = twotower.Engine(model)
    assert [result.token_ids for result in engine.generate([prompt] * 3, params)] == texts


def test_c_computes_what_the_reference_does(opened: Any, close: Callable) -> None:
    choice = opened.fastest.backends["context tower"]
    if choice.name == "reference":
        pytest.skip(choice.reason)
    # float32, summed in another order; as far apart as the reference in float32 and in float64 are
    close(opened.fastest.context_logits(opened.ids), opened.ours.context_logits(opened.ids), 1e-5)
    found, expected = (
        model.denoise(opened.ids[:, 130:], model.prefill(opened.ids[:, :130]))
        for model in (opened.fastest, opened.ours)
    )
    close(found, expected, 1e-5)

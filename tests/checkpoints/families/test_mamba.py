"""Families of Mamba-2 layers against transformers: every option away from its default, in float32.

The difference allowed is 1e-5 of the logits' scale: other orders of the same float32 sums. transformers clamps step
sizes in its scan over a text and not in its step by one token; no option here lets a step size reach the limits.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import twotower
from twotower.checkpoints import init, load_model
from twotower.checkpoints.initialise import open_backbone

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
ATTENTION = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_d_conv": 3}
HYBRID = SIZES | ATTENTION | MAMBA
GRANITE = HYBRID | {
    "layer_types": ["mamba", "attention", "mamba"],
    "shared_intermediate_size": 24,
    "embedding_multiplier": 3.0,
    "logits_scaling": 0.25,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
}
FALCON = HYBRID | {
    "mamba_d_ssm": 64,
    "embedding_multiplier": 2.5,
    "lm_head_multiplier": 1.7,
    "mlp_multipliers": [0.6, 1.9],
    "key_multiplier": 0.7,
    "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.8,
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.6,
    "ssm_multipliers": [0.5, 1.5, 0.7, 1.4, 1.1],
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": ("mamba2", SIZES | {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "use_bias": True}),
    "mamba2 tied": (
        "mamba2",
        SIZES
        | {"num_heads": 4, "head_dim": 16, "state_size": 5, "n_groups": 1, "use_conv_bias": False}
        | {"tie_word_embeddings": True},
    ),
    "bamba": ("bamba", HYBRID | {"attn_layer_indices": [1]}),
    "bamba with biases": (
        "bamba",
        HYBRID
        | {"attn_layer_indices": [0, 2], "mamba_proj_bias": True, "mamba_conv_bias": False}
        | {"attention_bias": True, "mlp_bias": True},
    ),
    "granite with experts": (
        "granitemoehybrid",
        GRANITE | {"num_local_experts": 4, "num_experts_per_tok": 2, "position_embedding_type": "nope"},
    ),
    "granite without experts": (
        "granitemoehybrid",
        GRANITE | {"num_local_experts": 0, "position_embedding_type": "rope", "tie_word_embeddings": True},
    ),
    "falcon": ("falcon_h1", FALCON),
    "falcon with a norm before the gate": ("falcon_h1", FALCON | {"mamba_rms_norm": True}),
    "falcon with a norm after the gate": (
        "falcon_h1",
        FALCON | {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_n_groups": 1},
    ),
}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """transformers' model of a name in MODELS and the two-tower checkpoint made of it, once each."""
    found: dict[str, tuple[Any, Path]] = {}

    def make(name: str) -> tuple[Any, Path]:
        if name not in found:
            kind, settings = MODELS[name]
            torch.manual_seed(3)
            model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **settings))
            for parameter in model.parameters():
                if parameter.ndim == 1:  # biases and norms that count
                    parameter.data.add_(0.3 * torch.randn_like(parameter))
            folder = tmp_path_factory.mktemp("family")
            model.float().eval().save_pretrained(folder / "source")
            init(folder / "source", folder / "out")
            found[name] = model, folder / "out"
        return found[name]

    return make


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(made: Callable, name: str, backend: str | None) -> None:
    source, out = made(name)
    ids = torch.randint(3, 48, (2, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = source(ids, use_cache=False).logits
    scale = wanted.abs().max().item()
    assert wanted.std() > 0.3, "logits near zero would agree whatever was loaded"
    model = twotower.load(out, backend=backend)
    torch.testing.assert_close(model.context_logits(ids)[..., :48], wanted, atol=TOLERANCE * scale, rtol=0)
    # Token by token and in blocks
    state, last = model.prefill(ids[:, :40]), wanted[:, 39]
    for end in (41, 42, 58, 73, 150):
        torch.testing.assert_close(state.next_logits[..., :48], last, atol=TOLERANCE * scale, rtol=0)
        state, last = model.extend(ids[:, state.length : end], state), wanted[:, end - 1]
    torch.testing.assert_close(state.next_logits[..., :48], last, atol=TOLERANCE * scale, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_the_denoiser_starts_as_the_backbone(made: Callable, name: str) -> None:
    """Of a block of one token, which sees nothing later, it gives the backbone's logits."""
    source, out = made(name)
    ids = torch.randint(3, 48, (2, 37), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = source(ids, use_cache=False).logits[:, -1]
    model = load_model(out)
    found = model.denoise(ids[:, -1:], model.prefill(ids[:, :-1]), t=0.5)[:, 0, :48]
    torch.testing.assert_close(found, wanted, atol=TOLERANCE * wanted.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_verified_text_is_the_backbones(made: Callable, name: str) -> None:
    model = twotower.load(made(name)[1])
    texts = [
        twotower.generate(model, [[5, 6, 7]], twotower.SamplingParams(mode=mode, max_new_tokens=24, ignore_eos=True))
        for mode in ("ar", "verified")
    ]
    assert texts[0][0].token_ids == texts[1][0].token_ids


def test_a_factor_of_what_enters_a_projection_with_a_bias_is_refused(tmp_path: Path) -> None:
    settings = FALCON | {"attention_bias": True}
    config = transformers.AutoConfig.for_model("falcon_h1", **settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"attention_in_multiplier is 1\.3, must be 1\.0"):
        open_backbone(tmp_path)

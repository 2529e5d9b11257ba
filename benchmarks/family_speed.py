"""Times one `ar` step and one NFE of the families' kinds of layers, each beside Llama's at the same shape.

    python benchmarks/family_speed.py [--dtype bfloat16|float32] [--context 512] [--repeats 21]

Prints one JSON line: for each family the median and the quartiles of the ratio of its time to Llama's, which were taken
right after each other, so that a busy minute of the machine makes both slower. The shape is SmolLM2-135M's with ten
blocks: d 576, 9/3 heads x 64, MLPs of 3 x 576 x 1536 weights, gated or not, v 8192; batch 1. Random weights.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from twotower import TwoTower, TwoTowerConfig
from twotower.backends.choose import pack_
from twotower.eval.provenance import commit, cpu_model
from twotower.rope import AttentionType, Rope

LLAMA = TwoTowerConfig(
    vocab_size=8192,
    hidden_size=576,
    pattern="*-" * 10,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    use_rope=True,
    intermediate_size=1536,
    gated_mlp=True,
    mlp_hidden_act="silu",
)
ROPE = Rope()
# Two weights of an ungated MLP are as many as three of a gated one.
UNGATED: dict[str, Any] = {"gated_mlp": False, "intermediate_size": 2304}
LAYER_NORM: dict[str, Any] = {"norm_type": "layer", "norm_bias": True}
ALTERNATING: dict[str, Any] = {
    "attention_types": (AttentionType(window=256, rope_parameters=ROPE), AttentionType(rope_parameters=ROPE)),
    "attention_pattern": "01" * 5,
}
PARTIAL: dict[str, Any] = {"attention_types": (AttentionType(rope_parameters=Rope(partial_rotary_factor=0.25)),)}
AROUND: dict[str, Any] = {"post_norm": True, "norm_offset": 1.0, "mlp_hidden_act": "gelu_tanh"}
DELTA: dict[str, Any] = {"mamba_head_dim": 64, "mamba_state_size": 64}
HALF = Rope(partial_rotary_factor=0.5)
LATENT: dict[str, Any] = {"kv_lora_rank": 192, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64}
BIASES: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": "head"},
    "olmo2": {"pre_norm": False, "post_norm": True, "qk_norm": "all"},
    "granite": {"embedding_scale": 12.0, "residual_scale": 0.22, "attention_scale": 0.015, "logit_scale": 0.125},
    "gemma2": AROUND | ALTERNATING | {"attention_softcap": 50.0, "logit_softcap": 30.0},
    "gemma3": AROUND | ALTERNATING | {"qk_norm": "head"},
    "cohere2": {"norm_type": "layer", "parallel": "*-", "logit_scale": 0.0625} | ALTERNATING,
    "gpt_neox": LAYER_NORM | UNGATED | BIASES | PARTIAL | {"mlp_hidden_act": "gelu", "parallel": "*-"},
    "gpt2": LAYER_NORM | UNGATED | BIASES | {"mlp_hidden_act": "gelu_tanh", "use_rope": False, "num_positions": 1024},
    "apertus": UNGATED | {"mlp_hidden_act": "xielu", "qk_norm": "head"},
    "sinks": ALTERNATING | {"attention_sinks": True},
    "gated": {"attention_gate": True},
    "delta": {"pattern": "G-" * 10, "mamba_num_heads": 9, "mamba_num_groups": 3} | DELTA,
    "latent": {"num_key_value_heads": 9, "attention_types": (AttentionType(rope_parameters=HALF),)} | LATENT,
}
BLOCK = 16


def random_model(config: TwoTowerConfig, dtype: torch.dtype) -> TwoTower:
    """A packed model whose random weights keep activations near 1."""
    torch.manual_seed(0)
    model = TwoTower(config, dtype=dtype)
    for name, tensor in model.released_tensors().items():
        if name.endswith(("norm.weight", "norm_f.weight")):
            tensor.fill_(1.0 - config.norm_offset)
        elif tensor.ndim >= 2 and "scale_shift" not in name:
            tensor.copy_(torch.randn(tensor.shape) * tensor.shape[-1] ** -0.5)
        else:
            tensor.copy_(torch.randn(tensor.shape) * 0.02)
    pack_(model)
    return model


def passes(config: TwoTowerConfig, dtype: torch.dtype, context: int) -> dict[str, Callable[[], object]]:
    """An `ar` step and an NFE behind `context` tokens."""
    model = random_model(config, dtype)
    ids = torch.arange(context)[None] % config.vocab_size
    state = model.prefill(ids, capacity=context + 2 * BLOCK)
    one, block = ids[:, :1], torch.full((1, BLOCK), config.mask_token_id)
    return {
        "ar": lambda: model.keep(model.score(one, state), with_logits=True),
        "nfe": lambda: model.denoiser_logits(block, state, (1.0,)),
    }


def timed(run: Callable[[], object]) -> float:
    """The seconds of a call, after one that is not timed."""
    run()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=21)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    llama = passes(LLAMA, dtype, args.context)
    found: dict[str, Any] = {}
    for name, changes in FAMILIES.items():
        family = passes(dataclasses.replace(LLAMA, **changes), dtype, args.context)
        for kind, run in family.items():
            ratios = [timed(run) / timed(llama[kind]) for _ in range(args.repeats)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            found[f"{name} {kind}"] = [round(value, 3) for value in (low, middle, high)]
    usual = {kind: statistics.median(timed(run) for _ in range(args.repeats)) for kind, run in llama.items()}
    milliseconds = {kind: round(1e3 * seconds, 3) for kind, seconds in usual.items()}
    where = {"cpu": cpu_model(), "threads": torch.get_num_threads(), "commit": commit()}
    print(
        json.dumps({**where, "dtype": args.dtype, "context": args.context, "llama_ms": milliseconds, "ratios": found})
    )


if __name__ == "__main__":
    main()

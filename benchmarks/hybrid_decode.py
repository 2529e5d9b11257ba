"""Times one `ar` step and one NFE on a random hybrid, beside floors for both and beside other implementations.

    python benchmarks/hybrid_decode.py [--dtype bfloat16|float32]

Prints one JSON line. The hybrid: MEMEM*EMEM*E, d 512, 8/2 heads x 64, Mamba 16 x 64 with state 64 in 4 groups, 32
experts of width 256 with 4 active, shared 512, v 8192; context 128, batch 1, block 16. Passes alternate, and medians
are printed. Every timed pass follows an untimed one of its kind, as in decoding, and then a read of 128 MB, so that its
weights come from memory.

The memory floor is the bytes of weights that a pass reads, divided by the bandwidth of those reads of 128 MB. The
arithmetic floor is the number of multiplications, divided by the speed of a large matrix product on the same machine.
`reference` is this package's PyTorch ops with its fastest packed products, which run if there is no C compiler.
`transformers` is NemotronH of transformers, with the same shapes and dtype, on PyTorch ops alone: for `ar` one token
after a cached context, and for an NFE a pass over 16 tokens without any context, which is less work than an NFE.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from twotower import TwoTower, TwoTowerConfig
from twotower.backends.choose import choose_backend, pack_
from twotower.backends.native.pack import has_bf16_pairs
from twotower.model.moe import MixtureOfExperts
from twotower.ops.linear import weight_layout
from twotower.origin import commit, cpu_model

CONFIG = TwoTowerConfig(
    vocab_size=8192,
    hidden_size=512,
    pattern="MEMEM*EMEM*E",
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    mamba_num_heads=16,
    mamba_head_dim=64,
    mamba_state_size=64,
    mamba_num_groups=4,
    num_experts=32,
    num_experts_per_tok=4,
    expert_intermediate_size=256,
    shared_expert_intermediate_size=512,
    routed_scaling_factor=2.5,
)
CONTEXT, BLOCK = 128, 16


def random_model(dtype: torch.dtype) -> TwoTower:
    """A model whose random weights keep activations near 1 and differ between the towers."""
    torch.manual_seed(0)
    model = TwoTower(CONFIG, dtype=dtype)
    for name, tensor in model.released_tensors().items():
        if name.endswith(("norm.weight", "norm_f.weight", ".D")):
            tensor.fill_(1.0)
        elif name.endswith("A_log"):
            tensor.copy_(torch.linspace(0.0, 2.0, tensor.numel()))
        elif name.endswith("dt_bias"):
            tensor.fill_(-3.0)
        elif tensor.ndim >= 2 and "scale_shift" not in name:
            tensor.copy_(torch.randn(tensor.shape) * tensor.shape[-1] ** -0.5)
        else:
            tensor.copy_(torch.randn(tensor.shape) * 0.02)
    return model


def weights_used(tokens: int, experts: float) -> float:
    """How many weights a pass over `tokens` tokens uses if it uses `experts` experts per `E` layer.

    With the experts that any token is routed to, this is what a pass reads; with those of one token, and `tokens` 0, it
    is the number of multiplications for each token.
    """
    c = CONFIG
    d, inner = c.hidden_size, c.mamba_width
    mamba = d * (inner + c.conv_width + c.mamba_num_heads) + inner * d
    attention = 2 * d * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
    moe = 2 * d * (experts * c.expert_intermediate_size + c.shared_expert_intermediate_size) + d * c.num_experts
    layers = {"M": mamba, "*": attention, "E": moe}
    return sum(layers[kind] for kind in c.pattern) + c.vocab_size * d + tokens * d


def experts_touched(model: TwoTower, run: Callable[[], object]) -> float:
    """The mean number of distinct experts per `E` layer that a pass of a model with the reference backend uses."""
    seen: list[int] = []

    def count(layer: MixtureOfExperts, inputs: tuple[Tensor]) -> None:
        seen.append(layer.route(inputs[0].flatten(0, 1)).experts.unique().numel())

    layers = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    hooks = [layer.register_forward_pre_hook(count) for layer in layers]
    run()
    for hook in hooks:
        hook.remove()
    return statistics.mean(seen)


def transformers_passes(dtype: torch.dtype, ids: Tensor) -> dict[str, Callable[[], object]]:
    """`ar` and `nfe` by transformers' NemotronH with random weights of the same shapes; empty without transformers."""
    try:
        import transformers
    except ImportError:
        return {}
    kinds = {"M": "linear_attention", "*": "full_attention", "E": "moe"}
    config = transformers.NemotronHConfig(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.hidden_size,
        layers_block_type=[kinds[kind] for kind in CONFIG.pattern],
        num_attention_heads=CONFIG.num_attention_heads,
        num_key_value_heads=CONFIG.num_key_value_heads,
        head_dim=CONFIG.head_dim,
        ssm_state_size=CONFIG.mamba_state_size,
        mamba_num_heads=CONFIG.mamba_num_heads,
        mamba_head_dim=CONFIG.mamba_head_dim,
        n_groups=CONFIG.mamba_num_groups,
        n_routed_experts=CONFIG.num_experts,
        num_experts_per_tok=CONFIG.num_experts_per_tok,
        moe_intermediate_size=CONFIG.expert_intermediate_size,
        moe_shared_expert_intermediate_size=CONFIG.shared_expert_intermediate_size,
        routed_scaling_factor=CONFIG.routed_scaling_factor,
    )
    model = transformers.NemotronHForCausalLM(config).to(dtype).eval()
    cache = model(ids, use_cache=True).past_key_values

    def ar() -> object:
        return model(ids[:, :1], past_key_values=cache, use_cache=True).logits  # the cache grows by a token each time

    return {"transformers_ar": ar, "transformers_nfe": lambda: model(ids[:, :BLOCK], use_cache=False).logits}


def timed(run: Callable[[], object]) -> float:
    """The seconds that a call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    model, reference = random_model(dtype), random_model(dtype)
    pack_(model)
    pack_(reference, "reference")
    ids = torch.randint(4, CONFIG.vocab_size, (1, CONTEXT))
    block = torch.randint(4, CONFIG.vocab_size, (1, BLOCK))
    block[:, 8:] = CONFIG.mask_token_id
    probe = torch.randn(32 * 1024 * 1024)  # 128 MB, beyond any cache
    # The dtype of the products: float32 unless the backend multiplies bf16 itself
    rounds = choose_backend("cpu", dtype).name == "native" and has_bf16_pairs()
    square = torch.randn(1024, 1024, dtype=dtype if rounds else model.context_tower.activation_dtype)
    with torch.inference_mode():
        states = {tower: tower.prefill(ids, capacity=CONTEXT + 64) for tower in (model, reference)}
        level = (0.5,)

        def ar(tower: TwoTower) -> Tensor | None:
            # Every step extends the same state, so the places that the last one took are given back first
            state = states[tower]
            state.buffer.tip = state.lengths
            return tower.absorb(ids[:, :1], state, with_logits=True).next_logits

        runs: dict[str, Callable[[], object]] = {
            "ar": lambda: ar(model),
            "nfe": lambda: model.denoiser_logits(block, states[model], level),
            "reference_ar": lambda: ar(reference),
            "reference_nfe": lambda: reference.denoiser_logits(block, states[reference], level),
            **transformers_passes(dtype, ids),
            "product": lambda: square @ square,
        }
        # The reference has the same weights, and its layers can be hooked
        touched = {name: experts_touched(reference, runs[f"reference_{name}"]) for name in ("ar", "nfe")}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        reads: list[float] = []
        for _ in range(arguments.repeats):
            for name, run in runs.items():
                run()
                reads.append(timed(probe.sum))
                seconds[name].append(timed(run))
    bandwidth = probe.numel() * 4 / statistics.median(reads)
    flops = 2 * 1024**3 / statistics.median(seconds["product"])
    size = torch.tensor([], dtype=dtype).element_size()
    out: dict[str, object] = {
        "benchmark": "hybrid_decode",
        "dtype": arguments.dtype,
        "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "product_gflop_s": round(flops / 1e9, 1),
    }
    for name, tokens in (("ar", 1), ("nfe", BLOCK)):
        floor = weights_used(tokens, touched[name]) * size / bandwidth
        arithmetic = 2 * tokens * weights_used(0, CONFIG.num_experts_per_tok) / flops
        median = statistics.median(seconds[name])
        quartiles = statistics.quantiles(seconds[name], n=4)
        found: dict[str, object] = {
            "ms": round(1e3 * median, 3),
            "ms_quartiles": [round(1e3 * quartiles[0], 3), round(1e3 * quartiles[2], 3)],
            "passes_per_second": round(1 / median, 1),
            "experts_touched": touched[name],
            "memory_floor_ms": round(1e3 * floor, 3),
            "ratio_to_memory_floor": round(median / floor, 2),
            "arithmetic_floor_ms": round(1e3 * arithmetic, 3),
            "ratio_to_larger_floor": round(median / max(floor, arithmetic), 2),
        }
        for other in ("reference", "transformers"):
            if f"{other}_{name}" in seconds:
                theirs = seconds[f"{other}_{name}"]
                found[f"{other}_ms"] = round(1e3 * statistics.median(theirs), 3)
                ratios = [t / o for t, o in zip(theirs, seconds[name], strict=True)]
                found[f"times_faster_than_{other}"] = round(statistics.median(ratios), 2)
        out[name] = found
    out |= {
        "backend": choose_backend("cpu", dtype).name,
        "reference_linear_backend": weight_layout("cpu", dtype).value,
        "threads": torch.get_num_threads(),
        "cpu": cpu_model(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    print(json.dumps(out))


if __name__ == "__main__":
    main()

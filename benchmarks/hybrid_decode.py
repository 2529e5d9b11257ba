"""Speed of one `ar` step and one NFE on a random hybrid, against the floor of reading its weights.

    python benchmarks/hybrid_decode.py [--dtype bfloat16|float32]

Prints one JSON line. Hybrid: MEMEM*EMEM*E, d 512, 8/2 heads x 64, Mamba 16 x 64 with state 64 in 4 groups, 32 experts
of width 256 with 4 active, shared 512, v 8192; context 128, batch 1, block 16. Steps alternate; medians are printed.
The
floor is the bytes of weights that a pass touches divided by the read bandwidth measured between the same steps. `plain`
is the same model with plain tensors (load's pack=False): what PyTorch's own linear layers make of it.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from twotower import ContextState, TwoTower, TwoTowerConfig
from twotower.model.moe import MixtureOfExperts
from twotower.ops.backend import activation_dtype, linear_backend

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
    """Weights of the size that keeps activations near 1, different in both towers."""
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


def touched_bytes(tokens: int, experts: float) -> float:
    """Bytes of bf16 weights read by one pass over `tokens` tokens that uses `experts` experts per layer."""
    c = CONFIG
    d, inner = c.hidden_size, c.mamba_width
    mamba = d * (inner + c.conv_width + c.mamba_num_heads) + inner * d
    attention = 2 * d * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
    moe = 2 * d * (experts * c.expert_intermediate_size + c.shared_expert_intermediate_size) + d * c.num_experts
    layers = {"M": mamba, "*": attention, "E": moe}
    return sum(layers[kind] for kind in c.pattern) + c.vocab_size * d + tokens * d


def experts_touched(model: TwoTower, run: Callable[[], object]) -> float:
    """Mean number of distinct experts per `E` layer that a pass uses."""
    seen: list[int] = []

    def count(layer: MixtureOfExperts, inputs: tuple[Tensor]) -> None:
        seen.append(layer.route(inputs[0].flatten(0, 1)).experts.unique().numel())

    layers = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    hooks = [layer.register_forward_pre_hook(count) for layer in layers]
    run()
    for hook in hooks:
        hook.remove()
    return statistics.mean(seen)


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    model, plain = random_model(dtype), random_model(dtype)
    model.pack_()
    ids = torch.randint(4, CONFIG.vocab_size, (1, CONTEXT))
    block = torch.randint(4, CONFIG.vocab_size, (1, BLOCK))
    block[:, 8:] = CONFIG.mask_token_id
    probe = torch.randn(32 * 1024 * 1024)  # 128 MB, beyond any cache
    with torch.inference_mode():
        state = model.prefill(ids, capacity=CONTEXT + 64)
        level = torch.tensor([0.5])
        plain_state = plain.prefill(ids, capacity=CONTEXT + 64)

        def ar(tower: TwoTower, before: ContextState) -> Tensor | None:
            # the state is extended and thrown away: give its places back, as a growing context would not need
            before.buffer.tip = before.lengths
            return tower.absorb(ids[:, :1], before, with_logits=True).next_logits

        runs: dict[str, Callable[[], object]] = {
            "ar": lambda: ar(model, state),
            "nfe": lambda: model.denoiser_logits(block, state, level),
            "plain_ar": lambda: ar(plain, plain_state),
            "plain_nfe": lambda: plain.denoiser_logits(block, plain_state, level),
            "read": lambda: probe.sum(),
        }
        active = {name: experts_touched(model, runs[name]) for name in ("ar", "nfe")}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(arguments.repeats + 3):
            for name, run in runs.items():
                took = timed(run)
                if repeat >= 3:
                    seconds[name].append(took)
    bandwidth = probe.numel() * 4 / statistics.median(seconds["read"])
    size = torch.tensor([], dtype=dtype).element_size()
    out: dict[str, object] = {"benchmark": "hybrid_decode", "dtype": arguments.dtype, "bandwidth_gb_s": bandwidth / 1e9}
    for name, tokens in (("ar", 1), ("nfe", BLOCK)):
        floor = touched_bytes(tokens, active[name]) * size / bandwidth
        median = statistics.median(seconds[name])
        quartiles = statistics.quantiles(seconds[name], n=4)
        out[name] = {
            "ms": round(1e3 * median, 3),
            "ms_quartiles": [round(1e3 * quartiles[0], 3), round(1e3 * quartiles[2], 3)],
            "passes_per_second": round(1 / median, 1),
            "experts_touched": active[name],
            "floor_ms": round(1e3 * floor, 3),
            "ratio_to_floor": round(median / floor, 2),
            "plain_ms": round(1e3 * statistics.median(seconds[f"plain_{name}"]), 3),
            "speedup_over_plain": round(
                statistics.median(p / o for p, o in zip(seconds[f"plain_{name}"], seconds[name], strict=True)), 2
            ),
        }
    out |= {
        "linear_backend": linear_backend("cpu", dtype).value,
        "activations": str(activation_dtype("cpu", dtype)),
        "threads": torch.get_num_threads(),
        "cpu": cpu_model(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    print(json.dumps(out))


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = (line for line in info.read_text().splitlines() if line.startswith("model name"))
        return next(named, f": {platform.processor()}").split(":", 1)[1].strip()
    return platform.processor()


def commit() -> str:
    return subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()


if __name__ == "__main__":
    main()

"""Times prefill, one step of `ar` and one NFE behind long contexts, on a random model of SmolLM2-135M's shape.

    python benchmarks/long_context.py [--contexts 512,2048,7936] [--dtype bfloat16|float32] [--repeats 9]

Prints one JSON line. A step absorbs one token with logits, an NFE is a denoiser pass over 16 positions; batch 1, two
threads unless `--threads` says otherwise. Steps and NFEs of all contexts alternate; medians and quartiles are printed.
`attention` of a step is the median beyond a step behind 16 tokens.

The floors: what a pass reads (weights, and every key and value that it sees) divided by the bandwidth of reading 256
MB, and what it multiplies divided by the speed of a large product of the same dtype on the same machine.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from twotower import TwoTower, TwoTowerConfig
from twotower.backends.choose import choose_backend, pack_
from twotower.backends.native.pack import has_bf16_pairs
from twotower.eval.provenance import commit, cpu_model
from twotower.model.state import ContextState

CONFIG = TwoTowerConfig(
    vocab_size=49152,
    hidden_size=576,
    pattern="*-" * 30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    use_rope=True,
    intermediate_size=1536,
    gated_mlp=True,
    mlp_hidden_act="silu",
    tie_word_embeddings=True,
    carried={"max_position_embeddings": 8192},
)
BLOCK, SHORT = 16, 16


def random_model(config: TwoTowerConfig, dtype: torch.dtype) -> TwoTower:
    """A model whose random weights keep activations near 1."""
    torch.manual_seed(0)
    model = TwoTower(config, dtype=dtype)
    for name, tensor in model.released_tensors().items():
        if name.endswith(("norm.weight", "norm_f.weight")):
            tensor.fill_(1.0)
        elif tensor.ndim >= 2 and "scale_shift" not in name:
            tensor.copy_(torch.randn(tensor.shape) * tensor.shape[-1] ** -0.5)
        else:
            tensor.copy_(torch.randn(tensor.shape) * 0.02)
    return model


def num_weights(config: TwoTowerConfig) -> int:
    """Of the layers that `config` describes, without embedding and head: what a token is multiplied with."""
    d, heads = config.hidden_size, config.num_attention_heads + config.num_key_value_heads
    layers = {"*": 2 * d * heads * config.head_dim, "-": 3 * d * config.intermediate_size}
    return sum(layers[kind] for kind in config.pattern)


def attention_flops(config: TwoTowerConfig, pairs: int) -> int:
    """Of `pairs` queries and keys that one sees of the other, through all layers: two products."""
    return 4 * config.pattern.count("*") * config.num_attention_heads * config.head_dim * pairs


def key_bytes(state: ContextState, length: int) -> int:
    """What `length` tokens of one row take in the cache."""
    tensors = (*state.buffer.keys, *state.buffer.values)
    return sum(t.shape[1] * t.shape[3] * t.element_size() for t in tensors) * length


def timed(run: Callable[[], object]) -> float:
    """The seconds that a call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def spread(seconds: list[float]) -> dict[str, Any]:
    """Milliseconds, median and quartiles."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {"ms": round(1e3 * middle, 2), "ms_quartiles": [round(1e3 * low, 2), round(1e3 * high, 2)]}


def measured(model: TwoTower, contexts: list[int], repeats: int) -> dict[str, Any]:
    """Everything but where it was measured."""
    config, dtype = model.config, model.context_tower.embeddings.dtype
    rounds = choose_backend("cpu", dtype).name == "native" and has_bf16_pairs()
    square = torch.randn(1024, 1024, dtype=dtype if rounds else model.context_tower.activation_dtype)
    probe = torch.randn(64 * 1024 * 1024)  # 256 MB, beyond any cache
    ids = torch.randint(4, config.vocab_size, (1, max(contexts)))
    block = torch.full((1, BLOCK), config.mask_token_id)
    model.prefill(ids[:, :SHORT])
    states: dict[int, ContextState] = {}
    prefill: dict[int, float] = {}
    for length in (SHORT, *contexts):
        began = time.perf_counter()
        states[length] = model.prefill(ids[:, :length], capacity=length + 1)
        prefill[length] = time.perf_counter() - began

    def step(state: ContextState) -> object:
        state.buffer.tip = state.lengths  # gives back the place that the last step took
        return model.absorb(ids[:, :1], state, with_logits=True)

    runs: dict[tuple[str, int], Callable[[], object]] = {}
    for length, state in states.items():
        runs["step", length] = functools.partial(step, state)
        runs["nfe", length] = functools.partial(model.denoiser_logits, block, state, (1.0,))
    seconds: dict[tuple[str, int], list[float]] = {name: [] for name in runs}
    reads, products = [], []
    for _ in range(repeats):
        reads.append(timed(probe.sum))
        products.append(timed(lambda: square @ square))
        for name, run in runs.items():
            run()
            seconds[name].append(timed(run))
    bandwidth = probe.nbytes / statistics.median(reads)
    flops = 2 * 1024**3 / statistics.median(products)
    head = config.vocab_size * config.hidden_size
    weights = num_weights(config)
    found: dict[str, Any] = {
        "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "product_gflop_s": round(flops / 1e9, 1),
        "key_bytes_per_token": key_bytes(states[SHORT], 1),
    }
    for length in contexts:
        entry: dict[str, Any] = {}
        keys = key_bytes(states[length], length) / bandwidth
        read = (weights + head) * dtype.itemsize / bandwidth + keys
        for name, rows in (("step", 1), ("nfe", BLOCK)):
            entry[name] = spread(seconds[name, length])
            multiplied = 2 * rows * (weights + head) + attention_flops(config, rows * length)
            entry[name] |= {
                "memory_floor_ms": round(1e3 * read, 2),
                "arithmetic_floor_ms": round(1e3 * multiplied / flops, 2),
                "attention_ms": round(entry[name]["ms"] - 1e3 * statistics.median(seconds[name, SHORT]), 2),
                "attention_memory_floor_ms": round(1e3 * keys, 2),
                "attention_arithmetic_floor_ms": round(1e3 * attention_flops(config, rows * length) / flops, 2),
            }
        multiplied = 2 * length * weights + attention_flops(config, length * (length + 1) // 2)
        entry["prefill_tokens_s"] = round(length / prefill[length], 1)
        entry["prefill_arithmetic_floor_tokens_s"] = round(length * flops / multiplied, 1)
        found[str(length)] = entry
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="512,2048,7936")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    model = random_model(CONFIG, dtype)
    pack_(model)
    with torch.inference_mode():
        found = measured(model, [int(n) for n in arguments.contexts.split(",")], arguments.repeats)
    where = {
        "backend": choose_backend("cpu", dtype).name,
        "threads": torch.get_num_threads(),
        "cpu": cpu_model(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    print(json.dumps({"benchmark": "long_context", "dtype": arguments.dtype, **found, **where}))


if __name__ == "__main__":
    main()

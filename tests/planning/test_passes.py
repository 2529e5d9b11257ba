"""What passes are thought to need, beside what the reference really allocates."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from twotower.config import TwoTowerConfig
from twotower.model.state import ContextState
from twotower.model.two_tower import TwoTower
from twotower.ops.selective_scan import PIECE
from twotower.planning.footprint import Weights, state_sizes, weights
from twotower.planning.passes import PassMemory, Speed, pass_memory, prompt_chunk, speed_of

# Wide enough that tensors outweigh what doesn't grow with the rows
WIDE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_attention_heads": 8,
    "head_dim": 16,
    "intermediate_size": 256,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_state_size": 16,
    "mamba_dt_rank": 8,
    "expert_intermediate_size": 64,
    "shared_expert_intermediate_size": 128,
}


def peak(run: Callable[[], object]) -> int:
    """The most bytes that PyTorch's CPU allocator had given out at a time while `run` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = run()
    held = most = 0
    assert found.profiler is not None
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    del kept
    return most


def after(model: TwoTower, b: int, t: int, s: int) -> ContextState:
    """A state of b rows that is taken to have t tokens, with room for s more."""
    state = model.context_tower.initial_state(b, t + s)
    state.buffer.tip = (t,) * b
    return dataclasses.replace(state, lengths=(t,) * b)


def needs(model: TwoTower, dtype: torch.dtype, b: int) -> PassMemory:
    sizes = state_sizes(model.config, dtype, dtype)
    return pass_memory(model.config, sizes, dtype, b, device_type="cpu", fused=False)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["M-M-", "*-*-", "*E*E", "G-G-", "S-S-", "R-R-", "M*-E"])
@torch.inference_mode()
def test_passes_take_no_more_than_is_thought_and_not_much_less(
    pattern: str, dtype: torch.dtype, tiny: Callable[..., TwoTower]
) -> None:
    """Not much: a plan that takes several times what is needed would leave memory without use."""
    model = tiny(pattern, dtype=dtype, **WIDE)
    constant = 48 * PIECE if pattern[0] in "SR" else 0  # a scan's piece has that many numbers, more than this pass
    for b, t, s in ((1, 0, 512), (4, 0, 256), (1, 2048, 256)):
        state, ids, memory = after(model, b, t, s), torch.full((b, s), 5), needs(model, dtype, b)
        model.context_tower._positioned(state, s, ids.device)  # tables that stay
        taken = peak(
            lambda s=s, b=b, state=state, ids=ids: model.keep(model.score(ids, state), (s,) * b, with_logits=True)
        )
        assert taken <= memory.fixed + b * s * (memory.row + (t + s) * memory.cell) <= 6 * taken + constant
    b, t = 8, 1024
    seed, ids, memory = model.seed(after(model, b, t, 0)), torch.full((b, 16), 5), needs(model, dtype, b)
    taken = peak(lambda: model.denoiser_logits(ids, seed, (0.5,) * b))
    # A step of `verified` keeps all that a commit needs, and `fixed` has room for that.
    assert taken <= memory.fixed + b * t * memory.key <= 20 * taken


def test_the_c_kernels_need_no_scores(sizes: dict[str, Any]) -> None:
    c = TwoTowerConfig(**sizes, pattern="*-")
    memory = pass_memory(
        c, state_sizes(c, torch.float32, torch.float32), torch.float32, 4, device_type="cpu", fused=True
    )
    assert (memory.cell, memory.key) == (0, 0)


def test_a_gpu_makes_scores_where_queries_are_grouped(sizes: dict[str, Any]) -> None:
    c = TwoTowerConfig(**sizes, pattern="*-")
    memory = [
        pass_memory(c, state_sizes(c, torch.bfloat16, torch.bfloat16), torch.bfloat16, 4, device_type=kind, fused=False)
        for kind in ("cpu", "cuda")
    ]
    assert memory[1].cell > 4 * memory[0].cell


def test_a_chunk_makes_reading_the_weights_a_quarter_of_the_pass() -> None:
    speed = Speed(flops=1e12, bandwidth=1e10, overhead=0.0, most_rows=1 << 20)
    dense, mixture = (Weights(0, 0, layers, active=10**9) for layers in (2 * 10**9, 2 * 10**10))
    for model in (dense, mixture):
        rows = prompt_chunk(model, speed)
        seconds = 2 * rows * model.active / speed.flops
        # a power of two is at most a factor of √2 from what it is rounded from
        assert 3 / 1.5 <= seconds / max(model.layers / speed.bandwidth, 0.2 / 3) <= 3 * 1.5
    assert prompt_chunk(mixture, speed) > prompt_chunk(dense, speed)


def test_chunks_of_known_models() -> None:
    """The released model on a GPU takes thousands, and small models on a CPU what they always took."""
    released = Weights(63 << 30, 63 << 30, 63 << 30, 3_200_000_000)
    assert prompt_chunk(released, speed_of("cuda", 1)) in (4096, 8192)
    assert prompt_chunk(Weights(0, 0, 25 << 20, 12_000_000), speed_of("cpu", 1)) == 256
    assert prompt_chunk(Weights(0, 0, 14 << 30, 7_000_000_000), speed_of("cpu", 2)) == 32


def test_weights_are_those_of_the_loaded_model(tiny: Callable[..., TwoTower]) -> None:
    for pattern in ("M*-E", "llama", "G-S-R-"):
        model = tiny(pattern, dtype=torch.bfloat16)
        found = weights(model.config, torch.bfloat16)
        assert found.context + found.denoiser == sum(p.nbytes for p in model.parameters())
        assert 0 < found.active <= found.layers
    moe = weights(tiny("E").config, torch.float32)
    layer = tiny("E").context_tower.layers[0].mixer
    assert (
        moe.active
        == sum(p.numel() for p in tiny("E").context_tower.layers.parameters())
        - (layer.up.numel() + layer.down.numel()) * 6 // 8
    )

"""Compares our training step with one that keeps boundary states and a dense mask, and with an AR step of one tower.

    python benchmarks/training_pass.py
    python benchmarks/training_pass.py --tokens 2048 --repeats 7 --scaling 1024 2048 4096 8192 > OUT.json
    python benchmarks/training_pass.py --checkpoint stories --tokens 256 --rows 8

Prints one JSON line. Without options it has 512 tokens and few repeats (with 1,024 it took 118 s of CPU time on a Xeon
with AMX); the results that are
published are of the second call. `--scaling` also measures peaks by block size and number of tokens. With
`--checkpoint` only our own steps are compared, for its model. Else the model is M*-EM*-E, d 512, 8/2 heads x 64, Mamba
16 x 64 with state 128 in 8 groups, 32 experts of width 256 with 4 active, shared 512, MLP 1024, v 8192, float32, random
weights. Batch 1, block 16, half of the positions masked. A step is forward and backward, without the optimiser.

- `seeded` is `training.objectives.sums.loss_sums`, `recompute` the same with that option, and `bf16` the same with a
  model that computes in bfloat16, as `twotower train --bf16` does; its gradients are bfloat16, and its peak is not
  measured.
- `boundary` does what released training code does. The context pass runs first and keeps the keys and values of every
  layer and, for `M`, the state and convolution rows at every block boundary. The denoiser folds blocks into the batch
  for `M` and adds a dense (t, 2t) mask in `*`. It has the same towers, applies the head to all masked rows at once, and
  is vectorised over blocks, as ours is.
- `ar` is the context tower alone, trained on all positions with one head product.

Steps alternate, and ratios are of neighbouring steps. On a shared machine the CPU seconds of the process say more than
those of the clock. A peak is the resident memory above that before the step, with weights and gradients allocated; it
comes from the kernel (Linux only).
"""

import argparse
import copy
import ctypes
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import twotower
from twotower import TwoTower, TwoTowerConfig
from twotower.model.attention import Attention
from twotower.model.mamba2 import Mamba2
from twotower.model.state import MambaState
from twotower.model.time_conditioning import Modulation
from twotower.ops.attention import cached_attention
from twotower.ops.rope import Positioning
from twotower.origin import commit, cpu_model
from twotower.training.forward.layout import Layout, make_layout
from twotower.training.forward.seeded_mixers import MambaSeed, context_mixed, context_seed, make_plan
from twotower.training.masks.noise import Corrupted
from twotower.training.objectives.sums import loss_sums
from twotower.training.run.precision import compute_in_

CONFIG = TwoTowerConfig(
    vocab_size=8192,
    hidden_size=512,
    pattern="M*-EM*-E",
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=1024,
    mamba_num_heads=16,
    mamba_head_dim=64,
    mamba_state_size=128,
    mamba_num_groups=8,
    num_experts=32,
    num_experts_per_tok=4,
    expert_intermediate_size=256,
    shared_expert_intermediate_size=512,
    routed_scaling_factor=2.5,
)
M_MMAP_THRESHOLD = -3


class Case(NamedTuple):
    """A row of tokens and its noisy version."""

    x0: Tensor
    noisy: Corrupted


def random_model(config: TwoTowerConfig) -> TwoTower:
    """A model whose random weights keep activations near 1, with gates at 1 and all gradients allocated."""
    torch.manual_seed(0)
    model = TwoTower(config)
    for name, tensor in model.released_tensors().items():
        if name.endswith(("norm.weight", "norm_f.weight", ".D")):
            tensor.fill_(1.0)
        elif name.endswith("A_log"):
            tensor.copy_(torch.linspace(0.0, 2.0, tensor.numel()))
        elif name.endswith("dt_bias"):
            tensor.fill_(-3.0)
        elif name.startswith("scale_shift"):
            tensor.zero_()[2] = 1.0
        elif tensor.ndim >= 2:
            tensor.copy_(torch.randn(tensor.shape) * tensor.shape[-1] ** -0.5)
        else:
            tensor.copy_(torch.randn(tensor.shape) * 0.02)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def make_case(config: TwoTowerConfig, t: int, block_size: int, rows: int = 1) -> Case:
    """Random rows of t tokens, half of them masked."""
    torch.manual_seed(t)
    x0 = torch.randint(4, config.vocab_size, (rows, t))
    layout = make_layout(torch.zeros(rows, t, dtype=torch.int64), block_size)
    level = (torch.rand(int(layout.block.max()) + 1)[layout.block] * 0.9 + 0.05).clone()
    masked = torch.rand(rows, t) < 0.5
    scored = torch.ones_like(masked)
    return Case(x0, Corrupted(x0.masked_fill(masked, config.mask_token_id), masked, level, level, scored, layout))


def train_only(model: TwoTower, *, context: bool) -> None:
    """Leaves gradients on for one tower and its head only."""
    model.requires_grad_(False)
    modules = (model.context_tower, model.context_lm_head) if context else (model.denoiser_tower, model.lm_head)
    for module in modules:
        module.requires_grad_(True)
    if not context:
        model.time_conditioning.requires_grad_(True)


def seeded_step(model: TwoTower, case: Case, *, recompute: bool) -> None:
    """Our step."""
    train_only(model, context=False)
    weight = case.noisy.masked.float()
    sums = loss_sums(model, case.x0, case.noisy, weight, recompute=recompute)
    (sums.losses["cross_entropy"] / weight.sum()).backward()


def ar_step(model: TwoTower, case: Case) -> None:
    """A plain AR step of the context tower."""
    train_only(model, context=True)
    tower = model.context_tower
    plan = make_plan(model.config, case.noisy.layout, chunk_size=64, dtype=torch.float32)
    x = tower.embed(case.x0)
    for layer in tower.stack:
        entered = layer.enter(x, None, torch.float32)
        if isinstance(layer.mixer, Mamba2 | Attention):
            seed = context_seed(layer.mixer, entered, plan)
            mixed = context_mixed(layer.mixer, seed, plan, torch.float32)
        else:
            mixed = layer.mixer(entered)
        x = layer.leave(x, mixed, None)
    logits = model.context_lm_head(tower.finish(x)[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), case.x0[:, 1:].flatten()).backward()


class Boundary(NamedTuple):
    """The state and convolution rows of an `M` layer before every block: (blocks, …)."""

    state: MambaState


@torch.no_grad()
def boundary_context(model: TwoTower, x0: Tensor, layout: Layout) -> list[Boundary | tuple[Tensor, Tensor] | None]:
    """Runs the whole context pass; returns for every layer what the denoiser needs of it."""
    tower, t = model.context_tower, x0.shape[1]
    block_size = int(layout.block_end[0, 0])
    # Chunks of one block each, whose initial states are the boundary states
    plan = make_plan(model.config, layout, chunk_size=block_size, dtype=torch.float32)
    causal = bias(torch.ones(t, t, dtype=torch.bool).tril())
    kept: list[Boundary | tuple[Tensor, Tensor] | None] = []
    x = tower.embed(x0)
    for layer in tower.stack:
        entered = layer.enter(x, None, torch.float32)
        if isinstance(layer.mixer, Mamba2):
            seed = context_seed(layer.mixer, entered, plan)
            assert isinstance(seed, MambaSeed)
            width = model.config.conv_kernel - 1
            rows = F.pad(seed.xbc, (0, 0, width, 0))[0].unfold(0, width, block_size)[: t // block_size]
            kept.append(Boundary(MambaState(rows.transpose(1, 2).contiguous(), seed.states[0])))
            mixed = context_mixed(layer.mixer, seed, plan, torch.float32)
        elif isinstance(layer.mixer, Attention):
            q, key, value, gate = layer.mixer.project(entered, Positioning(None, None))
            kept.append((key, value))
            mixed = layer.mixer.output(cached_attention(q, key, value, causal, layer.mixer.rule), gate)
        else:
            kept.append(None)
            mixed = layer.mixer(entered)
        x = layer.leave(x, mixed, None)
    return kept


def boundary_step(model: TwoTower, case: Case) -> None:
    """The step with boundary states and a dense mask."""
    train_only(model, context=False)
    x0, noisy = case
    layout, t = noisy.layout, x0.shape[1]
    kept = boundary_context(model, x0, layout)
    block = layout.block[0]
    mask = bias(torch.cat((block[:, None] > block, block[:, None] == block), dim=1))  # (t, 2t)
    blocks = int(block.max()) + 1
    levels, index = noisy.told.unique(return_inverse=True)
    x = model.denoiser_tower.embed(noisy.xt)
    for layer, seed, modulation in zip(model.denoiser_tower.stack, kept, model.time_conditioning(levels), strict=True):
        own = Modulation(*(F.embedding(index, part[:, 0]) for part in modulation.unbind(1)))
        entered = layer.enter(x, own, torch.float32)
        if isinstance(seed, Boundary):
            assert isinstance(layer.mixer, Mamba2)
            prepared = layer.mixer.prepare(entered.view(blocks, t // blocks, -1), seed.state.conv)
            mixed = layer.mixer.outputs(prepared, seed.state, torch.float32).view_as(entered)
        elif isinstance(seed, tuple):
            assert isinstance(layer.mixer, Attention)
            q, key, value, gate = layer.mixer.project(entered, Positioning(None, None))
            keys, values = torch.cat((seed[0], key), dim=2), torch.cat((seed[1], value), dim=2)
            mixed = layer.mixer.output(cached_attention(q, keys, values, mask, layer.mixer.rule), gate)
        else:
            mixed = layer.mixer(entered)
        x = layer.leave(x, mixed, own)
    logits = model.lm_head(model.denoiser_tower.finish(x)[noisy.masked])
    F.cross_entropy(logits, x0[noisy.masked]).backward()


def bias(visible: Tensor) -> Tensor:
    """What is added to attention scores: 0 where visible (queries, keys), else minus infinity."""
    return torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)[None, None]


def peak_mb(run: Callable[[], None]) -> float:
    """The peak of resident memory during `run`, in MB above that before it."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's high-water mark
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """The seconds of a call by the clock, and the CPU seconds of this process."""
    began, used = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - began, time.process_time() - used


def spread(values: list[float], digits: int = 3) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": round(median, digits), "q1": round(low, digits), "q3": round(high, digits)}


def coarse(model: TwoTower) -> TwoTower:
    """A copy of the model that computes in bfloat16, with all gradients allocated."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = None
    compute_in_(model, torch.bfloat16, ())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def speeds(runs: dict[str, Callable[[], None]], tokens: int, repeats: int, cold: set[str]) -> dict[str, object]:
    """Tokens per second of each step, which take turns, and the ratios of neighbouring steps; `cold` are warmed up."""
    wall: dict[str, list[float]] = {name: [] for name in runs}
    used: dict[str, list[float]] = {name: [] for name in runs}
    for name in sorted(cold):
        runs[name]()
    for _ in range(repeats):
        for name, run in runs.items():
            seconds = timed(run)
            wall[name].append(seconds[0])
            used[name].append(seconds[1])
    out: dict[str, object] = {
        name: {
            "tokens_per_second": spread([tokens / s for s in wall[name]], 0),
            "tokens_per_cpu_second": spread([tokens / s for s in used[name]], 0),
        }
        for name in runs
    }

    def ratio(over: str, under: str) -> dict[str, object]:
        return {
            label: spread([a / b for a, b in zip(values[over], values[under], strict=True)])
            for label, values in (("wall", wall), ("cpu", used))
        }

    for name in ("seeded", "recompute") if "boundary" in runs else ():
        out[f"{name}_speedup_over_boundary"] = ratio("boundary", name)
        out[f"{name}_time_over_ar"] = ratio(name, "ar")
    out["bf16_speedup_over_float32"] = ratio("seeded", "bf16")
    return out


def peaks(model: TwoTower, runs: dict[str, Callable[[], None]], tokens: int, scaling: list[int]) -> dict[str, object]:
    """Peak memory of each step, and of ours also by block size and by the numbers of tokens in `scaling`, if any."""
    out: dict[str, object] = {}
    found: dict[str, list[float]] = {name: [peak_mb(run) for _ in range(3)] for name, run in runs.items()}
    out["peak_mb"] = {name: spread(values, 0) for name, values in found.items()}
    for name in ("seeded", "recompute"):
        ratios = [a / b for a, b in zip(found[name], found["boundary"], strict=True)]
        out[f"{name}_peak_over_boundary"] = spread(ratios)
        if not scaling:
            continue
        steps = functools.partial(seeded_step, model, recompute=name == "recompute")
        by_block = {size: make_case(model.config, tokens, size) for size in (4, 16)}
        out[f"{name}_peak_mb_by_block"] = {
            size: round(peak_mb(functools.partial(steps, case))) for size, case in by_block.items()
        }
        out[f"{name}_peak_mb_by_tokens"] = {
            t: round(peak_mb(functools.partial(steps, make_case(model.config, t, 16)))) for t in scaling
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="2 or more")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--scaling", type=int, nargs="*", default=[], help="also measure peaks at so many tokens")
    parser.add_argument("--checkpoint", help="a checkpoint, or a shipped name, whose steps are timed")
    arguments = parser.parse_args()
    tokens, rows = arguments.tokens, arguments.rows
    if arguments.repeats < 2 or min(tokens, rows) < 1 or (arguments.checkpoint is None and (rows != 1 or tokens % 16)):
        parser.error("repeats must be 2 or more; without --checkpoint, rows 1 and tokens a multiple of 16")
    if arguments.checkpoint is not None and arguments.scaling:
        parser.error("scaling is measured without --checkpoint only")
    torch.set_num_threads(arguments.threads)
    out: dict[str, object] = {"benchmark": "training_pass", "tokens": tokens, "rows": rows, "block": 16}
    runs: dict[str, Callable[[], None]] = {}
    if arguments.checkpoint is None:
        model = random_model(CONFIG)
    else:
        out["checkpoint"] = arguments.checkpoint
        model = twotower.load(arguments.checkpoint, dtype="float32", pack=False)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    cold = {"seeded", "recompute"}
    case = make_case(model.config, tokens, 16, rows)
    for name in ("seeded", "recompute"):
        runs[name] = functools.partial(seeded_step, model, case, recompute=name == "recompute")
    if arguments.checkpoint is None:
        runs = {"boundary": functools.partial(boundary_step, model, case), **runs}
        runs["ar"] = functools.partial(ar_step, model, case)
        # Peaks come first, while freed memory of 256 KB or more goes back to the kernel: what is resident is in use
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 18)
        out |= peaks(model, runs, tokens, arguments.scaling)
        cold = set()  # each has run while its peak was measured
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 25)  # glibc moves there itself after large frees
    runs["bf16"] = functools.partial(seeded_step, coarse(model), case, recompute=False)
    out |= speeds(runs, tokens * rows, arguments.repeats, {"bf16", *cold})
    out |= {
        "threads": torch.get_num_threads(),
        "cpu": cpu_model(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    print(json.dumps(out))


if __name__ == "__main__":
    main()

"""Measures what the engine gains from scheduling every step anew, on the shipped stories checkpoint.

    python benchmarks/engine_load.py [--model PATH] [--new-tokens 96] [--repeats 3] [--part speeds]

Prints one JSON line. `--part` runs one of the four parts alone:

- `speeds`: tokens per second with 1, 2, 4, 8 and 16 requests at a time, 16 requests or 4 for each place (held-out
  prompts of stories_prompts.json, greedy, end tokens ignored), for every fixed mode and for `auto` with and without
  loss. Modes alternate, and medians over repeats are printed. `auto_against_best` is the median of the ratios of runs
  that followed one another.
- `rounds`: the rounds that 72 `diffusion` requests of 16 to 128 new tokens take, with prompts of 128 tokens. They come
  one every two rounds, which is about as much as the engine sustains, or one every three. Three simulated schedulers
  that separate prompts from decoding are compared: `phases` lets requests come and go, but a round is for prompts or
  for decoding, never for both; `static` decodes a lot of requests to its end before it takes the next lot; `aligned` is
  `phases` with batches of rows that are at the same step of their blocks.
- `easy_p95`: seconds of requests that need one step per block, 16 at a time: beside 8 requests that need 16 steps per
  block, and beside other easy ones.
- `prefix`: seconds to the first token of a prompt of 2048 + 8 tokens, with nothing cached and after another prompt with
  the same 2048; and the speed for prompts that share nothing, with the cache on divided by that with it off.
"""

import argparse
import collections
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import twotower
from twotower.eval.provenance import commit, cpu_model

PROMPTS = json.loads(Path(__file__).with_name("stories_prompts.json").read_text())
CONCURRENT = (1, 2, 4, 8, 16)
CHUNK = 64
WARM = 3  # runs before those that count, in which `auto` learns the modes' speeds and ends most of its trials


def fixed_modes(new_tokens: int) -> dict[str, twotower.SamplingParams]:
    common = {"max_new_tokens": new_tokens, "ignore_eos": True}
    modes = {mode: twotower.SamplingParams(mode=mode, **common) for mode in ("ar", "diffusion", "verified")}
    modes["auto"] = twotower.SamplingParams(mode="auto", **common)
    modes["auto, loss allowed"] = twotower.SamplingParams(mode="auto", allow_loss=True, **common)
    return modes


def speeds(model: twotower.TwoTower, new_tokens: int, repeats: int) -> dict[str, object]:
    """Tokens per second of each mode at each concurrency, and ratios of them."""
    modes = fixed_modes(new_tokens)
    # Ordered so that the modes that are compared run one after the other
    runs: dict[tuple[str, int], list[float]] = {(mode, c): [] for c, mode in itertools.product(CONCURRENT, modes)}
    engines = {
        pair: twotower.Engine(
            model, twotower.EngineConfig(max_num_requests=pair[1], state_bytes=48 << 20, snapshot_bytes=0)
        )
        for pair in runs
    }
    for repeat in range(-WARM, repeats):
        for (name, concurrent), engine in engines.items():
            began = time.perf_counter()
            prompts = itertools.islice(itertools.cycle(PROMPTS), max(16, 4 * concurrent))
            done = engine.generate(list(prompts), modes[name])
            if repeat >= 0:
                tokens = sum(len(g.token_ids) for g in done)
                runs[name, concurrent].append(tokens / (time.perf_counter() - began))
    found = {name: {c: round(statistics.median(runs[name, c]), 1) for c in CONCURRENT} for name in modes}
    return {
        "tokens_per_second": found,
        "sixteen_against_one": {name: round(by[16] / by[1], 2) for name, by in found.items()},
        "best_at_sixteen_against_best_at_one": round(
            max(by[16] for by in found.values()) / max(by[1] for by in found.values()), 2
        ),
        "auto_against_best": against_best(runs, "auto", ("ar", "verified")),
        "lossy_auto_against_best": against_best(runs, "auto, loss allowed", ("ar", "verified", "diffusion")),
    }


def against_best(
    runs: dict[tuple[str, int], list[float]], name: str, fixed: tuple[str, ...]
) -> dict[int, dict[str, float | str]]:
    """At each concurrency the fixed mode with the best median, and the speed of `name` as a multiple of its speed."""
    found: dict[int, dict[str, float | str]] = {}
    for c in CONCURRENT:
        best = max(fixed, key=lambda mode, c=c: statistics.median(runs[mode, c]))
        ratios = [ours / theirs for ours, theirs in zip(runs[name, c], runs[best, c], strict=True)]
        found[c] = {"best": best, "ratio": round(statistics.median(ratios), 3), "lowest": round(min(ratios), 3)}
    return found


def rounds(model: twotower.TwoTower, gap: int) -> dict[str, float]:
    """The rounds that each scheduler takes for the same requests, which come one every `gap` rounds."""
    prompts = [list(itertools.islice(itertools.cycle(PROMPTS[i % len(PROMPTS)][i % 7 :]), 128)) for i in range(72)]
    lengths = itertools.cycle((16, 128, 32, 16, 64, 32))
    params = [
        twotower.SamplingParams(max_new_tokens=n, ignore_eos=True) for n in itertools.islice(lengths, len(prompts))
    ]
    config = twotower.EngineConfig(max_num_requests=16, prompt_chunk=CHUNK, snapshot_bytes=0)
    engine = twotower.Engine(model, config)
    waiting, now = list(enumerate(prompts)), 0
    blocks: list[list[int]] = [[] for _ in prompts]  # for each request the steps of each of its blocks
    while waiting or engine.has_work:
        while waiting and waiting[0][0] * gap <= now:
            index, prompt = waiting.pop(0)
            engine.add(prompt, params[index], request_id=str(index))
        for event in engine.step():
            if event.result is not None:
                at = event.result.commit_steps
                blocks[int(event.request_id)] = [max(at[i : i + 16]) + 1 for i in range(0, len(at), 16)]
        now += 1
    arrivals = [i * gap for i in range(len(prompts))]
    chunks = math.ceil(len(prompts[0]) / CHUNK)
    others = {
        "phases": phase_rounds(arrivals, blocks, chunks, aligned=False),
        "static": static_rounds(arrivals, [sum(steps) for steps in blocks], chunks),
        "aligned": phase_rounds(arrivals, blocks, chunks, aligned=True),
    }
    return {"engine": now, **others, **{f"against_{name}": round(now / n, 3) for name, n in others.items()}}


def static_rounds(arrivals: list[int], steps: list[int], chunks: int, size: int = 16) -> int:
    """The rounds of a scheduler that absorbs a lot of prompts and decodes until the last of them is done."""
    now, first = 0, 0
    while first < len(arrivals):
        now = max(now, arrivals[first])
        lot = [i for i in range(first, min(first + size, len(arrivals))) if arrivals[i] <= now]
        now += chunks * len(lot) + max(steps[i] for i in lot)
        first += len(lot)
    return now


def phase_rounds(arrivals: list[int], blocks: list[list[int]], chunks: int, *, aligned: bool, size: int = 16) -> int:
    """The rounds of a scheduler that puts prompts first: a round absorbs a chunk of one, or else decodes one step.

    If `aligned`, only the largest group of rows that are at the same step of their blocks decodes.
    """
    left = [[step for steps in request for step in range(steps)] for request in blocks]
    now, coming = 0, 0
    prompt: dict[int, int] = {}
    running: list[int] = []
    while coming < len(arrivals) or prompt or running:
        while coming < len(arrivals) and arrivals[coming] <= now and len(prompt) + len(running) < size:
            prompt[coming] = chunks
            coming += 1
        if prompt:
            index = next(iter(prompt))
            prompt[index] -= 1
            if prompt[index] == 0:
                del prompt[index]
                running.append(index)
        elif running:
            step = collections.Counter(left[index][0] for index in running).most_common(1)[0][0]
            for index in running:
                if not aligned or left[index][0] == step:
                    left[index].pop(0)
            running = [index for index in running if left[index]]
        now += 1
    return now


def easy_p95(model: twotower.TwoTower, repeats: int) -> dict[str, float]:
    """The 95th percentile of the seconds of easy requests, alone and beside hard ones."""
    easy = twotower.SamplingParams(max_new_tokens=64, ignore_eos=True, confidence_threshold=0.0)
    hard = twotower.SamplingParams(max_new_tokens=64, ignore_eos=True, confidence_threshold=1.0)
    found: dict[str, list[float]] = {"easy_only": [], "mixed": []}
    config = twotower.EngineConfig(max_num_requests=16, snapshot_bytes=0)
    for repeat in range(repeats + 1):
        for name, params in (("easy_only", [easy] * 48), ("mixed", [easy, hard] * 24)):
            engine = twotower.Engine(model, config)
            seconds = [latency for p, latency in closed_loop(engine, params) if p is easy]
            if repeat:
                found[name].append(statistics.quantiles(seconds, n=20)[-1])
    p95 = {name: round(statistics.median(values), 4) for name, values in found.items()}
    return {**p95, "ratio": round(p95["mixed"] / p95["easy_only"], 3)}


def closed_loop(
    engine: twotower.Engine, params: list[twotower.SamplingParams]
) -> list[tuple[twotower.SamplingParams, float]]:
    """Runs all requests, 16 at a time; returns the params and the seconds of each, in the order in which they end."""
    coming = iter(enumerate(params))
    began: dict[str, tuple[twotower.SamplingParams, float]] = {}
    done = []
    while True:
        while len(began) < 16 and (pair := next(coming, None)) is not None:
            name = engine.add(PROMPTS[pair[0] % len(PROMPTS)], pair[1])
            began[name] = (pair[1], time.perf_counter())
        if not began:
            return done
        for event in engine.step():
            if event.result is not None:
                p, start = began.pop(event.request_id)
                done.append((p, time.perf_counter() - start))


def prefix(model: twotower.TwoTower, repeats: int) -> dict[str, float]:
    """What the prefix cache saves when it hits, and what it costs when it does not."""
    one = twotower.SamplingParams(mode="ar", max_new_tokens=1, ignore_eos=True, past_positions=True)
    seconds: dict[str, list[float]] = {"cold": [], "cached": []}
    on, off = (twotower.EngineConfig(state_bytes=96 << 20, snapshot_bytes=n << 20) for n in (8, 0))
    for _ in range(repeats):
        engine = twotower.Engine(model, on)
        stem = list(itertools.islice(itertools.cycle(itertools.chain(*PROMPTS)), 2048))
        for name, tail in (("cold", PROMPTS[0][:8]), ("cached", PROMPTS[1][:8])):
            (result,) = engine.generate([stem + tail], one)
            seconds[name].append(result.stats.seconds_to_first_token)
    some = twotower.SamplingParams(mode="ar", max_new_tokens=32, ignore_eos=True)
    ratios = []
    for _ in range(repeats):
        taken = []
        for config in (on, off):
            engine = twotower.Engine(model, config)
            began = time.perf_counter()
            engine.generate(PROMPTS, some)
            taken.append(time.perf_counter() - began)
        ratios.append(taken[1] / taken[0])
    medians = {name: round(statistics.median(values), 4) for name, values in seconds.items()}
    return {
        **medians,
        "cached_against_cold": round(medians["cached"] / medians["cold"], 3),
        "speed_on_against_off": round(statistics.median(ratios), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=("speeds", "rounds", "easy_p95", "prefix"), help="instead of all four")
    a = parser.parse_args()
    model = twotower.load(a.model)
    parts: dict[str, Callable[[], object]] = {
        "speeds": lambda: speeds(model, a.new_tokens, a.repeats),
        "rounds": lambda: {f"one_every_{gap}": rounds(model, gap) for gap in (2, 3)},
        "easy_p95": lambda: easy_p95(model, a.repeats),
        "prefix": lambda: prefix(model, a.repeats),
    }
    out = {"benchmark": "engine_load"} | {name: run() for name, run in parts.items() if a.part in (None, name)}
    out |= {
        "new_tokens": a.new_tokens,
        "repeats": a.repeats,
        "dtype": str(next(iter(model.parameters())).dtype),
        "threads": torch.get_num_threads(),
        "cpu": cpu_model(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    print(json.dumps(out))


if __name__ == "__main__":
    main()

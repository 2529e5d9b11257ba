"""Measures what decoding loses beside other programs that keep the machine's cores busy.

    python benchmarks/contention.py [--threads 2 1] [--loops 0 1 2] [--rounds 5] [--before CHECKOUT]

Prints one JSON line. The shipped stories checkpoint continues held-out prompts (stories_prompts.json), greedy at batch
1, in `ar`, `diffusion` and `verified`, beside as many busy loops as `--loops` says: processes that compute without a
pause, started here and stopped while they aren't wanted. `loop_cpu` is the share of a core that each got while it ran.
Each number of threads has a process of its own, since OpenMP reads its settings once, and gets the settings that the
command line chooses; all conditions alternate.
`of_quiet` is the speed beside loops divided by that of the same round without any, as the median over rounds with
quartiles. With `--before`, the root of another checkout of twotower, that one is measured in turns too, and
`of_before` is the speed of this one divided by that one's under the same conditions.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROMPTS = Path(__file__).with_name("stories_prompts.json")
MODES = ("ar", "diffusion", "verified")
SECONDS = 0.25  # of a measurement on a quiet machine; at most LONGEST times as much beside loops
LONGEST = 4


class Decoder:
    """A process that decodes with the package of `root` on so many threads, and says how fast."""

    def __init__(self, root: Path, threads: int) -> None:
        environment = os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, __file__, "--decode"]
        self._process = subprocess.Popen(
            command, env=environment, cwd=root, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.about = self._answer()

    def speed(self, mode: str) -> float:
        """Tokens per second."""
        assert self._process.stdin is not None
        print(mode, file=self._process.stdin, flush=True)
        return float(self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class BusyLoop:
    """A process that computes without a pause while it is let."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._clock = context.Value("d", 0.0, lock=False)
        self._process = context.Process(target=_spin, args=(self._clock,), daemon=True)
        self._process.start()
        while self._clock.value == 0:
            time.sleep(0.01)
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    @contextlib.contextmanager
    def running(self, shares: list[float]) -> Iterator[None]:
        """Lets it run; afterwards `shares` has one more share of a core that it got."""
        cpu, began = self._clock.value, time.perf_counter()
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)
            shares.append((self._clock.value - cpu) / (time.perf_counter() - began))

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _spin(clock: Any) -> None:
    while True:
        for _ in range(10_000):
            pass
        clock.value = time.process_time()


def decode() -> None:
    """What a Decoder's process does: reads names of modes and answers tokens per second."""
    if importlib.util.find_spec("twotower.cli.threads"):  # older checkouts have none
        importlib.import_module("twotower.cli.threads").settle_threads(os.environ)
    import torch

    import twotower
    from twotower.eval.provenance import commit, cpu_model

    model = twotower.load()
    prompts = itertools.cycle(json.loads(PROMPTS.read_text()))
    texts: dict[str, tuple[twotower.SamplingParams, list[list[int]]]] = {}
    for mode in MODES:
        params = twotower.SamplingParams(mode=mode, max_new_tokens=96, ignore_eos=True)
        list(twotower.stream(model, next(prompts), params))  # warm-up
        texts[mode] = (params, [])
        began = time.perf_counter()
        while time.perf_counter() - began < SECONDS:
            texts[mode][1].append(next(prompts))
            list(twotower.stream(model, texts[mode][1][-1], params))
    about = {"commit": commit(), "cpu": cpu_model(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        params, own = texts[line.strip()]
        tokens, began = 0, time.perf_counter()
        for output in itertools.chain.from_iterable(twotower.stream(model, prompt, params) for prompt in own):
            tokens += len(output.tokens)
            if time.perf_counter() - began > LONGEST * SECONDS:
                break
        print(tokens / (time.perf_counter() - began), flush=True)


def measure(decoders: dict[tuple[str, int], Decoder], loops: list[int], rounds: int) -> dict[str, Any]:
    """Speeds and their ratios by build, threads, mode and number of loops."""
    busy = [BusyLoop() for _ in range(max(loops))]
    speeds: dict[tuple[str, int, str, int], list[float]] = {}
    shares: list[float] = []
    for turn in range(rounds):
        conditions = [*itertools.product(MODES, loops, decoders)]
        for mode, count, who in conditions if turn % 2 else conditions[::-1]:
            with contextlib.ExitStack() as running:
                for loop in busy[:count]:
                    running.enter_context(loop.running(shares))
                if count:
                    time.sleep(0.02)  # until the scheduler has placed them
                speed = decoders[who].speed(mode)
            speeds.setdefault((*who, mode, count), []).append(speed)
    for loop in busy:
        loop.close()
    out: dict[str, Any] = {"loop_cpu": spread(shares) if shares else None}
    for (build, threads, mode, count), found in speeds.items():
        line: dict[str, Any] = {"tokens_per_second": round(statistics.median(found), 1)}
        if count and 0 in loops:
            line["of_quiet"] = spread(divided(found, speeds[build, threads, mode, 0]))
        if build == "now" and ("before", threads, mode, count) in speeds:
            line["of_before"] = spread(divided(found, speeds["before", threads, mode, count]))
        of_build = out.setdefault(build, {}).setdefault(f"{threads} threads", {})
        of_build.setdefault(mode, {})[f"{count} loops"] = line
    return out


def divided(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: list[float]) -> list[float]:
    """The median and the quartiles around it."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return [round(x, 3) for x in (middle, low, high)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--loops", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path, help="the root of another checkout to compare with")
    parser.add_argument("--decode", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.decode:
        decode()
        return
    roots = {"now": ROOT} | ({"before": arguments.before.resolve()} if arguments.before else {})
    decoders = {(name, n): Decoder(root, n) for n in arguments.threads for name, root in roots.items()}
    abouts = {name: decoders[name, arguments.threads[0]].about for name in roots}
    out = {"benchmark": "contention", "cores": os.cpu_count(), "rounds": arguments.rounds, "builds": abouts}
    out |= measure(decoders, sorted(arguments.loops), arguments.rounds)
    for decoder in decoders.values():
        decoder.close()
    print(json.dumps(out))


if __name__ == "__main__":
    main()

"""Engines of vLLM in this process, and what they must give."""

import gc
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import twotower
from twotower.model.two_tower import TwoTower

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

DATA = Path(twotower.__file__).parent / "data"
# Widths that vLLM's attention on CPUs takes: heads of a multiple of 32
SIZES = {"vocab_size": 96, "hidden_size": 64, "head_dim": 32, "mamba_head_dim": 16, "mamba_state_size": 16}


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., TwoTower]) -> Callable[[str], Path]:
    """checkpoint("stories"), ("hybrid"), ("llama") or of a pattern: a directory; the last two have random weights."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if (DATA / name).is_dir():  # of a whole path, the path itself
            return DATA / name
        if name not in made:
            made[name] = tmp_path_factory.mktemp("checkpoint")
            twotower.save(tiny(name, **SIZES), made[name])
        return made[name]

    return make


@pytest.fixture
def engine(checkpoint: Callable[[str], Path]) -> Iterator[Callable[..., Any]]:
    """engine(name, **arguments of vllm.LLM): one engine, closed at the test's end."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    engines: list[Any] = []

    def start(name: str, **arguments: Any) -> Any:
        folder = checkpoint(name)
        common = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "max_num_seqs": 8, "seed": 0}
        bare = not (folder / "tokenizer.json").exists()
        engines.append(LLM(str(folder), skip_tokenizer_init=bare, disable_log_stats=False, **common | arguments))
        return engines[-1]

    yield start
    for running in engines:
        running.llm_engine.engine_core.shutdown()
    engines.clear()
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="package")
def expected(checkpoint: Callable[[str], Path]) -> Callable[..., list[list[int]]]:
    """expected(name, prompts, most): the tokens of our `ar` or another mode, greedily and past every end."""
    models: dict[str, TwoTower] = {}

    def tokens(name: str, prompts: Sequence[Sequence[int]], most: int, mode: Any = "ar") -> list[list[int]]:
        if name not in models:
            models[name] = twotower.load(checkpoint(name), dtype="float32")
        params = twotower.SamplingParams(mode=mode, max_new_tokens=most, temperature=0, ignore_eos=True)
        return [list(result.token_ids) for result in twotower.generate(models[name], prompts, params)]

    return tokens


@pytest.fixture(scope="session")
def prompts() -> Callable[..., list[list[int]]]:
    """prompts(n) of 1 to `most` random tokens that are not special."""

    def make(number: int, *, most: int = 40, seed: int = 0) -> list[list[int]]:
        rng = random.Random(seed)
        return [[rng.randrange(4, SIZES["vocab_size"]) for _ in range(rng.randint(1, most))] for _ in range(number)]

    return make


@pytest.fixture(scope="session")
def ask() -> Callable[..., list[list[int]]]:
    """ask(engine, prompts, most): the tokens of each, greedily and past every end, in the server's mode or the given
    ones."""
    from vllm import SamplingParams

    def generate(
        engine: Any, ids: Sequence[Sequence[int]], most: int, modes: Sequence[str] | None = None
    ) -> list[list[int]]:
        common = {"temperature": 0, "max_tokens": most, "ignore_eos": True, "detokenize": False}
        params = [SamplingParams(**common, extra_args=mode and {"mode": mode}) for mode in modes or [None] * len(ids)]
        outputs = engine.generate([{"prompt_token_ids": list(one)} for one in ids], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


@pytest.fixture(scope="session")
def count() -> Callable[[Any, str], int]:
    """count(engine, metric): one of its counters, as /metrics names it without "vllm:"."""

    def total(engine: Any, metric: str) -> int:
        return sum(m.value for m in engine.get_metrics() if m.name == f"vllm:{metric}")

    return total

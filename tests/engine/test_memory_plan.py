"""What an engine takes of a machine's memory, on cards that are only numbers, and that it works with that."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from twotower.backends.choose import pack_
from twotower.config import TwoTowerConfig
from twotower.decoding.params import SamplingParams
from twotower.engine.config import EngineConfig
from twotower.engine.engine import Engine
from twotower.engine.memory_plan import MemoryPlan, places_before_loading, places_of, plan_memory
from twotower.engine.pool import StatePool
from twotower.engine.prefix_cache import PrefixCache, Snapshot, Tree
from twotower.errors import SettingError
from twotower.model.pages import PAGE_SIZE
from twotower.model.two_tower import TwoTower
from twotower.planning.machine import DeviceMemory

GB = 10**9
RELEASED = Path(__file__).parents[2] / "recipes/nemotron-30b/config.json"


@pytest.fixture(scope="module")
def released() -> TwoTowerConfig:
    found = TwoTowerConfig.from_json(RELEASED)
    return dataclasses.replace(found, carried={**found.carried, "max_position_embeddings": 262144})


def card(gigabytes: float, index: int = 0) -> DeviceMemory:
    return DeviceMemory(f"cuda:{index}", int(gigabytes * GB), int(gigabytes * GB))


def planned(config: TwoTowerConfig, *cards: DeviceMemory, **limits: Any) -> MemoryPlan:
    return plan_memory(config, places_before_loading(config, torch.bfloat16, *cards), EngineConfig(**limits))


def cpu(config: TwoTowerConfig, free: int, **limits: Any) -> MemoryPlan:
    return planned(config, DeviceMemory("cpu", 4 * free, free), **limits)


CARDS = [(141,), (150.1,), (80, 80), (85, 85)]


@pytest.mark.parametrize("sizes", CARDS)
def test_the_released_model_has_useful_defaults(released: TwoTowerConfig, sizes: tuple[float, ...]) -> None:
    plan = planned(released, *(card(size, i) for i, size in enumerate(sizes)))
    assert plan.warnings == ()
    assert (plan.max_num_requests, plan.max_context) == (16, 262144)
    assert plan.num_fitting(262144) >= 1
    assert plan.longest(16) > 16_000
    assert plan.num_snapshots >= 32
    assert plan.snapshot_bytes == plan.num_snapshots * plan.places.sizes.snapshot
    assert plan.prompt_chunk in (2048, 4096)
    assert plan.chunk_at(262144) >= PAGE_SIZE
    # all that may be in use at a time fits on the device
    passes = plan.passes
    used = plan.state_bytes + passes.fixed + plan.num_pages * PAGE_SIZE * passes.key + plan.prompt_chunk * passes.row
    assert used <= 0.9 * plan.places.context.free


@pytest.mark.parametrize("sizes", [(141,), (80, 80)])
def test_a_prefix_of_the_released_model_is_found_with_defaults(
    released: TwoTowerConfig, sizes: tuple[float, ...]
) -> None:
    """On tensors without memory: what the pool and the cache count, not what is computed."""
    plan = planned(released, *(card(size, i) for i, size in enumerate(sizes)))
    with FakeTensorMode(), torch.device("cuda:0"):
        model = TwoTower(
            released, dtype=torch.bfloat16, context_device="cuda:0", denoiser_device=f"cuda:{len(sizes) - 1}"
        )
        pool = StatePool(model, plan.pool_bytes, plan.max_num_requests)
        assert (pool.slot_bytes, pool.page_bytes) == plan.places.sizes[:2]
        assert pool.num_pages == plan.num_pages + 1
        cache, prompt, tree, table = PrefixCache(pool, plan.snapshot_bytes), list(range(100)), Tree(0), []
        assert pool.grow_(table, len(prompt))
        state = pool.open(table, 0, (), None, 0)
        points = cache.points(cache.match(prompt, tree, needs_logits=True), len(prompt))
        logits = torch.zeros(1, released.vocab_size)
        cache.insert(prompt, tree, table, {n: Snapshot(state.mamba, logits if n == 100 else None) for n in points})
        assert cache.bytes_of_snapshots == len(points) * pool.slot_bytes + logits.nbytes
        assert cache.match([*prompt, 5], tree, needs_logits=True).length == 100
        assert cache.match([*prompt[:70], 5], tree, needs_logits=True).length == 64


def test_a_card_that_has_no_room_for_the_weights_says_so(released: TwoTowerConfig) -> None:
    with pytest.raises(
        ValueError, match=r"cuda:0 has 0 B free beside weights of 117.7 GiB, and one request needs 47.0 MiB"
    ):
        planned(released, card(80))
    with pytest.raises(
        ValueError, match=r"passes may need [\d.]+ GiB, and 0 B are for states and keys; .* lower prompt"
    ):
        planned(released, card(127), prompt_chunk=4096)


def test_where_states_of_all_requests_do_not_fit_fewer_run(released: TwoTowerConfig) -> None:
    plan = planned(released, card(130.5))
    assert 1 <= plan.max_num_requests < 16
    assert plan.num_snapshots >= 1
    [lowered] = [warning for warning in plan.warnings if "requests run at a time, not 16" in warning]
    assert "46.8 MiB for its recurrent state" in lowered


def test_a_budget_in_bytes_wins(released: TwoTowerConfig) -> None:
    plan = planned(released, card(141), state_bytes=2 << 30)
    assert plan.state_bytes == 2 << 30
    assert plan.snapshot_bytes <= (2 << 30) // 4
    with pytest.raises(
        SettingError, match=r"state_bytes is 1048576, must be at least \d+ \(47.0 MiB\) for one request"
    ):
        planned(released, card(141), state_bytes=1 << 20)
    with pytest.raises(SettingError, match=r"memory_fraction is 0.5, must be left out beside state_bytes, 7"):
        EngineConfig(memory_fraction=0.5, state_bytes=7)
    half, most = (planned(released, card(141), memory_fraction=f) for f in (0.7, 0.9))
    assert most == planned(released, card(141))
    assert half.state_bytes < most.state_bytes


def test_settings_that_make_a_part_useless_are_said(released: TwoTowerConfig) -> None:
    def warned(**limits: Any) -> str:
        [warning] = planned(released, card(141), **limits).warnings
        return warning

    assert "snapshot_bytes is 33554432, less than one recurrent state of 490" in warned(snapshot_bytes=32 << 20)
    assert "so the prefix cache stores nothing; set at least 496" in warned(snapshot_bytes=32 << 20)
    assert "so the prefix cache stores no ends of prompts" in warned(snapshot_bytes=49_200_000)
    assert planned(released, card(141), snapshot_bytes=0).warnings == ()
    assert "more than the 4096 tokens that all 2 requests together may have" in warned(
        prompt_chunk=5000, max_num_requests=2, max_context=2048
    )
    assert "the prefix cache is off: of 95.4 MiB" in planned(released, card(141), state_bytes=100 * 10**6).warnings[1]
    assert "which" not in warned(max_context=2_000_000)
    assert "a text has room for " in warned(max_context=2_000_000)
    assert "more than the 13.6 GiB that are free on cuda:0" in warned(state_bytes=20 * GB)


def test_what_no_text_can_use_is_not_taken(sizes: dict[str, Any]) -> None:
    config = TwoTowerConfig(**sizes, pattern="M*-E")
    plan = cpu(config, 16 * GB)
    assert plan.state_bytes < 264 << 20
    assert plan.places.sizes.page == 2048
    assert plan.num_fitting(plan.max_context) == plan.max_num_requests == 16
    assert plan.longest(16) == plan.max_context == 4096
    one = cpu(config, 16 * GB, max_num_requests=1, max_context=100)
    assert one.num_pages == (256 << 20) // 2048  # a text may be longer than what was said
    large = cpu(TwoTowerConfig(**sizes | {"head_dim": 256, "num_key_value_heads": 4}, pattern="*-" * 8), 40 * GB)
    assert large.num_pages == 16 * (4096 + 80) // PAGE_SIZE
    tight = cpu(config, 2 << 20)
    assert tight.state_bytes < 1 << 20
    assert tight.num_pages > 0


@pytest.mark.parametrize("pattern", ["M*-E", "llama", "M-", "G*-", "S*-", "R*-"])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_planned_is_what_is_allocated_and_a_prefix_is_found(
    pattern: str, backend: str | None, dtype: torch.dtype, tiny: Callable[..., TwoTower]
) -> None:
    model = tiny(pattern, dtype=dtype)
    pack_(model, backend)
    engine = Engine(model)
    plan, pool = engine.plan, engine._pool
    assert (pool.slot_bytes, pool.page_bytes) == plan.places.sizes[:2]
    if pool.page_bytes:
        assert pool.num_pages == plan.num_pages + 1
    if backend is None:
        assert places_before_loading(model.config, dtype, DeviceMemory("cpu", GB, GB))[2:] == places_of(model)[2:]
    params, prompt = SamplingParams(mode="ar", max_new_tokens=2), [5, *range(4, 40), 7]
    engine.generate([prompt], params)
    engine.generate([prompt], params)
    assert engine.stats().cache_hit_tokens >= len(prompt)
    assert engine.stats().bytes_budget == plan.state_bytes


def test_a_pass_takes_few_of_many_large_states(released: TwoTowerConfig, sizes: dict[str, Any]) -> None:
    large, small = planned(released, card(141)), cpu(TwoTowerConfig(**sizes, pattern="M*-E"), GB)
    assert [large.most_marks(rows) for rows in (1, 4, 16, 32)] == [16, 4, 1, 1]
    assert small.most_marks(16) > 256

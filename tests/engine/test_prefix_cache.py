"""What a request finds of those before it, and that it is the state it would have computed."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from twotower.backends.choose import pack_
from twotower.decoding.generate import generate
from twotower.decoding.params import SamplingParams
from twotower.engine.config import EngineConfig
from twotower.engine.engine import Engine
from twotower.engine.job import Job
from twotower.engine.pool import StatePool
from twotower.engine.prefix_cache import PrefixCache, Snapshot
from twotower.model.pages import PAGE_SIZE, PagedKeys
from twotower.model.two_tower import TwoTower
from twotower.rope import AttentionType, Rope

PARAMS = SamplingParams(mode="ar", max_new_tokens=4)
PATTERNS = ["M*-E", "llama", "M-", "G*-", "S*-", "R*-"]


def engine(model: TwoTower, **config: int) -> Engine:
    return Engine(model, EngineConfig(**{"state_bytes": 1 << 22, "snapshot_bytes": 1 << 20, **config}))


def ids(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(4, 40) for _ in range(count)]


def found(engine: Engine, prompt: list[int], params: SamplingParams = PARAMS) -> int:
    """Runs a request to its end; how many tokens of it the cache had."""
    before = engine.stats()
    [result] = engine.generate([prompt], params)
    after = engine.stats()
    assert after.cache_hit_tokens - before.cache_hit_tokens == result.stats.num_cached_tokens
    assert 0 <= after.cache_query_tokens - before.cache_query_tokens - len(prompt) + 1 <= 1
    return result.stats.num_cached_tokens


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_shared_prefix_is_reused_to_the_last_page_and_then_to_the_token(pattern: str, tiny: Callable) -> None:
    stem = ids(100, 0)
    branches = [[*stem, 5 + i, *ids(30, i)] for i in range(3)]
    e = engine(tiny(pattern))
    assert found(e, branches[0]) == 0
    assert found(e, branches[1]) >= 96  # the grid, or a whole page
    assert found(e, branches[2]) == 100  # where the second left the first
    assert found(e, branches[0]) == 131  # all of it, with the logits that `ar` starts from


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_identical_prompt_costs_no_context_pass(pattern: str, tiny: Callable) -> None:
    e, prompt = engine(tiny(pattern)), ids(50, 1)
    first = e.generate([prompt], PARAMS)[0]
    again = e.generate([prompt], PARAMS)[0]
    assert again.token_ids == first.token_ids
    assert again.stats.context_calls == first.stats.context_calls - 1
    assert found(e, prompt, SamplingParams(mode="verified", max_new_tokens=4)) == 50
    assert found(e, prompt[:48]) < 48  # nobody ended there: no logits


def test_logits_are_only_asked_for_where_they_are_read(tiny: Callable) -> None:
    prompt = ids(64, 1)
    for mode, expected in (("ar", 32), ("verified", 32), ("diffusion", 48), ("mock_ar", 32)):
        e = engine(tiny("llama"))
        assert found(e, prompt) == 0
        assert found(e, prompt[:48], SamplingParams(mode=mode, max_new_tokens=4)) == expected


def same_state(model: TwoTower, job: Job, prompt: list[int], close: Callable) -> None:
    context = job.context
    assert context is not None
    fresh = model.prefill([prompt[: job.num_absorbed]])
    for ours, theirs in zip(context.mamba, fresh.mamba, strict=True):
        close(ours.conv, theirs.conv, 1e-5)  # float32, other chunks
        close(ours.ssm, theirs.ssm, 1e-5)
    if isinstance(context.buffer, PagedKeys):
        past = context.buffer.past(job.num_absorbed)

        def gathered(pool: Tensor) -> Tensor:
            return pool[past.pages].transpose(1, 2).flatten(2, 3)[:, :, : job.num_absorbed]

        for ours, theirs in zip((*past.keys, *past.values), (*fresh.buffer.keys, *fresh.buffer.values), strict=True):
            close(gathered(ours), theirs[:, :, : job.num_absorbed], 1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("chunk", [7, 64])
def test_a_state_after_a_hit_is_a_fresh_prefill(pattern: str, chunk: int, tiny: Callable, close: Callable) -> None:
    model = tiny(pattern)
    pack_(model)
    e = engine(model, prompt_chunk=chunk)
    rng = random.Random(2)
    prompts = [ids(90, 0)[: rng.randrange(20, 90)] + ids(rng.randrange(1, 40), i) for i in range(12)]
    hits = set()
    for prompt in prompts * 2:
        e.add(prompt, PARAMS)
        e._intake.admit(0)
        (job,) = e._intake.absorbing
        hits.add(job.num_absorbed)
        same_state(model, job, prompt, close)
        while e.has_work:
            e.step()
    assert len(hits) > 8
    assert any(n % PAGE_SIZE for n in hits)


def test_a_state_is_never_attached_to_a_shorter_prefix(tiny: Callable) -> None:
    pool = StatePool(tiny("M*-E"), 1 << 20, 1)
    cache = PrefixCache(pool, 1 << 20)
    table: list[int] = []
    pool.grow_(table, 40)
    with pytest.raises(AssertionError, match="exactly the tokens it has seen"):
        cache.insert(ids(20, 0), 0, table, {24: Snapshot((), None)})


def test_snapshots_stay_within_their_bytes_and_the_oldest_go_first(tiny: Callable) -> None:
    model = tiny("M*-E")
    slot = StatePool(model, 1 << 20, 1).slot_bytes
    e = engine(model, snapshot_bytes=5 * slot)
    prompts = [ids(20, i) for i in range(12)]
    for prompt in prompts:
        assert found(e, prompt) == 0
        assert e._cache.bytes_of_snapshots <= 5 * slot
    assert found(e, prompts[-1]) == 20
    assert found(e, prompts[0]) == 0


def test_pages_of_the_cache_make_room_for_requests(tiny: Callable) -> None:
    model = tiny("llama")
    page = StatePool(model, 1 << 20, 1).page_bytes
    e = engine(model, state_bytes=13 * page + 4096, snapshot_bytes=4096, max_num_requests=2)
    for i in range(6):
        assert found(e, ids(50, i)) == 0
        assert e.stats().bytes_used <= e.stats().bytes_budget
    assert found(e, ids(50, 5)) > 0
    assert e.stats().num_preemptions == 0


def test_off_means_off(tiny: Callable) -> None:
    e = engine(tiny("M*-E"), snapshot_bytes=0)
    assert found(e, ids(50, 0)) == 0
    assert found(e, ids(50, 0)) == 0
    assert e.stats().bytes_used == 0


def test_the_grid_grows_sparser_with_the_prompt(tiny: Callable) -> None:
    cache = PrefixCache(StatePool(tiny("M*-E"), 1 << 20, 1), 1 << 20)
    nothing = cache.match([], 0, needs_logits=False)
    for length in (1, 31, 33, 512, 513, 5000):
        points = cache.points(nothing, length)
        assert points[-1] == length
        assert len(points) <= 17
        assert all(p % 32 == 0 for p in points[:-1])
    assert 2048 in cache.points(nothing, 4096)


def test_inference_tensors_of_the_cache_are_not_written(tiny: Callable) -> None:
    """A request that goes on from a snapshot leaves it as it was."""
    e, prompt = engine(tiny("M*-E")), ids(40, 3)
    e.generate([prompt], PARAMS)
    kept = [n.snapshot for n in e._cache._nodes() if n.snapshot is not None]
    before = [[t.clone() for m in s.mamba for t in m] for s in kept]
    assert found(e, prompt, SamplingParams(max_new_tokens=40)) == 40
    for snapshot, tensors in zip(kept, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip((t for m in snapshot.mamba for t in m), tensors, strict=True))


def test_pages_with_several_snapshots_are_given_back_too(tiny: Callable) -> None:
    """Two points in one page are two nodes that hold it; a request that needs every page must get them all."""
    pool = StatePool(tiny("M*-E"), 1 << 18, num_slots=1)
    cache, table, prompt = PrefixCache(pool, 1 << 20), [], ids(3 * PAGE_SIZE - 3, 0)
    free = pool.num_free
    assert pool.grow_(table, len(prompt))
    snapshots = {n: Snapshot((), None) for n in (len(prompt) - 5, len(prompt) - 2, len(prompt))}
    cache.insert(prompt, 0, table, snapshots)
    cache.free_pages(free)
    assert pool.num_free == free - 3  # the owner still has them
    pool.release_(table)
    assert pool.num_free < free
    cache.free_pages(free)
    assert pool.num_free == free


LONGROPE = Rope(
    rope_type="longrope",
    original_max_position_embeddings=32,
    short_factor=(1.0, 1.5, 2.0, 3.0),
    long_factor=(2.0, 4.0, 8.0, 9.0),
)
DYNAMIC = Rope(rope_type="dynamic", original_max_position_embeddings=32, factor=4.0)


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC])
def test_texts_that_rope_turns_otherwise_share_no_keys(rope: Rope, tiny: Callable) -> None:
    model = tiny("*-*-", attention_types=(AttentionType(rope_parameters=rope),))
    prompt = ids(20, 0)
    requests = [SamplingParams(mode=mode, max_new_tokens=n) for mode in ("ar", "verified") for n in (9, 30, 50)]
    alone = [generate(model, [prompt], params)[0].token_ids for params in requests]
    assert alone[0] != alone[1][:9], "the lengths make no difference"
    assert [r.token_ids for r in generate(model, [prompt] * len(requests), requests)] == alone
    e = engine(model)
    assert [r.token_ids for r in e.generate([prompt] * len(requests), requests)] == alone
    assert found(e, prompt, requests[0]) == 20
    assert found(e, prompt, SamplingParams(mode="ar", max_new_tokens=41)) == (20 if rope is LONGROPE else 0)
    e.clear_cache()
    assert not e._cache._roots


def test_only_requests_of_one_salt_share_a_prompt(tiny: Callable) -> None:
    e, prompt = engine(tiny("M*-E")), ids(50, 1)
    salted = [SamplingParams(mode="ar", max_new_tokens=4, cache_salt=salt) for salt in ("a", "b")]
    assert [found(e, prompt, p) for p in (PARAMS, *salted, PARAMS, *salted)] == [0, 0, 0, 50, 50, 50]

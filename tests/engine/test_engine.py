"""What an engine does beside giving `generate`'s results; test_schedules.py has those."""

import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from twotower.backends.choose import pack_
from twotower.decoding.generate import generate
from twotower.decoding.modes import MODES
from twotower.decoding.params import SamplingParams
from twotower.engine.config import EngineConfig
from twotower.engine.engine import Engine
from twotower.model.two_tower import TwoTower


def engine(model: TwoTower, **config: int) -> Engine:
    return Engine(model, EngineConfig(**{"state_bytes": 1 << 20, "snapshot_bytes": 1 << 16, **config}))


@pytest.mark.parametrize(("pattern", "layers"), [("M*-E", None), ("ME*M*-", (1, 3, 4))])
def test_results_are_those_of_generate_in_order(pattern: str, layers: tuple[int, ...] | None, tiny: Callable) -> None:
    model = tiny(pattern, denoiser_layers=layers)
    prompts = [[4 + (i * 7 + j) % 30 for j in range(1 + 9 * i)] for i in range(2 * len(MODES))]
    params = [
        SamplingParams(mode=mode, max_new_tokens=9 + i, block_size=6, temperature=temperature, seed=i)
        for i, (temperature, mode) in enumerate((t, m) for t in (0.0, 1.0) for m in MODES)
    ]
    e = engine(model, max_num_requests=4, prompt_chunk=16)
    for ours, prompt, p in zip(e.generate(prompts, params), prompts, params, strict=True):
        alone = generate(model, [prompt], p)[0]
        assert (ours.token_ids, ours.commit_steps) == (alone.token_ids, alone.commit_steps)
        assert ours.stats.denoiser_calls == alone.stats.denoiser_calls
        assert ours.stats.context_calls == alone.stats.context_calls
    assert not e.has_work
    assert e.step() == []


def test_requests_decode_together_while_a_long_prompt_is_absorbed(tiny: Callable) -> None:
    """The short ones neither wait for the long prompt nor lengthen it."""
    e = engine(tiny("M*-E"), prompt_chunk=8)
    e.add([5] * 200, SamplingParams(mode="ar", max_new_tokens=1), request_id="long")
    short = {e.add([6, i], SamplingParams(mode="ar", max_new_tokens=6), request_id=f"short {i}") for i in range(4, 9)}
    ends: dict[str, int] = {}
    while e.has_work:
        ends |= {event.request_id: e.stats().num_rounds for event in e.step() if event.result is not None}
    assert all(ends[name] <= 10 for name in short)
    assert ends["long"] <= 200 / 8 + 3


def test_the_lowest_priority_comes_first_and_of_equal_ones_the_oldest(tiny: Callable) -> None:
    """One at a time; who decodes already isn't interrupted, and who comes later still comes before a higher number."""
    e, ends = engine(tiny("M*-E"), max_num_requests=1), []

    def add(name: str, priority: int) -> None:
        e.add([5, 6], SamplingParams(mode="ar", max_new_tokens=4, priority=priority), request_id=name)

    add("first", 0)
    e.step()
    for number, priority in enumerate([5, 0, -3, 5, -3]):
        add(f"{priority} {number}", priority)
    while e.has_work:
        ended = [event.request_id for event in e.step() if event.result is not None]
        ends += ended
        if ended == ["-3 2"]:
            add("1 later", 1)
            add("-9 later", -9)
    assert ends == ["first", "-3 2", "-9 later", "-3 4", "0 1", "1 later", "5 0", "5 3"]


def test_small_requests_pass_one_that_needs_more_pages_than_there_are(tiny: Callable) -> None:
    model = tiny("llama")
    page = engine(model)._pool.page_bytes
    e = engine(model, state_bytes=12 * page, snapshot_bytes=0)
    for name, length in (("first", 70), ("large", 140), ("small", 5)):
        e.add([5] * length, SamplingParams(mode="ar", max_new_tokens=12), request_id=name)
    ends = []
    while e.has_work:
        ends += [event.request_id for event in e.step() if event.result is not None]
    assert ends == ["first", "small", "large"] or ends == ["small", "first", "large"]


def test_one_large_request_is_not_passed_for_ever(tiny: Callable) -> None:
    """It needs all pages; a stream of small ones must let it in some time."""
    model = tiny("llama")
    page = engine(model)._pool.page_bytes
    e = engine(model, state_bytes=12 * page, snapshot_bytes=0)
    e.add([6] * 5, SamplingParams(mode="ar", max_new_tokens=30))
    e.step()
    e.add([5] * 140, SamplingParams(mode="ar", max_new_tokens=2), request_id="large")
    for i in range(200):
        e.add([6, 4 + i % 30], SamplingParams(mode="ar", max_new_tokens=3), request_id=f"small {i}")
        if any(event.request_id == "large" for event in e.step()):
            break
    assert 5 < i < 150


@pytest.mark.parametrize("pattern", ["llama", "M*-E"])
@pytest.mark.parametrize("length", [1, 16, 17, 28, 32, 40])
def test_a_text_that_needs_all_pages_is_written_again(pattern: str, length: int, tiny: Callable) -> None:
    """The cached pages of its prompt are the ones that it lacks."""
    model = tiny(pattern)
    pool = engine(model)._pool
    params = SamplingParams(mode="ar", max_new_tokens=3, block_size=16)
    room = pool.pages_for(length + 3 + 16 + 1) + 1
    e = engine(
        model,
        max_num_requests=2,
        state_bytes=room * pool.page_bytes + 2 * pool.slot_bytes + (1 << 16),
        snapshot_bytes=1 << 16,
    )
    assert e._pool.num_pages == room
    [expected] = generate(model, [[5] * length], params)
    for _ in range(2):
        for _ in range(2):
            e.add([5] * length, params)
        found = []
        for _ in range(100):
            found += [event.result.token_ids for event in e.step() if event.result is not None]
        assert found == [expected.token_ids] * 2


def test_a_budget_that_the_machine_has_not_is_refused(tiny: Callable) -> None:
    with pytest.raises(ValueError, match=r"MiB .* can't be allocated on cpu; lower state_bytes"):
        engine(tiny("llama"), state_bytes=1 << 60)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ar", "verified"])
def test_the_youngest_is_preempted_and_all_end(mode: str, tiny: Callable) -> None:
    model = tiny("M*-E", vocab_size=6, seed=1)
    e = engine(model)
    pages = e._pool.page_bytes * 15 + e._pool.slot_bytes * 4
    e = engine(model, max_num_requests=4, state_bytes=pages, snapshot_bytes=0)
    params = SamplingParams(mode=mode, max_new_tokens=100, block_size=8, temperature=1.0, seed=1)
    prompts = [[1 + i] * 20 for i in range(4)]
    names = [e.add(prompt, params) for prompt in prompts]
    ends = {}
    while e.has_work:
        for event in e.step():
            if event.result is not None:
                ends[event.request_id] = event.result
    assert list(ends) == names  # the oldest never waits for a younger one
    assert e.stats().num_preemptions > 0
    for name, prompt in zip(names, prompts, strict=True):
        assert ends[name].token_ids == generate(model, [prompt], params)[0].token_ids


def test_a_request_that_would_start_anew_keeps_its_draft(tiny: Callable) -> None:
    """At a temperature the tokens of `verified` depend on the draft's length, so preemption must not lose it."""
    e, lengths = engine(tiny("M*-E", vocab_size=6, seed=1)), set()
    e.add([4, 1], SamplingParams(mode="verified", max_new_tokens=60), request_id="a")
    for _ in range(12):
        e.step()
        [batch] = e._batches.of_mode.values()
        assert e._jobs["a"].request.draft == batch.rows.requests[0].draft
        lengths.add(batch.rows.requests[0].draft)
    assert len(lengths) > 1


@pytest.mark.slow
def test_aborts_at_random_phases_leave_nothing_behind_and_others_unchanged(tiny: Callable) -> None:
    abort_at_random(tiny("M*-E"), 300)


def abort_at_random(model: TwoTower, count: int) -> None:
    """Aborts `count` requests, whose ids are used again, beside some that stay."""
    pack_(model)
    rng = random.Random(0)
    prompts = [[rng.randrange(4, 40) for _ in range(rng.randrange(1, 70))] for _ in range(30)]
    params = [
        SamplingParams(
            mode=list(MODES)[i % 5], max_new_tokens=30, block_size=rng.choice([4, 16]), seed=i, temperature=i % 2
        )
        for i in range(30)
    ]
    e = engine(model, max_num_requests=6, prompt_chunk=32, state_bytes=1 << 17)
    staying: dict[str, int] = {}
    aborted, rounds, checked = 0, 0, 0
    while aborted < count or e.has_work:
        if aborted < count and rng.random() < 0.5:
            which = rng.randrange(30)
            stays = rng.random() < 0.05
            names = ["again", "and again"] if not stays else [f"stays {rounds}"]
            name = next((n for n in names if n not in e._jobs), None)
            if name is not None:
                e.add(prompts[which], params[which], request_id=name, watch=rng.random() < 0.3)
                if stays:
                    staying[name] = which
        for name in ("again", "and again"):
            if name in e._jobs and rng.random() < 0.3:
                e.abort(name)
                aborted += 1
        for event in e.step():
            if event.result is not None and event.request_id in staying:
                which = staying.pop(event.request_id)
                assert event.result.token_ids == generate(model, [prompts[which]], params[which])[0].token_ids
                checked += 1
        rounds += 1
        held = {page for job in e._jobs.values() for page in job.table}
        assert e.stats().usage == len(held) / (e._pool.num_pages - 1)
        assert rounds < 50 * count, "the engine does not come to an end"
    e.clear_cache()
    assert e.stats().bytes_used == 0
    assert checked > 0
    assert not staying


@pytest.mark.parametrize("pattern", ["M*-E", "M-"])
def test_the_usage_is_that_of_running_requests_alone(pattern: str, tiny: Callable) -> None:
    """What the cache keeps can be freed, so it does not count; pages that two requests share count once."""
    e, params = engine(tiny(pattern), max_num_requests=4), SamplingParams(mode="ar", max_new_tokens=40)
    usages = []
    for _ in range(3):
        e.add([5] * 200, params)
        e.step()
        usages.append(e.stats().usage)
    if e._pool.num_pages == 1:
        assert usages == [0.25, 0.5, 0.75]
    else:
        assert 0 < usages[1] - usages[0] < 0.5 * usages[0]
    while e.has_work:
        e.step()
    assert e.stats().usage == 0 < e.stats().bytes_used


def test_an_aborted_request_frees_its_state_at_once(tiny: Callable) -> None:
    e = engine(tiny("M*-E"), snapshot_bytes=0, prompt_chunk=16)
    params = SamplingParams(max_new_tokens=40, block_size=8)
    for rounds in (0, 1, 2, 5):
        e.add([5] * 40, params, request_id="a")
        for _ in range(rounds):
            e.step()
        assert (e.stats().bytes_used > 0) == (rounds > 0)
        e.abort("a")
        e.abort("a")
        e.abort("unknown")
        assert e.stats().bytes_used == 0
        assert not e.has_work


def test_watched_requests_have_an_event_for_every_step(tiny: Callable) -> None:
    e = engine(tiny("M*-E"))
    e.add([5, 6], SamplingParams(max_new_tokens=20, block_size=8), watch=True)
    e.add([5, 6], SamplingParams(max_new_tokens=20, block_size=8))
    events = []
    while e.has_work:
        events += e.step()
    watched = [event for event in events if event.request_id == "request-1"]
    assert all(event.block is not None for event in watched)
    assert watched[-1].result is not None
    assert len(watched) == watched[-1].result.stats.denoiser_calls
    assert all(event.block is None and event.token_ids for event in events if event.request_id == "request-2")


def test_an_event_says_how_long_its_request_waited(tiny: Callable) -> None:
    e, params = engine(tiny("M*-E"), max_num_requests=1), SamplingParams(mode="ar", max_new_tokens=9)
    began = time.perf_counter()
    for name in ("first", "second"):
        e.add([5, 6], params, request_id=name)
    e.add([5], SamplingParams(max_new_tokens=0), request_id="nothing")
    waited: dict[str, set[float]] = {}
    while e.has_work:
        for event in e.step():
            waited.setdefault(event.request_id, set()).add(event.seconds_queued)
            took = event.result.stats.seconds_total if event.result else None
            if event.request_id == "first" and took:
                first = took
    assert all(len(times) == 1 for times in waited.values())
    # it waited until the first was done, which came a little before it
    assert min(waited["second"]) > first / 2 > min(waited["first"])
    assert max(waited["nothing"]) < max(waited["second"]) < time.perf_counter() - began
    e.add_request(e.prepare([5], params), arrived=time.perf_counter() - 7)
    [event] = e.step()
    assert 7 <= event.seconds_queued < 8
    e.abort(event.request_id)


def test_a_round_waits_for_the_device_once(tiny: Callable, waits: list[str]) -> None:
    """Whatever runs in it: every mode, requests that come and go, and a prompt that is being absorbed."""
    e, rounds = engine(tiny("M*-"), prompt_chunk=64, max_num_requests=12), 0
    for i, mode in enumerate([*MODES, *MODES]):
        params = SamplingParams(mode=mode, max_new_tokens=8 + i, block_size=5, temperature=i % 2, top_k=9, seed=i)
        e.add([5, 6, 7, 8 + i], params)
    e.add([9] * 200, SamplingParams(mode="auto", max_new_tokens=8, allow_loss=True))
    while e.has_work:
        waits.clear()
        e.step()
        assert waits == ["tolist"]
        rounds += 1
    assert rounds > 8


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_num_requests", 0), ("prompt_chunk", 0), ("state_bytes", 0), ("snapshot_bytes", -1), ("max_num_waiting", -1)],
)
def test_limits_are_checked(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field} is {value}, must be an integer of at least"):
        EngineConfig(**{field: value})


def test_what_cannot_run_raises_before_anything_does(tiny: Callable) -> None:
    model = tiny("M*-E")
    with pytest.raises(ValueError, match="commits_apart is 'yes', must be True, False or None"):
        EngineConfig(commits_apart="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="snapshot_bytes is 7, must be below state_bytes, 7"):
        EngineConfig(state_bytes=7, snapshot_bytes=7)
    with pytest.raises(ValueError, match=r"state_bytes is 100, must be at least \d+ \(5.8 KiB\) for one request"):
        Engine(model, EngineConfig(state_bytes=100, snapshot_bytes=0))
    e = engine(model, state_bytes=1 << 17, max_num_requests=1)
    with pytest.raises(ValueError, match=r"314 pages of keys .* with max_new_tokens 5000 needs \(it gives 30\)"):
        e.add([5], SamplingParams(mode="ar", max_new_tokens=5000))
    with pytest.raises(ValueError, match=r"prompt\[0\] is 40, must be a token id"):
        e.generate([[5], [40]])
    assert not e.has_work
    e.add([5], SamplingParams(), request_id="a")
    with pytest.raises(ValueError, match="request_id is 'a', which an unfinished request has"):
        e.add([5], SamplingParams(), request_id="a")
    with pytest.raises(ValueError, match="1 requests are unfinished"):
        e.generate([[5]])

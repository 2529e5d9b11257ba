"""Random schedules: whatever shares the engine with a request, it gets what it gets alone."""

import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twotower.backends.choose import pack_
from twotower.decoding.generate import generate
from twotower.decoding.modes import MODES
from twotower.decoding.output import Generation, StepOutput
from twotower.decoding.params import COMMIT_RULES, SamplingParams
from twotower.engine.config import EngineConfig
from twotower.engine.engine import Engine
from twotower.model.two_tower import TwoTower

NUM_REQUESTS = 40


class Known(NamedTuple):
    """A request and what it gives alone."""

    prompt: list[int]
    params: SamplingParams
    alone: Generation


class Arrival(NamedTuple):
    """Request number `known` comes `gap` rounds after the one before it and is aborted after `patience` rounds."""

    known: int
    gap: int
    patience: int | None
    reuse_id: bool


@pytest.fixture(scope="session")
def model(tiny: Callable, byte_tokenizer: tokenizers.Tokenizer) -> TwoTower:
    """Every layer kind; with the C kernels where there is a compiler, so that results are equal to the bit."""
    made = tiny("M*-E", vocab_size=260, eos_token_id=(2, 77))
    made.tokenizer = byte_tokenizer
    pack_(made)
    return made


@pytest.fixture(scope="session")
def requests(model: TwoTower) -> list[Known]:
    """All modes and rules, prompts that share beginnings, ends by length, by token and by stop string."""
    rng = random.Random(0)
    stem = [rng.randrange(4, 260) for _ in range(60)]
    found = []
    for i in range(NUM_REQUESTS):
        mode = list(MODES)[i % len(MODES)]
        prompt = stem[: rng.choice([0, 5, 31, 32, 48, 60])] + [rng.randrange(4, 260) for _ in range(i % 7)]
        params = SamplingParams(
            mode=mode,
            commit_rule=rng.choice(COMMIT_RULES) if mode == "diffusion" else "confidence",
            max_new_tokens=rng.choice([0, 1, 5, 20, 48]),
            block_size=rng.choice([1, 4, 8, 16]),
            steps_per_block=rng.choice([1, 3, 16]),
            confidence_threshold=rng.choice([0.1, 0.5]),
            temperature=rng.choice([0.0, 0.0, 0.7]),
            top_k=rng.choice([None, 5]),
            seed=i,
            stop=("a", "zz") if i % 5 == 0 else (),
        )
        found.append(Known(prompt, params, generate(model, [prompt], params)[0]))
    return found


arrivals = st.lists(
    st.builds(
        Arrival,
        known=st.integers(0, NUM_REQUESTS - 1),
        gap=st.integers(0, 3),
        patience=st.none() | st.integers(0, 12),
        reuse_id=st.booleans(),
    ),
    min_size=12,
    max_size=24,
)
# From the least that any one request needs, so that requests are preempted, to room for all.
num_pages = st.integers(9, 18)


def play(engine: Engine, requests: list[Known], schedule: list[Arrival]) -> dict[str, tuple[Arrival, list[StepOutput]]]:
    """Runs a schedule to its end; what each request that was not aborted got, by id."""
    live: dict[str, tuple[Arrival, list[StepOutput]]] = {}
    done: dict[str, tuple[Arrival, list[StepOutput]]] = {}
    leaving: dict[str, int] = {}
    gone: list[str] = []
    coming = list(schedule)
    now, due = 0, 0
    while coming or engine.has_work:
        while coming and due + coming[0].gap <= now:
            arrival = coming.pop(0)
            due += arrival.gap
            known = requests[arrival.known]
            name = gone.pop() if arrival.reuse_id and gone else None
            name = engine.add(known.prompt, known.params, request_id=name)
            live[name] = (arrival, [])
            if arrival.patience is not None:
                leaving[name] = now + arrival.patience
        for name in [name for name, when in leaving.items() if when <= now]:
            del leaving[name]
            if name in live:
                engine.abort(name)
                gone.append(name)
                del live[name]
        for event in engine.step():
            assert event.request_id in live, "an event of a request that is gone"
            live[event.request_id][1].append(event)
            if event.result is not None:
                done[f"{event.request_id} at {now}"] = live.pop(event.request_id)
                leaving.pop(event.request_id, None)
        assert engine.stats().bytes_used <= engine.stats().bytes_budget
        now += 1
        assert now < 5000, "the engine does not come to an end"
    assert not live
    return done


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    schedule=arrivals,
    pages=num_pages,
    snapshots=st.sampled_from([0, 2, 40]),
    num_running=st.integers(1, 8),
    chunk=st.sampled_from([1, 7, 16, 64]),
    apart=st.booleans(),
)
def test_every_finished_request_is_generate_alone(
    schedule: list[Arrival],
    pages: int,
    snapshots: int,
    num_running: int,
    chunk: int,
    apart: bool,
    model: TwoTower,
    requests: list[Known],
) -> None:
    engine = engine_with(model, pages, snapshots, max_num_requests=num_running, prompt_chunk=chunk, commits_apart=apart)
    for arrival, events in play(engine, requests, schedule).values():
        known, result = requests[arrival.known], events[-1].result
        assert result is not None
        assert result.token_ids == known.alone.token_ids
        assert result.commit_steps == known.alone.commit_steps
        assert result.confidences == pytest.approx(known.alone.confidences, rel=1e-4)
        assert (result.text, result.finish_reason) == (known.alone.text, known.alone.finish_reason)
        assert [i for event in events for i in event.token_ids] == result.token_ids
        assert "".join(event.text for event in events) == result.text
        if engine.stats().num_preemptions == 0:
            assert result.stats.denoiser_calls == known.alone.stats.denoiser_calls
            assert known.alone.stats.context_calls - result.stats.context_calls in (0, 1)  # 1: the prompt was known
    engine.clear_cache()
    assert engine.stats().bytes_used == 0


def engine_with(model: TwoTower, pages: int, num_snapshots: int, **config: int) -> Engine:
    """An engine with so many pages of keys, and room for so many snapshots of the prefix cache."""
    pool = Engine(model, EngineConfig(state_bytes=1 << 20, snapshot_bytes=0))._pool
    needed = config["max_num_requests"] * pool.slot_bytes + (pages + 1) * pool.page_bytes
    snapshots = num_snapshots * pool.slot_bytes
    return Engine(model, EngineConfig(state_bytes=needed + snapshots, snapshot_bytes=snapshots, **config))

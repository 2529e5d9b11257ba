"""The engine's thread, as asyncio sees it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import torch

from twotower.decoding.generate import generate
from twotower.decoding.modes import MODES
from twotower.decoding.output import StepOutput
from twotower.decoding.params import SamplingParams
from twotower.engine.aio import AsyncEngine, EngineFailed, Overloaded, RequestFailed
from twotower.engine.config import EngineConfig
from twotower.model.two_tower import TwoTower

LONG = SamplingParams(mode="ar", max_new_tokens=2000)


@pytest.fixture(scope="module")
def model(tiny: Callable) -> TwoTower:
    return tiny("M*-E")


@pytest.fixture
def engine(model: TwoTower) -> Iterator[AsyncEngine]:
    made = AsyncEngine(
        model, EngineConfig(max_num_requests=4, max_num_waiting=8, state_bytes=1 << 21, snapshot_bytes=0)
    )
    made.start()
    yield made
    made.close()


async def last(stream: AsyncIterator[StepOutput]) -> StepOutput:
    events = [event async for event in stream]
    return events[-1]


async def idle(engine: AsyncEngine) -> None:
    """Waits until the engine has nothing to do and holds nothing; fails if it takes seconds."""
    deadline = time.monotonic() + 20
    while engine.stats().num_running or engine.stats().num_waiting or engine.stats().bytes_used:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


@pytest.mark.slow
def test_streams_at_once_are_generate_alone(model: TwoTower, engine: AsyncEngine) -> None:
    params = [SamplingParams(mode=mode, max_new_tokens=9 + i, seed=i, block_size=4) for i, mode in enumerate(MODES)] * 2
    prompts = [[5 + i] * (1 + 5 * i) for i in range(len(params))]

    async def main() -> list[StepOutput]:
        pairs = enumerate(zip(prompts, params, strict=True))
        streams = (engine.stream(prompt, p, request_id=f"mine {i}") for i, (prompt, p) in pairs)
        return await asyncio.gather(*(last(stream) for stream in streams))

    for i, (event, prompt, p) in enumerate(zip(asyncio.run(main()), prompts, params, strict=True)):
        assert event.request_id == f"mine {i}"
        assert event.result is not None
        assert event.result.token_ids == generate(model, [prompt], p)[0].token_ids


def test_closing_a_stream_frees_its_state_and_its_id(engine: AsyncEngine) -> None:
    async def main() -> None:
        for _ in range(5):
            stream = engine.stream([5, 6], LONG, request_id="same")
            async for _event in stream:
                break
            await stream.aclose()  # type: ignore[attr-defined]
        await idle(engine)

    asyncio.run(main())


def test_cancelling_the_task_aborts_too(engine: AsyncEngine) -> None:
    async def main() -> None:
        task = asyncio.create_task(last(engine.stream([5, 6], LONG)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await idle(engine)

    asyncio.run(main())


def test_abort_ends_the_stream_without_a_result(engine: AsyncEngine) -> None:
    async def main() -> list[StepOutput]:
        stream, events = engine.stream([5, 6], LONG, request_id="a"), []
        async for event in stream:
            events.append(event)
            await engine.abort("a")
        await engine.abort("a")
        await idle(engine)
        return events

    events = asyncio.run(main())
    assert events
    assert all(event.result is None for event in events)


def test_past_the_queue_limit_it_says_so(engine: AsyncEngine) -> None:
    async def main() -> None:
        tasks = [asyncio.create_task(last(engine.stream([5], LONG))) for _ in range(12)]
        while engine.stats().num_running + engine.stats().num_waiting < 12:
            await asyncio.sleep(0.005)
        with pytest.raises(Overloaded, match="12 requests are unfinished, the limit is 12"):
            await last(engine.stream([5], LONG))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await idle(engine)
        assert (await last(engine.stream([5], SamplingParams(max_new_tokens=2)))).result is not None

    asyncio.run(main())


def test_places_of_an_admission_are_given_back_once(engine: AsyncEngine) -> None:
    async def main() -> None:
        request = engine.prepare([5], LONG)
        with engine.admit(12) as admission:
            with pytest.raises(Overloaded, match="12 requests are unfinished"), engine.admit():
                pass
            streams = [engine.stream_prepared(request, admission) for _ in range(2)]
            for stream in streams:
                await anext(stream)
            assert (engine.num_unfinished, admission.num_left) == (12, 10)
            await streams[0].aclose()
            assert engine.num_unfinished == 11
        assert engine.num_unfinished == 1
        await streams[1].aclose()
        assert engine.num_unfinished == 0
        await idle(engine)

    asyncio.run(main())


def test_bad_requests_raise_where_they_are_made(engine: AsyncEngine) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match=r"prompt\[0\] is 40, must be a token id"):
            await last(engine.stream([40], SamplingParams()))
        stream = engine.stream([5], LONG, request_id="a")
        await anext(stream)
        with pytest.raises(ValueError, match="request_id is 'a', which an unfinished request has"):
            await last(engine.stream([5], LONG, request_id="a"))
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(main())


def test_a_closed_engine_ends_its_streams(model: TwoTower) -> None:
    engine = AsyncEngine(model, EngineConfig(state_bytes=1 << 21, snapshot_bytes=0)).start()

    async def main() -> None:
        task = asyncio.create_task(last(engine.stream([5], LONG)))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineFailed):
            await task
        with pytest.raises(EngineFailed, match="does not run"):
            await last(engine.stream([5], LONG))

    assert engine.is_running
    asyncio.run(main())
    assert not engine.is_running


def test_an_error_that_ends_the_engine_reaches_every_stream(model: TwoTower, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = AsyncEngine(model, EngineConfig(state_bytes=1 << 21, snapshot_bytes=0)).start()

    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise SystemError("out of order")

    async def main() -> None:
        monkeypatch.setattr(engine._engine, "step", broken)
        for _ in range(2):
            with pytest.raises(EngineFailed):
                await last(engine.stream([5], LONG))

    asyncio.run(main())
    assert not engine.is_running
    assert isinstance(engine.failure, SystemError)
    engine.close()
    assert isinstance(engine.failure, SystemError)


def test_an_exception_in_a_round_ends_its_requests_and_no_others(
    model: TwoTower, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two texts fail in a pass of the denoiser, beside one that needs none; the log has the traceback once."""
    params = SamplingParams(max_new_tokens=8, block_size=4)
    [alone] = generate(model, [[5, 6]], params)

    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("no denoiser")

    async def main() -> None:
        other = asyncio.create_task(last(engine.stream([7], SamplingParams(mode="ar", max_new_tokens=300))))
        with monkeypatch.context() as patched:
            patched.setattr(model, "denoiser_logits", broken)
            with engine.admit(2) as admission:
                request = engine.prepare([5, 6], params)
                streams = [last(engine.stream_prepared(request, admission)) for _ in range(2)]
                failed = await asyncio.gather(*streams, return_exceptions=True)
        assert [str(error) for error in failed] == ["the engine failed on this request: RuntimeError: no denoiser"] * 2
        for error in failed:
            assert isinstance(error, RequestFailed)
            assert isinstance(error.__cause__, RuntimeError)
        assert (await last(engine.stream([5, 6], params))).token_ids == tuple(alone.token_ids[-4:])
        assert (await other).result is not None
        await idle(engine)

    asyncio.run(main())
    records = [record for record in caplog.records if record.name == "twotower.engine.aio"]
    assert sum(int(record.getMessage().split()[0]) for record in records) == 2
    assert all(record.exc_info is not None for record in records)
    assert engine.failure is None


def test_a_request_that_cannot_be_added_ends_alone(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise TypeError("no such request")

    async def main() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(engine._engine, "add_request", broken)
            with pytest.raises(RequestFailed, match="TypeError: no such request"):
                await last(engine.stream([5], LONG))
        assert (await last(engine.stream([5], SamplingParams(max_new_tokens=2)))).result is not None
        await idle(engine)

    asyncio.run(main())

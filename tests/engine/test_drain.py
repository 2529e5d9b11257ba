"""An engine that is about to be closed: what waits is refused, what runs goes on until it is abandoned."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from twotower.decoding.generate import generate
from twotower.decoding.output import StepOutput
from twotower.decoding.params import SamplingParams
from twotower.engine.aio import AsyncEngine, Draining
from twotower.engine.config import EngineConfig
from twotower.model.two_tower import TwoTower

LONG = SamplingParams(mode="ar", max_new_tokens=200)


@pytest.fixture(scope="module")
def model(tiny: Callable) -> TwoTower:
    return tiny("M*-E")


@pytest.fixture
def engine(model: TwoTower) -> Iterator[AsyncEngine]:
    made = AsyncEngine(model, EngineConfig(max_num_requests=2, state_bytes=1 << 21, snapshot_bytes=0)).start()
    yield made
    made.close()


async def last(stream: AsyncIterator[StepOutput]) -> StepOutput:
    return [output async for output in stream][-1]


async def begin(engine: AsyncEngine, count: int) -> list["asyncio.Task[StepOutput]"]:
    """Starts `count` streams, and waits until two of them run."""
    tasks = [asyncio.create_task(last(engine.stream([5, i], LONG))) for i in range(count)]
    while engine.stats().num_running < 2 or engine.num_unfinished < count:
        await asyncio.sleep(0.001)
    return tasks


def test_what_waits_is_refused_and_what_runs_is_finished(model: TwoTower, engine: AsyncEngine) -> None:
    async def main() -> list[StepOutput | BaseException]:
        tasks = await begin(engine, 4)
        engine.drain()
        with pytest.raises(Draining, match="takes no more requests"), engine.admit():
            pass
        engine.drain()
        return await asyncio.gather(*tasks, return_exceptions=True)

    ended = asyncio.run(main())
    # which two of them run first is up to the threads that prepared them
    finished = [(i, output) for i, output in enumerate(ended) if isinstance(output, StepOutput)]
    assert len(finished) == 2
    for i, output in finished:
        assert output.result is not None
        assert output.result.token_ids == generate(model, [[5, i]], LONG)[0].token_ids
    refused = [output for output in ended if isinstance(output, Draining)]
    assert len(refused) == 2
    assert all("had not begun this request" in str(error) for error in refused)
    assert engine.is_draining
    assert engine.stats().bytes_used == engine.num_unfinished == 0


def test_the_texts_of_one_answer_are_all_finished(engine: AsyncEngine) -> None:
    """Two of the five run; without the others the answer is worth nothing."""

    async def main() -> list[StepOutput | BaseException]:
        params = SamplingParams(mode="ar", max_new_tokens=20)
        with engine.admit(5) as admission:
            request = engine.prepare([5], params)
            tasks = [asyncio.create_task(last(engine.stream_prepared(request, admission))) for _ in range(5)]
            while engine.stats().num_running < 2:
                await asyncio.sleep(0.001)
            other = asyncio.create_task(last(engine.stream([5], params)))
            while engine.num_unfinished < 6:
                await asyncio.sleep(0.001)
            engine.drain()
            return await asyncio.gather(*tasks, other, return_exceptions=True)

    *ours, other = asyncio.run(main())
    assert all(isinstance(output, StepOutput) and output.result is not None for output in ours)
    assert isinstance(other, Draining)


def test_the_abandoned_end_at_once_with_the_reason(engine: AsyncEngine) -> None:
    async def main() -> list[StepOutput | BaseException]:
        tasks = await begin(engine, 3)
        engine.abandon("no time is left")
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        while engine.stats().num_running:
            await asyncio.sleep(0.001)
        # it still takes requests, for only `drain` says that it shall not
        assert (await last(engine.stream([5], SamplingParams(max_new_tokens=2)))).result is not None
        return ended

    ended = asyncio.run(main())
    assert [str(error) for error in ended] == ["no time is left"] * 3
    assert all(isinstance(error, Draining) for error in ended)
    assert engine.stats().bytes_used == 0

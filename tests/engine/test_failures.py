"""An exception in a round fails the requests that it strikes; all others get what they get alone."""

import random
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import tokenizers
import torch

import twotower.engine
from twotower.backends.choose import pack_
from twotower.decoding.generate import generate
from twotower.decoding.modes import MODES
from twotower.decoding.output import Generation
from twotower.decoding.params import SamplingParams
from twotower.decoding.record import Record
from twotower.engine import batches, intake
from twotower.engine.config import EngineConfig
from twotower.engine.engine import Engine
from twotower.engine.failures import MOST_FAILED_ROUNDS
from twotower.model.two_tower import TwoTower

FOLDER = str(Path(twotower.engine.__file__).parent)
# What ends the requests that failed is left alone: an exception there must end the engine.
RECOVERY = {"step", "_drop_failed", "drop_failed", "recount_", "forget", "fail", "failing", "of"}


class Struck(Exception):
    """What the tests raise."""


class Asked(NamedTuple):
    """A request and what it gives alone."""

    prompt: list[int]
    params: SamplingParams
    alone: Generation


@pytest.fixture(scope="module")
def model(tiny: Callable, byte_tokenizer: tokenizers.Tokenizer) -> TwoTower:
    made: TwoTower = tiny("M*-E", vocab_size=260)
    made.tokenizer = byte_tokenizer
    pack_(made)
    return made


@pytest.fixture(scope="module")
def asked(model: TwoTower) -> list[Asked]:
    """Every mode, prompts that begin alike, and more of them than run at a time."""
    stem, found = [5 + i * i % 200 for i in range(48)], []
    for i, mode in enumerate([*MODES, "auto"] * 2):
        prompt = stem[: (48, 17, 32)[i % 3]] + [7 + i] * (i % 4)
        params = SamplingParams(mode=mode, max_new_tokens=7 + i, block_size=6, temperature=float(i % 2), seed=i)
        alone = params if mode != "auto" else SamplingParams(max_new_tokens=7 + i, mode="ar", temperature=float(i % 2))
        if mode == "auto":  # its text is that of `ar` where nothing is drawn
            params = SamplingParams(mode="auto", max_new_tokens=7 + i, block_size=6, temperature=0.0)
            alone = SamplingParams(mode="ar", max_new_tokens=7 + i, temperature=0.0)
        found.append(Asked(prompt, params, generate(model, [prompt], alone)[0]))
    return found


def small_engine(model: TwoTower, *, apart: bool = False) -> Engine:
    """It has too few pages for all that may run, so that it preempts."""
    pool = Engine(model, EngineConfig(state_bytes=1 << 20, max_num_requests=5, snapshot_bytes=1 << 16))._pool
    room = 5 * pool.slot_bytes + 24 * pool.page_bytes + (1 << 16)
    return Engine(
        model,
        EngineConfig(
            state_bytes=room, max_num_requests=5, prompt_chunk=24, snapshot_bytes=1 << 16, commits_apart=apart
        ),
    )


def check_counts(e: Engine) -> None:
    """What the pool counts is what the requests and the prefix cache hold."""
    jobs, pool = e._jobs.values(), e._pool
    tables = Counter(page for job in jobs for page in job.table)
    uses = tables + Counter(e._cache.pages())
    assert pool._uses == [uses[page] for page in range(pool.num_pages)]
    assert pool._num_tables == [tables[page] for page in range(pool.num_pages)]
    assert sorted(pool._free) == [page for page in range(1, pool.num_pages) if not uses[page]]
    assert pool._num_in_tables == len(tables)
    assert pool._num_slots_used == sum(job.has_slot for job in jobs)
    snapshots = [node.snapshot for node in e._cache._nodes() if node.snapshot is not None]
    assert e._cache.bytes_of_snapshots == sum(snapshot.num_bytes for snapshot in snapshots)


def run_all(e: Engine, asked: list[Asked]) -> Counter[bool]:
    """Runs all requests and checks those that get a result; counts which did."""
    waiting = {e.add(one.prompt, one.params, request_id=str(i)): one for i, one in enumerate(asked)}
    ends: Counter[bool] = Counter()
    for _ in range(400):
        for output in e.step():
            if output.error is not None:
                if not isinstance(output.error, Struck):
                    raise AssertionError from output.error
                del waiting[output.request_id]
                ends[False] += 1
            elif output.result is not None:
                assert output.result.token_ids == waiting.pop(output.request_id).alone.token_ids
                ends[True] += 1
        check_counts(e)
        if not e.has_work:
            break
    assert not waiting
    return ends


def check_recovered(e: Engine, asked: list[Asked]) -> None:
    """After a failure all that comes is right, and nothing is held but by the cache."""
    assert run_all(e, asked) == {True: len(asked)}
    assert e.stats().cache_hit_tokens > 0
    e.clear_cache()
    assert e.stats().bytes_used == 0


def strike(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, number: int, *, after: bool) -> Callable[[], bool]:
    """Lets call `number` of a function raise, before or after it has done its work; says whether it came to that."""
    real, calls = getattr(where, name), 0

    def struck(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != number:
            return real(*args, **kwargs)
        if after:
            real(*args, **kwargs)
        raise Struck(name)

    monkeypatch.setattr(where, name, struck)
    return lambda: calls >= number


def strike_with(error: BaseException) -> Callable:
    def struck(*_: Any) -> None:
        raise error

    return struck


PLACES: dict[str, Callable[[Engine], Any]] = {
    **dict.fromkeys(("score", "keep", "denoiser_logits", "scored_logits", "absorb"), lambda e: e.model),
    **dict.fromkeys(("open", "close_", "grow_", "extend_", "copy_page_", "hold_", "drop_"), lambda e: e._pool),
    **dict.fromkeys(("match", "points", "insert", "free_pages"), lambda e: e._cache),
    "read": lambda e: batches,
    "join": lambda e: intake,
    **dict.fromkeys(("take", "leave_queue"), lambda e: Record),
    "observe": lambda e: e._chooser,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("after", [False, True])
def test_one_exception_fails_some_and_the_others_are_right(
    name: str, after: bool, model: TwoTower, asked: list[Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    struck = 0
    for number in (1, 2, 5, 11):
        e = small_engine(model, apart=number == 5)
        with monkeypatch.context() as patched:
            came_to_it = strike(patched, PLACES[name](e), name, number, after=after)
            ends = run_all(e, asked)
        assert (ends[False] > 0) == came_to_it()
        struck += came_to_it()
        check_recovered(e, asked)
    assert struck


class _Lines:
    """Raises at one line of the engine, when it is about to be run for the `number`th time; or notes all lines."""

    def __init__(self, target: tuple[str, int] | None = None, number: int = 1) -> None:
        self.target, self.left = target, number
        self.seen: Counter[tuple[str, int]] = Counter()

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        ours = frame.f_code.co_filename.startswith(FOLDER) and frame.f_code.co_name not in RECOVERY
        return self.line if ours else None

    def line(self, frame: FrameType, event: str, _: Any) -> Any:
        place = (frame.f_code.co_filename, frame.f_lineno)
        if event == "line":
            self.seen[place] += 1
            if place == self.target:
                self.left -= 1
                if self.left == 0:
                    raise Struck(place)
        return self.line


def stepping(e: Engine, lines: _Lines) -> None:
    """Traces the engine's rounds."""
    real = e._round

    def traced(outputs: list[Any]) -> int:
        sys.settrace(lines)
        try:
            return real(outputs)
        finally:
            sys.settrace(None)

    e._round = traced


@pytest.mark.slow
def test_an_exception_at_any_line_of_a_round_leaves_the_engine_right(model: TwoTower, asked: list[Asked]) -> None:
    noted = _Lines()
    for apart in (False, True):
        e = small_engine(model, apart=apart)
        stepping(e, noted)
        run_all(e, asked)
    assert len(noted.seen) > 250
    rng, failed = random.Random(0), 0
    for place in rng.sample(sorted(noted.seen), 15):
        e = small_engine(model, apart=rng.random() < 0.3)
        lines = _Lines(place, rng.randint(1, max(noted.seen[place] // 3, 1)))
        stepping(e, lines)
        failed += run_all(e, asked)[False] > 0  # maybe all that it could strike had just ended
        check_recovered(e, asked)
    assert failed > 10


def test_the_library_raises_what_struck_and_goes_on(
    model: TwoTower, asked: list[Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    e, params = small_engine(model), SamplingParams(mode="ar", max_new_tokens=5)
    with monkeypatch.context() as patched:
        strike(patched, model, "score", 1, after=False)
        with pytest.raises(Struck) as caught:
            e.generate([[5, 6, 7]] * 3, params)
    assert any(entry.name == "_absorb_chunks" for entry in caught.traceback)
    assert not e.has_work
    check_counts(e)
    [one] = e.generate([[5, 6, 7]], params)
    assert one.token_ids == generate(model, [[5, 6, 7]], params)[0].token_ids


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("not enough memory: 9")])
def test_out_of_memory_empties_the_cache_and_lets_go_of_tensors(
    error: RuntimeError, model: TwoTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    e, params = small_engine(model), SamplingParams(mode="ar", max_new_tokens=5)
    e.generate([[5] * 40], params)
    assert e.stats().bytes_used > 0
    tensors = []

    def short(*_: Any) -> None:
        large = torch.zeros(1000)
        tensors.append(weakref.ref(large))
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(model, "scored_logits", short)
        patched.setattr(model, "score", short)
        e.add([5] * 40 + [6] * 9, params)
        [output] = e.step()
    assert output.error is error
    assert [tensor() for tensor in tensors] == [None]
    assert e.stats().bytes_used == 0


def test_another_error_leaves_the_cache(model: TwoTower, monkeypatch: pytest.MonkeyPatch) -> None:
    e, params = small_engine(model), SamplingParams(mode="ar", max_new_tokens=5)
    e.generate([[5] * 40], params)
    with monkeypatch.context() as patched:
        strike(patched, model, "score", 1, after=False)
        e.add([5] * 40 + [6] * 9, params)
        [output] = e.step()
    assert isinstance(output.error, Struck)
    e.add([5] * 40 + [6] * 9, params)
    e.step()
    assert e.stats().cache_hit_tokens >= 64


@pytest.mark.parametrize("error", [SystemError, KeyboardInterrupt, SystemExit])
def test_what_ends_the_process_is_raised(
    error: type[BaseException], model: TwoTower, asked: list[Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    e = small_engine(model)
    for one in asked:
        e.add(one.prompt, one.params)

    def broken(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(model, "score", broken)
        with pytest.raises(error):
            e.step()
    failed = [output for output in e.step() if output.error is not None]
    assert failed
    assert all(isinstance(output.error, error) for output in failed)
    for name in list(e._jobs):
        e.abort(name)
    check_counts(e)


def test_a_panic_of_rust_code_is_contained(model: TwoTower, monkeypatch: pytest.MonkeyPatch) -> None:
    """llguidance and tokenizers raise them as BaseException."""

    class Panic(BaseException):
        pass

    e = small_engine(model)
    with monkeypatch.context() as patched:
        patched.setattr(Record, "take", strike_with(Panic()))
        e.add([5], SamplingParams(mode="ar"), request_id="a")
        [output] = e.step()
    assert isinstance(output.error, Panic)
    check_counts(e)


def test_an_abort_that_fails_ends_what_runs_and_not_the_engine(
    model: TwoTower, asked: list[Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    e, params = small_engine(model), SamplingParams(mode="ar", max_new_tokens=30)
    names = [e.add([5, i], params) for i in range(2)]
    e.step()
    with monkeypatch.context() as patched:
        patched.setattr(e._pool, "close_", strike_with(KeyError()))
        e.abort(names[0])
    assert {output.request_id for output in e.step() if output.error is not None} == set(names)
    check_recovered(e, asked)


def test_memory_errors_of_a_pass_are_contained_but_not_those_of_the_engine(
    model: TwoTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: Any) -> None:
        raise MemoryError

    e = small_engine(model)
    with monkeypatch.context() as patched:
        patched.setattr(model, "score", short)
        e.add([5], SamplingParams())
        [output] = e.step()
    assert isinstance(output.error, MemoryError)
    with monkeypatch.context() as patched:
        patched.setattr(e._intake, "start", short)
        e.add([5], SamplingParams())
        with pytest.raises(MemoryError):
            e.step()


def test_after_so_many_failed_rounds_with_no_step_between_the_engine_gives_up(
    model: TwoTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    e, params = small_engine(model), SamplingParams(mode="ar", max_new_tokens=3)

    def fail_rounds(count: int) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(model, "score", None)  # a TypeError
            for i in range(count):
                e.add([6, 6 + i], params)
                assert [type(output.error) for output in e.step()] == [TypeError]

    fail_rounds(MOST_FAILED_ROUNDS - 1)
    e.generate([[5]], params)
    fail_rounds(MOST_FAILED_ROUNDS - 1)
    with pytest.raises(TypeError):
        fail_rounds(1)


def test_aborts_that_fail_end_the_rest_of_the_batch(
    model: TwoTower, asked: list[Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without memory for the rows that stay, these fail in the next round."""
    e, params = small_engine(model), SamplingParams(mode="ar", max_new_tokens=30)
    names = [e.add([5, i], params) for i in range(3)]
    e.step()
    e.step()
    with monkeypatch.context() as patched:
        strike(patched, e._batches.of_mode["ar"].rows.__class__, "select", 1, after=False)
        e.abort(names[0])
    assert {output.request_id for output in e.step() if output.error is not None} == set(names[1:])
    check_recovered(e, asked)

"""Mode `auto`: what it chooses from given costs, and that a change of mode changes no token."""

import itertools
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from twotower.backends.choose import pack_
from twotower.decoding.generate import generate, stream
from twotower.decoding.params import SamplingParams
from twotower.engine import engine as engine_module
from twotower.engine.auto import AutoRow, Chooser, Cost, Yield
from twotower.engine.config import EngineConfig
from twotower.engine.engine import Engine

EXACT, LOSSY = ("ar", "verified"), ("ar", "verified", "diffusion")


def run(chooser: Chooser, rows: Sequence[AutoRow], cost: Callable[[str, int], float], gives: dict[str, int]) -> None:
    """Many rounds of a machine whose steps cost and give so much."""
    for _ in range(600):
        if chooser.due(len(rows)):
            chooser.choose(rows, {})
        for row in rows:
            row.mode = row.wanted
        for mode in {row.mode for row in rows}:
            mine = [row for row in rows if row.mode == mode]
            chooser.observe(mode, len(mine), cost(mode, len(mine)))
            for row in mine:
                row.took_step()
                chooser.observe_yield(mode, row, gives[mode], 1)


def memory_bound(mode: str, rows: int) -> float:
    return {"ar": 1.0, "verified": 2.2, "diffusion": 1.1}[mode] + 0.01 * rows


def compute_bound(mode: str, rows: int) -> float:
    return 0.1 + {"ar": 1.0, "verified": 20.0, "diffusion": 16.0}[mode] * rows


@pytest.mark.parametrize("num_rows", [1, 2, 16])
@pytest.mark.parametrize(
    ("cost", "modes", "expected"),
    [
        (memory_bound, EXACT, "verified"),
        (memory_bound, LOSSY, "diffusion"),
        (compute_bound, EXACT, "ar"),
        (compute_bound, LOSSY, "ar"),
    ],
)
def test_the_fastest_mode_wins(cost: Callable, modes: tuple[str, ...], expected: str, num_rows: int) -> None:
    chooser = Chooser()
    rows = [AutoRow(modes) for _ in range(num_rows)]
    run(chooser, rows, cost, {"ar": 1, "verified": 5, "diffusion": 4})
    assert [row.mode for row in rows] == [expected] * num_rows


def test_the_choice_turns_with_the_load() -> None:
    """A step of 16 positions is nearly free for one row, and 16 times the work for 16."""

    def cost(mode: str, rows: int) -> float:
        return max(1.0, 0.1 * rows * (1 if mode == "ar" else 16)) * (1 if mode == "ar" else 1.5)

    chooser, gives = Chooser(), {"ar": 1, "verified": 4}
    alone, crowd = [AutoRow(EXACT)], [AutoRow(EXACT) for _ in range(16)]
    run(chooser, alone, cost, gives)
    assert alone[0].mode == "verified"
    run(chooser, crowd, cost, gives)
    assert {row.mode for row in crowd} == {"ar"}
    run(chooser, alone, cost, gives)
    assert alone[0].mode == "verified"


def test_what_two_rows_cost_is_found_out_again() -> None:
    """A price learnt from steps that the machine held up, which steps of one row don't put right."""
    chooser, rows = Chooser(), [AutoRow(EXACT), AutoRow(EXACT)]
    for _ in range(20):
        chooser.observe("ar", 1, 1.0)
        chooser.observe("ar", 2, 2.5)

    def cost(mode: str, num_rows: int) -> float:
        return {"ar": 0.9 + 0.1 * num_rows, "verified": 1.2 + 1.2 * num_rows}[mode]

    for _ in range(4):
        run(chooser, rows, cost, {"ar": 1, "verified": 2})
    assert [row.mode for row in rows] == ["ar", "ar"]


def test_requests_differ_in_what_a_draft_gives_them() -> None:
    """Beside each other in one round: the one whose drafts are right verifies, the other does not."""
    chooser = Chooser()
    rows = [AutoRow(EXACT), AutoRow(EXACT)]
    for _ in range(600):
        if chooser.due(len(rows)):
            chooser.choose(rows, {})
        for row in rows:
            row.mode = row.wanted
        for mode in {row.mode for row in rows}:
            mine = [row for row in rows if row.mode == mode]
            gives = [1 if mode == "ar" else (9 if row is rows[0] else 1) for row in mine]
            chooser.observe(mode, len(mine), len(mine) * {"ar": 1.0, "verified": 3.0}[mode])
            for row, given in zip(mine, gives, strict=True):
                row.took_step()
                chooser.observe_yield(mode, row, given, 1)
    assert [row.mode for row in rows] == ["verified", "ar"]


def test_a_line_through_steps_of_several_sizes() -> None:
    cost = Cost()
    for rows in (1, 2, 8, 16, 4) * 20:
        cost.observe(rows, 3.0 + 0.5 * rows)
    assert cost.line() == pytest.approx((3.0, 0.5), rel=1e-3)


def test_a_line_through_steps_of_several_lengths_is_their_mean() -> None:
    """Throughput follows from the mean: drafts of one mode take from two to six milliseconds, and one a stall."""
    cost = Cost()
    for i in range(400):
        cost.observe(2, 2.0 if i % 2 else 6.0)
    assert cost.expected(2) == pytest.approx(4.0, rel=0.05)
    cost.observe(2, 1000.0)
    assert cost.expected(2) < 5.0


def test_the_first_step_of_many_rows_is_taken_as_it_is() -> None:
    """It is no stall: what 16 rows cost must show at once, before more steps of as many are taken."""
    cost = Cost()
    for _ in range(8):
        cost.observe(1, 2.0)
    assert cost.expected(16) == pytest.approx(2.0)  # hope, where only one row was ever seen
    cost.observe(16, 17.0)
    assert cost.expected(16) == pytest.approx(17.0, rel=0.05)


def test_what_is_hoped_comes_down_to_the_mean() -> None:
    seen = Yield(keep=0.9995)
    seen.observe(2, 1)
    assert seen.hoped() == pytest.approx(3, rel=1e-3)  # one step says little
    for tokens in (1, 2, 3, 2, 4, 0) * 50:
        seen.observe(tokens, 1)
    assert 2.0 < seen.hoped() < 2.1
    lumps = Yield(keep=0.9995)
    for steps in (10, 12, 11) * 20:
        lumps.observe(16, steps)
    assert lumps.hoped() == pytest.approx(16 / 11, rel=0.02)  # a block after 11 steps is not a rare stroke of luck


def test_requests_begin_in_what_is_best_for_their_number() -> None:
    """The last request of a lot verifies, since a step of 16 positions is nearly free for one; a new lot must not."""

    def cost(mode: str, rows: int) -> float:
        return max(1.0, 0.1 * rows * (1 if mode == "ar" else 16)) * (1 if mode == "ar" else 1.5)

    chooser = Chooser()
    for num_rows in (16, 1):
        run(chooser, [AutoRow(EXACT) for _ in range(num_rows)], cost, {"ar": 1, "verified": 4})
    for num_rows, mode in ((1, "verified"), (16, "ar")):
        rows = [AutoRow(EXACT) for _ in range(num_rows)]
        chooser.begin(rows, num_rows)
        assert {row.mode for row in rows} == {row.wanted for row in rows} == {mode}


def trials(verified: float, num_rounds: int) -> list[int]:
    """Rounds at which one of 4 requests begins to verify, which costs four times as much and gives so many tokens."""
    chooser = Chooser()
    rows = [AutoRow(EXACT) for _ in range(4)]
    tried: list[int] = []
    for i in range(num_rounds):
        if chooser.due(len(rows)):
            chooser.choose(rows, {})
        for row in rows:
            row.mode = row.wanted
        for mode in {row.mode for row in rows}:
            mine = [row for row in rows if row.mode == mode]
            if mode == "verified" and (not tried or i - tried[-1] > 50):
                tried.append(i)
            chooser.observe(mode, len(mine), 1.0 if mode == "ar" else 4.0)
            for row in mine:
                row.took_step()
                chooser.observe_yield(mode, row, 1 if mode == "ar" else verified, 1)
    return tried


def test_a_mode_that_never_pays_is_tried_less_and_less() -> None:
    between = [b - a for a, b in itertools.pairwise(trials(3.5, 20000))]
    assert len(between) >= 4
    assert all(b > 1.5 * a for a, b in itertools.pairwise(between[1:]))


def test_a_mode_is_tried_the_less_the_further_it_is_from_paying() -> None:
    near, far = (trials(tokens, 4000) for tokens in (3.5, 1.5))
    assert near[:1] == far[:1]
    assert len(far) < len(near)


def test_a_step_that_takes_far_too_long_is_reason_to_choose_at_once() -> None:
    chooser = Chooser()
    rows = [AutoRow(EXACT)]
    assert chooser.due(1)
    chooser.choose(rows, {})
    for seconds in (1.0, 1.1, 0.9):
        chooser.observe("ar", 1, seconds)
        assert not chooser.due(1)
    assert chooser.due(2)  # so is a load that has doubled
    assert not chooser.due(1)
    chooser.observe("ar", 1, 9.0)
    assert chooser.due(1)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_changing_over_changes_no_token_of_greedy_text(
    temperature: float, tiny: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modes drawn at random before every step; greedy `ar` and `verified` are one text, `diffusion` ends its block."""
    model = tiny("M*-E", vocab_size=6, seed=1)
    pack_(model)
    rng = random.Random(0)
    seen = set()

    def choose(rows: Sequence[AutoRow], others: Any) -> None:
        for row in rows:
            row.wanted = rng.choice(row.modes)
            seen.add(row.wanted)

    engine = Engine(model, EngineConfig(state_bytes=1 << 17, snapshot_bytes=1 << 14, max_num_requests=6))
    monkeypatch.setattr(engine._chooser, "choose", choose)
    monkeypatch.setattr(engine._chooser, "due", lambda num_rows: True)
    prompts = [[4, 5, i % 3, *([2] * i)] for i in range(12)]
    exact = SamplingParams(mode="auto", max_new_tokens=40, block_size=6, temperature=temperature, seed=1)
    lossy = SamplingParams(mode="auto", max_new_tokens=40, block_size=6, allow_loss=True)
    results = engine.generate(prompts * 2, [exact] * 12 + [lossy] * 12)
    assert seen == set(LOSSY)
    assert all(len(result.token_ids) == 40 for result in results)
    if temperature == 0:
        ar = generate(model, prompts, SamplingParams(mode="ar", max_new_tokens=40))
        assert [r.token_ids for r in results[:12]] == [r.token_ids for r in ar]
    engine.clear_cache()
    assert engine.stats().bytes_used == 0


def test_left_alone_it_runs_and_measures(tiny: Callable) -> None:
    model = tiny("M*-E", vocab_size=6, seed=1)
    pack_(model)
    engine = Engine(model, EngineConfig(state_bytes=1 << 18, snapshot_bytes=0))
    params = SamplingParams(mode="auto", max_new_tokens=60, allow_loss=True, block_size=4)
    assert all(len(r.token_ids) == 60 for r in engine.generate([[4], [5]], params))
    assert set(engine._chooser._costs) == set(LOSSY)


def test_one_that_begins_in_the_place_of_another_is_no_change_of_load(
    tiny: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(tiny("M*-E"), EngineConfig(max_num_requests=2))
    loads = []
    monkeypatch.setattr(engine._chooser, "due", lambda num_rows: loads.append(num_rows))
    params = [SamplingParams(mode="auto", max_new_tokens=n, ignore_eos=True) for n in (6, 9, 8, 4, 7)]
    engine.generate([[5, 6, 7]] * 5, params)
    alone = loads.index(1)
    assert set(loads[:alone]) == {2}
    assert set(loads[alone:]) == {1}
    assert alone >= 13


def test_what_prompts_take_is_no_cost_of_a_round(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is due in any mode: counted as one of every round, it would favour modes of few rounds after each prompt."""
    engine = Engine(tiny("M*-E"), EngineConfig(max_num_requests=2, snapshot_bytes=0, prompt_chunk=16))
    absorbed, beside = [0], []
    absorb, now = engine._intake.absorb, time.perf_counter

    def slowly() -> None:
        absorbed[0] += bool(engine._intake.absorbing)
        absorb()

    monkeypatch.setattr(engine._intake, "absorb", slowly)
    monkeypatch.setattr(engine_module.time, "perf_counter", lambda: now() + 1000 * absorbed[0])
    monkeypatch.setattr(engine._chooser, "observe_round", lambda num_rows, seconds: beside.append(seconds))
    params = SamplingParams(mode="auto", max_new_tokens=12, ignore_eos=True)
    engine.generate([[5, 6, 7], [5] * 60, [5, 6]], params)
    assert absorbed[0] >= 4  # also in rounds in which others take their steps
    assert len(beside) >= 12
    assert max(beside) < 500


def test_only_the_engine_takes_it(tiny: Callable) -> None:
    model, params = tiny(), SamplingParams(mode="auto")
    with pytest.raises(ValueError, match=r"mode is 'auto', must be one of ar, .*only twotower.Engine can choose"):
        generate(model, [[5]], params)
    with pytest.raises(ValueError, match=r"only twotower.Engine"):
        next(stream(model, [5], params))
    with pytest.raises(ValueError, match=r"allow_loss is True, must be False in mode '.*only mode 'auto' reads"):
        SamplingParams(allow_loss=True)


@pytest.mark.slow
def test_a_change_after_a_block_has_room_for_block_and_draft(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block that diffusion has just finished is absorbed in the round in which the first draft is verified."""
    model = tiny("M*-E", vocab_size=6, seed=1)  # drafts are often right
    greedy = SamplingParams(mode="auto", max_new_tokens=40, block_size=16, allow_loss=True)
    prompts = [[i % 6, *[(i + j) % 5 for j in range(30)]] for i in range(12)]
    engine = Engine(model, EngineConfig(snapshot_bytes=0))
    names = [engine.add(prompt, greedy) for prompt in prompts]
    tokens: dict[str, list[int]] = {}

    def begin(rows: Sequence[AutoRow], num_rows: int) -> None:
        for row in rows:
            row.mode = row.wanted = "diffusion"

    def choose(rows: Sequence[AutoRow], others: Any) -> None:
        for row in rows:
            row.wanted = "verified" if any(tokens.values()) else "diffusion"

    monkeypatch.setattr(engine._chooser, "begin", begin)
    monkeypatch.setattr(engine._chooser, "choose", choose)
    monkeypatch.setattr(engine._chooser, "due", lambda num_rows: True)
    at_change = {}
    while engine.has_work:
        for event in engine.step():
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
            at_change.setdefault(event.request_id, len(tokens[event.request_id]))
    assert set(at_change.values()) == {16}
    for name, prompt in zip(names, prompts, strict=True):
        before = prompt + tokens[name][:16]
        expected = generate(model, [before], SamplingParams(mode="ar", max_new_tokens=24))[0].token_ids
        assert tokens[name][16:] == expected

"""Mode `auto`: what it chooses from given costs, and that a change of mode changes no token."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from twotower.decoding.generate import generate, stream
from twotower.decoding.params import SamplingParams
from twotower.engine.auto import AutoRow, Chooser, Cost
from twotower.engine.config import EngineConfig
from twotower.engine.engine import Engine

EXACT, LOSSY = ("ar", "verified"), ("ar", "verified", "diffusion")


def run(chooser: Chooser, rows: Sequence[AutoRow], cost: Callable[[str, int], float], gives: dict[str, int]) -> None:
    """Many rounds of a machine whose steps cost and give so much."""
    for _ in range(150):
        chooser.choose(rows, {})
        for mode in {row.mode for row in rows}:
            mine = [row for row in rows if row.mode == mode]
            chooser.observe(mode, len(mine), cost(mode, len(mine)), gives[mode] * len(mine))
            for row in mine:
                row.took_step(gives[mode])


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
    rows = [AutoRow(modes) for _ in range(num_rows)]
    run(Chooser(), rows, cost, {"ar": 1, "verified": 5, "diffusion": 4})
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


def test_requests_differ_in_what_a_draft_gives_them() -> None:
    """Beside each other in one round: the one whose drafts are right verifies, the other does not."""
    chooser, rows = Chooser(), [AutoRow(EXACT), AutoRow(EXACT)]
    for _ in range(300):
        chooser.choose(rows, {})
        for mode in {row.mode for row in rows}:
            mine = [row for row in rows if row.mode == mode]
            gives = [1 if mode == "ar" else (9 if row is rows[0] else 1) for row in mine]
            chooser.observe(mode, len(mine), len(mine) * {"ar": 1.0, "verified": 3.0}[mode], sum(gives))
            for row, given in zip(mine, gives, strict=True):
                row.took_step(given)
    assert [row.mode for row in rows] == ["verified", "ar"]


def test_a_line_through_steps_of_several_sizes() -> None:
    cost = Cost()
    for rows in (1, 2, 8, 16, 4) * 20:
        cost.observe(rows, 3.0 + 0.5 * rows)
    assert cost.line() == pytest.approx((3.0, 0.5), rel=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_changing_over_changes_no_token_of_greedy_text(
    temperature: float, tiny: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modes drawn at random before every step; greedy `ar` and `verified` are one text, `diffusion` ends its block."""
    model = tiny("M*-E", vocab_size=6, seed=1)
    model.pack_()
    rng = random.Random(0)
    seen = set()

    def choose(rows: Sequence[AutoRow], others: Any) -> None:
        for row in rows:
            row.mode = rng.choice(row.modes)
            seen.add(row.mode)

    engine = Engine(model, EngineConfig(state_bytes=1 << 17, snapshot_bytes=1 << 14, max_num_requests=6))
    monkeypatch.setattr(engine._chooser, "choose", choose)
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
    model.pack_()
    engine = Engine(model, EngineConfig(state_bytes=1 << 18, snapshot_bytes=0))
    params = SamplingParams(mode="auto", max_new_tokens=60, allow_loss=True, block_size=4)
    assert all(len(r.token_ids) == 60 for r in engine.generate([[4], [5]], params))
    assert set(engine._chooser._costs) == set(LOSSY)


def test_only_the_engine_takes_it(tiny: Callable) -> None:
    model, params = tiny(), SamplingParams(mode="auto")
    with pytest.raises(
        ValueError, match=r"mode is 'auto', which only twotower.Engine can choose for; must be one of ar"
    ):
        generate(model, [[5]], params)
    with pytest.raises(ValueError, match=r"only twotower.Engine"):
        next(stream(model, [5], params))
    with pytest.raises(ValueError, match="allow_loss is True, which only mode 'auto' reads"):
        SamplingParams(allow_loss=True)


def test_a_change_after_a_block_has_room_for_block_and_draft(tiny: Callable) -> None:
    """The block that diffusion has just finished is absorbed in the round in which the first draft is verified."""
    model = tiny("M*-E", vocab_size=6, seed=1)  # drafts are often right
    greedy = SamplingParams(mode="auto", max_new_tokens=40, block_size=16, allow_loss=True)
    prompts = [[i % 6, *[(i + j) % 5 for j in range(30)]] for i in range(12)]
    engine = Engine(model, EngineConfig(snapshot_bytes=0))
    names, tokens = [engine.add(prompt, greedy) for prompt in prompts], {}
    engine._chooser.choose = lambda rows, others: [  # type: ignore[method-assign]
        setattr(row, "mode", "verified" if any(tokens.values()) else "diffusion") for row in rows
    ]
    for name in names:
        engine._jobs[name].auto.mode = "diffusion"
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

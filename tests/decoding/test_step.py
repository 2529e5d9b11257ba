"""What every mode's step() promises to whoever drives it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from twotower.decoding.generate import generate
from twotower.decoding.modes import MODES
from twotower.decoding.params import SamplingParams
from twotower.decoding.record import make_request
from twotower.decoding.step import RowBatch, read, step
from twotower.model.pages import PagedKeys
from twotower.model.state import ContextState
from twotower.model.two_tower import TwoTower


def paged(model: TwoTower, prompts: list[tuple[int, ...]]) -> list[ContextState]:
    """One state per prompt, keys in pages of one pool, page numbers in disorder."""
    pages = 1 + 8 * len(prompts)
    shapes = [(pages, 16, k.shape[1], k.shape[3]) for k in model.context_tower.initial_state(1).buffer.keys]
    keys = [torch.zeros(shape).transpose(1, 2) for shape in shapes]
    values = [torch.zeros(shape).transpose(1, 2) for shape in shapes]
    states = []
    for row, prompt in enumerate(prompts):
        table = list(range(pages - 1 - row, 0, -len(prompts)))
        empty = dataclasses.replace(
            model.context_tower.initial_state(1), buffer=PagedKeys(keys, values, (table,), (0,))
        )
        states.append(model.absorb(torch.tensor([prompt]), empty, with_logits=True) if prompt else empty)
    return states


def start(model: TwoTower, params: list[SamplingParams]) -> list[RowBatch]:
    steps = MODES[params[0].mode].steps
    requests = [make_request(model, [9 + i, 8, 7 + i] * (i + 1), p) for i, p in enumerate(params)]
    states = paged(model, [steps.context_ids(r) for r in requests])
    return [steps.start(model, (r,), s) for r, s in zip(requests, states, strict=True)]


@pytest.mark.parametrize("pattern", ["M*-E", "llama", "M-"])
@pytest.mark.parametrize("mode", MODES)
def test_rows_join_and_leave_at_any_step(mode: Any, pattern: str, tiny: Callable) -> None:
    """Row i comes after i rounds and goes when it has enough; each gets what it gets alone."""
    model = tiny(pattern)
    params = [
        SamplingParams(mode=mode, max_new_tokens=7 + 3 * i, block_size=4 + i, temperature=i % 2, seed=i)
        for i in range(4)
    ]
    singles = start(model, params)
    tokens: list[list[int]] = [[] for _ in params]
    members: list[int] = []
    batch: RowBatch | None = None
    with torch.inference_mode():
        while singles or batch is not None:
            if batch is not None:
                stepped = step(MODES[mode].steps, model, batch)
                for place, row in enumerate(members):
                    tokens[row] += [t.id for t in stepped.tokens[place]]
                keep = [p for p, row in enumerate(members) if len(tokens[row]) < params[row].max_new_tokens]
                batch = stepped.rows.select(keep) if keep else None
                members = [members[p] for p in keep]
            if singles:
                row = len(params) - len(singles)
                stepped = step(MODES[mode].steps, model, singles.pop(0))
                tokens[row] += [t.id for t in stepped.tokens[0]]
                batch = stepped.rows if batch is None else batch.join(stepped.rows)
                members.append(row)
    for row, p in enumerate(params):
        alone = generate(model, [[9 + row, 8, 7 + row] * (row + 1)], p)[0]
        assert tokens[row][: p.max_new_tokens] == alone.token_ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_waits_for_the_device_once(mode: Any, temperature: float, tiny: Callable, waits: list[str]) -> None:
    """Without experts: the reference op of `E` layers reads its routing back, the C kernel does not."""
    model = tiny("M*-")
    params = [
        SamplingParams(mode=mode, max_new_tokens=40, block_size=4, temperature=temperature, top_k=5, seed=i)
        for i in range(2)
    ]
    with torch.inference_mode():
        one, other = (step(MODES[mode].steps, model, rows).rows for rows in start(model, params))
        batch = one.join(other)
        for _ in range(8):
            waits.clear()
            launched = MODES[mode].steps.launch(model, batch)
            assert waits == []
            [values] = read([launched])
            assert waits == ["tolist"]
            batch = launched.finish(values).rows
            assert waits == ["tolist"]


def test_steps_of_several_modes_are_read_at_once(tiny: Callable, waits: list[str]) -> None:
    """Results of every shape come back as if each was read alone."""
    model = tiny("M*-E")
    with torch.inference_mode():
        params = [SamplingParams(mode=mode, block_size=4 + i) for i, mode in enumerate(MODES)]
        launched = [MODES[p.mode].steps.launch(model, start(model, [p])[0]) for p in params]
        expected = [one.results.tolist() for one in launched]
        waits.clear()
        assert read(launched) == expected
        assert waits == ["tolist"]

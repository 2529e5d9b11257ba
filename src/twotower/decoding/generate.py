"""The plain driver: a loop over steps of each mode, for whole batches or one stream."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from twotower.decoding.modes import MODES
from twotower.decoding.output import Generation, StepOutput
from twotower.decoding.params import SamplingParams
from twotower.decoding.prompt import Prompt, per_prompt
from twotower.decoding.record import Record, make_request, warn_about_block_size
from twotower.decoding.step import ModeSteps, Request, step
from twotower.errors import SettingError
from twotower.model.two_tower import TwoTower


def generate(
    model: TwoTower, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
) -> list[Generation]:
    """Continues every prompt, a string or a sequence of token ids, with one set of params or one per prompt.

    Rows of one mode run as a batch; each result is what the row would give alone. Raises ValueError for bad prompts
    or settings before anything runs.
    """
    chosen = per_prompt(prompts, params)
    _refuse_auto(chosen)
    requests = [make_request(model, prompt, p) for prompt, p in zip(prompts, chosen, strict=True)]
    warn_about_block_size(model, chosen)
    results: dict[str, Generation] = {}
    for mode in MODES.values():
        began = time.perf_counter()
        records = [Record(model, r, began, id=str(i)) for i, r in enumerate(requests) if r.params.mode == mode.name]
        outputs = _drive(model, mode.steps, records) if records else ()
        results |= {output.request_id: output.result for output in outputs if output.result is not None}
    return [results[str(i)] for i in range(len(prompts))]


def stream(
    model: TwoTower, prompt: Prompt, params: SamplingParams | None = None, *, every_step: bool = False
) -> Iterator[StepOutput]:
    """Continues one prompt, a string or a sequence of token ids, and yields what comes of each step.

    The joined texts are the text of `generate`, and the last output has the whole `result`. Steps that give no token
    and no text are left out, unless `every_step`: then every step has an output, whose `block` shows the block that the
    step worked on. Raises ValueError for a bad prompt or settings before anything runs.
    """
    chosen = params or SamplingParams()
    _refuse_auto([chosen])
    request = make_request(model, prompt, chosen)
    warn_about_block_size(model, [chosen])
    record = Record(model, request, time.perf_counter(), watch=every_step)
    for output in _drive(model, MODES[chosen.mode].steps, [record]):
        if every_step or output.text or output.tokens or output.result is not None:
            yield output


def _refuse_auto(params: Sequence[SamplingParams]) -> None:
    if any(p.mode == "auto" for p in params):
        raise SettingError("mode", "auto", f"one of {', '.join(MODES)}", "only twotower.Engine can choose a mode")


def _drive(model: TwoTower, steps: ModeSteps[Any], records: list[Record]) -> Iterator[StepOutput]:
    """Steps one mode's batch until every request is finished; finished ones leave the batch between steps."""
    active = [record for record in records if record.request.max_new_tokens > 0]
    yield from (record.begin() for record in records if record not in active)
    if not active:
        return
    with torch.inference_mode():
        rows = _prefill(model, steps, [record.request for record in active])
    for record in active:
        record.context_calls += 1
    while active:
        with torch.inference_mode():
            stepped = step(steps, model, rows)
            rows = stepped.rows
            outputs = [record.take(stepped, place) for place, record in enumerate(active)]
            keep = [place for place, output in enumerate(outputs) if output.result is None]
            if 0 < len(keep) < len(active):
                rows = rows.select(keep)
        active = [active[place] for place in keep]
        yield from outputs


def _prefill(model: TwoTower, steps: ModeSteps[Any], requests: list[Request]) -> Any:
    """Absorbs ragged prompts in one batch, with room for everything the rows may produce."""
    prompts = [steps.context_ids(r) for r in requests]
    lengths = [len(p) for p in prompts]
    longest = max(lengths)
    table = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        table[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.long)
    room = max(n + r.max_new_tokens + r.block_size + 1 for n, r in zip(lengths, requests, strict=True))
    planned = [r.planned_length for r in requests]
    context = model.prefill(table, lengths, capacity=room, planned=planned)
    return steps.start(model, tuple(requests), context)

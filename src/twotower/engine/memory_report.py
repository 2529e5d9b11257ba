"""What an engine's memory is for, in words and in numbers: the table at the start of a server and its line of log."""

from typing import Any, NamedTuple

from twotower.engine.memory_plan import MemoryPlan
from twotower.model.pages import PAGE_SIZE
from twotower.planning.machine import in_words


class ReportRow(NamedTuple):
    """A use of memory, what is to be said of it, and its size; "" where that is no number of bytes."""

    name: str
    detail: str
    size: str


def memory_rows(plan: MemoryPlan) -> list[ReportRow]:
    """The table, from the weights to the requests that fit."""
    places, sizes = plan.places, plan.places.sizes
    weights, context, denoiser = places.weights, places.context, places.denoiser
    number, longest = plan.max_num_requests, plan.longest(plan.max_num_requests)

    def row(name: str, detail: str, count: int) -> ReportRow:
        return ReportRow(name, detail, in_words(count))

    towers = f"context tower {in_words(weights.context)}, denoiser {in_words(weights.denoiser)}"
    rows = [row("weights", towers, weights.context + weights.denoiser)]
    rows += [row("free beside them", place.name, place.free) for place in (context, denoiser) if place is not None]
    chunk = f"at most, with chunks of {plan.prompt_chunk:,} prompt tokens"
    rows.append(row("computed on the way", chunk, plan.computed_bytes))
    if sizes.slot:
        rows.append(row("recurrent states", f"{number} of {in_words(sizes.slot)}", number * sizes.slot))
    if sizes.page:
        detail = f"{plan.num_pages * PAGE_SIZE:,} tokens of {in_words(sizes.page // PAGE_SIZE)}"
        rows.append(row("keys and values", detail, plan.num_pages * sizes.page))
    kept = f"{plan.num_snapshots:,} snapshots of {in_words(sizes.snapshot)}" if plan.num_snapshots else "off"
    rows.append(row("prefix cache", kept, plan.snapshot_bytes))
    fits = f"{number} requests of {longest:,} tokens"
    if longest < plan.max_context:
        most = plan.num_fitting(plan.max_context)
        fits += f", or {most} of {plan.max_context:,}" if most else f"; one has at most {plan.longest(1):,}"
    return [*rows, ReportRow("at a time", fits, "")]


def memory_fields(plan: MemoryPlan) -> dict[str, Any]:
    """The same as numbers by name, for JSON; sizes are bytes."""
    places, sizes = plan.places, plan.places.sizes
    found = {
        "device": places.context.name,
        "free_bytes": places.context.free,
        "context_weight_bytes": places.weights.context,
        "denoiser_weight_bytes": places.weights.denoiser,
        "computed_bytes": plan.computed_bytes,
        "recurrent_state_bytes": plan.max_num_requests * sizes.slot,
        "key_bytes": plan.num_pages * sizes.page,
        "key_tokens": plan.num_pages * PAGE_SIZE,
        "cache_bytes": plan.snapshot_bytes,
        "cache_snapshots": plan.num_snapshots,
        "state_bytes": plan.state_bytes,
        "max_num_requests": plan.max_num_requests,
        "tokens_of_each": plan.longest(plan.max_num_requests),
        "max_context": plan.max_context,
        "requests_of_max_context": plan.num_fitting(plan.max_context),
        "prompt_chunk": plan.prompt_chunk,
    }
    if places.denoiser is not None:
        found |= {"denoiser_device": places.denoiser.name, "denoiser_free_bytes": places.denoiser.free}
    return found

"""What an engine does with the memory of its devices: how much is for keys, states and the prefix cache, how many
requests run at a time, and how much of a prompt a pass takes. Known from a config alone, before anything is loaded."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch

from twotower.backends.choose import choose_backend, state_dtypes
from twotower.config import TwoTowerConfig
from twotower.engine.config import EngineConfig
from twotower.errors import SettingError
from twotower.model.pages import PAGE_SIZE
from twotower.model.two_tower import TwoTower
from twotower.planning.footprint import StateSizes, Weights, state_sizes, weights
from twotower.planning.machine import DeviceMemory, device_memory, in_words
from twotower.planning.passes import MOST_MARKED, PassMemory, pass_memory, prompt_chunk, speed_of

# The most tokens of a text where neither a setting nor the checkpoint says it.
USUAL_CONTEXT = 4096
# Keys have so many bytes if they are there: small models have room for texts beyond what they were made for.
_USUAL_KEYS = 256 << 20
# A text's blocks may be longer than the checkpoint's, and need room behind it.
_LONGEST_BLOCK = 64
# The prefix cache is not given more snapshots for each request that may run.
_SNAPSHOTS_PER_REQUEST = 32
# Small states that one pass takes for the prefix cache may take so many bytes anyway.
_FREE_MARKS = 64 << 20
# What a pass over prompts computes on the way may take one part in so many of the memory.
_PASS_PART = 4


class Places(NamedTuple):
    """Where a model's towers are: the memory of the context tower's device and, if it is another one, the denoiser's,
    both with the weights loaded; the weights' sizes; what states and passes take there."""

    context: DeviceMemory
    denoiser: DeviceMemory | None
    weights: Weights
    sizes: StateSizes
    activations: torch.dtype
    fused: bool  # see `pass_memory`


def places_of(model: TwoTower) -> Places:
    """Where a loaded model is."""
    tower, c = model.context_tower, model.config
    sizes = state_sizes(c, tower.activation_dtype, tower.key_dtype or tower.activation_dtype)
    apart = model.context_device != model.denoiser_device
    return Places(
        device_memory(model.context_device),
        device_memory(model.denoiser_device) if apart else None,
        weights(c, tower.embeddings.dtype),
        sizes,
        tower.activation_dtype,
        tower.guest is not None,
    )


def places_before_loading(
    config: TwoTowerConfig, dtype: torch.dtype, context: DeviceMemory, denoiser: DeviceMemory | None = None
) -> Places:
    """Where a model of this config, with weights of `dtype`, will be; the weights are taken from what is free."""
    own = weights(config, dtype)
    choice = choose_backend(context.kind, dtype, None, config)
    dtypes = state_dtypes(choice, context.kind, dtype, config)
    used = own.context if denoiser is not None else own.context + own.denoiser
    return Places(
        context.less(used),
        None if denoiser is None else denoiser.less(own.denoiser),
        own,
        state_sizes(config, dtypes.activations, dtypes.keys),
        dtypes.activations,
        choice.name != "reference",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What an engine's memory is for; see `EngineConfig` for the fields of the same names, all of which are known here.

    `places` and `passes` are what it follows from. `num_pages` hold the keys of all texts, PAGE_SIZE tokens each, and
    one more is padding. `warnings` say what was lowered or is useless, in sentences with numbers.
    """

    places: Places
    passes: PassMemory
    max_num_requests: int
    max_context: int
    prompt_chunk: int
    state_bytes: int
    snapshot_bytes: int
    num_pages: int
    warnings: tuple[str, ...]

    @property
    def pool_bytes(self) -> int:
        """The bytes for keys and for running requests' states."""
        return self.state_bytes - self.snapshot_bytes

    @property
    def num_snapshots(self) -> int:
        """How many ends of prompts the prefix cache has room for."""
        return self.snapshot_bytes // self.places.sizes.snapshot

    @property
    def computed_bytes(self) -> int:
        """The most that passes need on the way, with every page in use."""
        passes = self.passes
        return passes.fixed + self.prompt_chunk * passes.row + self.num_pages * PAGE_SIZE * passes.key

    def num_fitting(self, length: int) -> int:
        """How many requests of `length` tokens, prompt and answer, have room at a time."""
        pages = _pages(length + _LONGEST_BLOCK + 1)
        return min(self.max_num_requests, self.num_pages // pages if self.places.sizes.page else self.max_num_requests)

    def longest(self, num_requests: int) -> int:
        """The most tokens that each of `num_requests` requests may have at a time."""
        if not self.places.sizes.page:
            return self.max_context
        return max(min(self.num_pages // num_requests * PAGE_SIZE - _LONGEST_BLOCK - 1, self.max_context), 0)

    def most_marks(self, num_rows: int) -> int:
        """How many times a pass over so many rows may take all of their recurrent states for the prefix cache."""
        slot = self.places.sizes.slot
        return max(MOST_MARKED, _FREE_MARKS // slot if slot else 0) // num_rows or 1

    def chunk_at(self, length: int) -> int:
        """`prompt_chunk`, or less for texts that have `length` tokens already: masks and scores of a pass take no more
        than those of a step of all requests would, with every page in use."""
        if not self.passes.cell:
            return self.prompt_chunk
        room = max(self.num_pages * PAGE_SIZE * self.passes.key, self.prompt_chunk * self.passes.row)
        return min(self.prompt_chunk, max(room // (self.passes.cell * max(length, 1)), PAGE_SIZE))


def plan_memory(config: TwoTowerConfig, places: Places, limits: EngineConfig) -> MemoryPlan:
    """The plan for a model of this config. Raises SettingError or ValueError where the memory has no room for one
    request.

    By default `memory_fraction` of what is free on the context tower's device, less what passes need there, is for
    keys, states and the prefix cache; with two devices the denoiser's must have room for its copy of the keys and
    states. A quarter is for snapshots of the prefix cache, in whole ones and at least one, if there is room; then come
    the requests' states, for half as many requests while they take more than half of the rest; what is left is for
    keys. Of all this no more than the longest texts can use is taken.
    """
    wanted = limits.max_context or config.trained_positions or USUAL_CONTEXT
    number = limits.max_num_requests
    while True:
        passes = pass_memory(
            config, places.sizes, places.activations, number, device_type=places.context.kind, fused=places.fused
        )
        chunk = limits.prompt_chunk or _chunk(places, passes, limits)
        room = limits.state_bytes or _room(places, passes, chunk, limits)
        split = _split(places, passes, number, room, wanted, limits)
        if split.fits or number == 1:
            break
        number //= 2
    if split.num_pages < (places.sizes.page > 0) or room < split.state_bytes:
        _refuse(places, passes, chunk, room, limits)
    plan = MemoryPlan(
        places=places,
        passes=passes,
        max_num_requests=number,
        max_context=wanted,
        prompt_chunk=chunk,
        state_bytes=limits.state_bytes or split.state_bytes,
        snapshot_bytes=split.snapshot_bytes,
        num_pages=split.num_pages,
        warnings=(),
    )
    return dataclasses.replace(plan, warnings=tuple(_warnings(plan, limits)))


class _Split(NamedTuple):
    """How a budget is divided; `fits` says whether so many requests leave enough of it for keys."""

    state_bytes: int
    snapshot_bytes: int
    num_pages: int
    fits: bool


def _split(places: Places, passes: PassMemory, number: int, room: int, wanted: int, limits: EngineConfig) -> _Split:
    slot, page, _ = places.sizes
    snapshot = places.sizes.snapshot
    given = limits.state_bytes is not None
    if limits.snapshot_bytes is not None:
        snapshots = limits.snapshot_bytes
    else:
        some = min(room // 4 // snapshot, _SNAPSHOTS_PER_REQUEST * number)
        snapshots = snapshot * max(some, int(room >= 2 * (snapshot + slot + 2 * page)))
    rest = room - snapshots - number * slot
    # While all pages are in use, passes need memory for each of their tokens; whoever gives bytes has left that free.
    cost = page if given else page + PAGE_SIZE * passes.key
    pages = max(rest, 0) // cost - 1 if page else 0
    if places.denoiser is not None and not given:
        there = _share(places.denoiser, limits) - passes.fixed - number * slot
        pages = min(pages, max(there, 0) // cost - 1) if page else pages
    if not given:
        used = number * _pages(wanted + _LONGEST_BLOCK + 1)
        pages = min(pages, max(used, _USUAL_KEYS // page)) if page else 0
    fits = rest >= 0 if not page else pages > 0 and rest >= number * slot
    return _Split(snapshots + number * slot + (pages + 1) * page * (page > 0), snapshots, pages, fits)


def usual_fraction(kind: str) -> float:
    """The `memory_fraction` that engines take by default on a kind of device, such as "cpu"."""
    return 0.5 if kind == "cpu" else 0.9


def _share(memory: DeviceMemory, limits: EngineConfig) -> int:
    return int(memory.free * (limits.memory_fraction or usual_fraction(memory.kind)))


def _room(places: Places, passes: PassMemory, chunk: int, limits: EngineConfig) -> int:
    """Bytes for keys, states and the cache, with what passes need for each cached token."""
    return _share(places.context, limits) - passes.fixed - chunk * passes.row


def _chunk(places: Places, passes: PassMemory, limits: EngineConfig) -> int:
    """`prompt_chunk` by its cost, halved until what a pass computes takes a small part of the memory."""
    chunk = prompt_chunk(places.weights, speed_of(places.context.kind, torch.get_num_threads()))
    while chunk > PAGE_SIZE and chunk * passes.row * _PASS_PART > _share(places.context, limits):
        chunk //= 2
    return chunk


def _pages(length: int) -> int:
    return -(-length // PAGE_SIZE)


def _refuse(places: Places, passes: PassMemory, chunk: int, room: int, limits: EngineConfig) -> None:
    sizes, context = places.sizes, places.context
    least = sizes.slot + 2 * sizes.page + (limits.snapshot_bytes or 0)
    if limits.state_bytes is not None:
        rule = f"at least {least} ({in_words(least)}) for one request of this model"
        raise SettingError("state_bytes", limits.state_bytes, rule, "raise it (--state-mib)")
    if context.free < least:
        raise ValueError(
            f"{context.name} has {in_words(max(context.free, 0))} free beside weights of "
            f"{in_words(places.weights.context + places.weights.denoiser)}, and one request needs {in_words(least)}; "
            "use a device with more memory, two devices (--context-device, --denoiser-device) or a smaller dtype"
        )
    raise ValueError(
        f"{context.name} has {in_words(context.free)} free, of which passes may need "
        f"{in_words(passes.fixed + chunk * passes.row)}, and {in_words(max(room, 0))} are for states and keys; one "
        f"request needs {in_words(least)}; lower prompt_chunk (--prompt-chunk), raise memory_fraction "
        "(--memory-fraction) or set state_bytes (--state-mib)"
    )


def _warnings(plan: MemoryPlan, limits: EngineConfig) -> Iterator[str]:
    sizes, context = plan.places.sizes, plan.places.context
    if plan.max_num_requests < limits.max_num_requests:
        yield (
            f"at most {plan.max_num_requests} requests run at a time, not {limits.max_num_requests}: each needs "
            f"{in_words(sizes.slot)} for its recurrent state, and {in_words(plan.state_bytes)} are for states and keys"
        )
    if sizes.slot and 0 < plan.snapshot_bytes < sizes.snapshot:
        what = "nothing" if plan.snapshot_bytes < sizes.slot else "no ends of prompts"
        yield (
            f"snapshot_bytes is {plan.snapshot_bytes}, less than one recurrent state of {sizes.slot} bytes with logits,"
            f" so the prefix cache stores {what}; set at least {sizes.snapshot}, or 0 to turn it off"
        )
    if limits.snapshot_bytes is None and not plan.snapshot_bytes:
        yield (
            f"the prefix cache is off: of {in_words(plan.state_bytes)} for states and keys, a snapshot would take "
            f"{in_words(sizes.snapshot)}; raise state_bytes (--state-mib) or memory_fraction (--memory-fraction)"
        )
    longest = plan.longest(1)
    if longest < plan.max_context:
        yield (
            f"a text has room for {longest:,} tokens, not for {plan.max_context:,}: keys have "
            f"{in_words(plan.num_pages * sizes.page)}; raise state_bytes (--state-mib) or memory_fraction "
            "(--memory-fraction)"
        )
    most = plan.max_num_requests * plan.max_context
    if limits.prompt_chunk is not None and limits.prompt_chunk > most:
        yield (
            f"prompt_chunk is {limits.prompt_chunk}, more than the {most} tokens that all {plan.max_num_requests} "
            "requests together may have; lower it"
        )
    if limits.state_bytes is not None and limits.state_bytes > context.free:
        yield (
            f"state_bytes is {limits.state_bytes} ({in_words(limits.state_bytes)}), more than the "
            f"{in_words(context.free)} that are free on {context.name}; lower it (--state-mib)"
        )

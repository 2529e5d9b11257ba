"""Blocks that stay unfinished between two steps of vLLM, which other rows take beside them. Letters: b rows."""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import cast

from twotower.decoding import diffusion
from twotower.decoding.diffusion import DiffusionRows
from twotower.decoding.step import Request, step
from twotower.integrations.vllm.blocks import Filled
from twotower.model.state import ContextState, KeyBuffer
from twotower.model.two_tower import TwoTower


class Canvases:
    """The blocks that the denoiser has begun, by the names of their rows.

    They hold no keys and no states: each step is told of them, as the cache of the context tower has them.
    """

    def __init__(self, model: TwoTower) -> None:
        self._model = model
        self._names: list[str] = []
        self._rows: DiffusionRows | None = None

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def step(
        self,
        names: Sequence[str],
        new: Mapping[str, Request],
        context: ContextState,
        *,
        until_full: bool,
        hurried: Container[str] = (),
    ) -> dict[str, Filled]:
        """One denoising step of the blocks of these rows (b), or as many as it takes until one of them is full, and
        those that are `hurried`.

        `new` has the requests whose blocks begin, `context` the context tower's state behind each row's text. Returns
        the blocks that are full, which are then forgotten.
        """
        beginning = [place for place, name in enumerate(names) if name in new]
        if beginning:
            requests = tuple(new[names[place]] for place in beginning)
            started = diffusion.start(self._model, requests, _lengths_of(context, beginning))
            self._rows = started if self._rows is None else self._rows.join(started)
            self._names += [names[place] for place in beginning]
        assert self._rows is not None
        aside = [n for n, name in enumerate(self._names) if name not in names]
        resting = self._rows.select(aside) if aside else None
        order = [self._names.index(name) for name in names]
        rows = self._rows if order == list(range(len(self._names))) else self._rows.select(order)
        rows = diffusion.with_context(self._model, rows, context)
        places, full = list(range(len(names))), dict[str, Filled]()
        while places:
            stepped = step(diffusion, self._model, rows)
            rows = cast(DiffusionRows, stepped.rows)  # what its own step gives
            for place, tokens, calls in zip(places, stepped.tokens, rows.block.steps, strict=True):
                if tokens:
                    full[names[place]] = Filled(tokens, calls)
            going = [n for n, tokens in enumerate(stepped.tokens) if not tokens]
            places = [places[n] for n in going]
            if going and len(going) < len(stepped.tokens):
                rows = rows.select(going)
            if not any(names[place] in hurried for place in places) and (full or not until_full):
                break
        self._names = [*(names[place] for place in places), *(self._names[n] for n in aside)]
        left = diffusion.with_context(self._model, rows, _lengths_of(context, places)) if places else None
        self._rows = left.join(resting) if left and resting else left or resting
        return full

    def forget(self, names: Iterable[str]) -> None:
        """Drops the blocks of rows whose request has ended or lost its place; names of others are ignored."""
        gone = set(names)
        kept = [n for n, name in enumerate(self._names) if name not in gone]
        if len(kept) == len(self._names):
            return
        self._names = [self._names[n] for n in kept]
        self._rows = self._rows.select(kept) if kept and self._rows is not None else None


def _lengths_of(context: ContextState, rows: Iterable[int]) -> ContextState:
    """Some rows' lengths alone: such states can be joined, whatever holds the keys of the others."""
    lengths = tuple(context.lengths[row] for row in rows)
    return ContextState(lengths, (), KeyBuffer([], [], lengths), None, tuple(context.rope_lengths[row] for row in rows))

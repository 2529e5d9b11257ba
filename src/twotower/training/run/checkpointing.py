"""Saved states of a run, in the format of torch.distributed.checkpoint, written in the background.

    state/step-00000200/            a complete state: sharded tensors, their index, progress.json
    state/step-00000300.partial/    a state that is being written, or whose writing was killed

A state is renamed when it is complete, and only then is the one before it deleted, so that a kill or a full disk at any
moment leaves a complete one. A state can be read by any number of processes, whatever number wrote it. Its index is a
pickle, which can run code when it is read: resume your own runs only.
"""

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from twotower.training.run.ranks import Ranks

PROGRESS_FILE = "progress.json"

# The exceptions that reading a broken pickle may raise.
_NO_PICKLE = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
)

Tensors = Mapping[str, Mapping[str, Tensor]]


class _Pending(NamedTuple):
    """A state that is being written in the background."""

    step: int
    progress: dict[str, Any]
    future: "Future[None]"


class Checkpoints:
    """Writes the states of a run below `folder` and keeps the newest. All ranks must make the same calls."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self.ranks = folder / "state", ranks
        # A process group of its own: messages of a write in the background must not mix with those of training.
        self._group = dist.new_group(backend="gloo") if ranks.size > 1 else None
        self._pending: _Pending | None = None

    def save(self, step: int, tensors: Tensors, progress: dict[str, Any]) -> None:
        """Starts to write a state: waits for the write before it, copies the tensors and returns. `progress` is what
        `read_progress` gives back, as JSON holds it."""
        self.finish()
        partial = self._partial(step)
        if self.ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.ranks.wait()
        _ignore_single_process_warning()
        future = async_save(
            dict(tensors), checkpoint_id=partial, process_group=self._group, no_dist=self._group is None
        )
        self._pending = _Pending(step, progress, cast("Future[None]", future))

    def poll(self) -> None:
        """Renames a state that is complete; returns at once if it is still being written."""
        if self._pending is not None and self._pending.future.done():
            self.finish()

    def finish(self) -> None:
        """Waits until the last `save` is complete and renames it. Raises ValueError where it can't be written."""
        if self._pending is None:
            return
        (step, progress, future), self._pending = self._pending, None
        try:
            future.result()
        except CheckpointException as error:
            left = sorted(place.name for place in self.folder.glob("step-*") if place.suffix != ".partial")
            again = f"the state before it, {left[-1]}, is whole" if left else "there is none before it to go on from"
            raise ValueError(
                f"the state of step {step} could not be written to {self.folder} ({_causes(error)}); make room and "
                f"call again: {again}"
            ) from error
        # Rank 0 writes the index, after every rank has written its tensors, so its write ends last.
        if self.ranks.rank == 0:
            (self._partial(step) / PROGRESS_FILE).write_text(json.dumps(progress))
            whole = self.place(step)
            shutil.rmtree(whole, ignore_errors=True)  # a damaged state of the same step
            os.replace(self._partial(step), whole)
            for other in self.folder.glob("step-*"):
                if other != whole:
                    shutil.rmtree(other)

    def place(self, step: int) -> Path:
        """Where the state of a step is, or will be, when it is complete."""
        return self.folder / f"step-{step:08d}"

    def _partial(self, step: int) -> Path:
        return self.place(step).with_suffix(".partial")


def latest_state(folder: Path) -> Path | None:
    """The newest complete state of the run in `folder`, or None if it has saved none. Warns of newer ones that are
    damaged, and raises ValueError where all are."""
    damage: dict[Path, str] = {}
    for state in sorted((p for p in (folder / "state").glob("step-*") if p.suffix != ".partial"), reverse=True):
        found = _damage(state)
        if found is None:
            for other, what in damage.items():
                warnings.warn(f"{other} is damaged ({what}); going on from {state.name}", stacklevel=2)
            return state
        damage[state] = found
    if damage:
        state, found = next(iter(damage.items()))
        raise ValueError(f"{state} is damaged ({found}); restore it, or delete {state.parent} to begin again")
    return None


def _damage(state: Path) -> str | None:
    """Why a state can't be read, such as an interrupted copy or a failed disk; None if it can."""
    try:
        progress = read_progress(state)
    except (OSError, ValueError) as error:
        return f"{PROGRESS_FILE}: {error}"
    try:
        index = FileSystemReader(state).read_metadata()
    except (OSError, *_NO_PICKLE) as error:
        return f".metadata: {type(error).__name__} {error}"
    needed: dict[str, int] = {}
    for part in index.storage_data.values():
        needed[part.relative_path] = max(needed.get(part.relative_path, 0), part.offset + part.length)
    for name, size in needed.items():
        if not (state / name).exists() or (state / name).stat().st_size < size:
            return f"{name} is not whole"
    lacks = [name for name in ("step", "run") if name not in progress]
    return f"{PROGRESS_FILE} lacks {lacks}" if lacks else None


def read_progress(state: Path) -> dict[str, Any]:
    """The `progress` that a state was saved with."""
    progress: dict[str, Any] = json.loads((state / PROGRESS_FILE).read_text())
    return progress


def stored_groups(state: Path) -> set[str]:
    """The names of the groups of tensors that a state holds, such as weights and ema."""
    return {name.split(".")[0] for name in _stored(state)}


def read_tensors_(state: Path, tensors: Tensors, ranks: Ranks) -> None:
    """Copies a state's tensors, group -> name -> tensor, into the given ones, whole or sharded. Raises ValueError where
    names or shapes differ."""
    check_tensors(state, tensors)
    _ignore_single_process_warning()
    wanted_tensors = {group: dict(members) for group, members in tensors.items()}
    load(wanted_tensors, checkpoint_id=state, no_dist=ranks.size == 1)


def read_tensor(state: Path, name: str) -> Tensor:
    """One tensor of a state as a whole, by group and name, such as weights.a.b. Raises KeyError if it isn't there."""
    _ignore_single_process_warning()
    entry = FileSystemReader(state).read_metadata().state_dict_metadata[name]
    assert isinstance(entry, TensorStorageMetadata)
    wanted = {name: torch.empty(entry.size, dtype=entry.properties.dtype)}
    load(wanted, checkpoint_id=state, no_dist=True)
    return wanted[name]


def check_tensors(state: Path, tensors: Tensors) -> None:
    """Raises ValueError where names or shapes of the given groups differ from the state's. The tensors may be on the
    meta device."""
    stored = _stored(state)
    for group, members in tensors.items():
        wanted = {f"{group}.{name}": tuple(tensor.shape) for name, tensor in members.items()}
        found = {name: shape for name, shape in stored.items() if name.split(".")[0] == group}
        if wanted != found:
            raise ValueError(
                f"{state} belongs to another model or other parameters of it: {_difference(wanted, found)}; choose an "
                "empty output folder"
            )


def _stored(state: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a state's tensors."""
    entries = FileSystemReader(state).read_metadata().state_dict_metadata
    return {name: tuple(e.size) for name, e in entries.items() if isinstance(e, TensorStorageMetadata)}


def _difference(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    name = min(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    return f"{name} is {found.get(name, 'missing')} there, {wanted.get(name, 'missing')} here"


def _causes(error: CheckpointException) -> str:
    return "; ".join(sorted({f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values()}))


def _ignore_single_process_warning() -> None:
    """Turns off PyTorch's warning that a single process writes or reads. It stays off, because the background thread
    that writes would not see a temporary filter."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")

"""What happens to requests when an exception strikes in the engine: which of them fail, and what ends the engine.

The engine serves many requests, so one exception must not end it. Whatever runs code of a model, a mode, a grammar or a
tokenizer is inside of `failing`, with the requests that it runs for; these fail, and at the end of the round the engine
drops what they held and counts anew what is in use.
"""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from twotower.engine.job import Job

# After so many rounds that failed, with no step of any request done between them, the engine gives up.
MOST_FAILED_ROUNDS = 16
_NEVER_HELD = (SystemError, KeyboardInterrupt, SystemExit)
# What PyTorch's allocators say in a RuntimeError that is no torch.OutOfMemoryError.
_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")


@contextmanager
def failing(jobs: Sequence[Job]) -> Iterator[None]:
    """An exception inside fails these jobs and goes no further.

    SystemError does, because Python itself is broken then, and so do KeyboardInterrupt and SystemExit.
    """
    try:
        yield
    except _NEVER_HELD:
        raise
    # of any kind, panics of Rust code among them, which are no Exception: it must not end the engine with all requests
    except BaseException as error:
        for job in jobs:
            job.error = error


def is_final(error: BaseException) -> bool:
    """Whether an exception outside of `failing`, in the engine's own bookkeeping, must end the engine.

    Others than these end only what runs. Without memory for Python's own objects nothing there is certain.
    """
    return isinstance(error, (*_NEVER_HELD, MemoryError))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had too little memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY)


def forget_values(error: BaseException) -> None:
    """Drops the local variables of the functions in which an exception struck, so that it holds no tensors."""
    held: BaseException | None = error
    while held is not None:
        traceback.clear_frames(held.__traceback__)
        held = held.__cause__ or held.__context__

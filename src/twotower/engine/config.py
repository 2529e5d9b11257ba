"""The limits of an engine."""

import dataclasses

from twotower.errors import SettingError, check_integer
from twotower.options import check_options, option

MIB = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits of one engine, checked once. A value that is not allowed raises SettingError. What is None follows from
    the model and the machine, see `plan_memory`.

    At most `max_num_requests` requests run at a time, fewer where the memory has no room for so many; the others wait.
    `AsyncEngine` refuses a new request while `max_num_waiting` are waiting. `prompt_chunk` is how many prompt tokens,
    of all prompts together, one round absorbs besides decoding. `max_context` is the most tokens that a text will have,
    by default the checkpoint's positions: memory that such texts can't use isn't taken.

    `state_bytes` bounds the keys, values and recurrent states of all requests and of the prefix cache, by default by
    `memory_fraction` of the memory that is free beside the weights (0.9, on a CPU 0.5), from which what passes need is
    taken too. `snapshot_bytes` of it are for the recurrent states and logits in the prefix cache, by default up to a
    quarter; 0 turns the cache off. The cache's keys take only pages that no running request needs.

    With `commits_apart` the context tower absorbs finished blocks together with prompts, while the denoiser works on
    other requests, and the next block of such a request begins one round later. This saves time if the towers are on
    two devices, which then work at once, but not on one device; None chooses accordingly.
    """

    max_num_requests: int = option(16, "Most texts written at a time.", least=1, flag="--max-requests")
    max_num_waiting: int = option(
        256, "Most texts that wait; the server refuses what comes beyond.", least=0, flag="--max-waiting"
    )
    memory_fraction: float | None = option(
        None,
        "Share of the memory that is free beside the weights for the keys, values and states of all texts.",
        above=0,
        most=1,
        shown_default="0.9 of a GPU's, 0.5 of a CPU's",
    )
    state_bytes: int | None = option(
        None,
        "MiB for the keys, values and states of all texts, in the place of a share.",
        least=1,
        shown_default="by --memory-fraction",
        flag="--state-mib",
        unit=MIB,
    )
    snapshot_bytes: int | None = option(
        None,
        "MiB of these for states and logits in the prefix cache; 0 turns the cache off.",
        least=0,
        shown_default="up to a quarter",
        flag="--snapshot-mib",
        unit=MIB,
    )
    prompt_chunk: int | None = option(
        None,
        "Most prompt tokens that are read beside one step of the other texts.",
        least=1,
        shown_default="by the cost of a pass",
    )
    max_context: int | None = None
    commits_apart: bool | None = None

    def __post_init__(self) -> None:
        check_options(self)
        if self.max_context is not None:
            check_integer("max_context", self.max_context, 1)
        if self.commits_apart not in (None, True, False):
            raise SettingError(
                "commits_apart", self.commits_apart, "True, False or None", "None lets the engine choose"
            )
        if self.memory_fraction is not None and self.state_bytes is not None:
            rule = f"left out beside state_bytes, {self.state_bytes}, which says the same in bytes"
            raise SettingError("memory_fraction", self.memory_fraction, rule)
        if self.state_bytes is not None and (self.snapshot_bytes or 0) >= self.state_bytes:
            raise SettingError(
                "snapshot_bytes",
                self.snapshot_bytes,
                f"below state_bytes, {self.state_bytes}, which it is part of",
                "lower it, or 0 turns the prefix cache off",
            )

"""The limits of an engine."""

import dataclasses

from twotower.errors import SettingError, check_integer
from twotower.options import check_options, option

MIB = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits of one engine, checked once. A value that is not allowed raises SettingError.

    At most `max_num_requests` requests run at a time; the others wait. `AsyncEngine` refuses a new request while
    `max_num_waiting` are waiting. `prompt_chunk` is how many prompt tokens, of all prompts together, one round absorbs
    besides decoding.

    `state_bytes` bounds the keys, values and recurrent states of all requests and of the prefix cache; the pages for
    keys are allocated at once. `snapshot_bytes` of it are for the recurrent states and logits in the prefix cache, by
    default a quarter, but at most 32 MiB; 0 turns the cache off. The cache's keys take only pages that no running
    request needs.

    With `commits_apart` the context tower absorbs finished blocks together with prompts, while the denoiser works on
    other requests, and the next block of such a request begins one round later. This saves time if the towers are on
    two devices, which then work at once, but not on one device; None chooses accordingly.
    """

    max_num_requests: int = option(16, "Most texts written at a time.", least=1, flag="--max-requests")
    max_num_waiting: int = option(
        256, "Most texts that wait; the server refuses what comes beyond.", least=0, flag="--max-waiting"
    )
    prompt_chunk: int = 256
    state_bytes: int = option(
        256 * MIB, "MiB for the keys, values and states of all texts.", least=1, flag="--state-mib", unit=MIB
    )
    snapshot_bytes: int | None = None
    commits_apart: bool | None = None

    def __post_init__(self) -> None:
        check_options(self)
        check_integer("prompt_chunk", self.prompt_chunk, 1)
        if self.snapshot_bytes is not None:
            check_integer("snapshot_bytes", self.snapshot_bytes, 0)
        if self.commits_apart not in (None, True, False):
            raise SettingError(
                "commits_apart", self.commits_apart, "True, False or None", "None lets the engine choose"
            )
        if self.snapshot_room >= self.state_bytes:
            raise SettingError(
                "snapshot_bytes",
                self.snapshot_bytes,
                f"below state_bytes, {self.state_bytes}, which it is part of",
                "lower it, or 0 turns the prefix cache off",
            )

    @property
    def snapshot_room(self) -> int:
        """The bytes for the prefix cache's recurrent states and logits."""
        return min(self.state_bytes // 4, 32 * MIB) if self.snapshot_bytes is None else self.snapshot_bytes

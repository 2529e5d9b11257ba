"""The limits of an engine."""

import dataclasses

from twotower.errors import SettingError, check_integer

MIB = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits of one engine, checked once. A value that is not allowed raises SettingError.

    At most `max_num_requests` requests run at a time; the others wait. `AsyncEngine` refuses a new request while
    `max_num_waiting` are waiting. `prompt_chunk` is how many prompt tokens, of all prompts together, one round absorbs
    beside decoding.

    `state_bytes` bounds the keys, values and recurrent states of all requests and of the prefix cache; the pages for
    keys are allocated at once. `snapshot_bytes` of it are for the recurrent states and logits in the prefix cache; 0
    turns the cache off. The cache's keys lie in pages that no running request needs.

    With `commits_apart` the context tower absorbs finished blocks together with prompts, while the denoiser goes on
    with other requests, and the next block of such a request begins one round later. That gains time where the towers
    are on two devices, which then work at once, and nothing on one device; None chooses accordingly.
    """

    max_num_requests: int = 16
    max_num_waiting: int = 256
    prompt_chunk: int = 256
    state_bytes: int = 256 * MIB
    snapshot_bytes: int = 32 * MIB
    commits_apart: bool | None = None

    def __post_init__(self) -> None:
        least = {"max_num_requests": 1, "max_num_waiting": 0, "prompt_chunk": 1, "state_bytes": 1, "snapshot_bytes": 0}
        for name, low in least.items():
            check_integer(name, getattr(self, name), low)
        if self.commits_apart not in (None, True, False):
            raise SettingError(
                "commits_apart", self.commits_apart, "True, False or None", "None lets the engine choose"
            )
        if self.snapshot_bytes >= self.state_bytes:
            raise SettingError(
                "snapshot_bytes",
                self.snapshot_bytes,
                f"below state_bytes, {self.state_bytes}, which it is part of",
                "lower it, or 0 turns the prefix cache off",
            )

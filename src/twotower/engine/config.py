"""What an engine may use."""

import dataclasses

MIB = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits of one engine, checked once.

    `max_num_requests` run at a time, the others wait; `AsyncEngine` turns away what comes while `max_num_waiting` do.
    `prompt_chunk` is the number of prompt tokens that one round
    absorbs beside decoding, all prompts together. `state_bytes` bounds all keys, values and recurrent states,
    those of the prefix cache included; pages of keys are allocated at once. `snapshot_bytes` of them are for the prefix
    cache's recurrent states and logits, and 0 turns the cache off; its pages are those that no running request needs.
    With `commits_apart`, the context tower absorbs finished blocks beside prompts while the denoiser goes on with other
    requests, and the next block begins in the round after. None does so where the towers are on two devices, which then
    work at once; on one device it gains nothing.
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
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name} is {value!r}, must be an integer of at least {low}")
        if self.commits_apart not in (None, True, False):
            raise ValueError(f"commits_apart is {self.commits_apart!r}, must be True, False or None to choose")
        if self.snapshot_bytes >= self.state_bytes:
            raise ValueError(
                f"snapshot_bytes is {self.snapshot_bytes}, must be below state_bytes, {self.state_bytes}, which it is "
                "part of; lower it, or 0 turns the prefix cache off"
            )

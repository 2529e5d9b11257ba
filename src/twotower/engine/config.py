"""What an engine may use."""

import dataclasses

MIB = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits of one engine, checked once.

    `max_num_requests` run at a time, the others wait; `AsyncEngine` turns away what comes while `max_num_waiting` do.
    `prompt_chunk` is the number of prompt tokens that one round
    absorbs beside decoding, all prompts together. `state_bytes` bounds keys, values and recurrent states of
    everything that runs; it is allocated at once.
    """

    max_num_requests: int = 16
    max_num_waiting: int = 256
    prompt_chunk: int = 256
    state_bytes: int = 256 * MIB

    def __post_init__(self) -> None:
        for name, least in (("max_num_requests", 1), ("max_num_waiting", 0), ("prompt_chunk", 1), ("state_bytes", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}, must be an integer of at least {least}")

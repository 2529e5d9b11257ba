"""How a checkpoint wants its texts to be sampled."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What holds where a request leaves a setting out; None where the checkpoint doesn't say either. `temperature` 0 is
    greedy."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None

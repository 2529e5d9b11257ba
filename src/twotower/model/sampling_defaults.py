"""How a checkpoint wants its texts to be sampled."""

import dataclasses

# Smallest temperature above 0 and repetition penalty: logits divided by it must stay finite in float32.
LEAST_DIVISOR = 1e-6
# Largest repetition penalty, for the same reason: negative logits are multiplied by it.
MOST_REPETITION_PENALTY = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What holds where a request leaves a setting out; None where the checkpoint doesn't say either. `temperature` 0 is
    greedy, `drafter` names where mode `verified` has its drafts from."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    drafter: str | None = None

"""Settings of an attention layer that may differ from layer to layer: what its queries see, and rotary positions."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Self

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions (arXiv 2104.09864), in the words of `rope_parameters` in a Hugging Face config.json.

    A head's number pairs turn by position · θ^(-2j/n), where θ is `rope_theta` and n is `partial_rotary_factor` of the
    head's width; the rest of the head does not turn. `rope_type` says how frequencies change for texts that are longer
    than `original_max_position_embeddings`, by `factor`: `ops.rope` has the equations. `low_freq_factor` and
    `high_freq_factor` are of "llama3", `beta_fast`, `beta_slow` and `truncate` of "yarn", and `short_factor` and
    `long_factor`, one divisor for each frequency, of "longrope". Cosines and sines are multiplied by
    `attention_factor`. Unlike in Hugging Face's files no setting follows from another one.
    """

    rope_theta: float = 10000.0
    rope_type: str = "default"
    partial_rotary_factor: float = 1.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float = 1.0
    # llama3
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    # yarn
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    # longrope: one divisor per frequency
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def length_class(self, length: int) -> int:
        """The least number of tokens for which frequencies are those for texts of `length` tokens; 0 where these are
        not longer than the original length, and for frequencies that are the same for all texts."""
        if length <= self.original_max_position_embeddings:
            return 0
        return {"longrope": self.original_max_position_embeddings + 1, "dynamic": length}.get(self.rope_type, 0)

    def part(self, head_dim: int) -> int:
        """`partial_rotary_factor` of a head of width `head_dim`, the n of the frequencies."""
        return int(head_dim * self.partial_rotary_factor)

    def turned(self, head_dim: int) -> int:
        """How many numbers of a head of width `head_dim` turn: pairs, so that of an odd part one more does."""
        return 2 * -(-self.part(head_dim) // 2)

    def problems(self, head_dim: int) -> Iterator[str]:
        """One sentence for each value that is not allowed beside heads of width `head_dim`."""
        turned = self.turned(head_dim)
        if self.rope_type not in ROPE_TYPES:
            yield f"rope_type is {self.rope_type!r}, must be one of {', '.join(ROPE_TYPES)}"
        if not self.rope_theta > 0:
            yield f"rope_theta is {self.rope_theta}, must be above 0"
        if not 0 < turned <= head_dim:
            yield f"RoPE turns pairs, {turned} of head_dim {head_dim}, must be some of them and at most all"
        if self.rope_type in ("dynamic", "yarn", "llama3", "longrope") and self.original_max_position_embeddings < 1:
            yield f"original_max_position_embeddings is {self.original_max_position_embeddings}, must be at least 1"
        if not self.factor > 0:
            yield f"factor is {self.factor}, must be above 0"
        for name in ("short_factor", "long_factor"):
            if self.rope_type == "longrope" and len(getattr(self, name)) != turned // 2:
                yield f"{name} has {len(getattr(self, name))} numbers, must have {turned // 2}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionType:
    """What the queries of an attention layer see, and how positions enter.

    A query at position i sees the keys at positions above i - `window` and, of the block that it is denoised in, those
    less than `window` away on both sides; None is no limit. With `chunk` it sees only positions of its own chunk, the
    one of i // chunk. `rope_parameters` None is attention without positions.

    With a `query_growth` g that is not 0, the query is multiplied by 1 + g·ln(1 + ⌊(i + `query_offset`) /
    `query_period`⌋), so that attention over long texts stays as sharp as over short ones (arXiv 2501.19399).
    """

    window: int | None = None
    chunk: int | None = None
    rope_parameters: Rope | None = None
    query_growth: float = 0.0
    query_period: int = 0
    query_offset: int = 0

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """One from its form in config.json. Raises ValueError for an unknown key."""
        rope = raw.get("rope_parameters")
        _check_keys(cls, raw)
        if rope is None:
            return cls(**raw)
        _check_keys(Rope, rope)
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in rope.items()}
        return cls(**{**raw, "rope_parameters": Rope(**values)})

    def to_dict(self) -> dict[str, Any]:
        """Its form in config.json: what differs from the defaults."""
        found = _changed(self)
        if self.rope_parameters is not None:
            found["rope_parameters"] = _changed(self.rope_parameters)
        return found

    def problems(self, head_dim: int) -> Iterator[str]:
        """One sentence for each value that is not allowed beside heads of width `head_dim`."""
        for name in ("window", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name} is {value}, must be null or at least 1"
        if self.query_growth and self.query_period < 1:
            yield f"query_period is {self.query_period}, must be at least 1 with query_growth"
        if self.query_offset < 0:
            yield f"query_offset is {self.query_offset}, must be at least 0"
        if self.rope_parameters is not None:
            yield from self.rope_parameters.problems(head_dim)


def _check_keys(kind: type[Any], raw: Mapping[str, Any]) -> None:
    known = {f.name for f in dataclasses.fields(kind)}
    if set(raw) - known:
        raise ValueError(f"attention_types has unknown keys {sorted(set(raw) - known)}; known keys are {sorted(known)}")


def _changed(settings: "Rope | AttentionType") -> dict[str, Any]:
    pairs = ((f, getattr(settings, f.name)) for f in dataclasses.fields(settings))
    return {f.name: list(v) if isinstance(v, tuple) else v for f, v in pairs if v != f.default}

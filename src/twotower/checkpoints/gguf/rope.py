"""A GGUF file's settings of RoPE, in the words of `rope_parameters` in a Hugging Face config.json."""

import math
from typing import Any

from twotower.checkpoints.gguf.reader import GgufFile, shown
from twotower.checkpoints.gguf.tensors import values_of

FACTOR_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def rope_parameters(file: GgufFile, head_dim: int) -> dict[str, Any]:
    """The settings for heads of width `head_dim`, as llama.cpp applies them.

    A factor without a type scales linearly. Frequencies divided by a tensor, and cosines and sines multiplied by a
    factor outside of YaRN, are expressed as LongRoPE whose divisors for short and long texts are the same. Raises
    ValueError for settings that `rope_parameters` can't express.
    """
    turned = file.count("rope.dimension_count", head_dim, least=2, most=head_dim)
    found: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": file.number("rope.freq_base", 10000.0),
        "partial_rotary_factor": turned / head_dim,
    }
    if turned % 2 or found["rope_theta"] <= 0:
        raise file.wrong(*(("rope.dimension_count", "even") if turned % 2 else ("rope.freq_base", "above 0")))
    kind = file.setting("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise ValueError(f"{file.path} scales RoPE by {shown(kind)}, must be none, linear, yarn or longrope")
    if file.setting("rope.scaling.alpha"):
        raise ValueError(f"{file.path} has rope.scaling.alpha, which our towers don't compute; take another model")
    factor = file.number("rope.scaling.factor", file.number("rope.scale_linear", 0.0))
    factor = factor if factor and kind != "none" else 1.0
    attention_factor = file.number("rope.scaling.attn_factor", 1.0)
    long, short = _divisors(file, turned // 2)
    original = file.count("rope.scaling.original_context_length", file.count("context_length", 0))
    if kind == "yarn":
        if long is not None:
            raise ValueError(f"{file.path} has both YaRN and a tensor of RoPE's divisors; take another model")
        return found | {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "attention_factor": _yarn_factor(file, factor) * attention_factor,
            "beta_fast": file.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": file.number("rope.scaling.yarn_beta_slow", 1.0),
        }
    if long is not None or attention_factor != 1:
        ones = [1.0] * (turned // 2)
        return found | {
            "rope_type": "longrope",
            "long_factor": [factor * divisor for divisor in long or ones],
            "short_factor": [factor * divisor for divisor in short or long or ones],
            "original_max_position_embeddings": original,
            "attention_factor": attention_factor,
        }
    return found if factor == 1 else found | {"rope_type": "linear", "factor": factor}


def _divisors(file: GgufFile, count: int) -> tuple[list[float] | None, list[float] | None]:
    """What each frequency is divided by, for long and for short texts; None: by nothing."""
    both, long, short = (
        None if name not in file.tensors else values_of(file.tensors[name]).double().tolist() for name in FACTOR_TENSORS
    )
    if both is not None and long is not None:
        raise ValueError(f"{file.path} has both {FACTOR_TENSORS[0]} and {FACTOR_TENSORS[1]}, must have one of them")
    long, short = (both, both) if both is not None else (long or short, short or long)
    for values in (long, short):
        if values is not None and len(values) != count:
            raise ValueError(f"{file.path} has {len(values)} divisors of RoPE's frequencies, must be {count}")
        if values is not None and not all(0 < value < math.inf for value in values):
            raise ValueError(f"{file.path} has a divisor of RoPE's frequencies that is not above 0; take another file")
    return (None, None) if long == short == [1.0] * count else (long, short)


def _yarn_factor(file: GgufFile, factor: float) -> float:
    """What YaRN multiplies cosines and sines by: 0.1·ln(factor) + 1 (arXiv 2309.00071), or the quotient of two such
    factors where the file names the second (DeepSeek's mscale_all_dim)."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1

    return scale(1.0) / scale(file.number("rope.scaling.yarn_log_multiplier", 0.0))

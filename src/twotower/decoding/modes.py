"""The decoding modes: what each does, what it is good for, and what a step of it costs.

This is the only list of modes. Command line, server, evaluation and documentation read it.
"""

import dataclasses
import functools
import importlib
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from twotower.decoding.step import ModeSteps

StepMode = Literal["ar", "mock_ar", "simulated_ar", "diffusion", "verified"]
Mode = Literal[StepMode, "auto"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingMode:
    """One way to write text with two towers.

    `module` is the module of twotower.decoding that takes its steps, and `settings` are the fields of SamplingParams
    that only some modes read and this one does. `exact` says that its texts are distributed as those of `ar`.
    `fills_blocks` says that a step fixes some positions of a block, in any order; in the other modes every step gives
    new tokens. `starts_from_logits` says that its first step reads the logits after the prompt.

    A step costs one pass of the denoiser if `uses_denoiser`. The context tower has one pass per step, or in a mode that
    fills blocks one pass per finished block.
    """

    name: StepMode
    summary: str
    module: str
    settings: tuple[str, ...] = ()
    exact: bool = False
    fills_blocks: bool = False
    starts_from_logits: bool = False
    uses_denoiser: bool = True

    @functools.cached_property
    def steps(self) -> "ModeSteps[Any]":
        """The functions that take its steps; imported when first used, because they import SamplingParams."""
        return cast("ModeSteps[Any]", importlib.import_module(f"twotower.decoding.{self.module}"))


MODES: dict[str, DecodingMode] = {
    mode.name: mode
    for mode in (
        DecodingMode(
            name="ar",
            summary="The context tower alone writes one token at a time.",
            module="ar",
            exact=True,
            starts_from_logits=True,
            uses_denoiser=False,
        ),
        DecodingMode(
            name="mock_ar",
            summary="The denoiser writes one token at a time from the context tower's state, without noise.",
            module="mock_ar",
        ),
        DecodingMode(
            name="simulated_ar",
            summary="The denoiser fills a block of masks from left to right, one token per step.",
            module="diffusion",
            settings=("block_size",),
            fills_blocks=True,
        ),
        DecodingMode(
            name="diffusion",
            summary="The denoiser fills a block of masks in a few steps, the surest tokens first.",
            module="diffusion",
            settings=(
                *("block_size", "steps_per_block", "confidence_threshold", "target_retention"),
                *("commit_rule", "entropy_bound"),
            ),
            fills_blocks=True,
        ),
        DecodingMode(
            name="verified",
            summary="A drafter, such as the denoiser, drafts several tokens, and the context tower keeps those that it "
            "would have written: exactly with the C kernels, elsewhere up to rounding.",
            module="verified",
            settings=("block_size", "drafter", "adaptive_draft"),
            exact=True,
            starts_from_logits=True,
        ),
    )
}

AUTO_SUMMARY = "An engine chooses `ar` or `verified` step by step, whichever is faster; allow_loss adds `diffusion`."
# Modes that draft, and so read which drafter to use.
DRAFTING_MODES: tuple[Mode, ...] = (*(mode.name for mode in MODES.values() if "drafter" in mode.settings), "auto")
# Modes whose texts are distributed as those of `ar`.
EXACT_MODES: tuple[StepMode, ...] = tuple(mode.name for mode in MODES.values() if mode.exact)

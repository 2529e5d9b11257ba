"""Where drafts of mode `verified` come from. This is the only list of drafters: command line, server and documentation
read it."""

import dataclasses
import functools
import importlib
from typing import TYPE_CHECKING, Literal, cast

from twotower.errors import SettingError

if TYPE_CHECKING:
    from twotower.decoding.drafting.draft import Drafter

DrafterName = Literal["denoiser", "ngram", "prompt"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftSource:
    """One source of drafts. `module` is the module of twotower.decoding.drafting that proposes them; `needs_ngrams`
    says that the checkpoint must have counts of n-grams, `uses_denoiser` that a draft costs a pass of the denoiser."""

    name: DrafterName
    summary: str
    module: str
    needs_ngrams: bool = False
    uses_denoiser: bool = False

    @functools.cached_property
    def drafter(self) -> "Drafter":
        """What proposes its drafts; imported when first used, because it imports SamplingParams."""
        return cast("Drafter", importlib.import_module(f"twotower.decoding.drafting.{self.module}"))


DRAFTERS: dict[str, DraftSource] = {
    source.name: source
    for source in (
        DraftSource(
            name="denoiser",
            summary="One pass of the denoiser over a block of masks.",
            module="denoiser",
            uses_denoiser=True,
        ),
        DraftSource(
            name="ngram",
            summary="The likeliest continuation by the checkpoint's counts of n-grams.",
            module="ngram",
            needs_ngrams=True,
        ),
        DraftSource(
            name="prompt",
            summary="What followed the text's end where it stood before, in the prompt or the text (prompt lookup).",
            module="prompt_lookup",
        ),
    )
}

DRAFTER_HELP = (
    "Where the drafts of verified come from, or several with commas: the first that has one drafts. "
    + " ".join(f"{source.name}: {source.summary}" for source in DRAFTERS.values())
)


@functools.lru_cache(maxsize=256)
def draft_sources(drafter: str) -> tuple[DraftSource, ...]:
    """The sources that a setting such as "prompt,ngram" names, in its order. Raises SettingError for any other text."""
    names = [name.strip() for name in drafter.split(",")]
    if not all(name in DRAFTERS for name in names) or len(set(names)) < len(names):
        rule = f"one of {', '.join(DRAFTERS)}, or several of them, each once, with commas between them"
        raise SettingError("drafter", drafter, rule)
    return tuple(DRAFTERS[name] for name in names)

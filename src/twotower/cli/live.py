"""Watching a generation in the terminal: committed text, and the block in progress with its masks."""

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import tokenizers
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from twotower.decoding.generate import stream
from twotower.decoding.output import BlockView, StepOutput
from twotower.decoding.params import SamplingParams
from twotower.decoding.prompt import Prompt
from twotower.model.two_tower import TwoTower

# Probability that a token had when it was fixed, at least -> its colour.
_COLOURS = ((0.9, "green"), (0.6, "yellow"), (0.0, "red"))
_NEW = "bold reverse"
# The width of a usual word and its space, so that the lines hardly move when words take the masks' places.
_MASK, _ASCII_MASK = " ▒▒▒", " ___"


class Step(NamedTuple):
    """A piece of a stream with `every_step`, and the seconds it took to compute."""

    piece: StepOutput
    seconds: float


class FixedPlace(NamedTuple):
    """A fixed place of a block: its token's text, and the probability that it had when it was fixed."""

    text: str
    confidence: float


class BlockReader:
    """The places of blocks, as text."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, mask_token_id: int) -> None:
        self._tokenizer = tokenizer
        self._mask_token_id = mask_token_id
        # Some decoders drop the first space of a text: pieces are decoded after this.
        self._anchor = tokenizer.encode("a", add_special_tokens=False).ids

    def places(self, block: BlockView) -> tuple[FixedPlace | None, ...]:
        """A block's places, None where it is masked; bytes of a character are dots, control tokens have their names."""
        return tuple(
            None if token == self._mask_token_id else FixedPlace(self._shown(token), confidence)
            for token, confidence in zip(block.ids, block.confidences, strict=True)
        )

    def _shown(self, token: int) -> str:
        alone = self._tokenizer.decode(self._anchor)
        piece = self._tokenizer.decode([*self._anchor, token])[len(alone) :]
        return piece.replace("\ufffd", "·") or f" {self._tokenizer.id_to_token(token) or '·'}"


def draw_block(places: Sequence[FixedPlace | None], before: Sequence[FixedPlace | None], console: Console) -> Text:
    """A block in progress as rich text: masks, and tokens in the colours of their probabilities, those reversed that
    were masked in `before`, the same block one step earlier (empty at its first step)."""
    mask = _MASK if console.encoding.startswith("utf") else _ASCII_MASK
    out = Text()
    for i, place in enumerate(places):
        if place is None:
            out.append(mask, "dim")
            continue
        style = next(colour for least, colour in _COLOURS if place.confidence >= least)
        is_new = before[i : i + 1] in ((), (None,))
        out.append(place.text, f"{style} {_NEW}" if is_new else style)
    return out


class StoryView:
    """What one stream has written so far, as rich text."""

    def __init__(self, prompt: str, tokenizer: tokenizers.Tokenizer, mask_token_id: int, console: Console) -> None:
        self.prompt = prompt
        self.console = console
        self.reader = BlockReader(tokenizer, mask_token_id)
        self.settled = ""  # text of all blocks before the one in view
        self.newest = ""  # text that came with the last piece
        self.before: tuple[FixedPlace | None, ...] = ()
        self.places: tuple[FixedPlace | None, ...] = ()
        self.step = 0  # of the block in view, 0 without one
        self.num_tokens = 0

    def take(self, piece: StepOutput) -> None:
        """Adds the next piece of a stream with `every_step`."""
        self.settled += self.newest
        self.newest = str(piece)
        self.num_tokens += len(piece.token_ids)
        # The finished text replaces the last block: an end token or a stop string may have cut it.
        block = None if piece.result is not None else piece.block
        self.before = self.places if block is not None and block.step > 1 else ()
        self.places = () if block is None else self.reader.places(block)
        self.step = 0 if block is None else block.step

    def text(self) -> Text:
        shown = Text.assemble((self.prompt, "dim"), self.settled)
        if self.step == 0:
            return shown.append(self.newest)
        return shown.append_text(draw_block(self.places, self.before, self.console))

    def status(self) -> str:
        """Where the generation is, in a few words."""
        if self.step == 0:
            return f"{self.num_tokens} tokens"
        masked = self.places.count(None)
        return f"{self.num_tokens} tokens, step {self.step} of this block, {masked} of {len(self.places)} masked"


class TextsView:
    """What one mode has written so far of several texts, one below the other, as rich text."""

    def __init__(
        self, prompts: Sequence[str], tokenizer: tokenizers.Tokenizer, mask_token_id: int, console: Console
    ) -> None:
        self._texts = [StoryView(prompt, tokenizer, mask_token_id, console) for prompt in prompts]
        self._num_whole = 0

    @property
    def is_whole(self) -> bool:
        return self._num_whole == len(self._texts)

    @property
    def num_tokens(self) -> int:
        return sum(text.num_tokens for text in self._texts)

    def take(self, piece: StepOutput) -> None:
        """Adds the next piece of the text that is being written; the last piece of a text has its result."""
        self._texts[self._num_whole].take(piece)
        self._num_whole += piece.result is not None

    def text(self) -> Text:
        """The texts that have begun."""
        return Text("\n\n").join(text.text() for text in self._texts[: self._num_whole + 1])

    def whole(self, answers: Sequence[str]) -> Text:
        """All texts as they will be with these answers."""
        given = zip(self._texts, answers, strict=True)
        return Text("\n\n").join(Text(text.prompt + answer) for text, answer in given)


def steps(model: TwoTower, prompt: Prompt, params: SamplingParams) -> Iterator[Step]:
    """Streams one generation step by step; time that the caller spends between two steps is not counted."""
    pieces = stream(model, prompt, params, every_step=True)
    while True:
        began = time.perf_counter()
        piece = next(pieces, None)
        if piece is None:
            return
        yield Step(piece, time.perf_counter() - began)


def show(model: TwoTower, prompt: Prompt, params: SamplingParams, console: Console) -> None:
    """Draws one generation live, and leaves its whole text and its speed behind. Needs a tokenizer."""
    if model.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer.json, so there is no text to show; pass --json")
    given = prompt if isinstance(prompt, str) else model.tokenizer.decode(list(prompt))
    view = StoryView(given, model.tokenizer, model.config.mask_token_id, console)
    seconds = 0.0
    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            for step in steps(model, prompt, params):
                seconds += step.seconds
                view.take(step.piece)
                shown = tail(view.text(), console, console.width, console.height - 2)
                live.update(Group(shown, Text(view.status(), "dim")), refresh=True)
    except KeyboardInterrupt:
        console.print(view.text())
        raise
    result = step.piece.result
    assert result is not None  # the last piece of every stream has one
    console.print(view.text())
    stats = result.stats
    told = speeds(stats.num_tokens, seconds, stats.denoiser_calls, stats.context_calls)
    console.print(Text(f"{params.mode}: {told}", "dim"))


def tail(text: Text, console: Console, width: int, height: int) -> Text:
    """The last `height` lines of a text wrapped to `width`."""
    return Text("\n").join(text.wrap(console, width)[-max(height, 1) :])


def speeds(num_tokens: int, seconds: float, denoiser_calls: int, context_calls: int) -> str:
    """A generation's speed and its passes in words."""
    line = f"{num_tokens} tokens, {num_tokens / seconds:.0f} tokens/s, "
    if denoiser_calls:
        line += f"{denoiser_calls} NFE, {num_tokens / denoiser_calls:.1f} tokens per NFE, "
    passes = denoiser_calls + context_calls - 1  # without the prompt's
    return (
        line
        + f"{context_calls} context passes"
        + (f", {num_tokens / passes:.1f} tokens per pass" if passes > 0 else "")
    )

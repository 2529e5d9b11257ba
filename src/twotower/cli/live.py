"""Watching a generation in the terminal: committed text, and the block in progress with its masks."""

import time
from collections.abc import Iterator
from typing import NamedTuple

import tokenizers
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from twotower.decoding.generate import stream
from twotower.decoding.output import BlockView, Generation, StepOutput
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


class StoryView:
    """What one stream has written so far, as rich text."""

    def __init__(self, prompt: str, tokenizer: tokenizers.Tokenizer, mask_token_id: int, console: Console) -> None:
        self.prompt = prompt
        self.tokenizer = tokenizer
        self.mask_token_id = mask_token_id
        self.mask = _MASK if console.encoding.startswith("utf") else _ASCII_MASK
        # Some decoders drop the first space of a text: pieces are decoded after this.
        self.anchor = tokenizer.encode("a", add_special_tokens=False).ids
        self.settled = ""  # text of all blocks before the one in view
        self.newest = ""  # text that came with the last piece
        self.before: tuple[int, ...] = ()
        self.block: BlockView | None = None
        self.num_tokens = 0

    def take(self, piece: StepOutput) -> None:
        """Adds the next piece of a stream with `every_step`."""
        same_block = self.block is not None and piece.block is not None and piece.block.step > 1
        self.before = self.block.ids if same_block and self.block is not None else ()
        self.settled += self.newest
        self.newest = str(piece)
        self.num_tokens += len(piece.token_ids)
        # The finished text replaces the last block: an end token or a stop string may have cut it.
        self.block = None if piece.result is not None else piece.block

    def text(self) -> Text:
        out = Text.assemble((self.prompt, "dim"), self.settled)
        if self.block is None:
            return out.append(self.newest)
        for place, (token, confidence) in enumerate(zip(self.block.ids, self.block.confidences, strict=True)):
            if token == self.mask_token_id:
                out.append(self.mask, "dim")
                continue
            style = next(colour for least, colour in _COLOURS if confidence >= least)
            is_new = self.before[place : place + 1] in ((), (self.mask_token_id,))
            out.append(self._shown(token), f"{style} {_NEW}" if is_new else style)
        return out

    def status(self) -> str:
        """Where the generation is, in a few words."""
        if self.block is None:
            return f"{self.num_tokens} tokens"
        masked = self.block.ids.count(self.mask_token_id)
        return (
            f"{self.num_tokens} tokens, step {self.block.step} of this block, {masked} of {len(self.block.ids)} masked"
        )

    def _shown(self, token: int) -> str:
        """One token by itself: bytes of a character as dots, control tokens by name."""
        alone = self.tokenizer.decode(self.anchor)
        piece = self.tokenizer.decode([*self.anchor, token])[len(alone) :]
        return piece.replace("\ufffd", "·") or f" {self.tokenizer.id_to_token(token) or '·'}"


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
    console.print(Text(_speeds(result, seconds, params.mode), "dim"))


def tail(text: Text, console: Console, width: int, height: int) -> Text:
    """The last `height` lines of a text wrapped to `width`."""
    return Text("\n").join(text.wrap(console, width)[-max(height, 1) :])


def _speeds(result: Generation, seconds: float, mode: str) -> str:
    stats = result.stats
    line = f"{mode}: {stats.num_tokens} tokens, {stats.num_tokens / seconds:.0f} tokens/s, "
    if stats.denoiser_calls:
        line += f"{stats.denoiser_calls} NFE, {stats.tokens_per_denoiser_call:.1f} tokens per NFE, "
    return line + f"{stats.context_calls} context passes"

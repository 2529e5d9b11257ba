"""`twotower demo`: texts written block by block, next to the same texts written token by token."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from twotower.checkpoints.hf import SHIPPED
from twotower.cli.live import Step, TextsView, steps, tail
from twotower.cli.options import DeviceOption, DtypeOption, ModelOption, open_model
from twotower.decoding.generate import generate
from twotower.decoding.modes import Mode
from twotower.decoding.output import Generation, StepOutput
from twotower.decoding.params import SamplingParams
from twotower.eval.tasks import Example, read_task
from twotower.model.two_tower import TwoTower

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_MEASURED: tuple[Mode, ...] = ("ar", "diffusion", "verified")
_SHOWN: tuple[Mode, ...] = ("diffusion", "ar")
_TITLES: dict[Mode, str] = {"diffusion": "diffusion: most certain first", "ar": "ar: one token at a time"}
_BORDERS: dict[Mode, str] = {"diffusion": "cyan", "ar": "blue"}
_SIDE_BY_SIDE = 80  # columns of the narrowest console with two panels side by side

_QUESTIONS_MODEL = "hybrid"
# Questions that no training has seen: task, number in its file, and the lines at the prompt's end that are the question
# itself; those before it are solved examples.
_QUESTIONS = (("json", 3, 2), ("lists", 20, 1), ("json", 9, 2), ("lists", 25, 1), ("json", 17, 2))
_BEGINNING = "Once upon a time"


class Wanted(NamedTuple):
    """A text to write: its prompt, what of it is shown, its settings but for the mode, and for a question what judges
    the answer."""

    prompt: str
    shown: str
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    example: Example | None = None

    def params(self, mode: Mode, temperature: float, seed: int) -> SamplingParams:
        return SamplingParams(
            mode=mode, max_new_tokens=self.max_new_tokens, stop=self.stop, temperature=temperature, seed=seed
        )


class Run(NamedTuple):
    """One mode's texts, one after the other, step by step as they came."""

    steps: list[Step]

    @property
    def results(self) -> list[Generation]:
        """The finished texts: the last piece of every stream has one."""
        return [step.piece.result for step in self.steps if step.piece.result is not None]

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)

    @property
    def num_tokens(self) -> int:
        return sum(result.stats.num_tokens for result in self.results)

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


@app.command("demo")
def command(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="How a text begins.",
            show_default=f"{len(_QUESTIONS)} questions that {_QUESTIONS_MODEL} has not seen; with --model, "
            f"{_BEGINNING!r}",
        ),
    ] = None,
    model: ModelOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of a text, 1 or more.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 to 100; 0 writes the likeliest text.")] = 0.0,
    seed: Annotated[int, typer.Option(help="0 or more; decides the text if --temperature is above 0.")] = 0,
    seconds: Annotated[
        float, typer.Option(min=0.0, help="Seconds that the slower mode takes, 0 or more; both are slowed down alike.")
    ] = 5.0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
) -> None:
    """Write the same texts in three modes, show two of them side by side in slow motion, and compare the speeds.

    Without a prompt and a model, they are answers to questions of tasks that come along, by the model that comes along
    for such. All texts are written before they are shown, because pauses between the steps would slow the steps down.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, must be at least 1 to have a text to show")
    texts: Sequence[Wanted] = [Wanted(prompt or _BEGINNING, prompt or _BEGINNING, max_new_tokens)]
    where: str | Path | None = model
    if prompt is None and model is None:
        texts, where = questions(max_new_tokens), SHIPPED[_QUESTIONS_MODEL]
    opened = open_model(where, device=device, dtype=dtype)
    if opened.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer.json, so there is no text to show; give another --model")
    console = Console()
    runs: dict[Mode, Run] = {}
    # A spinner that turns faster would take time from the runs that are measured.
    with console.status("Warming up", refresh_per_second=2) as status:
        for mode in _MEASURED:
            _warm_up(opened, texts[0].prompt, mode)
        for mode in _MEASURED:
            status.update(f"Writing in mode {mode}")
            runs[mode] = write(opened, texts, mode, temperature, seed)
    shown = [text.shown for text in texts]
    views = {m: TextsView(shown, opened.tokenizer, opened.config.mask_token_id, console) for m in _SHOWN}
    _play(runs, views, seconds if console.is_terminal else 0.0, console)
    console.print(_table(runs, texts))
    console.print(_explanation(runs, temperature))


def questions(max_new_tokens: int) -> list[Wanted]:
    """The questions that are shown without a prompt, with answers of at most so many tokens."""
    texts = []
    for task, number, lines in _QUESTIONS:
        example = read_task(task).examples[number]
        shown = "\n".join(example.prompt.split("\n")[-lines:])
        length = min(example.max_new_tokens, max_new_tokens)
        texts.append(Wanted(example.prompt, shown, length, example.stop, example))
    return texts


def write(model: TwoTower, texts: Sequence[Wanted], mode: Mode, temperature: float, seed: int) -> Run:
    """Writes the texts one after the other."""
    return Run([step for text in texts for step in steps(model, text.prompt, text.params(mode, temperature, seed))])


def _warm_up(model: TwoTower, prompt: str, mode: Mode) -> None:
    """The first passes of each shape are slow: libraries prepare their kernels."""
    length = 2 * model.config.block_size + 2
    short = SamplingParams(mode=mode, max_new_tokens=length, ignore_eos=True, past_positions=True)
    generate(model, [prompt], short)


def _play(runs: dict[Mode, Run], views: dict[Mode, TextsView], seconds: float, console: Console) -> None:
    """Shows the recorded texts together, so that the slower mode takes `seconds`, and leaves the finished panels."""
    slowdown = seconds / max(runs[mode].seconds for mode in views)
    captions = dict.fromkeys(views, f"{slowdown:.1f} times slower than it was")
    speeds = {mode: f"{runs[mode].tokens_per_second:.0f} tokens/s" for mode in views}
    whole = [view.whole([result.text or "" for result in runs[mode].results]) for mode, view in views.items()]
    lines = max(len(text.wrap(console, _text_width(console))) for text in whole)
    room = console.height - 5 if _beside(console) else console.height // 2 - 4
    began = time.perf_counter()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for due, mode, piece in _timeline({mode: runs[mode] for mode in views}):
            left = began + due * slowdown - time.perf_counter()
            if left > 0:  # a terminal that is too slow skips frames, but the last is printed below
                live.update(_stage(views, captions, console, min(lines, room)), refresh=True)
                time.sleep(max(0.0, began + due * slowdown - time.perf_counter()))
            views[mode].take(piece)
            if views[mode].is_whole:
                captions[mode] = speeds[mode]
    console.print(_stage(views, speeds, console, lines))


def _timeline(runs: dict[Mode, Run]) -> Iterator[tuple[float, Mode, StepOutput]]:
    """Every run's pieces in the order in which they would come if all runs began together: (seconds, mode, piece)."""
    events: list[tuple[float, Mode, StepOutput]] = []
    for mode, run in runs.items():
        at = 0.0
        for step in run.steps:
            at += step.seconds
            events.append((at, mode, step.piece))
    return iter(sorted(events, key=lambda event: event[0]))


def _beside(console: Console) -> bool:
    return console.width >= _SIDE_BY_SIDE


def _text_width(console: Console) -> int:
    """Columns of text in a panel, without its borders and padding."""
    return (console.width // 2 if _beside(console) else console.width) - 4


def _stage(views: dict[Mode, TextsView], captions: dict[Mode, str], console: Console, lines: int) -> RenderableType:
    """Both panels, each with the last `lines` of its text; side by side if the console is wide enough."""
    width = _text_width(console)
    panels = [
        Panel(
            tail(view.text(), console, width, lines),
            title=_TITLES[mode],
            subtitle=captions[mode],
            width=width + 4,
            height=max(lines, 1) + 2,
            border_style=_BORDERS[mode],
        )
        for mode, view in views.items()
    ]
    if not _beside(console):
        return Group(*panels)
    grid = Table.grid()
    grid.add_row(*panels)
    return grid


def _table(runs: dict[Mode, Run], texts: Sequence[Wanted]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("mode")
    asked = [text.example for text in texts if text.example is not None]
    for name in ("tokens/s", "against ar", "forward passes", "tokens per pass", *(("right",) if asked else ())):
        table.add_column(name, justify="right")
    base = runs["ar"].tokens_per_second
    for mode, run in runs.items():
        # without the prompt's, as everywhere
        passes = sum(result.stats.denoiser_calls + result.stats.context_calls - 1 for result in run.results)
        ratio = f"{run.tokens_per_second / base:.2f}x"
        row = [
            mode,
            f"{run.tokens_per_second:.0f}",
            ratio,
            str(passes),
            f"{run.num_tokens / passes:.1f}" if passes else "",
        ]
        if asked:
            right = sum(e.score(result.text or "") for e, result in zip(asked, run.results, strict=True))
            row.append(f"{right:.0f} of {len(asked)}")
        table.add_row(*row)
    return table


def _explanation(runs: dict[Mode, Run], temperature: float) -> Text:
    text = Text.assemble(
        ("diffusion", "bold"),
        " fills 16 masked positions in a few passes, and its text may differ from that of ar.\n",
        ("verified", "bold"),
        " lets the context tower, which writes ar, check each draft and keep what it would have written itself: ",
    )
    text.append(_same_or_not(runs) if temperature == 0 else "its texts have the same distribution as those of ar.")
    return text.append('\nNext: twotower demo "The little dog", whose denoiser is less sure of itself', "dim")


def _same_or_not(runs: dict[Mode, Run]) -> str:
    ours, theirs = ([i for result in runs[mode].results for i in result.token_ids] for mode in ("verified", "ar"))
    if ours == theirs:
        return f"all {len(ours)} tokens are those of ar."
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    # A pass over a block and a pass over one token round differently.
    return f"the first {same} tokens are those of ar, then rounding decided between two almost equally likely tokens."

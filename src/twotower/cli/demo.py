"""`twotower demo`: one story written block by block, next to the same story written token by token."""

import time
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from twotower.cli.live import Step, StoryView, steps, tail
from twotower.cli.options import DeviceOption, DtypeOption, ModelOption, open_model
from twotower.decoding.generate import generate
from twotower.decoding.modes import Mode
from twotower.decoding.output import Generation, StepOutput
from twotower.decoding.params import SamplingParams
from twotower.model.two_tower import TwoTower

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_MEASURED: tuple[Mode, ...] = ("ar", "diffusion", "verified")
_SHOWN: tuple[Mode, ...] = ("diffusion", "ar")
_TITLES: dict[Mode, str] = {"diffusion": "diffusion: most certain first", "ar": "ar: one token at a time"}
_BORDERS: dict[Mode, str] = {"diffusion": "cyan", "ar": "blue"}
_SIDE_BY_SIDE = 80  # columns of the narrowest console with two panels side by side


class Run(NamedTuple):
    """One mode's story, step by step as it came."""

    steps: list[Step]

    @property
    def result(self) -> Generation:
        result = self.steps[-1].piece.result
        assert result is not None  # the last piece of every stream has one
        return result

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)

    @property
    def tokens_per_second(self) -> float:
        return self.result.stats.num_tokens / self.seconds


@app.command("demo")
def command(
    prompt: Annotated[str, typer.Argument(help="How the story begins.")] = "Once upon a time",
    model: ModelOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the story, 1 or more.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 to 100; 0 writes the likeliest story.")] = 0.0,
    seed: Annotated[int, typer.Option(help="0 or more; decides the story if --temperature is above 0.")] = 0,
    seconds: Annotated[
        float, typer.Option(min=0.0, help="Seconds that the slower story takes, 0 or more; both are slowed down alike.")
    ] = 5.0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
) -> None:
    """Write one story in three modes, show two of them side by side in slow motion, and compare the speeds.

    All stories are written before they are shown, because pauses between the steps would slow the steps down.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, must be at least 1 to have a story to show")
    settings = [
        SamplingParams(mode=mode, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        for mode in _MEASURED
    ]
    opened = open_model(model, device=device, dtype=dtype)
    if opened.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer.json, so there is no story to show; give another --model")
    console = Console()
    runs: dict[Mode, Run] = {}
    # A spinner that turns faster would take time from the runs that are measured.
    with console.status("Warming up", refresh_per_second=2) as status:
        _warm_up(opened, prompt, settings)
        for params in settings:
            status.update(f"Writing a story in mode {params.mode}")
            runs[params.mode] = Run(list(steps(opened, prompt, params)))
    views = {m: StoryView(prompt, opened.tokenizer, opened.config.mask_token_id, console) for m in _SHOWN}
    _play(runs, views, seconds if console.is_terminal else 0.0, console)
    console.print(_table(runs))
    console.print(_explanation(runs, temperature))


def _warm_up(model: TwoTower, prompt: str, settings: list[SamplingParams]) -> None:
    """The first passes of each shape are slow: libraries prepare their kernels."""
    for params in settings:
        short = SamplingParams(
            mode=params.mode, max_new_tokens=2 * model.config.block_size + 2, ignore_eos=True, past_positions=True
        )
        generate(model, [prompt], short)


def _play(runs: dict[Mode, Run], views: dict[Mode, StoryView], seconds: float, console: Console) -> None:
    """Shows the recorded stories together, so that the slower one takes `seconds`, and leaves the finished panels."""
    slowdown = seconds / max(runs[mode].seconds for mode in views)
    captions = dict.fromkeys(views, f"{slowdown:.1f} times slower than it was")
    speeds = {mode: f"{runs[mode].tokens_per_second:.0f} tokens/s" for mode in views}
    whole = [Text(view.prompt + (runs[mode].result.text or "")) for mode, view in views.items()]
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
            if piece.result is not None:
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


def _stage(views: dict[Mode, StoryView], captions: dict[Mode, str], console: Console, lines: int) -> RenderableType:
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


def _table(runs: dict[Mode, Run]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("mode")
    for name in ("tokens/s", "against ar", "forward passes", "tokens per pass"):
        table.add_column(name, justify="right")
    base = runs["ar"].tokens_per_second
    for mode, run in runs.items():
        stats = run.result.stats
        passes = stats.denoiser_calls + stats.context_calls
        ratio = f"{run.tokens_per_second / base:.2f}x"
        table.add_row(mode, f"{run.tokens_per_second:.0f}", ratio, str(passes), f"{stats.num_tokens / passes:.1f}")
    return table


def _explanation(runs: dict[Mode, Run], temperature: float) -> Text:
    text = Text.assemble(
        ("diffusion", "bold"),
        " fills 16 masked positions in a few passes, and its story may differ from that of ar.\n",
        ("verified", "bold"),
        " lets the context tower, which writes ar, check each block and keep what it would have written itself: ",
    )
    text.append(_same_or_not(runs) if temperature == 0 else "its stories have the same distribution as those of ar.")
    return text.append('\nNext: twotower generate "The little dog" --mode verified', "dim")


def _same_or_not(runs: dict[Mode, Run]) -> str:
    ours, theirs = runs["verified"].result.token_ids, runs["ar"].result.token_ids
    if ours == theirs:
        return f"all {len(ours)} tokens are those of ar."
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    # A pass over a block and a pass over one token round differently.
    return f"the first {same} tokens are those of ar, then rounding decided between two almost equally likely tokens."

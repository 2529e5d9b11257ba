"""Draws docs/demo.svg, which README and the first page show: both panels of `twotower demo` at one moment, the first
after `--at` at which about half of a block is masked.

python docs/make_picture.py [--at 0.3]
"""

import argparse
import io
from pathlib import Path

from rich.console import Console

import twotower
from twotower.cli.demo import _SHOWN, _stage, _timeline, questions, write
from twotower.cli.live import TextsView

MOST_TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", type=float, default=0.3, help="share of the slower mode's time, 0 to 1")
    arguments = parser.parse_args()
    model, texts = twotower.load("hybrid"), questions(MOST_TOKENS)
    assert model.tokenizer is not None
    console = Console(record=True, width=110, height=40, file=io.StringIO(), force_terminal=True)
    runs = {}
    for mode in _SHOWN:
        write(model, texts, mode, 0.0, 0)  # warm-up
        runs[mode] = write(model, texts, mode, 0.0, 0)
    shown = [text.shown for text in texts]
    views = {m: TextsView(shown, model.tokenizer, model.config.mask_token_id, console) for m in _SHOWN}
    earliest = arguments.at * max(run.seconds for run in runs.values())
    due = 0.0
    for due, mode, output in _timeline(runs):
        views[mode].take(output)
        if due > earliest and output.block is not None and 0.3 < output.block.t < 0.7:
            break
    captions = {mode: f"{views[mode].num_tokens} tokens after {due * 1000:.0f} ms" for mode in _SHOWN}
    console.print(_stage(views, captions, console, 12))
    console.save_svg(str(Path(__file__).with_name("demo.svg")), title="twotower demo")


if __name__ == "__main__":
    main()

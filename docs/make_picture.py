"""Draws docs/demo.svg, which README and the first page show: both stories of `twotower demo` at one moment, the first
after `--at` at which about half of a block is masked.

python docs/make_picture.py [--at 0.3]
"""

import argparse
import io
from pathlib import Path

from rich.console import Console

import twotower
from twotower.cli.demo import _SHOWN, Run, _stage, _timeline
from twotower.cli.live import StoryView, steps

PROMPT = "Tom and his dog went to the park"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", type=float, default=0.3, help="share of the slower story's time, 0 to 1")
    arguments = parser.parse_args()
    model = twotower.load()
    assert model.tokenizer is not None
    console = Console(record=True, width=110, height=40, file=io.StringIO(), force_terminal=True)
    runs = {}
    for mode in _SHOWN:
        params = twotower.SamplingParams(mode=mode, max_new_tokens=128)
        list(steps(model, PROMPT, params))  # warm-up
        runs[mode] = Run(list(steps(model, PROMPT, params)))
    views = {m: StoryView(PROMPT, model.tokenizer, model.config.mask_token_id, console) for m in _SHOWN}
    earliest = arguments.at * max(run.seconds for run in runs.values())
    due = 0.0
    for due, mode, output in _timeline(runs):
        views[mode].take(output)
        if due > earliest and output.block is not None and 0.3 < output.block.t < 0.7:
            break
    captions = {mode: f"{views[mode].num_tokens} tokens after {due:.2f} s" for mode in _SHOWN}
    console.print(_stage(views, captions, console, 12))
    console.save_svg(str(Path(__file__).with_name("demo.svg")), title=f'twotower demo "{PROMPT}"')


if __name__ == "__main__":
    main()

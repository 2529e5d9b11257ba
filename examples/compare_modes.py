"""Compare the decoding modes on your own prompts: how much of `ar`'s text each keeps, how fast it is, what it costs.

    python examples/compare_modes.py --prompts prompts.txt

The file has one prompt per line. On the small hybrid model that comes with the package `diffusion` is about twice as
fast as `ar`; on the stories model, whose denoiser was trained less, it is slower: try --model stories.
"""

import argparse
import statistics
from pathlib import Path

import twotower

# The hybrid model was trained on lists, JSON and one-word answers; it learns the task from one example in the prompt.
EXAMPLE = 'Text: Tom is 30 years old and lives in Berlin.\nJSON: {"name": "Tom", "age": 30, "city": "Berlin"}\n'
PROMPTS = [
    "reverse: glass moon bird -> bird moon glass\nreverse: red green fish ->",
    "copy: glass moon bird -> glass moon bird\ncopy: salt red north glass moon ->",
    EXAMPLE + "Text: Finn is 11 years old and lives in Lima.\nJSON:",
    EXAMPLE + "Text: Sue is 41 years old and lives in Madrid.\nJSON:",
]
STOP = ("\n",)
MODES = {
    "ar": twotower.SamplingParams(mode="ar", stop=STOP),
    "verified": twotower.SamplingParams(mode="verified", stop=STOP),  # always ar's text
    "diffusion, γ 0.95": twotower.SamplingParams(mode="diffusion", stop=STOP, confidence_threshold=0.95),
    "diffusion, γ 0.6": twotower.SamplingParams(mode="diffusion", stop=STOP, confidence_threshold=0.6),
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="hybrid", help="a checkpoint's folder or hub id, or stories or hybrid")
parser.add_argument("--prompts", type=Path, help="a file with one prompt per line")
parser.add_argument("--repeats", type=int, default=5, help="how often each mode is timed")
options = parser.parse_args()

model = twotower.load(options.model)
prompts = options.prompts.read_text().splitlines() if options.prompts else PROMPTS
twotower.generate(model, prompts[:1])  # the first call compiles and warms up
texts: dict[str, list[str | None]] = {}
speeds: dict[str, list[float]] = {mode: [] for mode in MODES}
cost: dict[str, float] = {}
for _ in range(options.repeats):  # modes take turns, so that a slow minute hits all of them
    for mode, params in MODES.items():
        results = [twotower.generate(model, [prompt], params)[0] for prompt in prompts]
        tokens = sum(r.stats.num_tokens for r in results)
        speeds[mode].append(tokens / sum(r.stats.seconds_total for r in results))
        texts[mode] = [r.text for r in results]
        cost[mode] = sum(r.stats.denoiser_calls + r.stats.context_calls for r in results) / tokens

print(f"{'mode':20}  same text as ar   tokens/s  calls per token")
for mode in MODES:
    same = sum(a == b for a, b in zip(texts[mode], texts["ar"], strict=True))
    print(f"{mode:20} {same:5} of {len(prompts):3} {statistics.median(speeds[mode]):14.0f} {cost[mode]:12.2f}")

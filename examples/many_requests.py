"""Run many requests at once through an engine, each with its own mode and settings.

    python examples/many_requests.py

Requests join and leave between steps, so short ones need not wait for long ones. Each result is what the request would
give alone.
"""

import argparse

import twotower

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--tokens", type=int, default=48, help="how many new tokens each request writes at most")
options = parser.parse_args()

STARTS = ["Once upon a time", "The little dog", "Lily and Ben", "It was a sunny day", "The old tree", "A brave knight"]
MODES = [
    twotower.SamplingParams(mode="ar", max_new_tokens=options.tokens),
    twotower.SamplingParams(mode="verified", max_new_tokens=options.tokens, temperature=0.8, seed=1),
    twotower.SamplingParams(mode="diffusion", max_new_tokens=options.tokens, confidence_threshold=0.7),
    # the engine chooses between ar and verified at each step, by what they cost at the present load
    twotower.SamplingParams(mode="auto", max_new_tokens=options.tokens, stop=(".",)),
]

model = twotower.load("stories")
# All keys and recurrent states together stay below state_bytes; requests beyond max_num_requests wait.
engine = twotower.Engine(model, twotower.EngineConfig(max_num_requests=4, state_bytes=64 << 20))
for number, start in enumerate(STARTS):
    engine.add(start, MODES[number % len(MODES)], request_id=f"{number}")

while engine.has_work:
    for output in engine.step():  # what this round gave, one output per request that got something
        if output.result is not None:
            number = int(output.request_id)
            mode, text = MODES[number % len(MODES)].mode, STARTS[number] + (output.result.text or "")
            print(f"[{mode}, waited {output.seconds_queued:.2f} s] {' '.join(text.split())}")

stats = engine.stats()
print(f"\n{stats.num_rounds} rounds, {stats.context_calls} context calls, {stats.denoiser_calls} denoiser calls")

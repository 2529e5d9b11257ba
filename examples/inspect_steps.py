"""See what a mode did: when each token was fixed, how sure the model was, and what the text cost.

python examples/inspect_steps.py "Once upon a time" --mode diffusion
"""

import argparse

import twotower

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt", nargs="?", default="Once upon a time")
parser.add_argument("--mode", default="diffusion", choices=("ar", "diffusion", "verified", "simulated_ar"))
parser.add_argument("--tokens", type=int, default=32, help="how many new tokens to write at most")
options = parser.parse_args()

model = twotower.load("stories")
assert model.tokenizer is not None
params = twotower.SamplingParams(mode=options.mode, max_new_tokens=options.tokens)
[result] = twotower.generate(model, [options.prompt], params)

print(f"{'token':>14}  step  probability")
for token, step, confidence in zip(result.token_ids, result.commit_steps, result.confidences, strict=True):
    bar = "█" * round(20 * confidence)
    print(f"{model.tokenizer.id_to_token(token)!r:>14} {step:5}  {confidence:4.2f} {bar}")

stats = result.stats
print(f"\nended by {result.finish_reason!r} after {stats.num_tokens} tokens")
print(f"{stats.context_calls} context calls, the prompt's among them, and {stats.denoiser_calls} denoiser calls")
if stats.denoiser_calls:  # mode ar has none
    print(f"{stats.tokens_per_denoiser_call:.2f} tokens per denoiser call")
print(f"{stats.seconds_to_first_token:.3f} s to the first token, {stats.seconds_total:.3f} s in all")

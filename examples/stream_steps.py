"""Watch a story being written: each line is the block after one step of the denoiser.

    python examples/stream_steps.py "Once upon a time"

A dot is a position that is still masked. Tokens appear where the denoiser is sure of them, not from left to right.
"""

import argparse

import twotower

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt", nargs="?", default="Once upon a time")
parser.add_argument("--tokens", type=int, default=48, help="how many new tokens to write at most")
options = parser.parse_args()

model = twotower.load("stories")
params = twotower.SamplingParams(mode="diffusion", max_new_tokens=options.tokens, confidence_threshold=0.8)


def drawn(block: twotower.BlockView) -> str:
    """The block's tokens side by side, with dots for masks."""
    assert model.tokenizer is not None
    drawing = ""
    for token in block.ids:
        piece = model.tokenizer.id_to_token(token)
        drawing += " ·" if token == model.config.mask_token_id else str(piece).replace("▁", " ")
    return drawing


# Without every_step=True the stream gives only the steps at which text became certain.
for output in twotower.stream(model, options.prompt, params, every_step=True):
    if output.block is not None:
        print(f"step {output.block.step:2}  {output.block.t:4.0%} masked  {drawn(output.block)!r}")
    if output.result is not None:
        stats = output.result.stats
        print(f"\n{options.prompt}{output.result.text}")
        print(f"\n{stats.num_tokens} tokens in {stats.denoiser_calls} calls of the denoiser")

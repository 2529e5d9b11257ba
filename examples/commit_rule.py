"""Decode with a commit rule of your own, from the three calls that decoding is made of: prefill, denoise and extend.

    python examples/commit_rule.py

The rule here fixes the longest run of sure tokens at the left end of the block, so that text grows from left to right
but several tokens at a time. Change `commit` to try another.
"""

import argparse

import torch
from torch import Tensor

import twotower

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--blocks", type=int, default=4, help="how many blocks of 16 tokens to write")
options = parser.parse_args()

model = twotower.load("stories")
assert model.tokenizer is not None
mask = model.config.mask_token_id


def commit(confidence: Tensor, masked: Tensor) -> Tensor:
    """Which masked positions (s,) bool to fix now, given the probability (s,) of the likeliest token at each."""
    sure = (confidence > 0.6) | ~masked
    run = sure.cumprod(0).bool()  # true up to the first position that is not sure
    run[masked.int().argmax()] = True  # always the leftmost mask, or decoding might not end
    return run & masked


prompt = "Once upon a time"
ids = model.tokenizer.encode(prompt).ids
state = model.prefill([ids])  # the context tower reads the prompt: keys, values and recurrent states
calls = 0
for _ in range(options.blocks):
    block = torch.full((model.config.block_size,), mask)  # (s,)
    while (masked := block == mask).any():
        logits = model.denoise(block[None], state)[0]  # (s, v); the state is only read
        calls += 1
        logits[:, mask] = -torch.inf  # a mask is not an answer
        confidence, best = logits.softmax(-1).max(-1)
        block = torch.where(commit(confidence, masked), best, block)
    state = model.extend(block[None], state)  # the context tower absorbs the finished block
    ids += block.tolist()
print(model.tokenizer.decode(ids))
print(f"\n{options.blocks * model.config.block_size} tokens in {calls} calls of the denoiser")

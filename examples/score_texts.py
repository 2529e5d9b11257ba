"""Score texts: how likely the context tower finds each, and where it would have gone on otherwise.

    python examples/score_texts.py

Only the autoregressive context tower runs: it is the model that the modes `ar` and `verified` write as.
"""

import math

import twotower

PROMPT = "Once upon a time, there was a little girl named"
TEXTS = ["Lily. She loved to play outside.", "Lily. She outside play to loved.", "Xerxes. He taxed the provinces."]

model = twotower.load("stories")
assert model.tokenizer is not None
scores = twotower.score(model, TEXTS, [PROMPT] * len(TEXTS), num_top=1)

for text, scored in zip(TEXTS, scores, strict=True):
    per_token = scored.total / len(scored.token_ids)  # natural logarithms
    print(f"\n{text!r}: log-probability {scored.total:.1f}, perplexity {math.exp(-per_token):.1f}")
    for token, logprob, top in zip(scored.token_ids, scored.logprobs, scored.top, strict=True):
        [(likeliest, best)] = top
        if best - logprob > 3:  # the likeliest token was over twenty times as likely
            print(
                f"    {model.tokenizer.id_to_token(token)!r} {math.exp(logprob):.2%}, "
                f"rather {model.tokenizer.id_to_token(likeliest)!r} {math.exp(best):.0%}"
            )

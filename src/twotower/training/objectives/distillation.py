"""The loss `distillation`: KL(p ‖ q) from the context tower's distribution p of a token to the denoiser's.

    Σ_v p(v | x0 before i) · log(p(v | x0 before i) / q(v | known places))

p knows all clean tokens before place i, also those of its own block that the denoiser doesn't see. Its mean over these
is what q should be, so p teaches the same as the token itself with less noise, but only where q knows nothing that p
doesn't. Two things break that, and are left out:

- places with a known one behind them in their block: p is unsure of what a look ahead settles, and so would q be;
- places behind a text's end, which fill its last block: a backbone has seen no such text.

With them the loss tripled the passes of decoding by confidence: behind the ends of the hybrid's answers, half of all
masked places, its context tower gives the right token a probability of 0.001.

Letters: b batch, v views, t tokens, m positions, o vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor

from twotower.training.masks.noise import Corrupted
from twotower.training.masks.places import after_end, known_behind


def divergence(log_q: Tensor, log_p: Tensor, mask_token_id: int) -> Tensor:
    """(m,): KL(p ‖ q) in nats of log-probabilities (m, o)."""
    found = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    # 0 · (log 0 − log 0) is nan; the gradient, which is 0, passes autograd by as it does in `Head`
    found.detach().select(-1, mask_token_id).zero_()
    return found.sum(-1)


def taught(x0: Tensor, noisy: Corrupted, eos_token_ids: tuple[int, ...]) -> Tensor:
    """(v·b, t) bool: the masked places where the context tower has a distribution and knows no less than the denoiser.
    A document's first token has nothing before it."""
    views, place = len(noisy.masked) // len(x0), noisy.layout.position
    ended = after_end(x0, noisy.layout, noisy.scored, eos_token_ids) | (place == 0)
    return noisy.masked & ~known_behind(noisy) & ~ended.expand_as(x0).repeat(views, 1)

"""The loss `certainty`: the denoiser learns to be sure where it is right (dParallel, arXiv 2509.26488).

    H(softmax(log q / T)) where argmax q = x0, else 0        T = 0.5, as published

The cross-entropy makes q as wide as what the known places leave open, so that a decoder with a threshold waits. This
makes it narrower, but only where waiting would gain nothing. The published form divides by the number of right places,
which changes with the weights; here the step's usual denominator divides, so that the gradient does not depend on how a
step is cut.

Letters: m positions, o vocabulary.
"""

import torch
from torch import Tensor

TEMPERATURE = 0.5


def certainty(log_q: Tensor, targets: Tensor, mask_token_id: int) -> Tensor:
    """(m,): the entropy of log_q (m, o) at half of its temperature, in nats, where its likeliest token is the target
    (m,) int64; 0 elsewhere."""
    sharp = log_q / TEMPERATURE
    # 0 · −∞ is nan: the mask token's probability is 0, and any finite number does in its place
    finite = sharp.index_fill(-1, torch.tensor(mask_token_id, device=sharp.device), 0.0)
    entropy = sharp.logsumexp(-1) - (sharp.softmax(-1) * finite).sum(-1)
    return entropy * (log_q.argmax(-1) == targets)

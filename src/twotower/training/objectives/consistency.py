"""The loss `consistency`: what the denoiser says of a place early in decoding should be what it says of it later.

    KL(q(· | xs) ‖ q(· | xt)) at places that both hide, where xs is a later state of the same block: xt with more known

After CDLM's consistency along a decoding trajectory and Multi-Path Discrete Consistency (arXiv 2605.00161), over random
bridges between noise levels. q(· | xs) gets no gradient. A `trajectory` block's later state is the next one of its
decoding; of other blocks each masked place becomes known with a chance that is drawn per block, the posterior bridge of
absorbing noise. The later state is a version of the row of its own, on which the other losses are taken too.

Letters: b batch, v views (noisy versions of one row), t tokens.
"""

import torch
from torch import Tensor


def compared(masked: Tensor) -> Tensor:
    """(2b, t) bool: the places of the first view that the second one, the later state, hides too. `masked` (2b, t) is
    the masks of both."""
    early, late = masked.chunk(2)
    return torch.cat((early & late, torch.zeros_like(late)))

"""The loss `cross_entropy`: −log q(x0), the likelihood bound of masked diffusion without its factor 1/t̂ (MDLM, arXiv
2406.07524).

Letters: m positions, o vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(log_q: Tensor, targets: Tensor) -> Tensor:
    """(m,): −log_q (m, o) of the targets (m,) int64."""
    return F.nll_loss(log_q, targets, reduction="none")

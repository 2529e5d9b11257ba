"""From a tower's hidden states to logits. Letters: d width, v vocabulary."""

import torch
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.model.linear import Linear, Pack


class Head(nn.Module):
    """The output projection of a tower: logits W·x, with a bias if the config has `head_bias`, times its `logit_scale`,
    limited to c·tanh(logits / c) by its `logit_softcap` c. The mask token's logit is −∞ whatever its row holds.

    The mask stands for a token that is not known yet and is itself no token of a text. So no tower proposes it, and the
    other tokens keep the probabilities that they have in the backbone, to which the mask was added.
    """

    def __init__(self, config: TwoTowerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.mask_token_id = config.mask_token_id
        self.scale, self.softcap, self.tied = config.logit_scale, config.logit_softcap, config.tie_word_embeddings
        self.linear = Linear(config.hidden_size, config.vocab_size, bias=config.head_bias, dtype=dtype)
        self.is_masked = False  # whether the projection itself gives the mask token −∞

    @property
    def weight(self) -> nn.Parameter:
        """The projection (v, d), which is not there in a packed model."""
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """The logits of hidden states x (…, d): (…, v), float32 or wider."""
        logits = self.linear(x)
        if logits.dtype.itemsize < 4:
            logits = logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.is_masked:
            return logits
        # Last, so that nothing makes it finite again. A softmax's gradient is 0 there, so autograd need not know, which
        # would cost it a pass over all logits.
        logits.detach().select(-1, self.mask_token_id).fill_(-torch.inf)
        return logits

    def tie_(self, embeddings: nn.Parameter) -> None:
        """Makes the tower's embeddings (v, d) the weight."""
        self.linear.weight = embeddings

    def untie_(self) -> None:
        """Gives the head a weight of its own: packing frees it, and the embeddings must stay."""
        self.linear.weight = nn.Parameter(self.linear.weight.detach())

    def pack_(self, dtype: torch.dtype, pack: Pack) -> None:
        """Packs the weight, see `Linear.pack_`. The mask token then gets the bias −∞, because three operations at every
        pass on one number of each row cost a small model more than a bias does."""
        row = self.linear.weight[self.mask_token_id].detach()
        # a product with values beyond could be infinite itself, and ∞ − ∞ is no −∞
        is_plain = self.softcap is None and self.scale > 0 and bool((row.abs() < 1e30).all())
        self.linear.pack_(dtype, pack)
        if self.linear.packed is None or not is_plain:
            return
        bias = (
            row.new_zeros(self.linear.outputs, dtype=dtype) if self.linear.bias is None else self.linear.bias.detach()
        )
        bias[self.mask_token_id] = -torch.inf
        self.linear.bias = nn.Parameter(bias)
        self.is_masked = True

    def released_tensors(self, name: str) -> dict[str, Tensor]:
        """Its tensors under the released name of the head; a tied weight is the embedding's."""
        found = {} if self.tied else {f"{name}.weight": self.weight.data}
        return found if self.linear.bias is None else found | {f"{name}.bias": self.linear.bias.data}

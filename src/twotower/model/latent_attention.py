"""Multi-head latent attention's projection (arXiv 2405.04434). Letters: b batch, s tokens, d width, h heads, p head
width in the cache, r and n the parts of a head with and without positions, v value width."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.model.linear import Linear, Pack
from twotower.model.norm import Norm

# That of DeepSeek's code for the norms of latents, whatever the config says of the others
_EPSILON = 1e-6


class LatentProjection(nn.Module):
    """x (b, s, d) to queries, keys and values of h heads each, as one plain projection gives them: (b, s, 3·h·p).

    Keys without positions and values come from one normed latent of a token, keys with positions are the same for all
    heads, and queries come from x or from a latent of their own. A head is r numbers that RoPE turns, n others, and
    zeros up to p; a value is v numbers and zeros. So all that follows, the cache of keys and values as well, is that
    of other attention: the cache is as large as without latents.
    """

    def __init__(self, config: TwoTowerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        c, h, bias = config, config.num_attention_heads, config.attention_bias
        self.num_heads, self.head_dim = h, c.head_dim
        self.parts = (c.qk_rope_head_dim, c.qk_nope_head_dim, c.v_head_dim)
        turned, plain, value = self.parts
        exact = dataclasses.replace(config, layer_norm_epsilon=_EPSILON)
        inputs = c.q_lora_rank or c.hidden_size
        self.q_a_proj = Linear(c.hidden_size, inputs, bias=bias, dtype=dtype) if c.q_lora_rank else None
        self.q_a_norm = Norm(exact, inputs, dtype=dtype) if c.q_lora_rank else None
        self.q_proj = Linear(inputs, h * (turned + plain), bias=False, dtype=dtype)
        self.kv_a_proj = Linear(c.hidden_size, c.kv_lora_rank + turned, bias=bias, dtype=dtype)
        self.kv_a_norm = Norm(exact, c.kv_lora_rank, dtype=dtype)
        self.kv_b_proj = Linear(c.kv_lora_rank, h * (plain + value), bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        turned, plain, value = self.parts
        latent = x if self.q_a_proj is None or self.q_a_norm is None else self.q_a_norm(self.q_a_proj(x), x.dtype)
        query = self.q_proj(latent).unflatten(-1, (self.num_heads, -1))  # (b, s, h, r+n)
        both = self.kv_a_proj(x)
        shared = both[..., -turned:].unsqueeze(-2).expand(-1, -1, self.num_heads, -1)  # (b, s, h, r)
        expanded = self.kv_b_proj(self.kv_a_norm(both[..., :-turned], x.dtype))
        own, values = expanded.unflatten(-1, (self.num_heads, -1)).split((plain, value), dim=-1)
        heads = (query, torch.cat((shared, own), dim=-1), values)
        return torch.cat([F.pad(part, (0, self.head_dim - part.shape[-1])) for part in heads], dim=-2).flatten(-2)

    def pack_(self, dtype: torch.dtype, pack: Pack) -> None:
        for projection in (self.q_a_proj, self.q_proj, self.kv_a_proj, self.kv_b_proj):
            if projection is not None:
                projection.pack_(dtype, pack)
        for norm in (self.q_a_norm, self.kv_a_norm):
            if norm is not None:
                norm.pack_(dtype)

    def released_tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in ("q_a_proj", "q_proj", "kv_a_proj", "kv_b_proj"):
            projection = getattr(self, name)
            found |= {} if projection is None else projection.released_tensors((name,), (projection.outputs,))
        if self.q_a_norm is not None:
            found |= self.q_a_norm.released_tensors("q_a_norm")
        return found | self.kv_a_norm.released_tensors("kv_a_norm")

"""The `*` mixer: attention. Letters: b batch, s tokens, d width, h heads, k KV heads, p head width."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.model.linear import Linear, Pack
from twotower.model.pages import PastLayer
from twotower.ops.attention import cached_attention, rotate, seeded_attention


class Projected(NamedTuple):
    """Queries (b, h, s, p), keys and values (b, k, s, p), rotated where the config asks for RoPE."""

    query: Tensor
    key: Tensor
    value: Tensor


class Rotation(NamedTuple):
    """RoPE's cosines and sines for s tokens, (b or 1, s, 1, p/2)."""

    cos: Tensor
    sin: Tensor


def rotation(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Angles position · theta^(-2j/p) for positions (b, s); computed in float32 as Hugging Face does."""
    j = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions[..., None, None].float() * (1.0 / theta ** (j / head_dim))  # (b, s, 1, p/2)
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


class Attention(nn.Module):
    """Grouped-query attention, with RoPE where the config asks for it. The tower appends the keys to the cache."""

    def __init__(self, config: TwoTowerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        query, kv = self.num_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.sizes = (query, kv, kv)
        self.qkv_proj = Linear(config.hidden_size, sum(self.sizes), bias=config.attention_bias, dtype=dtype)
        self.o_proj = Linear(query, config.hidden_size, bias=config.attention_bias, dtype=dtype)

    def project(self, x: Tensor, rope: Rotation | None) -> Projected:
        """x (b, s, d) to queries, keys and values."""
        b, s, _ = x.shape
        heads = self.qkv_proj(x).view(b, s, -1, self.head_dim)  # (b, s, h+2k, p)
        num_kv = (heads.shape[2] - self.num_heads) // 2
        rotated = heads[:, :, : self.num_heads + num_kv]
        if rope is not None:
            rotated = rotate(rotated, rope.cos, rope.sin)
        rotated = rotated.transpose(1, 2)
        value = heads[:, :, self.num_heads + num_kv :].transpose(1, 2)
        return Projected(rotated[:, : self.num_heads], rotated[:, self.num_heads :], value)

    def causal(self, query: Tensor, past: PastLayer, mask: Tensor | None) -> Tensor:
        """The mixer's output (b, s, d) for queries (b, h, s, p) over cached keys, the tokens' own among them."""
        return self.output(cached_attention(query, past.key, past.value, mask, past.pages))

    def block(self, projected: Projected, past: PastLayer, mask: Tensor | None) -> Tensor:
        """The mixer's output (b, s, d) for a block that sees the cached keys and all of its own."""
        return self.output(seeded_attention(*projected, past.key, past.value, mask, past.pages))

    def output(self, attended: Tensor) -> Tensor:
        """(b, h, s, p) to (b, s, d)."""
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def pack_(self, dtype: torch.dtype, pack: Pack) -> None:
        self.qkv_proj.pack_(dtype, pack)
        self.o_proj.pack_(dtype, pack)

    def released_tensors(self) -> dict[str, Tensor]:
        qkv = self.qkv_proj.released_tensors(("q_proj", "k_proj", "v_proj"), self.sizes)
        return qkv | self.o_proj.released_tensors(("o_proj",), (self.o_proj.outputs,))

"""The `*` mixer: attention. Letters: b batch, s tokens, d width, h heads, k KV heads, p head width."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.model.latent_attention import LatentProjection
from twotower.model.linear import Linear, Pack
from twotower.model.norm import Norm
from twotower.model.pages import PastLayer
from twotower.ops.attention import ScoreRule, cached_attention, seeded_attention
from twotower.ops.rope import Positioning, rotate


class Projected(NamedTuple):
    """Queries (b, h, s, p), keys and values (b, k, s, p), rotated and scaled as positions say, and where the config
    asks for them the gates (b, s, h·p) before their sigmoid."""

    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor | None


class Attention(nn.Module):
    """Grouped-query attention. The tower appends the keys to the cache.

    `number` counts the attention layers below this one, and `index` says which of the config's `attention_kinds` it is
    of: what its queries see and how positions enter.
    """

    def __init__(self, config: TwoTowerConfig, number: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.index = config.attention_indices[number]
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.scale = self.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        if config.attention_scale_by_depth:
            self.scale /= number + 1
        self.softcap, self.clip, self.slopes = config.attention_softcap, config.clip_qkv, config.alibi_slopes
        self.normed_behind_rope = config.qk_norm_behind_rope
        self.normed_together = config.qk_norm == "all"
        self.value_dim = config.v_head_dim or self.head_dim  # the rest of a value is zeros
        query, kv = self.num_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.sizes = (query, kv, kv)
        self.qkv_proj: Linear | LatentProjection
        if config.kv_lora_rank:
            self.qkv_proj = LatentProjection(config, dtype)
        else:
            self.qkv_proj = Linear(config.hidden_size, sum(self.sizes), bias=config.attention_bias, dtype=dtype)
        inputs = self.num_heads * self.value_dim
        self.o_proj = Linear(inputs, config.hidden_size, bias=config.attention_bias, dtype=dtype)
        self.gate_proj: Linear | None = None
        if config.attention_gate:
            self.gate_proj = Linear(config.hidden_size, inputs, bias=config.attention_bias, dtype=dtype)
        self.q_norm = self._norm(config, self.num_heads, dtype)
        self.k_norm = self._norm(config, config.num_key_value_heads, dtype)
        self.sinks = nn.Parameter(torch.empty(self.num_heads, dtype=dtype)) if config.attention_sinks else None

    def _norm(self, config: TwoTowerConfig, num_heads: int, dtype: torch.dtype) -> Norm | None:
        turned = config.attention_kinds[self.index].rope_parameters is not None
        if config.qk_norm is None or (config.qk_norm_behind_rope and not turned):
            return None
        p = self.head_dim
        shape = {"head": (p,), "each": (num_heads, p), "all": (num_heads * p,)}[config.qk_norm]
        return Norm(config, *shape, dtype=dtype, bias=config.qk_norm_bias)

    @property
    def rule(self) -> ScoreRule:
        """How scores become weights."""
        return ScoreRule(self.scale, self.softcap, self.sinks, self.slopes)

    def project(self, x: Tensor, at: Positioning) -> Projected:
        """x (b, s, d) to queries, keys and values."""
        b, s, _ = x.shape
        heads = self.qkv_proj(x).view(b, s, -1, self.head_dim)  # (b, s, h+2k, p)
        num_kv = (heads.shape[2] - self.num_heads) // 2
        rotated, value = heads[:, :, : self.num_heads + num_kv], heads[:, :, self.num_heads + num_kv :]
        if not self.normed_behind_rope:
            rotated = self._normed(rotated)
        if self.clip is not None:
            rotated, value = rotated.clamp(-self.clip, self.clip), value.clamp(-self.clip, self.clip)
        if at.rope is not None:
            rotated = rotate(rotated, at.rope)
        if self.normed_behind_rope:
            rotated = self._normed(rotated)
        query, key = rotated[:, :, : self.num_heads], rotated[:, :, self.num_heads :]
        if at.query_scale is not None:
            query = query * at.query_scale
        gate = None if self.gate_proj is None else self.gate_proj(x)
        return Projected(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), gate)

    def _normed(self, heads: Tensor) -> Tensor:
        """Queries and keys (b, s, h+k, p) through their norms, if they have any."""
        if self.q_norm is None or self.k_norm is None:
            return heads
        parts = heads.split((self.num_heads, heads.shape[2] - self.num_heads), dim=2)
        together = [part.flatten(2) if self.normed_together else part for part in parts]
        normed = [norm(part, heads.dtype) for norm, part in zip((self.q_norm, self.k_norm), together, strict=True)]
        return torch.cat([part.unflatten(2, (-1, self.head_dim)) if part.ndim == 3 else part for part in normed], dim=2)

    def causal(self, projected: Projected, past: PastLayer, mask: Tensor | None) -> Tensor:
        """The mixer's output (b, s, d) over cached keys, the tokens' own among them."""
        attended = cached_attention(projected.query, past.key, past.value, mask, self.rule, past.pages)
        return self.output(attended, projected.gate)

    def block(self, projected: Projected, past: PastLayer, mask: Tensor | None) -> Tensor:
        """The mixer's output (b, s, d) for a block that sees the cached keys and its own."""
        query, key, value, gate = projected
        attended = seeded_attention(query, key, value, past.key, past.value, mask, self.rule, past.pages)
        return self.output(attended, gate)

    def output(self, attended: Tensor, gate: Tensor | None) -> Tensor:
        """(b, h, s, p), multiplied by the gate's sigmoid if there is one, to (b, s, d)."""
        rows = attended[..., : self.value_dim].transpose(1, 2).flatten(2)
        return self.o_proj(rows if gate is None else rows * gate.sigmoid())

    def pack_(self, dtype: torch.dtype, pack: Pack) -> None:
        self.qkv_proj.pack_(dtype, pack)
        self.o_proj.pack_(dtype, pack)
        if self.gate_proj is not None:
            self.gate_proj.pack_(dtype, pack)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.pack_(dtype)
        if self.sinks is not None:
            self.sinks.data = self.sinks.data.to(torch.promote_types(dtype, torch.float32))

    def released_tensors(self) -> dict[str, Tensor]:
        if isinstance(self.qkv_proj, LatentProjection):
            found = self.qkv_proj.released_tensors()
        else:
            found = self.qkv_proj.released_tensors(("q_proj", "k_proj", "v_proj"), self.sizes)
        found |= self.o_proj.released_tensors(("o_proj",), (self.o_proj.outputs,))
        if self.gate_proj is not None:
            found |= self.gate_proj.released_tensors(("gate_proj",), (self.gate_proj.outputs,))
        for name, norm in (("q_norm", self.q_norm), ("k_norm", self.k_norm)):
            found |= {} if norm is None else norm.released_tensors(name)
        return found if self.sinks is None else found | {"sinks": self.sinks.data}

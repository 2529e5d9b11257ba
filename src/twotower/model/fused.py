"""A packed tower's layers in one call to C. Letters: b batch, s tokens, d width, i layers, m `M` layers, w in_proj's
outputs, c conv channels, h heads, p head width, n state width."""

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twotower.config import TwoTowerConfig
from twotower.model.attention import Attention, Rotation
from twotower.model.layer import Layer
from twotower.model.linear import Linear
from twotower.model.mamba2 import Mamba2, Prepared
from twotower.model.mlp import MLP
from twotower.model.moe import MixtureOfExperts
from twotower.model.pages import Past
from twotower.model.state import ContextState, MambaState
from twotower.ops.linear import PackedWeight
from twotower.ops.native.call import threads
from twotower.ops.native.tower import LayerWeights, Pass, Product, Shape, run
from twotower.ops.ssd import CHUNK, ScanInputs


class FusedCausal(NamedTuple):
    """hidden (b, s, d) after the last norm; per `M` layer what the scan read, and the SSM states (b, h, p, n) after
    each of the marks and, where they are known, after all tokens."""

    hidden: Tensor
    prepared: tuple[Prepared, ...]
    marked: list[tuple[Tensor, ...]]
    ends: tuple[Tensor, ...] | None


class FusedTower:
    """What `Tower.causal` and `Tower.block` compute, from the embedding to the last norm, to the same bits.

    Holds addresses of the layers' packed weights, so those must stay as they are. A hook on a layer, or a part that was
    replaced, would not be seen: `usable` says so.
    """

    def __init__(self, config: TwoTowerConfig, stack: Sequence[Layer], norm: Tensor) -> None:
        self.config = config
        self.norm = norm
        self.stack = tuple(stack)
        self.shape = _shape(config, stack)
        self.layers = (LayerWeights * len(stack))(*(_weights(layer) for layer in stack))
        modules = [module for layer in stack for module in layer.modules()]
        self._children = [(module._modules, dict(module._modules)) for module in modules if module._modules]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy takes the addresses of its own weights."""
        return FusedTower, (self.config, self.stack, self.norm)

    @property
    def usable(self) -> bool:
        return not any(self._hooks) and all(now == then for now, then in self._children)

    def causal(
        self,
        x: Tensor,
        state: ContextState,
        past: Past,
        places: Tensor | None,
        rope: Rotation | None,
        marks: Sequence[int],
    ) -> FusedCausal:
        """The context tower over embedded tokens x (b, s, d), which is overwritten; appends keys to `past`."""
        c, (b, s, _) = self.config, x.shape
        num = len(state.mamba)
        sizes = (c.mamba_width, c.conv_width, c.mamba_num_heads)
        saved = [x.new_empty(num, b, s, width) for width in (sum(sizes), *sizes[1:])]
        # A block's end state waits until it is known how much of the block stays.
        cuts = () if 1 < s <= CHUNK and not marks else (*marks, s)
        ends = x.new_empty(len(cuts), num, b, c.mamba_num_heads, c.mamba_head_dim, c.mamba_state_size)
        hidden = self._run(
            x,
            state,
            past,
            rope,
            saved,
            starts=torch.tensor(state.lengths),
            places=places,
            ends=ends,
            cuts=torch.tensor(cuts, dtype=torch.int64),
            keeps=True,
            causal=True,
        )
        by_cut = [cut.unbind() for cut in ends.unbind()]
        return FusedCausal(hidden, self._prepared(*saved), by_cut[: len(marks)], by_cut[-1] if cuts else None)

    def block(
        self,
        x: Tensor,
        seed: ContextState,
        past: Past,
        rope: Rotation | None,
        modulation: Tensor | None,
        widths: tuple[int, ...],
    ) -> Tensor:
        """The denoiser over a block's embedded tokens x (b, s, d), which is overwritten; modulation (i, b, 3, 1, d)."""
        c, (b, s, _) = self.config, x.shape
        sizes = (c.mamba_width, c.conv_width, c.mamba_num_heads)
        room = [x.new_empty(b, s, width) for width in (sum(sizes), *sizes[1:])] if seed.mamba else [x, x, x]
        starts, own = torch.tensor((seed.lengths, widths))
        return self._run(x, seed, past, rope, room, starts=starts, widths=own, modulation=modulation)

    def _run(
        self, x: Tensor, state: ContextState, past: Past, rope: Rotation | None, saved: list[Tensor], **more: Any
    ) -> Tensor:
        """The last norm's output (b, s, d). `more` are fields of `Pass`."""
        b, s, _ = x.shape
        hidden = torch.empty_like(x)
        dense = [MambaState(m.conv.contiguous(), m.ssm.contiguous()) for m in state.mamba]
        mamba, keys = iter(dense), zip(past.keys, past.values, strict=True)
        memory = array("Q")
        for layer in self.stack:
            pair = next(mamba) if layer.kind == "M" else next(keys) if layer.kind == "*" else None
            memory.extend((0, 0) if pair is None else (pair[0].data_ptr(), pair[1].data_ptr()))
        tensors = dict(zip(("projected", "convolved", "steps"), saved, strict=True), x=x, hidden=hidden, norm=self.norm)
        if rope is not None:
            shared = rope.cos.shape[0] == 1
            more |= {"cosine": rope.cos, "sine": rope.sin, "angle_batch": 0 if shared else rope.cos.stride(0)}
        if past.keys:
            batch, head, token, _ = past.keys[0].stride()
            more |= {"key_batch": batch, "key_head": head, "key_token": token, "page_size": past.keys[0].shape[2]}
        if past.pages is not None:
            more |= {"pages": past.pages, "num_pages": past.pages.shape[1]}
        if "cuts" in more:
            more["num_cuts"] = more["cuts"].shape[0]
        fields = {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in (tensors | more).items()}
        what = Pass(b=b, s=s, threads=threads(), memory=memory.buffer_info()[0], **fields)
        run(self.shape, self.layers, what)
        return hidden

    def _prepared(self, projected: Tensor, convolved: Tensor, steps: Tensor) -> tuple[Prepared, ...]:
        """Views of what all layers' scans read: (m, b, s, w), (m, b, s, c) and (m, b, s, h), taken apart."""
        c = self.config
        group = c.mamba_num_groups * c.mamba_state_size
        z, xbc, _ = projected.split((c.mamba_width, c.conv_width, c.mamba_num_heads), dim=-1)
        states, B, C = convolved.split((c.mamba_width, group, group), dim=-1)
        heads = states.unflatten(-1, (c.mamba_num_heads, c.mamba_head_dim)).unbind()
        Bs, Cs = (v.unflatten(-1, (c.mamba_num_groups, c.mamba_state_size)).unbind() for v in (B, C))
        scans = map(ScanInputs, heads, steps.unbind(), Bs, Cs)
        return tuple(map(Prepared, z.unbind(), xbc.unbind(), scans))


def _shape(config: TwoTowerConfig, stack: Sequence[Layer]) -> Shape:
    c = config
    some = next(m for layer in stack for m in layer.modules() if isinstance(m, Linear))
    assert isinstance(some.packed, PackedWeight)
    low, high = c.time_step_limit
    return Shape(
        num_layers=len(stack),
        width=c.hidden_size,
        bf16=some.packed.data.dtype == torch.bfloat16,
        eps=c.layer_norm_epsilon,
        mamba_heads=c.mamba_num_heads,
        mamba_head=c.mamba_head_dim,
        mamba_groups=c.mamba_num_groups,
        state=c.mamba_state_size,
        kernel=c.conv_kernel,
        shortest=low,
        longest=high,
        heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads,
        head=c.head_dim,
        gated=c.gated_mlp,
        experts=c.num_experts,
        active=c.num_experts_per_tok,
        groups=c.expert_num_groups,
        kept=c.expert_topk_groups,
        normalise=c.norm_topk_prob,
        expert=c.expert_intermediate_size,
        factor=c.routed_scaling_factor,
    )


def _weights(layer: Layer) -> LayerWeights:
    mixer = layer.mixer
    found: dict[str, Tensor | None] = {"norm": layer.norm}
    if isinstance(mixer, Mamba2):
        first, second = mixer.in_proj, mixer.out_proj
        found |= {"taps": mixer.conv_taps, "conv_bias": mixer.conv_bias, "dt_bias": mixer.dt_bias}
        found |= {"A": mixer.A, "D": mixer.D, "gate_norm": mixer.norm}
    elif isinstance(mixer, Attention):
        first, second = mixer.qkv_proj, mixer.o_proj
    elif isinstance(mixer, MLP):
        first, second = mixer.up_proj, mixer.down_proj
    else:
        assert isinstance(mixer, MixtureOfExperts)
        assert mixer.packed is not None
        first, second = mixer.shared.up_proj, mixer.shared.down_proj
        found |= {"router": mixer.gate, "correction": mixer.correction_bias}
        found |= {"up": mixer.packed.up, "down": mixer.packed.down}
        found |= {"up_bias": mixer.packed.up_bias, "down_bias": mixer.packed.down_bias}
    pointers = {k: v.data_ptr() for k, v in found.items() if v is not None}
    return LayerWeights(kind=ord(layer.kind), first=_product(first), second=_product(second), **pointers)


def _product(linear: Linear) -> Product:
    assert isinstance(linear.packed, PackedWeight)
    bias = 0 if linear.bias is None else linear.bias.data_ptr()
    return Product(weight=linear.packed.data.data_ptr(), bias=bias, outputs=linear.outputs)

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
from twotower.model.mamba2 import Mamba2
from twotower.model.mlp import MLP
from twotower.model.moe import MixtureOfExperts
from twotower.model.pages import Past
from twotower.model.state import ContextState, MambaState
from twotower.ops.linear import PackedWeight
from twotower.ops.native.call import threads
from twotower.ops.native.tower import LayerWeights, Pass, Product, Shape, advance, run
from twotower.ops.ssd import CHUNK


class FusedCausal(NamedTuple):
    """hidden (b, s, d) after the last norm, and what the states after some of the tokens are made of.

    `before` are the states before the tokens, whose addresses are in `memory`; `saved` is what the scans read, see
    `Pass`; `ends` has the SSM states (m, b, h, p, n) after the numbers of tokens for which they are known.
    """

    tower: "FusedTower"
    hidden: Tensor
    before: list[MambaState]
    memory: "array[int]"
    saved: list[Tensor]
    ends: dict[int, Tensor]

    def advance(self, counts: Tensor | None) -> tuple[MambaState, ...]:
        """The states after each row's first counts[b] (b,) int64 tokens, all of them where `counts` is None."""
        return self._states(counts, self.ends.get(self.hidden.shape[1]) if counts is None else None)

    def marked(self, mark: int) -> tuple[MambaState, ...]:
        """The states after `mark` tokens, of those that were asked for."""
        return self._states(torch.full(self.hidden.shape[:1], mark), self.ends[mark])

    def _states(self, counts: Tensor | None, ssm: Tensor | None) -> tuple[MambaState, ...]:
        if not self.before:
            return ()
        num, (conv, state), known = len(self.before), self.before[0], ssm is not None
        conv = conv.new_empty(num, *conv.shape)
        ssm = state.new_empty(num, *state.shape) if ssm is None else ssm
        where = self.memory.buffer_info()[0]
        advance(self.tower.shape, self.tower.layers, where, self.saved, counts, conv, None if known else ssm)
        return tuple(map(MambaState, conv.unbind(), ssm.unbind()))


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
        before, memory = self._memory(state, past)
        num = len(before)
        sizes = (c.mamba_width, c.conv_width, c.mamba_num_heads)
        saved = [x.new_empty(num, b, s, width) for width in (sum(sizes), *sizes[1:])]
        # A block's end state waits until it is known how much of the block stays.
        cuts = () if 1 < s <= CHUNK and not marks else (*marks, s)
        ends = x.new_empty(len(cuts), num, b, c.mamba_num_heads, c.mamba_head_dim, c.mamba_state_size)
        hidden = self._run(
            x,
            memory,
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
        return FusedCausal(self, hidden, before, memory, saved, dict(zip(cuts, ends.unbind(), strict=True)))

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
        _dense, memory = self._memory(seed, past)  # the tensors live as long as their addresses are used
        return self._run(x, memory, past, rope, room, starts=starts, widths=own, modulation=modulation)

    def _memory(self, state: ContextState, past: Past) -> "tuple[list[MambaState], array[int]]":
        """The `M` layers' states without gaps, and the addresses of what every layer remembers, two per layer."""
        dense = [MambaState(m.conv.contiguous(), m.ssm.contiguous()) for m in state.mamba]
        mamba, keys = iter(dense), zip(past.keys, past.values, strict=True)
        memory = array("Q")
        for layer in self.stack:
            pair = next(mamba) if layer.kind == "M" else next(keys) if layer.kind == "*" else None
            memory.extend((0, 0) if pair is None else (pair[0].data_ptr(), pair[1].data_ptr()))
        return dense, memory

    def _run(
        self, x: Tensor, memory: "array[int]", past: Past, rope: Rotation | None, saved: list[Tensor], **more: Any
    ) -> Tensor:
        """The last norm's output (b, s, d). `more` are fields of `Pass`."""
        b, s, _ = x.shape
        hidden = torch.empty_like(x)
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

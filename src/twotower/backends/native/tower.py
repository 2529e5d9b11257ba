"""A tower's layers in one call to C, see c/tower.c. Letters: b batch, s tokens, d width, i layers, m recurrent
layers, w conv kernel, c conv channels, h heads, p head width, n state width."""

import ctypes
import math
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.backends.native import unmask
from twotower.backends.native.call import filled, function, structure, threads
from twotower.backends.native.pack import PanelWeight, pack_panels, pack_weight
from twotower.backends.protocol import StateDtypes
from twotower.config import TwoTowerConfig
from twotower.config_rules import ACTIVATIONS
from twotower.model.attention import Attention
from twotower.model.delta_net import DeltaNet
from twotower.model.layer import Layer
from twotower.model.linear import Linear
from twotower.model.mamba2 import Mamba2
from twotower.model.mlp import MLP
from twotower.model.moe import MixtureOfExperts
from twotower.model.norm import Norm
from twotower.model.pages import Past
from twotower.model.passes import CausalPass, PassInputs
from twotower.model.recurrent import RECURRENT_KINDS
from twotower.model.state import ContextState, MambaState
from twotower.model.tower import Tower
from twotower.ops.rope import Positioning
from twotower.ops.ssd import CHUNK

# How queries and keys are normed, in the order of the numbers in c/tower.c
NORMS = (None, "head", "each", "all")


# Positions: beyond, a token's keys are read so often that their bytes count
LONG_CONTEXT = 1024


class LayerTensors(NamedTuple):
    """A layer's packed projections, its norms, its other tensors and its numbers, by the names that LayerWeights in
    c/calls.h has for them; the bias of the projection `first` is `first_bias`, and so on."""

    kind: str
    products: dict[str, PanelWeight]
    norms: dict[str, Norm]
    named: dict[str, Tensor]
    numbers: dict[str, float]


def take_tower_(tower: Tower) -> None:
    """Packs the weights of a tower of bfloat16 or float32 for C and puts a guest into it that runs its passes."""
    experts = [_take_experts(layer.mixer) for layer in tower.stack]
    dtypes = state_dtypes(tower.config, tower.embeddings.dtype)
    tower.key_dtype = dtypes.keys
    tower.pack_(dtypes.activations, pack_weight)
    weights = [_tensors(tower.config, layer, taken) for layer, taken in zip(tower.stack, experts, strict=True)]
    tower.guest = NativeTower(tower.config, tower.stack, weights, tower.norm_f)


def state_dtypes(config: TwoTowerConfig, dtype: torch.dtype) -> StateDtypes:
    """What a tower of weights of `dtype` gets: float32, but keys in bfloat16 where keys and values may outweigh the
    layers. A model for short contexts gains nothing by that rounding."""
    is_long = int(config.carried.get("max_position_embeddings") or 0) > LONG_CONTEXT
    return StateDtypes(torch.float32, torch.bfloat16 if dtype == torch.bfloat16 and is_long else torch.float32)


def missing(config: TwoTowerConfig) -> str | None:
    """What a tower of this config needs that the C kernels don't have, None if they have everything."""
    kinds = {"S": "Mamba-1 layers", "R": "RG-LRU layers"}
    lacking = [f"{name} (layers of kind {kind})" for kind, name in kinds.items() if kind in config.pattern]
    return ", ".join(lacking) or None


class NativeTower:
    """Runs a tower in C, see `backends.protocol.TowerGuest`: one call per pass, from embedded tokens to the last norm.

    It holds the tensors whose addresses are in `layers`, so those live as long as it does. `stack` is only looked at
    for hooks and for parts that were replaced, which C would pass over: either is a RuntimeError at the next pass.
    """

    logit_ops = unmask

    def __init__(self, config: TwoTowerConfig, stack: Sequence[Layer], weights: list[LayerTensors], norm: Norm) -> None:
        self.config = config
        self.stack = tuple(stack)
        self.weights = weights
        self.norm = norm
        self.shape = _shape(config, weights)
        self._last_norm = _norm(norm)
        self.layers = (structure("LayerWeights") * len(weights))(*map(_layer_weights, weights))
        self._watched = [_WatchedLayer.of(layer) for layer in self.stack]
        self._hooks = [hooks for watched in self._watched for hooks in watched.hooks]
        self._children = [pair for watched in self._watched for pair in watched.children]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy takes the addresses of its own tensors."""
        return NativeTower, (self.config, self.stack, self.weights, self.norm)

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        ids, table = ids.contiguous(), table.contiguous()
        x = torch.empty(*ids.shape, table.shape[1], dtype=torch.float32)
        is_bf16 = table.dtype == torch.bfloat16
        function("tt_embed")(ids.data_ptr(), ids.numel(), table.data_ptr(), is_bf16, table.shape[1], x.data_ptr())
        return x

    def causal(self, inputs: PassInputs, marks: tuple[int, ...]) -> CausalPass:
        self._check_layers()
        c, state, x = self.config, inputs.state, inputs.x
        b, s, _ = x.shape
        before, memory = self._memory(state, inputs.past)
        saved = [x.new_empty(len(before), b, s, width) for width in _saved_widths(c)] if before else [x, x, x]
        # A block's end state waits until it is known how much of the block stays.
        cuts = () if not before or (1 < s <= CHUNK and not marks) else (*marks, s)
        shape = (len(cuts), len(before), b, c.mamba_num_heads, c.mamba_head_dim, c.mamba_state_size)
        ends = x.new_empty(shape) if cuts else None
        hidden = self._run(
            inputs,
            memory,
            saved,
            starts=torch.tensor(state.lengths),
            places=inputs.places,
            ends=ends,
            cuts=torch.tensor(cuts) if cuts else None,
            num_cuts=len(cuts),
            keeps=True,
            causal=True,
        )
        by_cut = {} if ends is None else dict(zip(cuts, ends.unbind(), strict=True))
        replay = NativeReplay(self, before, memory, saved, by_cut, s)
        return CausalPass(hidden, state, replay.advance, {mark: replay.marked(mark) for mark in marks})

    def block(self, inputs: PassInputs, modulation: Tensor | None, widths: tuple[int, ...]) -> Tensor:
        self._check_layers()
        seed, x = inputs.state, inputs.x
        b, s, _ = x.shape
        room = [x.new_empty(b, s, width) for width in _saved_widths(self.config)] if seed.mamba else [x, x, x]
        starts, own = torch.tensor((seed.lengths, widths))
        _dense, memory = self._memory(seed, inputs.past)  # the tensors live as long as their addresses are used
        return self._run(inputs, memory, room, starts=starts, widths=own, modulation=modulation)

    def _check_layers(self) -> None:
        """Costs a look at each dict, some microseconds, and goes into detail only where something is found."""
        if not any(self._hooks) and all(now == then for now, then in self._children):
            return
        for i, watched in enumerate(self._watched):
            what = "a forward hook" if any(watched.hooks) else "a module in it that was replaced"
            if any(watched.hooks) or any(now != then for now, then in watched.children):
                layer = self.stack[i]
                raise RuntimeError(
                    f"layer {layer.index} ({layer.kind!r}) has {what}, which the C kernels would pass over; "
                    'load the model with load(..., backend="reference")'
                )

    def _memory(self, state: ContextState, past: Past) -> "tuple[list[MambaState], array[int]]":
        """The recurrent layers' states without gaps, and the addresses of what every layer remembers, two per layer."""
        dense = [MambaState(m.conv.contiguous(), m.ssm.contiguous()) for m in state.mamba]
        memory = array("Q")
        for layer in self.stack:
            if layer.kind in RECURRENT_KINDS:
                memory.extend(tensor.data_ptr() for tensor in dense[layer.memory])
            elif layer.kind == "*":
                memory.extend((past.keys[layer.memory].data_ptr(), past.values[layer.memory].data_ptr()))
            else:
                memory.extend((0, 0))
        return dense, memory

    def _run(self, inputs: PassInputs, memory: "array[int]", saved: list[Tensor], **more: Any) -> Tensor:
        """The last norm's output (b, s, d). `saved` are projected, convolved, steps; `more` are fields of TowerPass."""
        x, _, past, positioning, _ = inputs
        b, s, _ = x.shape
        hidden = torch.empty_like(x)
        tensors = dict(zip(("projected", "convolved", "steps"), saved, strict=True), x=x, hidden=hidden)
        table = (structure("Positioning") * len(positioning))(*map(_positioning, positioning))
        more |= {"norm": self._last_norm, "positioning": ctypes.addressof(table)}
        if past.keys:
            batch, head, token, _ = past.keys[0].stride()
            more |= {"key_batch": batch, "key_head": head, "key_token": token, "page_size": past.keys[0].shape[2]}
            more |= {"bf16_keys": past.keys[0].dtype == torch.bfloat16}
        if past.pages is not None:
            more |= {"pages": past.pages, "num_pages": past.pages.shape[1]}
        fields = {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in (tensors | more).items()}
        what = filled("TowerPass", b=b, s=s, threads=threads(), memory=memory.buffer_info()[0], **fields)
        function("tt_tower")(*map(ctypes.addressof, (self.shape, self.layers, what)))
        return hidden


class NativeReplay(NamedTuple):
    """What the states after some of a pass's s tokens are made of.

    `before` are the states before the tokens, whose addresses are in `memory`; `saved` is what the scans read, see
    TowerPass in c/calls.h; `ends` has the SSM states (m, b, h, p, n) after the numbers of tokens for which they are
    known.
    """

    tower: NativeTower
    before: list[MambaState]
    memory: "array[int]"
    saved: list[Tensor]
    ends: dict[int, Tensor]
    num_tokens: int

    def advance(self, counts: Tensor | None) -> tuple[MambaState, ...]:
        """The states after each row's first counts[b] (b,) int64 tokens, all of them where `counts` is None."""
        return self._states(counts, self.ends.get(self.num_tokens) if counts is None else None)

    def marked(self, mark: int) -> tuple[MambaState, ...]:
        """The states after `mark` tokens, of those that were asked for."""
        return self._states(torch.full(self.saved[0].shape[1:2], mark), self.ends[mark]) if self.before else ()

    def _states(self, counts: Tensor | None, ssm: Tensor | None) -> tuple[MambaState, ...]:
        if not self.before:  # a model without recurrent layers, whose pass kept nothing
            return ()
        _, b, s, _ = self.saved[0].shape
        num, (conv, state), known = len(self.before), self.before[0], ssm is not None
        conv = conv.new_empty(num, *conv.shape)
        ssm = state.new_empty(num, *state.shape) if ssm is None else ssm
        function("tt_advance")(
            *(ctypes.addressof(self.tower.shape), ctypes.addressof(self.tower.layers), self.memory.buffer_info()[0]),
            *(v.data_ptr() for v in self.saved),
            *(b, s, None if counts is None else counts.data_ptr()),
            *(conv.data_ptr(), None if known else ssm.data_ptr(), threads()),
        )
        return tuple(map(MambaState, conv.unbind(), ssm.unbind()))


class _WatchedLayer(NamedTuple):
    """The hooks of a layer's modules, and each module's children now and as they were when they were packed."""

    hooks: list[dict[int, Any]]
    children: list[tuple[dict[str, nn.Module | None], dict[str, nn.Module | None]]]

    @classmethod
    def of(cls, layer: Layer) -> "_WatchedLayer":
        modules = list(layer.modules())
        hooks: list[dict[int, Any]] = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        return cls(hooks, [(m._modules, dict(m._modules)) for m in modules if m._modules])


def _num_gates(config: TwoTowerConfig) -> int:
    """As in TowerShape in c/calls.h."""
    return 2 if "G" in config.pattern else 1


def _saved_widths(config: TwoTowerConfig) -> tuple[int, int, int]:
    """How wide a token's projected, convolved and steps are, see TowerPass in c/calls.h."""
    gates = config.mamba_num_heads * _num_gates(config)
    return config.mamba_width + config.conv_width + gates, config.conv_width, gates


def _shape(config: TwoTowerConfig, weights: list[LayerTensors]) -> ctypes.Structure:
    c = config
    low, high = c.time_step_limit
    panels = [p.panels for layer in weights for p in layer.products.values()]
    panels += [layer.named["up"] for layer in weights if "up" in layer.named]
    return filled(
        "TowerShape",
        num_layers=len(weights),
        width=c.hidden_size,
        bf16=panels[0].dtype == torch.bfloat16,
        eps=c.layer_norm_epsilon,
        mamba_heads=c.mamba_num_heads,
        mamba_head=c.mamba_head_dim,
        mamba_groups=c.mamba_num_groups,
        state=c.mamba_state_size,
        kernel=c.conv_kernel,
        gates=_num_gates(c),
        norm_first=c.mamba_norm == "before_gate",
        shortest=low,
        longest=high,
        layer_norm=c.norm_type == "layer",
        heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads,
        head=c.head_dim,
        qk_norm=NORMS.index(c.qk_norm),
        softcap=c.attention_softcap or 0,
        latent_turned=c.qk_rope_head_dim,
        latent_plain=c.qk_nope_head_dim,
        value_head=c.v_head_dim or c.head_dim,
        norm_behind_rope=c.qk_norm_behind_rope,
        clip=c.clip_qkv or 0,
        activation=ACTIVATIONS.index(c.mlp_hidden_act),
        gated=c.gated_mlp,
        glu_limit=math.inf if c.glu_limit is None else c.glu_limit,
        glu_offset=c.glu_offset,
        glu_gate_scale=c.glu_gate_scale,
        experts=c.num_experts,
        active=c.num_experts_per_tok,
        groups=c.expert_num_groups,
        kept=c.expert_topk_groups,
        normalise=c.norm_topk_prob,
        softmax=c.router == "softmax",
        expert=c.expert_intermediate_size,
        latent=c.moe_latent_size,
        weigh_inputs=c.weigh_expert_inputs,
        factor=c.routed_scaling_factor,
    )


def _take_experts(mixer: nn.Module) -> dict[str, Tensor]:
    """Packs a layer's experts into panels (e, panels, inputs, NR) and frees the mixer's own."""
    if not isinstance(mixer, MixtureOfExperts):
        return {}
    taken = {"up": pack_panels(mixer.up), "down": pack_panels(mixer.down.transpose(1, 2))}
    del mixer.up, mixer.down
    return taken


def _tensors(config: TwoTowerConfig, layer: Layer, experts: dict[str, Tensor]) -> LayerTensors:
    mixer = layer.mixer
    found: dict[str, Tensor | None] = {**experts}
    norms = {"norm": layer.norm, "post_norm": layer.post_norm}
    numbers: dict[str, float] = {"joins": layer.joins, "scale": layer.scale}
    products: dict[str, Linear | None]
    if isinstance(mixer, Mamba2):
        products = {"first": mixer.in_proj, "second": mixer.out_proj}
        found |= {"taps": mixer.conv_taps, "conv_bias": mixer.conv_bias, "dt_bias": mixer.dt_bias}
        found |= {"A": mixer.A, "D": mixer.D, "gate_norm": mixer.norm, "scales": mixer.scales}
    elif isinstance(mixer, DeltaNet):
        products = {"first": mixer.in_proj, "second": mixer.out_proj}
        found |= {"taps": mixer.conv_taps, "dt_bias": mixer.dt_bias, "A": -mixer.A_log.detach().exp()}
        found["gate_norm"] = mixer.norm.detach().float().repeat(config.mamba_num_heads)
    elif isinstance(mixer, Attention):
        from_x = mixer.qkv_proj
        products = {"second": mixer.o_proj, "gate": mixer.gate_proj}
        if isinstance(from_x, Linear):
            products["first"] = from_x
        else:
            products |= {"first": from_x.q_proj, "q_latent": from_x.q_a_proj}
            products |= {"kv_latent": from_x.kv_a_proj, "kv_expand": from_x.kv_b_proj}
            norms |= {"q_latent_norm": from_x.q_a_norm, "kv_latent_norm": from_x.kv_a_norm}
            numbers["latent_eps"] = from_x.kv_a_norm.eps
        norms |= {"q_norm": mixer.q_norm, "k_norm": mixer.k_norm}
        kind = config.attention_kinds[mixer.index]
        turned = 0 if kind.rope_parameters is None else kind.rope_parameters.turned(config.head_dim)
        numbers |= {"positioning": mixer.index, "turned": turned, "attention_scale": mixer.scale}
        numbers |= {"window": kind.window or 0, "chunk": kind.chunk or 0}
        found |= {"sinks": mixer.sinks, "slopes": torch.tensor(mixer.slopes) if mixer.slopes else None}
    elif isinstance(mixer, MLP):
        products = {"first": mixer.up_proj, "second": mixer.down_proj}
        found["alphas"] = None if mixer.alphas is None else F.softplus(mixer.alphas)
    else:
        assert isinstance(mixer, MixtureOfExperts)  # `missing` has looked
        shared = mixer.shared
        products = {} if shared is None else {"first": shared.up_proj, "second": shared.down_proj}
        products |= {"latent_in": mixer.latent_in, "latent_out": mixer.latent_out}
        found |= {"router": mixer.gate, "router_bias": mixer.gate_bias, "correction": mixer.correction_bias}
        found |= {"up_bias": mixer.up_bias, "down_bias": mixer.down_bias, "shared_gate": mixer.shared_gate}
    packed: dict[str, PanelWeight] = {}
    for name, projection in products.items():
        if projection is not None:
            assert isinstance(projection.packed, PanelWeight)
            packed[name] = projection.packed
            found[f"{name}_bias"] = projection.bias
    return LayerTensors(
        layer.kind,
        packed,
        {name: norm for name, norm in norms.items() if norm is not None},
        {name: tensor for name, tensor in found.items() if tensor is not None},
        numbers,
    )


def _layer_weights(tensors: LayerTensors) -> ctypes.Structure:
    """The addresses of a layer's tensors."""
    pointers: dict[str, Any] = {name: tensor.data_ptr() for name, tensor in tensors.named.items()}
    for name, packed in tensors.products.items():
        bias = pointers.pop(f"{name}_bias", 0)
        pointers[name] = filled("Product", weight=packed.panels.data_ptr(), bias=bias, outputs=packed.outputs)
    norms = {name: _norm(norm) for name, norm in tensors.norms.items()}
    return filled("LayerWeights", kind=ord(tensors.kind), **pointers, **norms, **tensors.numbers)


def _norm(norm: Norm) -> ctypes.Structure:
    return filled("Norm", weight=norm.weight.data_ptr(), bias=0 if norm.bias is None else norm.bias.data_ptr())


def _positioning(at: Positioning) -> ctypes.Structure:
    fields: dict[str, int] = {}
    if at.rope is not None:
        batch = 0 if at.rope.cos.shape[0] == 1 else at.rope.cos.stride(0)
        fields |= {"cosine": at.rope.cos.data_ptr(), "sine": at.rope.sin.data_ptr(), "angle_batch": batch}
    if at.query_scale is not None:
        batch = 0 if at.query_scale.shape[0] == 1 else at.query_scale.stride(0)
        fields |= {"query_scale": at.query_scale.data_ptr(), "scale_batch": batch}
    return filled("Positioning", **fields)

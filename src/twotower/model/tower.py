"""A stack of layers, run causally (context tower) or over one block (denoiser tower).

Letters: b batch, s tokens, t cached tokens rounded up, d width, i layers, h heads, p head width, n state width.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.model.attention import Attention
from twotower.model.layer import Layer, RecurrentMixer
from twotower.model.linear import Pack
from twotower.model.norm import Norm
from twotower.model.passes import CausalPass, PassInputs
from twotower.model.recurrent import Recurrent
from twotower.model.state import ContextState, KeyBuffer, MambaState
from twotower.model.time_conditioning import Modulation
from twotower.ops import unmask
from twotower.ops.attention import block_mask, causal_mask
from twotower.ops.rope import Positioning, Rotation, frequencies, query_scale, rotation
from twotower.ops.ssd import CHUNK
from twotower.ops.transfer import to_device
from twotower.rope import AttentionType, Rope

if TYPE_CHECKING:  # the type of a guest, and nothing that runs: the reference imports no backend
    from twotower.backends.protocol import LogitOps, TowerGuest


class Replay(NamedTuple):
    """What one recurrent layer needs to advance its state over part of a block: inputs, start, and the end if known."""

    inputs: Any
    start: MambaState
    end: Tensor | None  # (b, h, p, n)


def _replay(mixers: Sequence[Recurrent], replays: Sequence[Replay], counts: Tensor | None) -> tuple[MambaState, ...]:
    """`CausalPass.advance`, layer by layer."""
    pairs = zip(mixers, replays, strict=True)
    return tuple(mixer.advance(r.inputs, r.start, counts, r.end) for mixer, r in pairs)


def positionings(
    config: TwoTowerConfig, positions: Tensor, dtype: torch.dtype, lengths: Tensor | None = None
) -> tuple[Positioning, ...]:
    """For each of the config's `attention_kinds` what positions (b or 1, s) int64 do.

    `lengths` (b, s or 1) int64 on the CPU are the `TwoTowerConfig.rope_length` of the texts, where it is not 0 for all.
    """
    distinct, index = (None, None) if lengths is None else lengths.unique(return_inverse=True)

    def turns(rope: Rope) -> Rotation:
        if distinct is None:
            each = frequencies(rope, config.head_dim, 0)
        else:
            every = torch.stack([frequencies(rope, config.head_dim, length) for length in distinct.tolist()])
            each = every[index].unsqueeze(-2)  # (b, s or 1, 1, n/2)
        return rotation(positions, each, rope.attention_factor, dtype)

    def one(kind: AttentionType) -> Positioning:
        scale = query_scale(positions, kind, dtype) if kind.query_growth else None
        return Positioning(None if kind.rope_parameters is None else turns(kind.rope_parameters), scale)

    return tuple(map(one, config.attention_kinds))


class Tower(nn.Module):
    """Embedding, layers and last norm; the head belongs to `TwoTower`.

    `indices`, ascending, say which layers of the config's pattern it has, None all of them. The others add nothing to
    the residual stream. Layers keep their indices in the names of tensors.

    `guest`, where a backend has put one, runs the passes in the place of the layers here, which then only hold the
    weights.
    """

    def __init__(self, config: TwoTowerConfig, dtype: torch.dtype, indices: Sequence[int] | None = None) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=dtype))
        self.position_embeddings: nn.Parameter | None = None
        if config.num_positions:
            table = torch.empty(config.num_positions, config.hidden_size, dtype=dtype)
            self.position_embeddings = nn.Parameter(table)
        self.embedding_norm = Norm(config, config.hidden_size, dtype=dtype) if config.embedding_norm else None
        indices = range(config.num_layers) if indices is None else indices
        # Of parallel layers, the first one that is there is the one that the others join.
        pairs = itertools.pairwise((-1, *indices))
        joins = [all(config.joins[before + 1 : i + 1]) for before, i in pairs]
        self.layers = nn.ModuleList(Layer(config, i, dtype, joins=j) for i, j in zip(indices, joins, strict=True))
        self.norm_f = Norm(config, config.hidden_size, dtype=dtype)
        self.activation_dtype = dtype
        self.key_dtype: torch.dtype | None = None  # of cached keys and values, if it isn't the activations'
        self.guest: TowerGuest | None = None
        self._positioning: tuple[Positioning, ...] = ()  # of all positions met so far, see `_positioned`

    @property
    def stack(self) -> list[Layer]:
        """The layers in order."""
        return cast("list[Layer]", list(self.layers))

    @property
    def logit_ops(self) -> "LogitOps":
        """The operations on this tower's logits that decoding calls at every step."""
        return unmask if self.guest is None else self.guest.logit_ops

    def initial_state(self, batch_size: int, capacity: int = 0, planned: Sequence[int] | None = None) -> ContextState:
        """The state before any token, with room for `capacity` tokens per row.

        `planned` are the numbers of tokens that the rows will have, by default `capacity`; RoPE may depend on them."""
        planned = (capacity,) * batch_size if planned is None else planned
        rope_lengths = tuple(map(self.config.rope_length, planned))
        c = self.config
        num_attention = c.pattern.count("*")
        dtype = self.key_dtype or self.activation_dtype
        empty = self.embeddings.new_zeros(batch_size, c.num_key_value_heads, 0, c.head_dim, dtype=dtype)
        buffer = KeyBuffer([empty] * num_attention, [empty] * num_attention, (0,) * batch_size)
        mamba = tuple(mixer.initial_state(batch_size) for mixer in self._recurrent())
        return ContextState((0,) * batch_size, mamba, buffer, None, rope_lengths).reserve(capacity)

    def causal(self, ids: Tensor, state: ContextState, marks: tuple[int, ...] = ()) -> CausalPass:
        """Runs ids (b, s) after `state`; the result's `commit` decides how many tokens of each row stay, and drops the
        padding behind shorter rows with the rest.

        `marks`, ascending and between 0 and s, ask for the recurrent states after so many tokens; they cost no pass.
        """
        state = state.reserve(ids.shape[1])
        places = state.buffer.places(state.lengths, ids.shape[1]) if state.buffer.keys else None
        inputs = self._inputs(ids, state, places, state.padded_length(ids.shape[1]))
        run = self._causal if self.guest is None else self.guest.causal
        result = run(inputs, marks)
        state.buffer.tip = None
        return result

    def block(
        self,
        ids: Tensor,
        seed: ContextState,
        modulation: Tensor | None,
        widths: tuple[int, ...] | None = None,
    ) -> Tensor:
        """The denoiser over one block ids (b, s), seeded by the context state, to hidden (b, s, d); only reads `seed`.

        `modulation` (i, b, 3, 1, d) is what `TimeConditioning` gives; `widths` are the rows' own block lengths where
        they differ, and places beyond are padding that nobody sees.
        """
        inputs = self._inputs(ids, seed, None, seed.padded_length())
        run = self._block if self.guest is None else self.guest.block
        return run(inputs, modulation, widths or (ids.shape[1],) * seed.batch_size)

    def embed(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """(b, s) to the residual stream (b, s, d). `positions` (b or 1, s) int64 are read by models that have learnt
        positions; those behind the last one get the last one's, which only padding may be."""
        if self.guest is None:
            wide = self.config.residual_in_fp32 and self.activation_dtype != torch.float64
            x = F.embedding(ids, self.embeddings).to(torch.float32 if wide else self.activation_dtype)
        else:
            x = self.guest.embed(ids, self.embeddings)
        if self.config.embedding_scale != 1.0:
            x = x * self.config.embedding_scale
        if self.embedding_norm is not None:
            x = self.embedding_norm(x, x.dtype)
        if self.position_embeddings is None:
            return x
        assert positions is not None
        return x + F.embedding(positions.clamp(max=self.config.num_positions - 1), self.position_embeddings).to(x.dtype)

    def finish(self, x: Tensor) -> Tensor:
        """The last norm of the residual stream x (b, s, d)."""
        return self.norm_f(x, self.activation_dtype)

    def pack_(self, activation_dtype: torch.dtype, pack: Pack) -> None:
        """Packs every constant weight for inference with activations of the given dtype."""
        self.activation_dtype = activation_dtype
        for layer in self.stack:
            layer.pack_(activation_dtype, pack)
        self.norm_f.pack_(activation_dtype)
        if self.embedding_norm is not None:
            self.embedding_norm.pack_(activation_dtype)

    def released_tensors(self) -> dict[str, Tensor]:
        found = {"embeddings.weight": self.embeddings.data}
        if self.position_embeddings is not None:
            found["position_embeddings.weight"] = self.position_embeddings.data
        if self.embedding_norm is not None:
            found |= self.embedding_norm.released_tensors("embedding_norm")
        for layer in self.stack:
            found |= {f"layers.{layer.index}.{k}": v for k, v in layer.released_tensors().items()}
        return found | self.norm_f.released_tensors("norm_f")

    def _reaches(self) -> list[dict[str, Any]]:
        """For each of the config's `attention_kinds` the settings of its masks."""
        slopes = self.config.alibi_slopes
        return [{"window": kind.window, "chunk": kind.chunk, "slopes": slopes} for kind in self.config.attention_kinds]

    def _recurrent(self) -> list[Recurrent]:
        return [layer.mixer for layer in self.stack if isinstance(layer.mixer, RecurrentMixer)]

    def _inputs(self, ids: Tensor, state: ContextState, places: Tensor | None, used: int) -> PassInputs:
        """`used` is the number of places of the keys that a row may see, rounded up."""
        starts, positions = state.lengths, None
        if self.position_embeddings is not None:
            limit = self.config.num_positions
            if max(starts) >= limit:
                raise ValueError(
                    f"a text has {max(starts) + 1} tokens, must have at most the model's {limit} positions"
                )
            positions = to_device(starts, ids.device)[:, None] + torch.arange(ids.shape[1], device=ids.device)
        positioning = self._positioned(state, ids.shape[1], ids.device)
        return PassInputs(self.embed(ids, positions), state, state.buffer.past(used), positioning, places)

    def _causal(self, inputs: PassInputs, marks: tuple[int, ...]) -> CausalPass:
        x, state, past, positioning, places = inputs
        s, t = x.shape[1], past.length if past.keys else 0
        device, dtype = x.device, self.activation_dtype
        masks = [
            causal_mask(state.lengths, s, t, dtype, device, **reach) for reach in (self._reaches() if past.keys else ())
        ]
        replays: list[Replay] = []
        marked: list[tuple[MambaState, ...]] = []
        read = x
        for layer in self.stack:
            read = read if layer.joins else x
            entered = layer.enter(read, None, dtype)
            if isinstance(layer.mixer, RecurrentMixer):
                mixed, replay, states = self._causal_recurrent(layer.mixer, entered, state.mamba[layer.memory], marks)
                replays.append(replay)
                marked.append(states)
            elif isinstance(layer.mixer, Attention):
                index = layer.mixer.index
                projected = layer.mixer.project(entered, positioning[index])
                state.buffer.append_(layer.memory, state.lengths, places, projected.key, projected.value)
                mixed = layer.mixer.causal(projected, past.layer(layer.memory), masks[index])
            else:
                mixed = layer.mixer(entered)
            x = layer.leave(x, mixed, None)
        by_mark = {mark: tuple(states[i] for states in marked) for i, mark in enumerate(marks)}
        return CausalPass(self.finish(x), state, functools.partial(_replay, self._recurrent(), replays), by_mark)

    def _causal_recurrent(
        self, mixer: Recurrent, x: Tensor, start: MambaState, marks: tuple[int, ...]
    ) -> tuple[Tensor, Replay, tuple[MambaState, ...]]:
        """The mixer's output (b, s, d), what a commit needs, and the states at the marks."""
        inputs = mixer.prepare(x, start.conv)
        if 1 < x.shape[1] <= CHUNK and not marks:
            # A block: its end state waits until it is known how much of the block stays.
            return mixer.outputs(inputs, start, self.activation_dtype), Replay(inputs, start, None), ()
        mixed, end, states = mixer.scan(inputs, start, marks, self.activation_dtype)
        return mixed, Replay(inputs, start, end), states

    def _block(self, inputs: PassInputs, modulation: Tensor | None, widths: tuple[int, ...]) -> Tensor:
        x, seed, past, positioning, _ = inputs
        s, t = x.shape[1], past.length if past.keys else 0
        device, dtype = x.device, self.activation_dtype
        masks = [
            block_mask(seed.lengths, widths, s, t, dtype, device, **reach)
            for reach in (self._reaches() if past.keys else ())
        ]
        read = x
        for i, layer in enumerate(self.stack):
            own = None if modulation is None else Modulation(*modulation[i].unbind(1))
            read = read if layer.joins else x
            entered = layer.enter(read, own, dtype)
            if isinstance(layer.mixer, RecurrentMixer):
                start = seed.mamba[layer.memory]
                mixer: Recurrent = layer.mixer
                mixed = mixer.outputs(mixer.prepare(entered, start.conv), start, dtype)
            elif isinstance(layer.mixer, Attention):
                index = layer.mixer.index
                projected = layer.mixer.project(entered, positioning[index])
                mixed = layer.mixer.block(projected, past.layer(layer.memory), masks[index])
            else:
                mixed = layer.mixer(entered)
            x = layer.leave(x, mixed, own)
        return self.finish(x)

    def _positioned(self, state: ContextState, s: int, device: torch.device) -> tuple[Positioning, ...]:
        """For each of the config's `attention_kinds` what the positions of s tokens after each row's earlier ones do.
        It comes from tables that grow with the positions met, except for texts for which RoPE is not as usual."""
        starts = state.lengths
        if any(state.rope_lengths):
            place = to_device(starts, device)[:, None] + torch.arange(s, device=device)
            return positionings(self.config, place, self.activation_dtype, torch.tensor(state.rope_lengths)[:, None])
        tables = [p.query_scale if p.rope is None else p.rope.cos for p in self._positioning]
        known = next((table for table in tables if table is not None), None)
        end = max(starts) + s
        if not self._positioning or (
            known is not None and (known.shape[1] < end or known.dtype != self.activation_dtype)
        ):
            with torch.inference_mode(False):  # a later pass may want gradients
                positions = torch.arange(max(2 * end, 512), device=device)[None]  # twice: a context grows
                self._positioning = positionings(self.config, positions, self.activation_dtype)
        if len(set(starts)) == 1:
            return tuple(p.each(lambda table: table[:, starts[0] : end]) for p in self._positioning)
        index = to_device(starts, device)[:, None] + torch.arange(s, device=device)
        # not table[0, index]: on a CPU that wakes PyTorch's threads from 3,000 numbers on, see `state.rows_of`
        places = index.flatten()
        return tuple(
            p.each(lambda table: table[0].index_select(0, places).unflatten(0, index.shape)) for p in self._positioning
        )

"""A stack of layers, run causally (context tower) or over one block (denoiser tower).

Letters: b batch, s tokens, t cached tokens rounded up, d width, i layers, h heads, p head width, n state width.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.model.attention import Attention, Rotation, rotation
from twotower.model.layer import Layer
from twotower.model.linear import Pack
from twotower.model.mamba2 import Mamba2, MambaInputs
from twotower.model.passes import CausalPass, PassInputs
from twotower.model.state import ContextState, KeyBuffer, MambaState
from twotower.model.time_conditioning import Modulation
from twotower.ops import unmask
from twotower.ops.attention import block_mask, causal_mask
from twotower.ops.norm import rms_norm
from twotower.ops.ssd import CHUNK
from twotower.ops.transfer import to_device

if TYPE_CHECKING:  # the type of a guest, and nothing that runs: the reference imports no backend
    from twotower.backends.protocol import LogitOps, TowerGuest


class Replay(NamedTuple):
    """What one `M` layer needs to advance its state over part of a block: inputs, start, and the end if known."""

    inputs: MambaInputs
    start: MambaState
    end: Tensor | None  # (b, h, p, n)


def _replay(mixers: Sequence[Mamba2], replays: Sequence[Replay], counts: Tensor | None) -> tuple[MambaState, ...]:
    """`CausalPass.advance`, layer by layer."""
    pairs = zip(mixers, replays, strict=True)
    return tuple(mixer.advance(r.inputs, r.start, counts, r.end) for mixer, r in pairs)


class Tower(nn.Module):
    """Embedding, layers and last norm; the head belongs to `TwoTower`.

    `guest`, where a backend has put one, runs the passes in the place of the layers here, which then only hold the
    weights.
    """

    def __init__(self, config: TwoTowerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=dtype))
        self.layers = nn.ModuleList(Layer(config, kind, dtype) for kind in config.pattern)
        self.norm_f = nn.Parameter(torch.empty(config.hidden_size, dtype=dtype))
        self.activation_dtype = dtype
        self.guest: TowerGuest | None = None
        self._rotations: Rotation | None = None  # RoPE's for all positions met so far

    @property
    def stack(self) -> list[Layer]:
        """The layers in order."""
        return cast("list[Layer]", list(self.layers))

    @property
    def logit_ops(self) -> "LogitOps":
        """The operations on this tower's logits that decoding calls at every step."""
        return unmask if self.guest is None else self.guest.logit_ops

    def initial_state(self, batch_size: int, capacity: int = 0) -> ContextState:
        """The state before any token, with room for `capacity` tokens per row."""
        c = self.config
        num_attention = c.pattern.count("*")
        empty = self.embeddings.new_zeros(batch_size, c.num_key_value_heads, 0, c.head_dim, dtype=self.activation_dtype)
        buffer = KeyBuffer([empty] * num_attention, [empty] * num_attention, (0,) * batch_size)
        mamba = tuple(mixer.initial_state(batch_size) for mixer in self._mambas())
        return ContextState((0,) * batch_size, mamba, buffer, None).reserve(capacity)

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

    def embed(self, ids: Tensor) -> Tensor:
        """(b, s) to the residual stream (b, s, d)."""
        wide = self.config.residual_in_fp32 and self.activation_dtype != torch.float64
        return F.embedding(ids, self.embeddings).to(torch.float32 if wide else self.activation_dtype)

    def finish(self, x: Tensor) -> Tensor:
        """The last norm of the residual stream x (b, s, d)."""
        return rms_norm(x, self.norm_f, self.config.layer_norm_epsilon, self.activation_dtype)

    def pack_(self, activation_dtype: torch.dtype, pack: Pack) -> None:
        """Packs every constant weight for inference with activations of the given dtype."""
        self.activation_dtype = activation_dtype
        for layer in self.stack:
            layer.pack_(activation_dtype, pack)
        self.norm_f.data = self.norm_f.data.to(torch.promote_types(activation_dtype, torch.float32))

    def released_tensors(self) -> dict[str, Tensor]:
        found = {"embeddings.weight": self.embeddings.data}
        for i, layer in enumerate(self.stack):
            found |= {f"layers.{i}.{k}": v for k, v in layer.released_tensors().items()}
        return found | {"norm_f.weight": self.norm_f.data}

    def _mambas(self) -> list[Mamba2]:
        return [layer.mixer for layer in self.stack if isinstance(layer.mixer, Mamba2)]

    def _inputs(self, ids: Tensor, state: ContextState, places: Tensor | None, used: int) -> PassInputs:
        """`used` is the number of places of the keys that a row may see, rounded up."""
        rope = self._rotation(state.lengths, ids.shape[1], ids.device)
        return PassInputs(self.embed(ids), state, state.buffer.past(used), rope, places)

    def _causal(self, inputs: PassInputs, marks: tuple[int, ...]) -> CausalPass:
        x, state, past, rope, places = inputs
        mask = None
        if past.keys:
            mask = causal_mask(state.lengths, x.shape[1], past.length, self.activation_dtype, x.device)
        replays: list[Replay] = []
        marked: list[tuple[MambaState, ...]] = []
        num_attention = 0
        for layer in self.stack:
            entered = layer.enter(x, None, self.activation_dtype)
            if isinstance(layer.mixer, Mamba2):
                mixed, replay, states = self._causal_mamba(layer.mixer, entered, state.mamba[len(replays)], marks)
                replays.append(replay)
                marked.append(states)
            elif isinstance(layer.mixer, Attention):
                query, key, value = layer.mixer.project(entered, rope)
                state.buffer.append_(num_attention, state.lengths, places, key, value)
                mixed = layer.mixer.causal(query, past.layer(num_attention), mask)
                num_attention += 1
            else:
                mixed = layer.mixer(entered)
            x = layer.leave(x, mixed, None)
        by_mark = {mark: tuple(states[i] for states in marked) for i, mark in enumerate(marks)}
        return CausalPass(self.finish(x), state, functools.partial(_replay, self._mambas(), replays), by_mark)

    def _causal_mamba(
        self, mixer: Mamba2, x: Tensor, start: MambaState, marks: tuple[int, ...]
    ) -> tuple[Tensor, Replay, tuple[MambaState, ...]]:
        """The mixer's output (b, s, d), what a commit needs, and the states at the marks."""
        inputs = mixer.prepare(x, start.conv)
        if 1 < x.shape[1] <= CHUNK and not marks:
            # A block: its end state waits until it is known how much of the block stays.
            return mixer.outputs(inputs, start, self.activation_dtype), Replay(inputs, start, None), ()
        mixed, end, states = mixer.scan(inputs, start, marks, self.activation_dtype)
        return mixed, Replay(inputs, start, end), states

    def _block(self, inputs: PassInputs, modulation: Tensor | None, widths: tuple[int, ...]) -> Tensor:
        x, seed, past, rope, _ = inputs
        mask = None
        if past.keys:
            mask = block_mask(seed.lengths, widths, x.shape[1], past.length, self.activation_dtype, x.device)
        num_mamba = num_attention = 0
        for i, layer in enumerate(self.stack):
            own = None if modulation is None else Modulation(*modulation[i].unbind(1))
            entered = layer.enter(x, own, self.activation_dtype)
            if isinstance(layer.mixer, Mamba2):
                start = seed.mamba[num_mamba]
                mixed = layer.mixer.outputs(layer.mixer.prepare(entered, start.conv), start, self.activation_dtype)
                num_mamba += 1
            elif isinstance(layer.mixer, Attention):
                mixed = layer.mixer.block(layer.mixer.project(entered, rope), past.layer(num_attention), mask)
                num_attention += 1
            else:
                mixed = layer.mixer(entered)
            x = layer.leave(x, mixed, own)
        return self.finish(x)

    def _rotation(self, starts: tuple[int, ...], s: int, device: torch.device) -> Rotation | None:
        """RoPE's angles for s tokens after each row's `starts`, from a table that grows with the positions met."""
        c = self.config
        if not c.use_rope:
            return None
        known, end = self._rotations, max(starts) + s
        if known is None or known.cos.shape[1] < end or known.cos.dtype != self.activation_dtype:
            with torch.inference_mode(False):  # a later pass may want gradients
                positions = torch.arange(max(2 * end, 512), device=device)[None]  # twice: a context grows
                known = self._rotations = rotation(positions, c.head_dim, c.rope_theta, self.activation_dtype)
        if len(set(starts)) == 1:
            return Rotation(*(part[:, starts[0] : end] for part in known))
        index = to_device(starts, device)[:, None] + torch.arange(s, device=device)
        return Rotation(*(part[0, index] for part in known))

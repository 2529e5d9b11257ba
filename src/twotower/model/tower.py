"""A stack of layers, run causally (context tower) or over one block (denoiser tower).

Letters: b batch, s tokens, t cached tokens rounded up, d width, h heads, k KV heads, p head width.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.model.attention import Attention, Rotation, rotation
from twotower.model.fused import FusedTower
from twotower.model.layer import Layer
from twotower.model.mamba2 import Mamba2, Prepared
from twotower.model.state import ContextState, KeyBuffer, MambaState
from twotower.model.time_conditioning import Modulation
from twotower.ops.backend import Backend
from twotower.ops.kernels import REFERENCE, kernels
from twotower.ops.ssd import CHUNK
from twotower.ops.transfer import to_device


class Replay(NamedTuple):
    """What one `M` layer needs to advance its state over part of a block: inputs, start, and the end if known."""

    prepared: Prepared
    start: MambaState
    end: Tensor | None  # (b, h, p, n)


class CausalPass(NamedTuple):
    """The context tower over s tokens, before it is decided how many of them stay.

    hidden (b, s, d) after the last norm; `state` is the one before the tokens, whose key buffer already holds them.
    `advance` gives the recurrent states, one per `M` layer, after each row's first counts[b] (b,) int64 tokens, or all
    of them for None; `marks` has those after each of the numbers of tokens that were asked for.
    """

    hidden: Tensor
    state: ContextState
    advance: Callable[[Tensor | None], tuple[MambaState, ...]]
    marks: dict[int, tuple[MambaState, ...]]


class _CausalMamba(NamedTuple):
    """A mixer's output (b, s, d), what a commit needs, and the states at the marks."""

    mixed: Tensor
    replay: Replay
    marked: tuple[MambaState, ...]


def _replay(mixers: Sequence[Mamba2], replays: Sequence[Replay], counts: Tensor | None) -> tuple[MambaState, ...]:
    """`Scored.advance`, layer by layer."""
    pairs = zip(mixers, replays, strict=True)
    return tuple(mixer.advance(r.prepared, r.start, counts, r.end) for mixer, r in pairs)


class Tower(nn.Module):
    """Embedding, layers and last norm; the head belongs to `TwoTower`."""

    def __init__(self, config: TwoTowerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=dtype))
        self.layers = nn.ModuleList(Layer(config, kind, dtype) for kind in config.pattern)
        self.norm_f = nn.Parameter(torch.empty(config.hidden_size, dtype=dtype))
        self.activation_dtype = dtype
        self.kernels = REFERENCE
        self.fused: FusedTower | None = None
        self._rotations: Rotation | None = None  # RoPE's for all positions met so far

    def initial_state(self, batch_size: int, capacity: int = 0) -> ContextState:
        """The state before any token, with room for `capacity` tokens per row."""
        c = self.config
        num_attention = c.pattern.count("*")
        empty = self.embeddings.new_zeros(batch_size, c.num_key_value_heads, 0, c.head_dim, dtype=self.activation_dtype)
        buffer = KeyBuffer([empty] * num_attention, [empty] * num_attention, (0,) * batch_size)
        mixers = [layer.mixer for layer in self.stack if isinstance(layer.mixer, Mamba2)]
        mamba = tuple(mixer.initial_state(batch_size) for mixer in mixers)
        return ContextState((0,) * batch_size, mamba, buffer, None).reserve(capacity)

    @property
    def stack(self) -> list[Layer]:
        """The layers in order."""
        return cast("list[Layer]", list(self.layers))

    def causal(self, ids: Tensor, state: ContextState, marks: tuple[int, ...] = ()) -> CausalPass:
        """Runs ids (b, s) after `state`; `commit` decides how many tokens of each row stay; padding is the rest.

        `marks`, ascending and between 0 and s, ask for the recurrent states after so many tokens; they cost no pass.
        """
        s = ids.shape[1]
        state = state.reserve(s)
        rope = self._rotation(state.lengths, s, ids.device)
        t = state.padded_length(s)
        past = state.buffer.past(t)
        places = state.buffer.places(state.lengths, s) if state.buffer.keys else None
        x = self.embed(ids)
        if self.fused is not None and self.fused.usable:
            done = self.fused.causal(x, state, past, places, rope, marks)
            state.buffer.tip = None
            return CausalPass(done.hidden, state, done.advance, {mark: done.marked(mark) for mark in marks})
        mask = None
        if state.buffer.keys:
            mask = self.kernels.causal_mask(state.lengths, s, t, self.activation_dtype, ids.device)
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
                q, key, value = layer.mixer.project(entered, rope)
                state.buffer.append_(num_attention, state.lengths, places, key, value)
                keys, values = past.keys[num_attention], past.values[num_attention]
                mixed = layer.mixer.output(self.kernels.cached_attention(q, keys, values, mask, past.pages))
                num_attention += 1
            else:
                mixed = layer.mixer(entered)
            x = layer.leave(x, mixed, None)
        state.buffer.tip = None
        by_mark = {mark: tuple(states[i] for states in marked) for i, mark in enumerate(marks)}
        mixers = [layer.mixer for layer in self.stack if isinstance(layer.mixer, Mamba2)]
        return CausalPass(self.finish(x), state, functools.partial(_replay, mixers, replays), by_mark)

    def commit(self, scored: CausalPass, counts: tuple[int, ...], next_logits: Tensor | None) -> ContextState:
        """The state after the first counts[b] of the scored tokens of each row.

        Keys are truncated; a recurrent state can't be, so it is replayed from the block's start. Mutates nothing that
        another state still reads. Scored tokens can be committed once.
        """
        state = scored.state
        lengths = tuple(n + c for n, c in zip(state.lengths, counts, strict=True))
        whole = min(counts) == scored.hidden.shape[1]
        index = None if whole else to_device(counts, scored.hidden.device)
        mamba = scored.advance(index)
        assert state.buffer.tip is None, "these scored tokens were committed before"
        state.buffer.tip = lengths
        return ContextState(lengths, mamba, state.buffer, next_logits)

    def block(
        self,
        ids: Tensor,
        seed: ContextState,
        modulation: Tensor | None,
        widths: tuple[int, ...] | None = None,
    ) -> Tensor:
        """The denoiser over one block ids (b, s), seeded by the context state, to hidden (b, s, d); only reads.

        `modulation` (i, b, 3, 1, d) is what `TimeConditioning` gives; `widths` are the rows' own block lengths where
        they differ, and places beyond are padding that nobody sees.
        """
        s = ids.shape[1]
        rope = self._rotation(seed.lengths, s, ids.device)
        used = seed.padded_length()
        past = seed.buffer.past(used)
        widths = widths or (s,) * len(seed.lengths)
        x = self.embed(ids)
        if self.fused is not None and self.fused.usable:
            return self.fused.block(x, seed, past, rope, modulation, widths)
        mask = None
        if seed.buffer.keys:
            mask = self.kernels.block_mask(seed.lengths, widths, s, used, self.activation_dtype, ids.device)
        num_mamba = num_attention = 0
        for i, layer in enumerate(self.stack):
            own = None if modulation is None else Modulation(*modulation[i].unbind(1))
            entered = layer.enter(x, own, self.activation_dtype)
            if isinstance(layer.mixer, Mamba2):
                start = seed.mamba[num_mamba]
                mixed = layer.mixer.outputs(layer.mixer.prepare(entered, start.conv), start, self.activation_dtype)
                num_mamba += 1
            elif isinstance(layer.mixer, Attention):
                q, key, value = layer.mixer.project(entered, rope)
                keys, values = past.keys[num_attention], past.values[num_attention]
                attended = self.kernels.seeded_attention(q, key, value, keys, values, mask, past.pages)
                mixed = layer.mixer.output(attended)
                num_attention += 1
            else:
                mixed = layer.mixer(entered)
            x = layer.leave(x, mixed, own)
        return self.finish(x)

    def embed(self, ids: Tensor) -> Tensor:
        """(b, s) to the residual stream (b, s, d)."""
        wide = self.config.residual_in_fp32 and self.activation_dtype != torch.float64
        return F.embedding(ids, self.embeddings).to(torch.float32 if wide else self.activation_dtype)

    def finish(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.norm_f, self.config.layer_norm_epsilon, self.activation_dtype)

    def _rotation(self, starts: tuple[int, ...], s: int, device: torch.device) -> Rotation | None:
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

    def _causal_mamba(self, mixer: Mamba2, x: Tensor, start: MambaState, marks: tuple[int, ...]) -> _CausalMamba:
        prepared = mixer.prepare(x, start.conv)
        if 1 < x.shape[1] <= CHUNK and not marks:
            # A block: its end state waits until it is known how much of the block stays.
            mixed = mixer.outputs(prepared, start, self.activation_dtype)
            return _CausalMamba(mixed, Replay(prepared, start, None), ())
        mixed, end, states = mixer.scan(prepared, start, marks, self.activation_dtype)
        return _CausalMamba(mixed, Replay(prepared, start, end), states)

    def pack_(self, activation_dtype: torch.dtype, backend: Backend) -> None:
        """Packs every constant weight for inference by `backend` with activations of the given dtype."""
        self.activation_dtype = activation_dtype
        self.kernels = kernels(backend)
        for layer in self.stack:
            layer.pack_(activation_dtype, backend)
        self.norm_f.data = self.norm_f.data.to(torch.promote_types(activation_dtype, torch.float32))
        if backend is Backend.NATIVE:
            self.fused = FusedTower(self.config, self.stack, self.norm_f)

    def released_tensors(self) -> dict[str, Tensor]:
        found = {"embeddings.weight": self.embeddings.data}
        for i, layer in enumerate(self.stack):
            found |= {f"layers.{i}.{k}": v for k, v in layer.released_tensors().items()}
        return found | {"norm_f.weight": self.norm_f.data}

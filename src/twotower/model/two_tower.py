"""Both towers and the calls that decoding is made of. Letters: b batch, s tokens, d width, v vocabulary;
t is the noise level."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import tokenizers
import torch
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.model.calibration import Calibration
from twotower.model.head import Head
from twotower.model.ngrams import NgramTable
from twotower.model.passes import CausalPass
from twotower.model.sampling_defaults import SamplingDefaults
from twotower.model.state import ContextState
from twotower.model.time_conditioning import TimeConditioning
from twotower.model.tower import Tower
from twotower.ops.transfer import to_device

if TYPE_CHECKING:  # a type, and nothing that runs: the model imports no backend
    from twotower.backends.protocol import BackendChoice

# Tokens of a prompt absorbed at a time: bounds the (s, t) attention scores.
PREFILL_CHUNK = 256


class TwoTower(nn.Module):
    """A frozen causal context tower and a denoiser tower with the same shapes, of all layers or of the config's
    `denoiser_layers`.

    Decoding is made of four calls: `absorb` takes tokens into the context tower's state, `denoiser_logits` is one pass
    of the denoiser over a block, and `score` runs the context tower over tokens of which `accept` keeps a prefix.
    `prefill`, `denoise` and `extend` are the same for whoever works by hand: they check their arguments. Logits are
    float32, those of a model of float64 weights float64.

    Parameters are allocated, not initialised: `checkpoints` fills them through `released_tensors`. `backends`, by
    "context tower" and "denoiser tower", says what runs each in a model packed by `twotower.backends.choose.pack_`, and
    why; it is empty in a model of plain tensors, which PyTorch runs. A model that `load` opened has its checkpoint's
    `tokenizer`, the `sampling` that holds where a request says nothing, the `ngrams` that drafts can be made of and the
    `calibration` of its commits, if it has any, and as `documents`, name -> content, the other files that `save` writes
    with it; None means that nobody said which there are.
    """

    def __init__(
        self,
        config: TwoTowerConfig,
        *,
        dtype: torch.dtype = torch.float32,
        context_device: torch.device | str = "cpu",
        denoiser_device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: tokenizers.Tokenizer | None = None
        self.sampling = SamplingDefaults()
        self.ngrams: NgramTable | None = None
        self.calibration: Calibration | None = None
        self.documents: Mapping[str, bytes] | None = None
        self.backends: dict[str, BackendChoice] = {}
        # A meta default device (shapes only) wins over the arguments' default.
        meta = torch.get_default_device().type == "meta"
        with torch.device("meta" if meta else context_device):
            self.context_tower = Tower(config, dtype)
            self.context_lm_head = Head(config, dtype)
        with torch.device("meta" if meta else denoiser_device):
            self.denoiser_tower = Tower(config, dtype, config.denoiser_indices)
            self.lm_head = Head(config, dtype)
            self.time_conditioning = TimeConditioning(config, dtype)
        if config.tie_word_embeddings:
            self.context_lm_head.tie_(self.context_tower.embeddings)
            self.lm_head.tie_(self.denoiser_tower.embeddings)

    @property
    def context_device(self) -> torch.device:
        """Where the context tower runs."""
        return self.context_tower.embeddings.device

    @property
    def denoiser_device(self) -> torch.device:
        """Where the denoiser tower runs."""
        return self.denoiser_tower.embeddings.device

    @torch.no_grad()
    def context_logits(self, ids: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """The context tower's logits for ids (b, s) int64: (b, s, v); position i predicts token i + 1."""
        ids = self._checked(ids, self.context_device)
        if ids.shape[1] == 0:
            raise ValueError("ids have 0 tokens, must have at least 1")
        state = self.context_tower.initial_state(ids.shape[0], ids.shape[1])
        logits = []
        for chunk in ids.split(PREFILL_CHUNK, dim=1):
            scored = self.context_tower.causal(chunk, state)
            logits.append(self.scored_logits(scored))
            state = scored.commit((chunk.shape[1],) * ids.shape[0], None)
        return torch.cat(logits, dim=1)

    @torch.no_grad()
    def prefill(
        self,
        ids: Tensor | Sequence[Sequence[int]],
        lengths: Sequence[int] | None = None,
        *,
        capacity: int = 0,
        planned: Sequence[int] | None = None,
    ) -> ContextState:
        """The state after prompts ids (b, s) int64, right-padded to s where `lengths` gives shorter rows.

        `capacity` tokens per row are allocated at once. `planned` are the numbers of tokens that the rows are to have
        in the end, by default `capacity` or what they have now: where RoPE depends on a text's length ("dynamic" and
        "longrope"), a text is turned by its planned length, however long it becomes. `next_logits` is (b, v), or None
        if all rows are empty.
        """
        ids = self._checked(ids, self.context_device)
        b, s = ids.shape
        lengths = (s,) * b if lengths is None else tuple(lengths)
        if len(lengths) != b or not all(0 <= n <= s for n in lengths):
            raise ValueError(f"lengths are {lengths}, must be {b} values in [0, {s}]")
        planned = [max(capacity, n) for n in lengths] if planned is None else planned
        state = self.context_tower.initial_state(b, max(capacity, s), planned)
        for start in range(0, s, PREFILL_CHUNK):
            chunk = ids[:, start : start + PREFILL_CHUNK]
            counts = tuple(min(max(n - start, 0), chunk.shape[1]) for n in lengths)
            state = self.absorb(chunk, state, counts, with_logits=True)
        return state

    @torch.no_grad()
    def denoise(
        self, block_ids: Tensor | Sequence[Sequence[int]], state: ContextState, t: Tensor | float | None = None
    ) -> Tensor:
        """One NFE: the denoiser's logits for block_ids (b, s), (b, s, v). Only reads `state`.

        `t` in [0, 1], a number or (b,), is the noise level; by default each row's fraction of masked positions.
        """
        ids = self._checked(block_ids, self.denoiser_device)
        self._check_batch(ids, state)
        if t is None:
            level = (ids == self.config.mask_token_id).float().mean(-1)
        else:
            level = torch.as_tensor(t, dtype=torch.float32, device=ids.device)
            if level.shape not in ((), ids.shape[:1]):
                shape = tuple(level.shape)
                raise ValueError(f"t has shape {shape}, must be one number or ({ids.shape[0]},), one per row")
            if not bool(((level >= 0) & (level <= 1)).all()):
                raise ValueError(f"t is {t}, must be in [0, 1]")
            level = level.expand(ids.shape[0])
        return self.denoiser_logits(ids, self.seed(state), tuple(level.tolist()))

    @torch.no_grad()
    def extend(self, block_ids: Tensor | Sequence[Sequence[int]], state: ContextState) -> ContextState:
        """The state after the context tower absorbed block_ids (b, s); `state` stays usable."""
        ids = self._checked(block_ids, self.context_device)
        self._check_batch(ids, state)
        return self.absorb(ids, state, with_logits=True)

    def seed(self, state: ContextState) -> ContextState:
        """A state of the context tower as the denoiser reads it: on its device and in the dtypes of what runs it."""
        tower = self.denoiser_tower
        return state.to(self.denoiser_device, tower.activation_dtype, tower.key_dtype or tower.activation_dtype)

    def denoiser_logits(
        self, ids: Tensor, seed: ContextState, t: tuple[float, ...] | None, widths: tuple[int, ...] | None = None
    ) -> Tensor:
        """`denoise` without checks, with a `seed` that the method of this name made.

        t holds Python numbers: the modulation of a level met before is not computed again. None is without modulation,
        for mode `mock_ar`. `widths` are the rows' block lengths where they are not all s.
        """
        modulation = None if t is None else self.time_conditioning.at(t)
        logits: Tensor = self.lm_head(self.denoiser_tower.block(ids, seed, modulation, widths))
        return logits

    def score(self, ids: Tensor, state: ContextState, marks: tuple[int, ...] = ()) -> CausalPass:
        """The context tower over ids (b, s) without deciding how many of them stay; see `accept`, and `CausalPass`."""
        return self.context_tower.causal(ids, state, marks)

    def scored_logits(self, scored: CausalPass) -> Tensor:
        """(b, s, v): position i predicts the token after it."""
        logits: Tensor = self.context_lm_head(scored.hidden)
        return logits

    def accept(self, scored: CausalPass, counts: tuple[int, ...], next_logits: Tensor | None = None) -> ContextState:
        """The state after the first counts[b] scored tokens of each row."""
        return scored.commit(counts, next_logits)

    def absorb(
        self,
        ids: Tensor,
        state: ContextState,
        counts: tuple[int, ...] | None = None,
        *,
        with_logits: bool,
        rows: list[int] | None = None,
    ) -> ContextState:
        """`extend` without checks, by the first counts[b] of ids (b, s); the rest of a row is padding.

        With `with_logits` False the new state has no `next_logits`, which saves the head's product. `rows` are the
        state's rows that ids belong to; the others stay as they are.
        """
        if rows is not None and len(rows) < state.batch_size:
            return state.put(rows, self.absorb(ids, state.select(rows), counts, with_logits=with_logits))
        return state if ids.shape[1] == 0 else self.keep(self.score(ids, state), counts, with_logits=with_logits)

    def keep(self, scored: CausalPass, counts: tuple[int, ...] | None = None, *, with_logits: bool) -> ContextState:
        """The second half of `absorb`: the state after the first counts[b] scored tokens of each row, 0 or more."""
        b, s, _ = scored.hidden.shape
        counts = (s,) * b if counts is None else counts
        logits = None
        if with_logits:
            logits = self.context_lm_head(_last_of(scored.hidden, counts))
            if min(counts) == 0:  # rows that ended in an earlier chunk keep their logits
                before = scored.state.next_logits
                before = torch.zeros_like(logits) if before is None else before
                logits = torch.where(to_device(counts, logits.device)[:, None] > 0, logits, before)
        return scored.commit(counts, logits)

    def _checked(self, ids: Tensor | Sequence[Sequence[int]], device: torch.device) -> Tensor:
        ids = torch.as_tensor(ids, device=device)
        if ids.ndim != 2:
            raise ValueError(f"ids have shape {tuple(ids.shape)}, must be (batch, tokens); add a batch dimension")
        if ids.numel() == 0:
            return ids.long()
        if ids.dtype.is_floating_point or ids.dtype == torch.bool:
            raise ValueError(f"ids are {ids.dtype}, must be integers")
        low, high = ids.min().item(), ids.max().item()
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(f"ids span [{low}, {high}], must be in [0, {self.config.vocab_size - 1}]")
        return ids.long()

    def _check_batch(self, ids: Tensor, state: ContextState) -> None:
        if ids.shape[0] != state.batch_size:
            raise ValueError(f"ids have {ids.shape[0]} rows, the state has {state.batch_size}; they must agree")
        if ids.shape[1] == 0:
            raise ValueError("the block has 0 tokens, must have at least 1")

    def untie_heads_(self) -> None:
        """Gives the heads weights of their own: packing frees a head's weight, and the embedding must stay."""
        if self.config.tie_word_embeddings:
            self.context_lm_head.untie_()
            self.lm_head.untie_()

    def released_tensors(self) -> dict[str, Tensor]:
        """Every tensor of the released layout, by its released name, as a view of this model's parameters."""
        found = {f"context_tower.{k}": v for k, v in self.context_tower.released_tensors().items()}
        found |= {f"denoiser_tower.{k}": v for k, v in self.denoiser_tower.released_tensors().items()}
        found |= self.context_lm_head.released_tensors("context_lm_head")
        found |= self.lm_head.released_tensors("lm_head")
        return found | self.time_conditioning.released_tensors()


def _last_of(hidden: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Position counts[b] - 1 of each row of hidden (b, s, d), the first where that is 0: (b, d)."""
    if min(counts) == hidden.shape[1]:
        return hidden[:, -1]
    index = to_device([max(n - 1, 0) for n in counts], hidden.device)
    return hidden[torch.arange(len(counts), device=index.device), index]

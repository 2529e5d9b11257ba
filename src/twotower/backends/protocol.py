"""What a backend offers: all that whoever writes one for another device needs to know.

A backend runs a tower's passes in the place of the layers in `twotower.model`, which are the reference: `Tower.causal`
and `Tower.block` define every result here, and tests hold each backend to them. It is a package beside this file that
has the functions of `Backend`; `choose` decides where it runs and puts it into a model, and nothing else names it.

Letters: b rows, s tokens, d width, v vocabulary, e experts and f their width, i inputs and o outputs of a weight, c
conv channels, w conv kernel, h heads, p head width, n state width.

**Dtypes.** The tower's `activation_dtype` is the backend's to set: x, hidden states, keys, values and conv rows have
it; cached keys and values have the tower's `key_dtype`, where the backend sets one. SSM states are float32 or wider,
router scores float64, norms and softmax at least float32. Logits are float32.

**Memory.** Every tensor is on the tower's device. A pass may overwrite the inputs' `x`, and a causal one writes the new
keys and values into `inputs.past`; all else that comes in is read only. The recurrent states of `inputs.state` in
particular are values that other states share: a pass makes new ones. Results must not lie in memory that a later pass
writes.

**Waiting.** A pass is launched and returns; it may not read a device tensor's values on the host (no `.item()`,
`.tolist()`, `bool(tensor)`), because decoding launches further work before it looks at results. What the host may use
is given as Python numbers: the rows' lengths and widths, the marks.

**Bits.** The same call gives the same bits at every run. A backend's package docstring says whether it promises more,
as `native` does: a row gives the same bits whatever shares its batch, and a token whatever chunk of a text it comes in.
With that, `verified` equals `ar` token for token and the engine equals `generate` even where two tokens are equally
likely; without it they agree up to rounding. Against the reference only rounding may differ: the same products and sums
in another order.

**Errors.** No memory is MemoryError or torch.OutOfMemoryError. A model that was changed so that the guest would give
other results than its layers (a forward hook, a replaced module) is a RuntimeError that names the layer.
"""

import dataclasses
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from twotower.config import TwoTowerConfig
from twotower.model.passes import CausalPass, PassInputs
from twotower.model.tower import Tower
from twotower.ops.linear import PackedWeight
from twotower.ops.unmask import Best, BlockPlaces


@dataclasses.dataclass(frozen=True)
class BackendChoice:
    """What runs a tower, "reference" or a backend's name, and why: "asked for", or such as "float64 on cpu: …".

    `advice` says what makes it slow on this machine and what to do about it; "" where nothing does.
    """

    name: str
    reason: str
    advice: str = ""


class StateDtypes(NamedTuple):
    """What a tower's activations and convolution rows have, and what its cached keys and values have."""

    activations: torch.dtype
    keys: torch.dtype


class Backend(Protocol):
    """A backend's package."""

    def take_tower_(self, tower: Tower, /) -> None:
        """Sets `tower.guest` to a `TowerGuest` that has the tower's weights, and `tower.activation_dtype`.

        `tower.pack_(dtype, pack_weight)` packs every projection (`Linear.packed`) and converts small parameters. The
        experts of an `E` layer (`mixer.up`, `mixer.down`, both (e, f, d)) are the backend's to store: it packs and
        deletes them before. What was packed can't be trained or saved any more.
        """

    def state_dtypes(self, config: TwoTowerConfig, dtype: torch.dtype, /) -> StateDtypes:
        """What `take_tower_` gives a tower of this config with weights of `dtype`."""

    def pack_weight(self, weight: Tensor, /) -> PackedWeight:
        """A constant weight (o, i) as a function of x (…, i) in the activation dtype and a bias (o,) or None, which
        gives their product (…, o). The head and the denoiser's time conditioning multiply with it."""


class TowerGuest(Protocol):
    """Runs one tower, from its tokens to the last norm. After `copy.deepcopy` of a model, the copy's guest
    reads the copy's weights."""

    @property
    def logit_ops(self) -> "LogitOps":
        """The operations on logits of this guest's backend."""

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        """The rows ids (b, s) int64 of the embeddings (v, d), in what holds the residual stream: (b, s, d)."""

    def causal(self, inputs: PassInputs, marks: tuple[int, ...]) -> CausalPass:
        """The context tower over x (b, s, d), s at least 1: token j of row b sees the state, the row's cached keys and
        the tokens up to itself. See `model.passes` for what comes in and what goes out.

        Writes keys and values (kv heads, p) of every `*` layer to `inputs.past` at each new token's place, padding
        included. `marks` are ascending numbers in [0, s]. The result's `advance` is called at any later time with
        counts (b,) int64 on the device, in [0, s], or None for all tokens: it gives the recurrent states after each
        row's first counts[b] tokens from what this pass kept, conv (b, w-1, c) and ssm (b, h, p, n) per `M` layer.
        `marks` of the result has the same after each marked number of tokens.
        """

    def block(self, inputs: PassInputs, modulation: Tensor | None, widths: tuple[int, ...]) -> Tensor:
        """The denoiser over one block x (b, s, d), to hidden (b, s, d).

        In `*` layers each place sees the row's cached keys and the first widths[b] places of its own block, both ways;
        `M` layers run from `inputs.state` forward. Places beyond a row's width hold no defined values. Writes nothing
        that outlives the pass. `modulation` (layers, b, 3, 1, d) has each layer's shift, scale and gate, see
        `model.layer`; None leaves them out.
        """


class LogitOps(Protocol):
    """What decoding does with logits and blocks at every step. The module `twotower.ops.unmask` is the reference and
    has the equations; logits and confidences are float32, ids and steps int64. Nothing that comes in is written."""

    def best(self, logits: Tensor, /) -> Best:
        """Of logits (…, v): the first of the largest ones, its probability, and log Σ exp(logits). The token is exact,
        NaN being larger than every number; the relative errors of the sum and the probability stay below 1e-6."""

    def argmax(self, logits: Tensor, /) -> Tensor:
        """The tokens (…) of `best` alone."""

    def entropy(self, logits: Tensor, /) -> Tensor:
        """The entropy (…) of softmax(logits) (…, v) in nats, its error below 1e-6 of log v."""

    def commit(
        self,
        sure: Tensor,
        masked: Tensor,
        left: Tensor,
        threshold: Tensor | None,
        bound: Tensor | None = None,
        *,
        leftmost: bool,
    ) -> Tensor:
        """The masked places (b, s) bool that commit now; exact, ties included."""

    def fix(
        self,
        places: BlockPlaces,
        valid: Tensor,
        fixed: Tensor,
        tokens: Tensor,
        confidence: Tensor,
        step: Tensor,
        mask_token_id: int,
    ) -> BlockPlaces:
        """The block after a step in which the places `fixed` have their tokens; exact."""

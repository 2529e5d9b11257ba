"""What a config costs, without any weights: parameters, and bytes of weights, of context state and of one pass."""

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from twotower.config import TwoTowerConfig
from twotower.model.pages import PAGE_SIZE
from twotower.model.recurrent import RECURRENT_KINDS
from twotower.model.tower import Tower
from twotower.model.two_tower import TwoTower

TowerName = Literal["context", "denoiser"]

# What the characters of a config's pattern stand for, in the order of the tables.
LAYER_NAMES = {
    "M": "Mamba-2 layers",
    "G": "delta net layers",
    "S": "Mamba-1 layers",
    "R": "RG-LRU layers",
    "*": "attention layers",
    "-": "MLP layers",
    "E": "expert layers",
}
PARTS = ("embeddings", *LAYER_NAMES.values(), "final norm", "head", "time conditioning")


class Place(NamedTuple):
    """Which tower a tensor belongs to, and which of PARTS."""

    tower: TowerName
    part: str


class StateBytes(NamedTuple):
    """One sequence's context state: what grows with the context, and what does not."""

    keys_and_values: int
    recurrent: int


class StateSizes(NamedTuple):
    """Bytes of a sequence's recurrent state (`slot`, 0 without recurrent layers), of the keys and values of PAGE_SIZE
    tokens (`page`, 0 without attention layers), and of the logits after its last token (`logits`)."""

    slot: int
    page: int
    logits: int

    @property
    def snapshot(self) -> int:
        """What the prefix cache keeps for the end of a prompt beside its keys."""
        return self.slot + self.logits


class Weights(NamedTuple):
    """Bytes of each tower's weights with its head, and of the denoiser's time conditioning; of these the bytes of the
    context tower's layers, and how many parameters of those one token is multiplied with."""

    context: int
    denoiser: int
    layers: int
    active: int


def released_tensors(config: TwoTowerConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of the released layout with the shape and type it has in memory, on the meta device."""
    with torch.device("meta"):
        return TwoTower(config, dtype=dtype).released_tensors()


def place(name: str, config: TwoTowerConfig) -> Place:
    """Sorts a released tensor name."""
    head, _, rest = name.partition(".")
    if head == "context_lm_head":
        return Place("context", "head")
    if head == "lm_head":
        return Place("denoiser", "head")
    if head in ("context_tower", "denoiser_tower"):
        tower: TowerName = "context" if head == "context_tower" else "denoiser"
        if rest.startswith("layers."):
            return Place(tower, LAYER_NAMES[config.pattern[int(rest.split(".")[1])]])
        return Place(tower, "embeddings" if rest.startswith("embedding") else "final norm")
    return Place("denoiser", "time conditioning")


def parameters(config: TwoTowerConfig) -> dict[Place, int]:
    """Parameters of every part of each tower; a tied head has none of its own."""
    counts: dict[Place, int] = {}
    for name, tensor in released_tensors(config, torch.float32).items():
        where = place(name, config)
        counts[where] = counts.get(where, 0) + tensor.numel()
    return counts


def state_bytes(config: TwoTowerConfig, length: int, dtype: torch.dtype) -> StateBytes:
    """Bytes of one sequence's state after `length` tokens with weights of `dtype`.

    Keys and values: 2 · attention layers · k · p · t. Recurrent, per recurrent layer: the last w-1 rows of the
    convolution's input, and the state, which is float32 at any dtype.
    """
    c = config
    per_token = 2 * c.pattern.count("*") * c.num_key_value_heads * c.head_dim
    recurrent = 0
    for kind in filter(RECURRENT_KINDS.count, c.pattern):
        channels, numbers = recurrent_sizes(c, kind)
        recurrent += (c.conv_kernel - 1) * channels * dtype.itemsize + numbers * torch.float32.itemsize
    return StateBytes(per_token * length * dtype.itemsize, recurrent)


def state_sizes(config: TwoTowerConfig, activations: torch.dtype, keys: torch.dtype) -> StateSizes:
    """The sizes of a context state with activations and cached keys of these dtypes."""
    wide = torch.promote_types(activations, torch.float32).itemsize
    sizes = [recurrent_sizes(config, kind) for kind in config.pattern if kind in RECURRENT_KINDS]
    slot = sum((config.conv_kernel - 1) * c * activations.itemsize + n * wide for c, n in sizes)
    page = state_bytes(config, PAGE_SIZE, keys).keys_and_values
    return StateSizes(slot, page, config.vocab_size * wide)


def weights(config: TwoTowerConfig, dtype: torch.dtype) -> Weights:
    """The sizes of both towers' weights of `dtype`, as they are loaded."""
    with torch.device("meta"):
        model = TwoTower(config, dtype=dtype)
    c, tower = config, model.context_tower
    used = c.num_experts_per_tok / c.num_experts if c.num_experts else 1.0
    layers = [(name, p) for layer in tower.layers for name, p in layer.named_parameters()]
    experts = sum(p.numel() for name, p in layers if name.startswith(("mixer.up", "mixer.down")) and p.ndim == 3)
    every = sum(p.numel() for _, p in layers)
    return Weights(
        context=sum(p.nbytes for part in (tower, model.context_lm_head) for p in _own(part, tower)),
        denoiser=sum(
            p.nbytes
            for part in (model.denoiser_tower, model.lm_head, model.time_conditioning)
            for p in _own(part, model.denoiser_tower)
        ),
        layers=sum(p.nbytes for _, p in layers),
        active=int(every - experts * (1 - used)),
    )


def _own(part: nn.Module, tower: Tower) -> Iterator[Tensor]:
    """The parameters of a part, without the embeddings where it is a head that is tied to them."""
    return (p for p in part.parameters() if part is tower or p is not tower.embeddings)


def recurrent_sizes(c: TwoTowerConfig, kind: str) -> tuple[int, int]:
    """The channels that a recurrent layer of a kind convolves, and the numbers in its state."""
    channels = {"S": c.mamba_width, "R": c.mamba_width + 1}.get(kind, c.conv_width)
    return channels, c.mamba_width * (1 if kind == "R" else c.mamba_state_size)


def pass_bytes(
    config: TwoTowerConfig, tensors: Mapping[str, Tensor], tower: TowerName, tokens: int, *, head: bool
) -> float:
    """Bytes of weights that one forward pass of a tower over `tokens` tokens reads.

    Of the embedding only the tokens' rows, of e experts no more than the min(e, a·s) that s tokens with a active
    experts each can choose. `head` says whether logits are computed. `tensors` are `released_tensors`.
    """
    used = min(1.0, config.num_experts_per_tok * tokens / config.num_experts) if config.num_experts else 1.0
    total = 0.0
    for name, tensor in _of_tower(config, tensors, tower):
        part = place(name, config).part
        if part == "embeddings":
            total += tokens * config.hidden_size * tensor.element_size()
            total += tensor.nbytes if head and config.tie_word_embeddings else 0
        elif part != "head" or head:
            total += tensor.nbytes * (used if ".experts." in name else 1.0)
    return total


def _of_tower(config: TwoTowerConfig, tensors: Mapping[str, Tensor], tower: TowerName) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in tensors.items() if place(name, config).tower == tower)

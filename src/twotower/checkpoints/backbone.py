"""An opened single-tower model, whatever its file format, in the terms of our towers; `initialise` makes two of it."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from twotower.checkpoints.hf.tensor_files import TensorSpec
from twotower.config import TwoTowerConfig
from twotower.model.one_tower import OneTower


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backbone:
    """A single-tower model: its config, its tensors, and the files that go with it.

    `specs` has the dtype and shape of each tensor, under its name inside a tower (`embeddings.weight`, `layers.{i}…`,
    `norm_f.weight`) or `lm_head.weight`. `stream()` yields each tensor once, in any order, on the CPU. `tokenizer` is
    the text of a tokenizer.json, None if it has none; `documents` are further files to keep, name -> content.
    `mask_token_id` is the token that the family keeps free for the mask, if any. `skipped` are the names of tensors in
    the file that are no part of the backbone, such as multi-token prediction heads.
    """

    config: TwoTowerConfig
    specs: Mapping[str, TensorSpec]
    stream: Callable[[], Iterator[tuple[str, Tensor]]]
    tokenizer: str | None
    documents: Mapping[str, bytes]
    mask_token_id: int | None = None
    skipped: tuple[str, ...] = ()


def tower_shapes(config: TwoTowerConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of one tower and its head, by their names in a `Backbone`; allocates nothing."""
    with torch.device("meta"):
        tensors = OneTower(config).released_tensors()
    return {name.removeprefix("backbone."): tuple(tensor.shape) for name, tensor in tensors.items()}

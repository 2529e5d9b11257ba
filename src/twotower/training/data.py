"""Token corpora on disk: `.npz` shards of rows with the length of each row's unscored prefix."""

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Corpus(NamedTuple):
    """ids (r, t) integers and the number of leading positions of each row that are never masked (r,)."""

    ids: np.ndarray
    prefix: np.ndarray

    @classmethod
    def load(cls, folder: str | Path, *, vocab_size: int) -> "Corpus":
        """Reads every shard of `folder`: arrays `ids` (r, t) and `prefix` (r,). Raises ValueError naming a bad file."""
        files = sorted(f for f in Path(folder).glob("*.npz") if ".partial" not in f.name)
        if not files:
            raise ValueError(f"{folder} holds no .npz shard; make some with: twotower sample")
        shards = [_read(file, vocab_size) for file in files]
        lengths = {shard.ids.shape[1] for shard in shards}
        if len(lengths) > 1:
            raise ValueError(
                f"{folder} has rows of {sorted(lengths)} tokens, must all be of one length; sample it again"
            )
        return cls(*(np.concatenate(arrays) for arrays in zip(*shards, strict=True)))

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """x0 (b, t) int64 and scored (b, t) bool of optimiser step `step`: epoch-wise shuffles that depend on (seed,
        epoch) alone, so that a resumed run sees the same rows."""
        per_epoch = len(self.ids) // size
        if per_epoch == 0:
            raise ValueError(f"batch size {size} exceeds the corpus of {len(self.ids)} rows; lower it")
        order = np.random.default_rng((seed, step // per_epoch)).permutation(len(self.ids))
        rows = order[step % per_epoch * size :][:size]
        x0 = torch.from_numpy(self.ids[rows].astype(np.int64))
        scored = torch.arange(x0.shape[1]) >= torch.from_numpy(self.prefix[rows].astype(np.int64))[:, None]
        return x0, scored


def _read(file: Path, vocab_size: int) -> Corpus:
    try:
        with np.load(file, allow_pickle=False) as shard:
            arrays = dict(shard)
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise ValueError(f"{file} is not a whole .npz file ({error}); sample it again") from error
    if set(arrays) != {"ids", "prefix"}:
        raise ValueError(f"{file} holds {sorted(arrays)}, must hold ids and prefix; sample it again")
    ids, prefix = arrays["ids"], arrays["prefix"]
    if ids.ndim != 2 or prefix.shape != ids.shape[:1] or ids.size == 0:
        raise ValueError(
            f"{file} has ids {ids.shape} and prefix {prefix.shape}, must be (r, t) and (r,); sample it again"
        )
    if ids.dtype.kind not in "iu" or prefix.dtype.kind not in "iu":
        raise ValueError(f"{file} holds {ids.dtype} ids and {prefix.dtype} prefixes, must be integers; sample it again")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"{file} has ids outside [0, {vocab_size}); sample it with this checkpoint")
    return Corpus(ids, prefix)

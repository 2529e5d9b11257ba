"""Token corpora on disk: `.npz` shards of rows with the length of each row's unscored prefix."""

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
            raise ValueError(f"{folder} holds no .npz shard; make some with twotower.training.sampling.write_shard")
        ids, prefix = [], []
        for file in files:
            with np.load(file, allow_pickle=False) as shard:
                if set(shard) != {"ids", "prefix"}:
                    raise ValueError(f"{file} holds {sorted(shard)}, must hold ids and prefix; sample it again")
                ids.append(shard["ids"])
                prefix.append(shard["prefix"])
            if ids[-1].min() < 0 or ids[-1].max() >= vocab_size:
                raise ValueError(f"{file} has ids outside [0, {vocab_size}); sample it with this checkpoint")
        return cls(np.concatenate(ids), np.concatenate(prefix))

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

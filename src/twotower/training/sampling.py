"""A corpus sampled from the frozen context tower itself. Letters: b rows, t tokens."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from twotower.decoding.sampling import inverse_sample
from twotower.model.two_tower import TwoTower


@torch.inference_mode()
def sample_rows(model: TwoTower, *, rows: int, length: int, prefix: int, seed: int) -> Tensor:
    """(b, t) int64 rows that start with BOS: temperature 1 up to position `prefix`, greedy after it.

    The greedy part is a function of its prefix, so a denoiser can learn it; the sampled part gives it variety. The
    mask token and token 0 (unknown) never occur.
    """
    bos = model.config.bos_token_id
    if bos is None:
        raise ValueError("the config has no bos_token_id to start rows with; set it in config.json")
    if not 1 <= prefix <= length:
        raise ValueError(f"prefix is {prefix}, must be in [1, length={length}]")
    generator = torch.Generator().manual_seed(seed)
    device = model.context_device
    ids = torch.full((rows, 1), bos, device=device)
    state = model.absorb(ids, model.context_tower.initial_state(rows, length), with_logits=True)
    columns = [ids]
    for position in range(1, length):
        assert state.next_logits is not None
        logits = state.next_logits
        logits[:, [0, model.config.mask_token_id]] = -torch.inf
        if position < prefix:
            draws = torch.rand(rows, 1, generator=generator).to(device)
            ids = inverse_sample(logits.softmax(-1).unsqueeze(1), draws)
        else:
            ids = logits.argmax(-1, keepdim=True)
        columns.append(ids)
        if position + 1 < length:
            state = model.absorb(ids, state, with_logits=True)
    return torch.cat(columns, dim=1)


def write_shard(
    model: TwoTower, folder: Path, index: int, *, rows: int, length: int, greedy_fraction: float, seed: int
) -> Path:
    """Samples shard `index` into `folder` as `{index:05d}.npz`, unless it is there already, and returns its path.

    A `greedy_fraction` of shards turn greedy after a prefix whose length is drawn per shard from [6, 160); the prefix
    is not scored in training. The others are sampled throughout. Depends on (seed, index) alone.
    """
    file = folder / f"{index:05d}.npz"
    if file.exists():
        return file
    rng = np.random.default_rng((seed, index))
    greedy = rng.random() < greedy_fraction
    prefix = int(rng.integers(6, min(160, length))) if greedy else length
    ids = sample_rows(model, rows=rows, length=length, prefix=prefix, seed=int(rng.integers(2**62)))
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial.npz")
    unscored = np.full(rows, prefix if greedy else 1, np.int32)
    np.savez(partial, ids=ids.cpu().numpy().astype(np.int32), prefix=unscored)
    partial.replace(file)
    return file

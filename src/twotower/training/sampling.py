"""A corpus sampled from the frozen context tower itself. Letters: b rows, t tokens."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from twotower.decoding.sampling import inverse_sample
from twotower.model.two_tower import TwoTower
from twotower.training.data import Rows, write_shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What the shards of a corpus hold: `rows` rows of `length` tokens each.

    A row is sampled at temperature 1 up to a prefix, then at one of `temperatures`, drawn per shard with equal chances
    (so (0, 0, 0, 1) makes three shards of four greedy). The prefix, whose length is drawn per shard from
    [`shortest_prefix`, `longest_prefix`], gives variety and is not scored in training; with temperature 1 all is.
    """

    rows: int = 512
    length: int = 256
    temperatures: tuple[float, ...] = (0.0, 0.0, 0.0, 1.0)
    shortest_prefix: int = 6
    longest_prefix: int = 159
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"rows is {self.rows}, must be at least 1")
        if self.length < 2:
            raise ValueError(f"length is {self.length}, must be at least 2: the first token is BOS")
        if not self.temperatures or not all(0 <= t <= 100 for t in self.temperatures):
            raise ValueError(f"temperatures are {self.temperatures}, must be one or more numbers in [0, 100]")
        if not 1 <= self.shortest_prefix <= self.longest_prefix < self.length:
            raise ValueError(
                f"prefixes are {self.shortest_prefix} to {self.longest_prefix} tokens, must be "
                f"1 <= shortest <= longest < length={self.length}"
            )
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, must be 0 or more")


@torch.inference_mode()
def sample_rows(model: TwoTower, *, rows: int, length: int, prefix: int, seed: int, temperature: float = 0.0) -> Tensor:
    """(b, t) int64 rows that start with BOS: temperature 1 up to position `prefix`, `temperature` after it, 0 greedy.

    A greedy continuation is a function of its prefix, so a denoiser can learn it; the sampled part gives it variety.
    The mask token and token 0 (unknown) never occur.
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
        heat = 1.0 if position < prefix else temperature
        if heat > 0:
            draws = torch.rand(rows, 1, generator=generator).to(device)
            ids = inverse_sample((logits / heat).softmax(-1).unsqueeze(1), draws)
        else:
            ids = logits.argmax(-1, keepdim=True)
        columns.append(ids)
        if position + 1 < length:
            state = model.absorb(ids, state, with_logits=True)
    return torch.cat(columns, dim=1)


def sample_shard(model: TwoTower, folder: Path, index: int, config: SampleConfig) -> Path:
    """Samples shard `index` into `folder` as `{index:05d}.safetensors`, unless it is there, and returns its path.

    Depends on (config, index) alone. A kill leaves no half shard under that name.
    """
    file = folder / f"{index:05d}.safetensors"
    if file.exists():
        return file
    rng = np.random.default_rng((config.seed, index))
    temperature = float(rng.choice(config.temperatures))
    prefix = int(rng.integers(config.shortest_prefix, config.longest_prefix + 1))
    seed = int(rng.integers(2**62))
    ids = sample_rows(model, rows=config.rows, length=config.length, prefix=prefix, seed=seed, temperature=temperature)
    start = 1 if temperature == 1 else prefix
    scored = np.broadcast_to(np.arange(config.length) >= start, ids.shape)
    write_shard(file, Rows(ids.cpu().numpy(), scored, np.zeros(ids.shape)))
    return file

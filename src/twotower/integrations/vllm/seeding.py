"""The context tower's state as vLLM's cache holds it, for our denoiser to read. Letters: b rows, m blocks of a row,
n tokens of a block, k KV heads, p head width, t tokens rounded up."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.config import TwoTowerConfig
from twotower.model.state import ContextState, KeyBuffer, MambaState, padded

# Numbers below it are exact in every dtype that a cache may have.
_BASE = 256


class CacheReader:
    """Reads the cache of a vLLM model runner, of the first kind, on one device.

    Kernels lay keys and values out within a block as suits them; where each number lies is learnt once, by having them
    write numbers that say where they belong.
    """

    def __init__(self, runner: Any, config: TwoTowerConfig) -> None:
        self._runner = runner
        self._config = config
        layers = runner.compilation_config.static_forward_context
        groups = runner.kv_cache_config.kv_cache_groups
        of = {name: number for number, group in enumerate(groups) for name in group.layer_names}
        names = [f"model.layers.{i}.mixer" for i in range(config.num_layers)]
        self._attention = [layers[f"{n}.attn"] for n, kind in zip(names, config.pattern, strict=True) if kind == "*"]
        self._recurrent = [layers[n] for n, kind in zip(names, config.pattern, strict=True) if kind == "M"]
        self._key_groups = [of[f"{n}.attn"] for n, kind in zip(names, config.pattern, strict=True) if kind == "*"]
        self._state_groups = [of[n] for n, kind in zip(names, config.pattern, strict=True) if kind == "M"]
        self._places = [_places(layer) for layer in self._attention]

    def state(self, rows: Sequence[int], lengths: Sequence[int], kept: Sequence[int]) -> ContextState:
        """The state of some rows of the runner's batch after so many tokens of each; copies it.

        `kept` says how many of the tokens of its last step each row kept, where these were the newest and a draft: the
        state is that after them. It is 1 for other rows.
        """
        keys, values = [], []
        for layer, group, places in zip(self._attention, self._key_groups, self._places, strict=True):
            key, value = self._keys(layer.kv_cache, self._table(group, rows, lengths, layer.kv_cache), places)
            size = padded(max(lengths))
            keys.append(F.pad(key[:, :, :size], (0, 0, 0, max(0, size - key.shape[2]))))
            values.append(F.pad(value[:, :, :size], (0, 0, 0, max(0, size - value.shape[2]))))
        mamba = []
        for layer, group in zip(self._recurrent, self._state_groups, strict=True):
            conv, ssm = layer.kv_cache
            # A row's inputs of the convolution are in its first entry, of several steps.
            last = conv[self._entries(group, rows, lengths, (1,) * len(rows))]
            # vLLM can be told to keep channels first
            last = last if last.shape[-1] == self._config.conv_width else last.transpose(1, 2)
            places = torch.tensor(kept)[:, None] - 1 + torch.arange(self._config.conv_kernel - 1)
            last = last[torch.arange(len(rows))[:, None], places]
            mamba.append(MambaState(last, ssm[self._entries(group, rows, lengths, kept)].float()))
        known = tuple(int(n) for n in lengths)
        return ContextState(known, tuple(mamba), KeyBuffer(keys, values, known), None, (0,) * len(known))

    def _keys(self, cache: Tensor, table: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (b, k, m·n, p) of the blocks in table (b, m)."""
        b, m = table.shape
        blocks = cache[table.flatten()].flatten(1)[:, places.flatten()]
        both = blocks.view(b, m, *places.shape).permute(2, 0, 3, 1, 4, 5)  # (2, b, k, m, n, p)
        key, value = both.flatten(3, 4).unbind()
        return key, value

    def _table(self, group: int, rows: Sequence[int], lengths: Sequence[int], cache: Tensor) -> Tensor:
        """The blocks (b, m) that hold the rows' tokens; behind a row's last one, the block that nobody uses."""
        most = -(-max(lengths) // cache.shape[2])
        return self._blocks(group, rows)[:, :most].to(cache.device)

    def _entries(self, group: int, rows: Sequence[int], lengths: Sequence[int], kept: Sequence[int]) -> Tensor:
        """The entry (b,) of each row's recurrent state after its kept tokens."""
        table = self._blocks(group, rows)
        spec = self._runner.kv_cache_config.kv_cache_groups[group].kv_cache_spec
        column = torch.tensor(kept) - 1
        if spec.mamba_cache_mode == "align":
            column = (torch.tensor(lengths) - 1) // spec.block_size
        return table.gather(1, column[:, None])[:, 0].to(self._runner.device)

    def _blocks(self, group: int, rows: Sequence[int]) -> Tensor:
        table = self._runner.input_batch.block_table[group].block_table.np
        return torch.from_numpy(table[list(rows)]).long()


def _places(layer: Any) -> Tensor:
    """For each key and value of a block (2, k, n, p), where it lies in the block's entry of the cache, int64."""
    _, k, n, both = layer.kv_cache.shape
    cache = layer.kv_cache.new_zeros((1, k, n, both))
    numbers = torch.arange(2 * k * n * (both // 2), device=cache.device).view(2, k, n, both // 2)
    slots = torch.arange(n, device=cache.device)
    found = torch.zeros(cache.numel(), dtype=torch.long, device=cache.device)
    step = 1
    while step < numbers.numel():
        digit = (numbers // step % _BASE).to(cache.dtype).transpose(1, 2).contiguous()  # (2, n, k, p)
        layer.impl.do_kv_cache_update(layer, digit[0], digit[1], cache, slots)
        found += cache.flatten().long() * step
        step *= _BASE
    places = found.argsort()
    if not torch.equal(found[places], numbers.flatten()):
        raise RuntimeError("the attention backend writes other numbers than keys and values to the cache")
    return places.view(numbers.shape)

"""The context tower's state as vLLM's cache holds it, for our denoiser to read. Letters: b rows, m blocks of a row,
n tokens of a block, k KV heads, p head width, t tokens rounded up."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.config import TwoTowerConfig
from twotower.model.state import ContextState, KeyBuffer, MambaState, padded

# Numbers below it are exact in every dtype that a cache may have.
_BASE = 256

# For each layer by its name the blocks (b, m) that hold the tokens of some rows, or their recurrent states, int64, as
# the layer's kernels count blocks
Tables = Mapping[str, Tensor]


class RowsCache(NamedTuple):
    """Where vLLM has the keys and states of some rows: its layers by name, and of its groups of them what each is."""

    layers: Mapping[str, Any]
    kv_cache_config: Any
    tables: Tables


def first_runner_cache(runner: Any, rows: Sequence[int]) -> RowsCache:
    """That of some rows of the batch of vLLM's first model runner."""
    tables: dict[str, Tensor] = {}
    for number, group in enumerate(runner.kv_cache_config.kv_cache_groups):
        table = torch.from_numpy(runner.input_batch.block_table[number].block_table.np[list(rows)]).long()
        tables |= dict.fromkeys(group.layer_names, table)
    return RowsCache(runner.compilation_config.static_forward_context, runner.kv_cache_config, tables)


class CacheReader:
    """Reads the cache of a vLLM model runner on one device, whose layers are `layers` by name.

    Kernels lay keys and values out within a block as suits them; where each number lies is learnt once, by having them
    write numbers that say where they belong.
    """

    def __init__(self, layers: Mapping[str, Any], kv_cache_config: Any, config: TwoTowerConfig) -> None:
        self._layers = layers
        self._config = config
        self._specs = {n: group.kv_cache_spec for group in kv_cache_config.kv_cache_groups for n in group.layer_names}
        names = [f"model.layers.{i}.mixer" for i in range(config.num_layers)]
        self._attention = [f"{n}.attn" for n, kind in zip(names, config.pattern, strict=True) if kind == "*"]
        self._recurrent = [n for n, kind in zip(names, config.pattern, strict=True) if kind == "M"]
        self._places = [_places(layers[name]) for name in self._attention]

    def state(self, tables: Tables, lengths: Sequence[int], kept: Sequence[int]) -> ContextState:
        """The state of some rows (b) after so many tokens of each, which lie where `tables` say; copies it.

        `kept` says how many of the tokens of its last step each row kept, where these were the newest and a draft: the
        state is that after them. It is 1 for other rows.
        """
        keys, values = [], []
        for name, places in zip(self._attention, self._places, strict=True):
            cache = self._layers[name].kv_cache
            key, value = self._keys(cache, _blocks(tables[name], lengths, cache), places)
            size = padded(max(lengths))
            keys.append(F.pad(key[:, :, :size], (0, 0, 0, max(0, size - key.shape[2]))))
            values.append(F.pad(value[:, :, :size], (0, 0, 0, max(0, size - value.shape[2]))))
        mamba = []
        for name in self._recurrent:
            conv, ssm = self._layers[name].kv_cache
            # A row's inputs of the convolution are in its first entry, of several steps.
            last = conv[self._entries(name, tables[name], lengths, (1,) * len(lengths)).to(conv.device)]
            # vLLM can be told to keep channels first
            last = last if last.shape[-1] == self._config.conv_width else last.transpose(1, 2)
            places = torch.tensor(kept)[:, None] - 1 + torch.arange(self._config.conv_kernel - 1)
            last = last[torch.arange(len(lengths))[:, None], places]
            mamba.append(MambaState(last, ssm[self._entries(name, tables[name], lengths, kept).to(ssm.device)].float()))
        known = tuple(int(n) for n in lengths)
        return ContextState(known, tuple(mamba), KeyBuffer(keys, values, known), None, (0,) * len(known))

    def _keys(self, cache: Tensor, table: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (b, k, m·n, p) of the blocks in table (b, m)."""
        b, m = table.shape
        blocks = cache[table.flatten()].flatten(1)[:, places.flatten()]
        both = blocks.view(b, m, *places.shape).permute(2, 0, 3, 1, 4, 5)  # (2, b, k, m, n, p)
        key, value = both.flatten(3, 4).unbind()
        return key, value

    def _entries(self, name: str, table: Tensor, lengths: Sequence[int], kept: Sequence[int]) -> Tensor:
        """The entry (b,) of each row's recurrent state after its kept tokens."""
        spec = self._specs[name]
        column = torch.tensor(kept, device=table.device) - 1
        if spec.mamba_cache_mode == "align":
            column = (torch.tensor(lengths, device=table.device) - 1) // spec.block_size
        return table.gather(1, column[:, None])[:, 0]


def _blocks(table: Tensor, lengths: Sequence[int], cache: Tensor) -> Tensor:
    """The blocks (b, m) that hold the rows' tokens; behind a row's last one, the block that nobody uses."""
    return table[:, : -(-max(lengths) // cache.shape[2])].to(cache.device)


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

"""Keys that lie on several devices, brought together, without vLLM."""

import pytest
import torch

from twotower.config import TwoTowerConfig
from twotower.integrations.vllm.shards import whole_state
from twotower.model.state import ContextState, KeyBuffer


class Group:
    """Devices that call one after the other, the first one last."""

    def __init__(self, size):
        self.world_size = size
        self.sent = []

    def gather(self, mine, *, dst, dim):
        assert dst == 0
        assert mine.is_contiguous()
        self.sent.insert(0, mine)
        return torch.cat(self.sent, dim) if len(self.sent) == self.world_size else None


@pytest.fixture
def whole():
    """whole(config): a state of two rows with random numbers."""

    def make(config):
        torch.manual_seed(0)
        layers, lengths = config.pattern.count("*"), (9, 14)
        both = [torch.randn(2, config.num_key_value_heads, 16, config.head_dim) for _ in range(2 * layers)]
        return ContextState(lengths, (), KeyBuffer(both[:layers], both[layers:], lengths), None, (0, 0))

    return make


def part(state, rank, size):
    """What a device has of a state, by vLLM's rules: heads in turn, too few of them repeated."""
    number = min(size, state.buffer.keys[0].shape[1])
    keys, values = (
        [tensor.chunk(number, 1)[rank // (size // number)] for tensor in half]
        for half in (state.buffer.keys, state.buffer.values)
    )
    return ContextState(state.lengths, (), KeyBuffer(keys, values, state.lengths), None, (0, 0))


@pytest.mark.parametrize(("pattern", "size", "heads"), [("*-*-", 2, 2), ("*-", 2, 4), ("*-", 4, 2), ("*-", 4, 1)])
def test_the_parts_of_all_devices_are_the_whole_on_the_first(pattern, size, heads, sizes, whole) -> None:
    config = TwoTowerConfig(**sizes | {"pattern": pattern, "num_key_value_heads": heads})
    state, group = whole(config), Group(size)
    for rank in reversed(range(1, size)):
        assert whole_state(part(state, rank, size), config, group) is None
    found = whole_state(part(state, 0, size), config, group)
    assert found.lengths == state.lengths == found.buffer.tip
    for mine, theirs in zip(
        found.buffer.keys + found.buffer.values, state.buffer.keys + state.buffer.values, strict=True
    ):
        assert torch.equal(mine, theirs)


def test_one_device_has_the_whole_already(sizes, whole) -> None:
    config = TwoTowerConfig(**sizes, pattern="*-")
    state = whole(config)
    assert whole_state(state, config, Group(1)) is state

"""A denoiser divided over several devices, which are threads here, without vLLM."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import twotower
from twotower.backends.choose import pack_denoiser_
from twotower.checkpoints.hf.two_towers import load_denoiser_
from twotower.config import TwoTowerConfig
from twotower.integrations.vllm.outline import outline
from twotower.integrations.vllm.shards import cut, join_, narrowed
from twotower.model.state import ContextState, KeyBuffer, MambaState

# As in released models: more groups than devices, or one; KV heads that devices divide or share
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4, "mamba_num_heads": 8, "mamba_num_groups": 4}
FEW = WIDE | {"num_key_value_heads": 2, "mamba_num_groups": 1, "vocab_size": 39}
WIDTHS = {"intermediate_size": 32, "expert_intermediate_size": 16, "shared_expert_intermediate_size": 24}
MODELS = {
    "wide": WIDE | WIDTHS | {"pattern": "M*-E"},
    "few": FEW | WIDTHS | {"pattern": "M*E-"},
    "gated": WIDE | WIDTHS | {"pattern": "*-*-", "gated_mlp": True, "mlp_hidden_act": "silu", "use_rope": True},
    "tied": FEW | WIDTHS | {"pattern": "*-M", "tie_word_embeddings": True},
    "layers": WIDE | WIDTHS | {"pattern": "M*-E", "denoiser_layers": (1, 3)},
}


class Devices:
    """What they have given to a call that all of them make."""

    def __init__(self, size):
        self.given = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)


class Group:
    def __init__(self, devices, rank):
        self.devices, self.rank_in_group, self.world_size = devices, rank, len(devices.given)

    def _all(self, mine):
        assert mine.is_contiguous()
        self.devices.given[self.rank_in_group] = mine
        self.devices.barrier.wait()
        found = list(self.devices.given)
        self.devices.barrier.wait()
        return found

    def all_reduce(self, input_):
        return torch.stack(self._all(input_)).sum(0)

    def all_gather(self, input_, dim=-1):
        return torch.cat(self._all(input_), dim)


def share(state, config, group):
    """What vLLM's cache of a device has: of heads and channels in turn its part."""
    rank, size = group.rank_in_group, group.world_size

    def of(whole, units, dim):
        parts = min(size, units)
        return whole.chunk(parts, dim)[rank * parts // size].contiguous()

    bc = config.mamba_num_groups * config.mamba_state_size
    mamba = []
    for conv, ssm in state.mamba:
        x, b, c = conv.split((config.mamba_width, bc, bc), dim=-1)
        groups = config.mamba_num_groups
        parts = torch.cat([of(x, config.mamba_num_heads, -1), of(b, groups, -1), of(c, groups, -1)], -1)
        mamba.append(MambaState(parts, of(ssm, config.mamba_num_heads, 1)))
    keys, values = (
        [of(tensor, config.num_key_value_heads, 1) for tensor in half]
        for half in (state.buffer.keys, state.buffer.values)
    )
    return ContextState(state.lengths, tuple(mamba), KeyBuffer(keys, values, state.lengths), None, state.rope_lengths)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_the_parts_on_all_devices_are_the_whole_denoiser(name, size, tiny, tmp_path) -> None:
    kinds = dict(MODELS[name])
    whole = tiny(kinds.pop("pattern"), dtype=torch.float64, **kinds)
    twotower.save(whole, tmp_path)
    torch.manual_seed(0)
    ids = torch.randint(4, 38, (2, 21))
    state = whole.prefill(ids, (21, 17))
    block = torch.full((2, 6), whole.config.mask_token_id)
    block[:, 2] = 17
    expected = whole.denoiser_logits(block, whole.seed(state), (0.8, 0.5), (6, 5))
    devices = Devices(size)

    def one(rank):
        group = Group(devices, rank)
        model = outline(tmp_path, torch.float64, "cpu", num_devices=size)
        join_(model, whole.config, group)
        load_denoiser_(model, tmp_path, lambda name, tensor: cut(name, tensor, whole.config, group))
        if whole.config.tie_word_embeddings:
            model.lm_head.tie_(model.denoiser_tower.embeddings)
        pack_denoiser_(model, "reference")
        with torch.inference_mode():
            seed = share(state, whole.config, group)
            return model.denoiser_logits(block, model.seed(seed), (0.8, 0.5), (6, 5))

    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(one, range(size)))
    for logits in found:
        assert torch.equal(logits, found[0])  # else devices would commit different tokens
        assert torch.allclose(logits[0], expected[0], rtol=1e-9, atol=1e-9)
        assert torch.allclose(logits[1, :5], expected[1, :5], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (3, r"--tensor-parallel-size is 3, must divide the denoiser: num_attention_heads 8 is no multiple of 3; .*cho"),
        (8, "n_groups 4 is not 1 and no multiple of 8"),
        (5, "num_key_value_heads 4 is no multiple of 5 and no divisor"),
    ],
)
def test_a_number_of_devices_that_does_not_divide_it_is_refused(size, message, sizes) -> None:
    with pytest.raises(ValueError, match=message):
        narrowed(TwoTowerConfig(**sizes | MODELS["wide"]), size)


def test_one_device_has_all_of_it(sizes) -> None:
    config = TwoTowerConfig(**sizes | MODELS["wide"])
    assert narrowed(config, 1) == config

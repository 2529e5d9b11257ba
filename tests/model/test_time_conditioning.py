from collections.abc import Callable

import pytest
import torch

from twotower.backends.choose import pack_
from twotower.model.time_conditioning import MAX_LEVELS, TimeConditioning


def test_each_layer_is_its_table_plus_what_all_share(tiny: Callable, close: Callable) -> None:
    conditioning = tiny("M*-E", dtype=torch.float64).time_conditioning
    t = torch.tensor([0.0, 0.3, 1.0])
    layers = [layer.unbind(1) for layer in conditioning(t)]
    assert len(layers) == 4
    for layer, table in zip(layers, conditioning.tables, strict=True):
        assert all(part.shape == (3, 1, 32) for part in layer)
        for part, own, first, first_own in zip(layer, table, layers[0], conditioning.tables[0], strict=True):
            close(part - own, first - first_own, 1e-12)  # the same sums in another order


def test_shared_part_is_the_embedding_through_both_mlps(tiny: Callable, close: Callable) -> None:
    conditioning = tiny("*", dtype=torch.float64).time_conditioning
    angles = torch.tensor([300 * 10000 ** (-j / 128) for j in range(128)], dtype=torch.float64)
    x = torch.cat((angles.cos(), angles.sin()))
    silu = torch.nn.functional.silu
    expected = conditioning.block(silu(conditioning.embed_out(silu(conditioning.embed_in(x))))).view(3, -1)
    shift, scale, gate = conditioning(torch.tensor([0.3]))[0].unbind(1)
    for part, row, table in zip((shift, scale, gate), expected, conditioning.tables[0], strict=True):
        close(part[0, 0], row + table, 1e-5)  # float32 angles of up to 1000 radians


@pytest.mark.parametrize("pack", [False, True])
def test_bf16_rounds_t_as_the_released_model_does(pack: bool, tiny: Callable) -> None:
    """0.8125 · 1000 is 812.5, which bf16 rounds to 812: both levels must come out alike, packed or not."""
    assert (torch.tensor(0.8125).bfloat16() * 1000).item() == 812.0
    model = tiny("*", dtype=torch.bfloat16)
    conditioning: TimeConditioning = model.time_conditioning
    wide = tiny("*").time_conditioning
    for name, tensor in conditioning.released_tensors().items():
        wide.released_tensors()[name].copy_(tensor)
    if pack:
        pack_(model)
    ours = conditioning(torch.tensor([0.8125]))[0, :, 0].float()
    as_released, unrounded = (wide(torch.tensor([level]))[0, :, 0] for level in (0.812, 0.8125))
    assert (ours - as_released).abs().mean() < 0.5 * (ours - unrounded).abs().mean()


def test_neutral_tables_make_the_denoiser_its_backbone(tiny: Callable, ids: Callable) -> None:
    """gate 1, shift = scale = 0 and zero in the last layer: step 0 of training computes the backbone exactly."""
    model = tiny("M*-E")
    tensors = model.released_tensors()
    for name, tensor in tensors.items():
        if name.startswith("denoiser_tower"):
            tensor.copy_(tensors[name.replace("denoiser", "context")])
        elif name == "lm_head.weight":
            tensor.copy_(tensors["context_lm_head.weight"])
        elif name.startswith("t_block"):
            tensor.zero_()
        elif name.startswith("scale_shift"):
            tensor.zero_()[2] = 1
    prompt = ids(1, 9)
    state = model.prefill(prompt)
    for t in (0.0, 0.5, 1.0):  # a block of one token sees what the causal tower sees
        logits = model.denoise([[7]], state, t)[0, 0]
        torch.testing.assert_close(logits, model.extend([[7]], state).next_logits[0], rtol=1e-4, atol=1e-4)
    assert logits.isfinite().sum() == 39  # all but the mask's


def test_known_levels_are_what_would_be_computed(tiny: Callable) -> None:
    model = tiny("M*")
    conditioning: TimeConditioning = model.time_conditioning
    levels = tuple((i + 1) / 100 for i in range(MAX_LEVELS + 3))  # the first ones are forgotten on the way
    weight = conditioning.tables.data
    for packed in (False, True):
        if packed:
            pack_(model)
        with torch.no_grad():
            for some in (levels[:1], levels[:3], levels, levels[:2]):
                torch.testing.assert_close(conditioning.at(some), conditioning(torch.tensor(some)))
            assert len(conditioning._known) <= (MAX_LEVELS if packed else 0)
            weight += 1  # weights that may change are read each time
            changed = conditioning(torch.tensor(levels[:1]))
            assert torch.equal(conditioning.at(levels[:1]), changed) is not packed

"""The training pass: the denoiser over every block of a sequence at once.

Letters: b batch, t tokens, d width, h heads, k KV heads, p head width, m masked rows, v vocabulary.
"""

import torch
from torch import Tensor

from twotower.model.attention import Attention, rotation
from twotower.model.mlp import MLP
from twotower.model.moe import MixtureOfExperts
from twotower.model.time_conditioning import Modulation
from twotower.model.two_tower import TwoTower
from twotower.ops.attention import cached_attention


def block_parallel_hidden(model: TwoTower, x0: Tensor, xt: Tensor, t: Tensor, block: Tensor) -> Tensor:
    """The denoiser's last hidden (b, t, d) for noisy tokens xt given the context tower's pass over clean tokens x0.

    x0, xt (b, t) int64; t (b, t) each position's noise level (constant within a block); block (t,) the index of each
    position's block, non-decreasing. A position sees the context keys of earlier blocks and the noisy keys of its
    own. The towers advance layer by layer, so one layer's context tensors are live. Gradients reach the denoiser
    only. Raises ValueError for `M` layers, whose seeded training scan is not written yet.
    """
    config = model.config
    if "M" in config.pattern:
        raise ValueError(f"pattern {config.pattern} has M layers, which can't be trained yet; use layers of *, - and E")
    context, denoiser = model.context_tower, model.denoiser_tower
    length = x0.shape[1]
    dtype = denoiser.activation_dtype
    positions = torch.arange(length, device=x0.device)
    rope = rotation(positions[None], config.head_dim, config.rope_theta, dtype) if config.use_rope else None
    causal = _bias(positions[:, None] >= positions, dtype)
    seeded = _bias(torch.cat((block[:, None] > block, block[:, None] == block), dim=1), dtype)  # (t, 2t)
    modulations = _per_position(model, t)
    clean, noisy = context.embed(x0), denoiser.embed(xt)
    for below, layer, modulation in zip(context.stack, denoiser.stack, modulations, strict=True):
        entered = layer.enter(noisy, modulation, dtype)
        with torch.no_grad():
            clean_entered = below.enter(clean, None, dtype)
        if isinstance(layer.mixer, Attention) and isinstance(below.mixer, Attention):
            with torch.no_grad():
                q, past_key, past_value = below.mixer.project(clean_entered, rope)
                clean_mixed = below.mixer.output(cached_attention(q, past_key, past_value, causal))
            q, key, value = layer.mixer.project(entered, rope)
            keys, values = torch.cat((past_key, key), dim=2), torch.cat((past_value, value), dim=2)
            mixed = layer.mixer.output(cached_attention(q, keys, values, seeded))
        else:
            assert isinstance(layer.mixer, MLP | MixtureOfExperts)
            assert isinstance(below.mixer, MLP | MixtureOfExperts)
            with torch.no_grad():
                clean_mixed = below.mixer(clean_entered)
            mixed = layer.mixer(entered)
        with torch.no_grad():
            clean = below.leave(clean, clean_mixed, None)
        noisy = layer.leave(noisy, mixed, modulation)
    return denoiser.finish(noisy)


def _per_position(model: TwoTower, t: Tensor) -> list[Modulation]:
    levels, index = t.unique(return_inverse=True)  # few: one per block of each row
    return [Modulation(*(part[:, 0][index] for part in layer)) for layer in model.time_conditioning(levels)]


def _bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)[None, None]

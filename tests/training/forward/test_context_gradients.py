"""Which layers of the context tower the training pass runs, and the gradients that come back through them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from twotower.model.layer import Layer
from twotower.model.two_tower import TwoTower
from twotower.training.forward.block_parallel import block_parallel_hidden
from twotower.training.forward.layout import Layout, make_layout


def one_document(length: int) -> Layout:
    return make_layout(torch.zeros(1, length, dtype=torch.int64), 4)


def test_context_layers_above_the_last_that_is_read_do_not_run(
    tiny: Callable, ids: Callable, monkeypatch: pytest.MonkeyPatch, noisy: Callable
) -> None:
    model, x0, layout = tiny("*-*-*-", denoiser_layers=(0, 2, 5)), ids(1, 16), one_document(16)
    model.context_tower.requires_grad_(False)
    xt, t = noisy(x0, layout)
    ran: list[int] = []

    def enter(self: Layer, *arguments: Any) -> Tensor:
        ran.extend([self.index] if any(self is layer for layer in model.context_tower.stack) else [])
        return entered(self, *arguments)

    entered = Layer.enter
    monkeypatch.setattr(Layer, "enter", enter)
    block_parallel_hidden(model, x0, xt, t, layout)
    assert ran == [0, 1, 2]
    ran.clear()
    block_parallel_hidden(model, x0, xt, t, layout, with_context=True)
    assert ran == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("pattern", "layers"), [("MEM*-*E", (0, 1, 3)), ("*-*-*-", (2, 3, 5)), ("M*-E", None), ("SG-R", (1, 2))]
)
def test_gradients_are_those_of_decoding_block_by_block(
    pattern: str,
    layers: tuple[int, ...] | None,
    trained: bool,
    tiny: Callable,
    ids: Callable,
    close: Callable,
    noisy: Callable,
) -> None:
    """Plain autograd through a causal pass and the denoiser over one block at a time, as cached decoding runs them."""
    x0, layout = ids(1, 22), one_document(22)
    xt, t = noisy(x0, layout)
    models = [tiny(pattern, dtype=torch.float64, denoiser_layers=layers) for _ in range(2)]
    for model in models:
        model.context_tower.requires_grad_(trained)
    hidden = block_parallel_hidden(models[0], x0, xt, t, layout, with_context=True)
    (hidden.denoiser.sin().sum() + hidden.context.cos().sum() * trained).backward()
    context, denoiser = models[1].context_tower, models[1].denoiser_tower
    whole = context.causal(x0, context.initial_state(1, 32)).hidden
    loss = whole.cos().sum() * trained
    for block in range(6):
        place = (layout.block[0] == block).nonzero()[:, 0]
        state = context.initial_state(1, 32)
        if block:
            state = context.causal(x0[:, : place[0]], state).commit((int(place[0]),), None)
        modulation = models[1].time_conditioning(t[0, place[:1]])
        loss = loss + denoiser.block(xt[:, place], state, modulation).sin().sum()
    loss.backward()
    # float64, sums reordered; some gradients are sums of terms that cancel
    gradients = [{n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in models]
    largest = max(gradient.abs().max() for gradient in gradients[1].values())
    for name, gradient in gradients[1].items():
        assert (gradients[0].pop(name) - gradient).abs().max() <= 1e-9 * largest, name
    assert all(not gradient.any() for gradient in gradients[0].values())


class Pass(nn.Module):
    """A model's training pass, for `functional_call`."""

    def __init__(self, model: TwoTower) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Any) -> Tensor:
        return block_parallel_hidden(self.model, *arguments, chunk_size=6).denoiser


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["MM", "M*M", "*-*"])
def test_gradients_through_seeding_into_context_weights(
    pattern: str, tiny: Callable, ids: Callable, noisy: Callable
) -> None:
    """What reaches the denoiser through state, convolution and keys, against finite differences in float64."""
    # small, because a failing gradcheck looks at every weight
    sizes = {"vocab_size": 12, "hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2}
    mamba = {"mamba_num_heads": 2, "mamba_head_dim": 2, "mamba_state_size": 3, "mamba_num_groups": 1}
    model = tiny(pattern, dtype=torch.float64, intermediate_size=4, **sizes, **mamba)
    x0 = ids(1, 11, vocab_size=12)
    layout = make_layout(torch.tensor([[0] * 8 + [1] * 3]), 3, 1)
    xt, t = noisy(x0, layout)
    module = Pass(model)
    names = [f"model.context_tower.{n}" for n, _ in model.context_tower.named_parameters()]
    weights = [module.get_parameter(n).detach().clone().requires_grad_() for n in names]

    def hidden(*values: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, values, strict=True)), (x0, xt, t, layout))

    assert torch.autograd.gradcheck(hidden, weights, fast_mode=True, atol=1e-6)
    reached = torch.autograd.grad(hidden(*weights).sin().sum(), weights, allow_unused=True)
    # above the last seed nothing reads the context tower
    last = f"layers.{len(pattern) - 1}.mixer."
    unread = {last + end for end in ("D", "norm", "out_proj.weight", "o_proj.weight")} | {"norm_f.weight"}
    for name, gradient in zip(names, reached, strict=True):
        silent = name.removeprefix("model.context_tower.") in unread
        assert silent == (gradient is None or not gradient.any()), name

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from twotower.ops.linear import pack
from twotower.ops.mlp import Activation
from twotower.ops.moe import ExpertWeights, Routing, _all_experts, _grouped_experts, apply_experts, route

ROWS = (1, 2, 5, 16, 17, 63, 64, 65, 130)
SETTINGS: dict[str, Any] = {
    "num_active": 3,
    "num_groups": 1,
    "topk_groups": 1,
    "normalise": True,
    "scaling_factor": 2.5,
}


def naive_route(x: Tensor, weight: Tensor, correction: Tensor, **settings: Any) -> list[dict[int, float]]:
    """Each row's chosen experts and their weights, by a float64 loop."""
    rows = []
    softmax = settings.get("router") == "softmax"
    for row in x.double():
        logits = [float(row @ w) for w in weight.double()]
        if settings.get("bias") is not None:
            logits = [a + float(b) for a, b in zip(logits, settings["bias"], strict=True)]
        scores = [math.exp(a) / sum(map(math.exp, logits)) if softmax else 1 / (1 + math.exp(-a)) for a in logits]
        choice = [s + float(b) for s, b in zip(scores, correction.double(), strict=True)]
        size = len(choice) // settings["num_groups"]
        groups = [choice[g : g + size] for g in range(0, len(choice), size)]
        values = [max(group) if softmax else sum(sorted(group)[-2:]) for group in groups]
        kept = sorted(range(len(groups)), key=lambda g: -values[g])[: settings["topk_groups"]]
        choice = [c if e // size in kept else -math.inf for e, c in enumerate(choice)]
        chosen = sorted(range(len(choice)), key=lambda e: -choice[e])[: settings["num_active"]]
        total = sum(scores[e] for e in chosen) + 1e-20 if settings["normalise"] else 1.0
        rows.append({e: scores[e] / total * settings["scaling_factor"] for e in chosen})
    return rows


def as_dicts(routing: Routing) -> list[dict[int, float]]:
    pairs = zip(routing.experts.tolist(), routing.weights.tolist(), strict=True)
    return [dict(zip(experts, weights, strict=True)) for experts, weights in pairs]


def naive_experts(x: Tensor, routing: Routing, w: ExpertWeights) -> Tensor:
    out = torch.zeros_like(x, dtype=torch.float64)
    for r, chosen in enumerate(as_dicts(routing)):
        for e, weight in chosen.items():
            hidden = w.up[e].double() @ x[r].double() * (weight if w.weigh_inputs else 1.0)
            hidden = hidden if w.up_bias is None else hidden + w.up_bias[e].double()
            if w.activation.gated:
                gate, value = hidden.chunk(2)
                hidden = gate * gate.sigmoid() * value
            else:
                hidden = hidden.clamp(min=0) ** 2
            y = hidden @ w.down[e].double()
            y = y if w.down_bias is None else y + w.down_bias[e].double()
            out[r] += y if w.weigh_inputs else weight * y
    return out


def router(rows: int, num_experts: int = 12, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    sizes = ((rows, 6), (num_experts, 6), (num_experts,))
    x, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes)
    return x.to(dtype), weight.to(dtype), bias * 0.3


def weights(
    num_experts: int = 12,
    *,
    biased: bool,
    dtype: torch.dtype = torch.float64,
    gated: bool = False,
    weigh_inputs: bool = False,
) -> ExpertWeights:
    generator = torch.Generator().manual_seed(7)
    e, f, d = num_experts, 5, 6
    u = 2 * f if gated else f
    sizes = ((e, u, d), (e, f, d), (e, u), (e, d))
    up, down, up_bias, down_bias = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes)
    biases = (up_bias, down_bias) if biased else (None, None)
    by = Activation("silu", gated=True) if gated else Activation()
    return ExpertWeights(up, down, (), (), *biases, by, weigh_inputs)


@pytest.mark.parametrize("rows", [1, 5, 65])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"normalise": False},
        {"num_active": 1},
        {"num_active": 12},
        {"num_groups": 4, "topk_groups": 2},
        {"num_groups": 6, "topk_groups": 2},
        {"num_groups": 12, "topk_groups": 5},  # groups of one
        {"router": "softmax"},
        {"router": "softmax", "normalise": False, "num_active": 1},
        {"router": "softmax", "num_groups": 4, "topk_groups": 2, "normalise": False},
        {"router": "softmax", "bias": torch.linspace(-2, 2, 12).double()},
        {"bias": torch.linspace(-2, 2, 12).double(), "num_active": 12},
    ],
)
def test_route_is_the_loop(rows: int, changed: dict[str, Any]) -> None:
    x, weight, bias = router(rows)
    routing = route(x, weight, bias, **SETTINGS | changed)
    assert routing.weights.dtype == torch.float64
    assert as_dicts(routing) == [
        pytest.approx(row, rel=1e-12) for row in naive_route(x, weight, bias, **SETTINGS | changed)
    ]


def test_no_expert_of_a_masked_group_is_chosen() -> None:
    """Even where the kept group's corrected scores are negative, as in DeepSeek's own code and in transformers. The
    released code has 0.0 for the masked ones; its models have one group, so it never does."""
    x, weight = torch.zeros(1, 2), torch.zeros(4, 2)  # every score is 0.5
    bias = torch.tensor([-0.6, -0.7, -2.0, -2.0])  # corrected: -0.1, -0.2 | -1.5, -1.5
    routing = route(x, weight, bias, **SETTINGS | {"num_active": 1, "num_groups": 2, "topk_groups": 1})
    assert routing.experts.item() == 0


def test_normalised_softmax_is_a_softmax_over_the_chosen_logits() -> None:
    """What Mixtral, GraniteMoE and gpt-oss compute."""
    x, weight, bias = router(7)
    settings = SETTINGS | {"scaling_factor": 1.0, "router": "softmax", "bias": bias}
    routing = route(x, weight, torch.zeros(12), **settings)
    best = (x @ weight.t() + bias).topk(3)
    expected = Routing(best.indices, best.values.softmax(-1))
    assert as_dicts(routing) == [pytest.approx(row, rel=1e-12) for row in as_dicts(expected)]


def test_weights_are_the_unbiased_scores() -> None:
    x, weight, bias = router(3)
    settings = SETTINGS | {"num_active": 12, "normalise": False, "scaling_factor": 1.0}
    plain, shifted = (as_dicts(route(x, weight, b, **settings)) for b in (bias, bias + 100))
    assert plain == [pytest.approx(row, rel=1e-12) for row in shifted]


def test_scores_are_float64_even_for_bf16_tokens() -> None:
    """Two experts closer than float32 can tell apart are still told apart."""
    x = torch.ones(1, 2, dtype=torch.bfloat16)
    weight = torch.tensor([[4.0, 0.0], [4.0, 1e-9]], dtype=torch.float64)
    routing = route(x, weight, torch.zeros(2), **SETTINGS | {"num_active": 1})
    assert routing.experts.item() == 1


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("changed", [{}, {"gated": True}, {"gated": True, "weigh_inputs": True}])
def test_both_ways_through_the_experts_are_the_loop(rows: int, biased: bool, changed: dict[str, bool]) -> None:
    x, gate, correction = router(rows)
    routing = route(x, gate, correction, **SETTINGS)
    stacked = weights(biased=biased, **changed)
    expected = naive_experts(x, routing, stacked)
    if not stacked.weigh_inputs:
        torch.testing.assert_close(_all_experts(x, routing, stacked), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(_grouped_experts(x, routing, stacked, 12), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(apply_experts(x, routing, stacked), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rows", [1, 5, 64, 130])
@pytest.mark.parametrize("gated", [False, True])
def test_bf16_experts_are_close_to_the_loop(rows: int, gated: bool) -> None:
    x, gate, correction = router(rows, dtype=torch.bfloat16)
    routing = route(x, gate, correction, **SETTINGS)
    stacked = weights(biased=True, dtype=torch.bfloat16, gated=gated)
    expected = naive_experts(x, routing, stacked)
    for out in (_all_experts(x, routing, stacked), _grouped_experts(x, routing, stacked, 12)):
        assert out.dtype == torch.bfloat16
        # a handful of bf16 roundings, 2^-9 each, of hidden values, gates and outputs
        assert (out.double() - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("rows", [1, 5, 17])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("changed", [{}, {"gated": True}, {"gated": True, "weigh_inputs": True}])
def test_packed_experts_are_the_loop(rows: int, biased: bool, changed: dict[str, bool]) -> None:
    x, gate, correction = router(rows, dtype=torch.float32)
    routing = route(x, gate, correction, **SETTINGS)
    stacked = weights(biased=biased, dtype=torch.float32, **changed)
    ups, downs = [pack(w) for w in stacked.up], [pack(w.t().contiguous()) for w in stacked.down]
    if ups[0] is None:
        pytest.skip("this torch packs nothing")
    none = torch.empty(0)
    packed = stacked._replace(up=none, down=none, packed_up=tuple(ups), packed_down=tuple(downs))
    expected = naive_experts(x, routing, stacked)
    # float32 products of width 5 and 6, squared in between
    assert (apply_experts(x, routing, packed).double() - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("everything", [False, True])
def test_experts_that_were_not_chosen_add_exactly_nothing(rows: int, everything: bool) -> None:
    x, gate, correction = router(rows)
    routing = route(x, gate, correction, **SETTINGS | {"num_active": 1})
    stacked = weights(biased=True)
    loud = stacked._make(v.clone() if isinstance(v, Tensor) else v for v in stacked)
    others = sorted(set(range(12)) - set(routing.experts.flatten().tolist()))
    assert others
    for tensor in (loud.up, loud.down, loud.up_bias, loud.down_bias):
        tensor[others] = 1e6
    run = _all_experts if everything else lambda *a: _grouped_experts(*a, 12)
    assert torch.equal(run(x, routing, loud), run(x, routing, stacked))


@pytest.mark.slow
def test_gradients_reach_experts_and_router() -> None:
    x, gate, correction = router(4)
    stacked = weights(biased=False)
    leaves = tuple(v.requires_grad_() for v in (x, gate, stacked.up, stacked.down))

    def run(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return apply_experts(x, route(x, gate, correction, **SETTINGS), ExpertWeights(up, down))

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.slow
@pytest.mark.usefixtures("cxx_compiler")
def test_compiled_bfloat16_gradients_are_the_plain_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 64, generator=generator).bfloat16()  # too many for all experts at once
    weights = [torch.randn(2, 64, 64, generator=generator).bfloat16().requires_grad_() for _ in "ud"]
    routing = Routing(torch.arange(128)[:, None] % 2, torch.ones(128, 1, dtype=torch.float64))

    def gradients(apply: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        loss = apply(x, routing, ExpertWeights(*weights)).float().square().sum()
        return torch.autograd.grad(loss, weights)

    for compiled, plain in zip(gradients(torch.compile(apply_experts)), gradients(apply_experts), strict=True):
        torch.testing.assert_close(compiled, plain)

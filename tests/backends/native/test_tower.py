"""Whole passes in C against the reference at odd lengths and widths, and bits that no batch or chunk may change."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import twotower
from twotower.backends.choose import _pack_side_, choose_backend, pack_
from twotower.backends.native import build
from twotower.backends.native.pack import has_bf16_pairs
from twotower.model import linear as model_linear
from twotower.model.pages import PAGE_SIZE, PagedKeys
from twotower.model.state import ContextState, MambaState
from twotower.model.two_tower import TwoTower
from twotower.ops import linear as plain
from twotower.ops import mlp, moe
from twotower.rope import AttentionType, Rope

pytestmark = pytest.mark.skipif(build.library() is None, reason="this machine has no C compiler")

BIASES = {"use_bias": True, "attention_bias": True, "mlp_bias": True}
# What other families' layers have: LayerNorm, norms behind mixers and of queries and keys, parallel layers, scales.
LAYER_NORM = {"norm_type": "layer", "norm_bias": True, "qk_norm": "each", "parallel": "*-", "use_rope": True} | BIASES
POST_NORM = {"pre_norm": False, "post_norm": True, "qk_norm": "all", "residual_scale": 0.4, "attention_scale": 0.2}
TWO_ROPES = {
    "attention_types": (
        AttentionType(rope_parameters=Rope(rope_theta=100.0, rope_type="linear", factor=3.0)),
        AttentionType(),
        AttentionType(rope_parameters=Rope(rope_theta=50.0, attention_factor=1.2)),
    ),
    "attention_pattern": "120",
}
WINDOWS = {
    "attention_types": (
        AttentionType(window=7, rope_parameters=Rope(rope_theta=100.0, partial_rotary_factor=0.5)),
        AttentionType(window=20),
        AttentionType(chunk=9),
        AttentionType(rope_parameters=Rope(partial_rotary_factor=0.25)),
    ),
    "attention_pattern": "0123",
    "attention_softcap": 2.0,
    "attention_sinks": True,
}
# Queries that grow with their positions, clamped projections, norms behind RoPE, scores by depth, a head with a bias
QUERIES = {
    "attention_types": (
        AttentionType(rope_parameters=Rope(rope_theta=100.0), query_growth=0.5, query_period=6),
        AttentionType(query_growth=0.3, query_period=7, query_offset=1),
    ),
    "attention_pattern": "01",
    "qk_norm": "head",
    "qk_norm_behind_rope": True,
    "clip_qkv": 1.5,
    "attention_scale_by_depth": True,
    "head_bias": True,
}
LATENTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 12,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 5,
    "v_head_dim": 7,
    "attention_types": (AttentionType(rope_parameters=Rope(partial_rotary_factor=0.34)),),
}
GATED: dict[str, Any] = {"gated_mlp": True, "mlp_hidden_act": "silu"}
SOFTMAX: dict[str, Any] = {"router": "softmax", "norm_topk_prob": False}
PATTERNS: list[tuple[str, dict[str, Any]]] = [
    ("G*-G", {"attention_gate": True}),
    ("MG*", {"mamba_state_size": 24, "mamba_head_dim": 13}),
    ("*-*", LATENTS | {"q_lora_rank": 90}),
    ("**-**", WINDOWS),
    ("*-*-", LAYER_NORM),
    ("*-*-", QUERIES),
    ("M*-*-", POST_NORM | TWO_ROPES | {"attention_pattern": "02"}),
    ("M*-E", {}),
    ("EM*M-*", BIASES),
    ("MG*M-*", {"denoiser_layers": (1, 3, 5)}),
    ("*-*-**", WINDOWS | {"denoiser_layers": (1, 2, 5)}),
    ("M*-M*-", {"parallel": "M*-", "denoiser_layers": (1, 2, 3, 5)}),
    ("M", {}),
    ("llama", {}),
    ("E-*", GATED | SOFTMAX | {"moe_latent_size": 20, "shared_expert_gate": True, "mlp_hidden_act": "gelu"}),
    ("E*", GATED | {"weigh_expert_inputs": True, "num_experts_per_tok": 1, "expert_intermediate_size": 21}),
]
# Each reaches a way through some kernel: state widths of 2, 4, 8 and 16 vectors and between, head widths that fill
# vectors in eights, twos, ones and not at all, panels that are not full, few taps, groups of experts and of channels.
SIZES: list[tuple[str, dict[str, Any]]] = [
    ("M", {"mamba_state_size": 5, "mamba_num_groups": 1, "mamba_head_dim": 5, "conv_kernel": 2}),
    ("M", {"mamba_state_size": 32, "mamba_num_groups": 4, "hidden_size": 33, "time_step_limit": (0.1, 0.5)}),
    ("M", {"mamba_state_size": 64, "mamba_head_dim": 13, "conv_kernel": 3, "use_conv_bias": False}),
    ("M", {"mamba_state_size": 100} | BIASES),
    ("M", {"mamba_state_size": 128}),
    ("M", {"mamba_state_size": 256}),
    ("M", {"mamba_norm": "before_gate", "mamba_head_dim": 13}),
    ("M", {"mamba_norm": None, "mamba_scales": (0.4, 1.5, 0.7, 1.2, 0.9)}),
    ("*", {"head_dim": 6, "num_attention_heads": 2, "num_key_value_heads": 1, "use_rope": True}),
    ("*", {"head_dim": 48, "num_key_value_heads": 4} | BIASES),
    ("*", {"head_dim": 140, "num_attention_heads": 2, "use_rope": True}),
    ("-", {"intermediate_size": 37, "gated_mlp": True, "mlp_hidden_act": "silu", "hidden_size": 240} | BIASES),
    ("-", {"intermediate_size": 65, "hidden_size": 7}),
    ("E", {"num_experts": 16, "expert_num_groups": 4, "expert_topk_groups": 2, "num_experts_per_tok": 3}),
    ("E", {"num_experts": 16, "expert_num_groups": 8, "expert_topk_groups": 3, "norm_topk_prob": False} | BIASES),
    ("E", {"num_experts": 33, "expert_intermediate_size": 20, "hidden_size": 33}),
    ("-", {"mlp_hidden_act": "xielu", "intermediate_size": 37} | BIASES),
    ("-", {"mlp_hidden_act": "gelu", "intermediate_size": 33}),
    ("-", {"mlp_hidden_act": "relu"}),
    ("E", GATED | {"mlp_hidden_act": "gelu", "router": "softmax", "shared_expert_intermediate_size": 0}),
    ("E", GATED | {"expert_intermediate_size": 19, "shared_expert_gate": True, "num_experts_per_tok": 8}),
    ("E", GATED | {"weigh_expert_inputs": True, "num_experts_per_tok": 1, "norm_topk_prob": False}),
    ("EE", {"moe_latent_size": 50, "router_bias": True, "router": "softmax"} | BIASES),
    ("E", {"moe_latent_size": 7, "num_experts": 16, "expert_num_groups": 4, "expert_topk_groups": 3} | SOFTMAX),
    ("E-", GATED | {"mlp_hidden_act": "quick_gelu", "glu_limit": 0.5, "glu_offset": 1.0} | BIASES),
    ("E-", GATED | {"mlp_hidden_act": "gelu_tanh"}),
]
SIZES += [
    ("G", {}),
    ("G", {"mamba_state_size": 5, "mamba_num_groups": 1, "mamba_head_dim": 5, "conv_kernel": 2, "hidden_size": 33}),
    ("GMG", {"mamba_state_size": 33, "mamba_num_groups": 4, "mamba_head_dim": 7, "time_step_limit": (0.1, 0.5)}),
    ("G-", {"mamba_state_size": 128, "parallel": "G-"}),
    ("**", {"attention_gate": True, "hidden_size": 33} | BIASES),
    ("*-*", {"alibi_slopes": (0.5, 0.03, 0.1, 0.7), "num_key_value_heads": 4, "clip_qkv": 1.5}),
    ("**", LATENTS),
    ("**", LATENTS | {"q_lora_rank": 6, "hidden_size": 33, "attention_gate": True} | BIASES),
    ("**", LATENTS | {"head_dim": 18, "v_head_dim": 18, "qk_rope_head_dim": 6, "q_lora_rank": 300}),
    ("*-*-", LAYER_NORM),
    ("*-*-", LAYER_NORM | {"hidden_size": 33, "num_key_value_heads": 4, "norm_bias": False}),
    ("*-*-", POST_NORM | {"hidden_size": 37, "num_key_value_heads": 1}),
    ("*-*-", {"post_norm": True, "norm_offset": 1.0, "qk_norm": "head", "use_rope": True}),
    ("M*-M*-", {"parallel": "M*", "residual_scale": 0.7}),
    ("M*-M*-", {"parallel": "M*-", "norm_type": "layer"}),
    ("***", TWO_ROPES),
    ("*-*-", QUERIES),
    ("*-*-", LAYER_NORM | {"qk_norm_bias": True, "clip_qkv": 0.7}),
    ("*-*-", QUERIES | LAYER_NORM | {"qk_norm_bias": True, "head_dim": 14}),
    ("**-**", WINDOWS),
    ("*-***", WINDOWS | {"attention_softcap": None, "num_key_value_heads": 1, "head_dim": 24}),
    ("*-***", WINDOWS | {"attention_sinks": False, "num_key_value_heads": 4, "qk_norm": "head"}),
]
either_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
any_pattern = pytest.mark.parametrize(("pattern", "config"), PATTERNS)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def pair(tiny: Callable, pattern: str, dtype: torch.dtype, config: dict[str, Any]) -> tuple[TwoTower, TwoTower]:
    """A model in C and the same weights in float32 PyTorch."""
    packed, exact = tiny(pattern, dtype=dtype, **config), tiny(pattern, **config)
    for name, tensor in packed.released_tensors().items():
        exact.released_tensors()[name].copy_(tensor)
    exact.time_conditioning.released_dtype = dtype
    pack_(packed, "native")
    return packed, exact


def prefilled(model: TwoTower, tokens: Tensor, lengths: list[int]) -> ContextState:
    return model.prefill(tokens, lengths, capacity=tokens.shape[1] + 96)


def tensors(mamba: tuple[MambaState, ...]) -> list[Tensor]:
    return [part for layer in mamba for part in layer]


def outcome(model: TwoTower, ids: Callable, s: int) -> list[Tensor]:
    """What a causal pass of s tokens behind two prompts gives, and a block after it."""
    scored = model.score(ids(2, s, seed=1), prefilled(model, ids(2, 30), [30, 13]))
    replayed = [scored.advance(None if n is None else torch.tensor(n)) for n in (None, [0, s // 2])]
    state = model.keep(scored, (s, s - 1), with_logits=True)
    assert state.next_logits is not None
    block = model.denoiser_logits(ids(2, 16), state, (0.5, 1.0), (16, 3))
    return [state.next_logits, block[0], block[1, :3], *(t for mamba in replayed for t in tensors(mamba))]


@either_dtype
@pytest.mark.parametrize(("pattern", "config"), SIZES)
@pytest.mark.usefixtures("threads")
def test_passes_are_the_references(
    pattern: str,
    config: dict[str, Any],
    dtype: torch.dtype,
    tiny: Callable,
    ids: Callable,
    close: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tolerance = 5e-5  # float32 sums in another order, over up to 100 tokens
    if dtype == torch.bfloat16 and has_bf16_pairs():
        tolerance = 2e-2  # a hidden value between two of bf16 may be rounded to either

        def rounding(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
            return plain.linear(x.bfloat16().float() if isinstance(weight, Tensor) else x, weight, bias)

        for module in (model_linear, mlp, moe):
            monkeypatch.setattr(module, "linear", rounding)
    packed, exact = pair(tiny, pattern, dtype, config)
    with torch.inference_mode():
        for s in (1, 2, 17, 70):
            for ours, theirs in zip(outcome(packed, ids, s), outcome(exact, ids, s), strict=True):
                close(ours, theirs, tolerance)


@either_dtype
@any_pattern
def test_bits_depend_on_neither_batch_nor_chunk(
    pattern: str, config: dict[str, Any], dtype: torch.dtype, tiny: Callable, ids: Callable
) -> None:
    """What makes `verified` equal `ar` even where two tokens are equally likely."""
    model, tokens = tiny(pattern, dtype=dtype, **config), ids(3, 40)
    pack_(model, "native")
    whole = model.context_logits(tokens)
    for row in range(3):
        assert torch.equal(model.context_logits(tokens[row : row + 1]), whole[row : row + 1])
    for size in (1, 5, 16):
        state = model.context_tower.initial_state(3)
        for at in range(0, 40, size):
            state = model.extend(tokens[:, at : at + size], state)
            assert torch.equal(state.next_logits, whole[:, min(at + size, 40) - 1])
    block = torch.full((3, 8), 3)
    together = model.denoise(block, model.prefill(tokens))
    for row in range(3):
        alone = model.denoise(block[:1], model.prefill(tokens[row : row + 1]))
        assert torch.equal(alone, together[row : row + 1])


@any_pattern
def test_a_row_that_overflowed_stays_alone(pattern: str, config: dict[str, Any], tiny: Callable, ids: Callable) -> None:
    model = tiny(pattern, **config)
    pack_(model, "native")
    state = model.prefill(ids(3, 20))
    alone = model.extend(ids(3, 20, seed=1), state).next_logits[1:]
    for part in (*tensors(state.mamba), *state.buffer.keys):
        part[0] = math.inf
    assert torch.equal(model.extend(ids(3, 20, seed=1), state).next_logits[1:], alone)


@any_pattern
@pytest.mark.parametrize("s", [1, 5, 16, 100])
@pytest.mark.parametrize("marks", [(), (1,), (0, 3, 4)])
def test_states_within_a_pass_are_those_of_its_first_tokens_alone(
    pattern: str, config: dict[str, Any], s: int, marks: tuple[int, ...], tiny: Callable, ids: Callable
) -> None:
    """To the bit, whether marked before the pass or replayed after it."""
    model, tokens, new = tiny(pattern, **config), ids(2, 30), ids(2, s, seed=1)
    pack_(model, "native")
    marks = tuple(mark for mark in marks if mark <= s)

    def after(count: int) -> list[Tensor]:
        return tensors(model.absorb(new[:, :count], prefilled(model, tokens, [30, 13]), with_logits=False).mamba)

    with torch.inference_mode():
        scored = model.score(new, prefilled(model, tokens, [30, 13]), marks)
        for mark in marks:
            assert all(map(torch.equal, tensors(scored.marks[mark]), after(mark)))
        assert all(map(torch.equal, tensors(scored.advance(None)), after(s)))
        for ours, none, half in zip(
            tensors(scored.advance(torch.tensor([0, s // 2]))), after(0), after(s // 2), strict=True
        ):
            assert torch.equal(ours[0], none[0])
            assert torch.equal(ours[1], half[1])


@any_pattern
def test_keys_in_pages_give_the_bits_of_keys_in_rows(
    pattern: str, config: dict[str, Any], tiny: Callable, ids: Callable
) -> None:
    model = tiny(pattern, **config)
    pack_(model, "native")

    def run(state: ContextState) -> tuple[Tensor, Tensor]:
        state = model.absorb(ids(2, 50), state, (50, 20), with_logits=True)
        state = model.absorb(ids(2, 3), state, (3, 2), with_logits=True)
        assert state.next_logits is not None
        return model.denoiser_logits(ids(2, 16), state, (1.0, 0.5)), state.next_logits

    with torch.inference_mode():
        empty = model.context_tower.initial_state(2)
        shapes = [(20, PAGE_SIZE, k.shape[1], k.shape[3]) for k in empty.buffer.keys]
        keys, values = ([torch.zeros(shape).transpose(1, 2) for shape in shapes] for _ in range(2))
        tables: tuple[list[int], ...] = ([9, 4, 7, 1], [3, 8])  # the second row's padding goes to page 0
        paged = dataclasses.replace(empty, buffer=PagedKeys(keys, values, tables, (0, 0)) if keys else empty.buffer)
        assert all(map(torch.equal, run(paged), run(empty)))


def test_a_hook_or_a_new_part_in_a_layer_is_refused(tiny: Callable, ids: Callable) -> None:
    model, other = tiny("M*-E"), tiny("M*-E", seed=5)
    pack_(model, "native")
    state, block = model.prefill(ids(1, 20)), ids(1, 8)
    before = model.denoise(block, state)
    layer = model.denoiser_tower.layers[2]
    hook = layer.mixer.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"layer 2 \('-'\) has a forward hook.*load\(..., backend=\"reference\"\)"):
        model.denoise(block, state)
    hook.remove()
    assert torch.equal(model.denoise(block, state), before)
    mixer, layer.mixer = layer.mixer, other.denoiser_tower.layers[2].mixer
    with pytest.raises(RuntimeError, match=r"layer 2 \('-'\) has a module in it that was replaced"):
        model.denoise(block, state)
    layer.mixer = mixer
    assert torch.equal(model.denoise(block, state), before)


def test_a_packed_model_can_be_copied(tiny: Callable, ids: Callable) -> None:
    model = tiny("M*-E")
    pack_(model, "native")
    twin = copy.deepcopy(model)
    state = model.prefill(ids(1, 20))
    before = model.denoise(ids(1, 8), state)
    assert torch.equal(twin.denoise(ids(1, 8), twin.prefill(ids(1, 20))), before)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(model.denoise(ids(1, 8), state), before)
    assert not torch.equal(twin.denoise(ids(1, 8), twin.prefill(ids(1, 20))), before)


def test_a_model_says_what_runs_each_tower() -> None:
    model = twotower.load("hybrid", backend="native")
    assert {tower: choice.name for tower, choice in model.backends.items()} == {
        "context tower": "native",
        "denoiser tower": "native",
    }
    assert twotower.load("hybrid", pack=False).backends == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("positions", [512, 4096])
def test_a_denoiser_reads_what_another_backend_cached(
    positions: int, dtype: torch.dtype, tiny: Callable, ids: Callable, close: Callable
) -> None:
    """As where the towers are on two devices: each backend has its own dtypes of keys and convolution rows."""
    made: dict[tuple[str, str], TwoTower] = {}
    for sides in itertools.product(("reference", "native"), repeat=2):
        made[sides] = model = tiny("*M*-", dtype=dtype, use_rope=True, carried={"max_position_embeddings": positions})
        for name, part in zip(sides, ("context", "denoiser"), strict=True):
            tower, head = getattr(model, f"{part}_tower"), "context_lm_head" if part == "context" else "lm_head"
            others = [getattr(model, head)] + [model.time_conditioning] * (part == "denoiser")
            _pack_side_(choose_backend("cpu", dtype, name), tower, others)
    expected = made["reference", "reference"].denoise(ids(2, 8), made["reference", "reference"].prefill(ids(2, 40)))
    for (context, denoiser), model in made.items():
        state = model.prefill(ids(2, 40))
        long = positions > 1024 or context == "reference"
        assert state.buffer.keys[0].dtype == (dtype if long else torch.float32)
        if context == denoiser:
            assert model.seed(state) is state
        # bf16: the reference rounds activations; keys or rows read in another dtype differ by more than half
        close(model.denoise(ids(2, 8), state), expected, 0.1 if dtype == torch.bfloat16 else 1e-5)
    for mode in ("diffusion", "verified", "mock_ar"):
        params = twotower.SamplingParams(mode=mode, max_new_tokens=20, ignore_eos=True)
        prompt = ids(1, 12)[0].tolist()
        for sides in (("reference", "native"), ("native", "reference")):
            engine = twotower.Engine(made[sides], twotower.EngineConfig(state_bytes=1 << 20, snapshot_bytes=1 << 16))
            [paged] = engine.generate([prompt], params)
            assert paged.token_ids == twotower.generate(made[sides], [prompt], params)[0].token_ids

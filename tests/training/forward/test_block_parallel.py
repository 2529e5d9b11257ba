from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from twotower.model import moe
from twotower.model.two_tower import TwoTower
from twotower.ops.moe import ExpertWeights, Routing, apply_experts
from twotower.rope import AttentionType, Rope
from twotower.training.forward.block_parallel import block_parallel_hidden
from twotower.training.forward.layout import Layout, make_layout

PATTERNS = ["*", "-*", "M", "G", "S", "R", "MEM", "M*-E", "llama"]
LATENTS = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 6,
    "attention_types": (AttentionType(rope_parameters=Rope(partial_rotary_factor=0.5)),),
}
# What layers of other families differ in: (pattern, config)
TURNS = AttentionType(rope_parameters=Rope(rope_theta=100.0))
GROWS = AttentionType(query_growth=0.5, query_period=4, query_offset=1)
BEHIND = {"qk_norm_behind_rope": True, "clip_qkv": 1.0, "attention_scale_by_depth": True, "head_bias": True}
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("**-", {"attention_types": (TURNS, AttentionType(window=6)), "attention_pattern": "01"}),
    ("*", {"attention_types": (AttentionType(window=3, rope_parameters=Rope(partial_rotary_factor=0.5)),)}),
    ("**", {"attention_types": (AttentionType(chunk=7), TURNS), "attention_pattern": "01", "attention_sinks": True}),
    ("*-*-", {"parallel": "*-", "norm_type": "layer", "norm_bias": True, "num_positions": 64}),
    ("*-*-", {"pre_norm": False, "post_norm": True, "qk_norm": "all", "residual_scale": 0.5}),
    (
        "*-*-",
        {"post_norm": True, "norm_offset": 1.0, "qk_norm": "head", "attention_softcap": 2.0, "embedding_scale": 3.0},
    ),
    ("MG*-M*E-", {"denoiser_layers": (0, 5, 6), "attention_scale_by_depth": True}),
    ("S*-RM", {"denoiser_layers": (2, 3)}),
    ("*-*-*-", {"parallel": "*-", "denoiser_layers": (1, 2, 3, 5)}),
    ("M*-M*-", {"parallel": "M*-", "denoiser_layers": (1, 2, 5)}),
    ("G*-", {"attention_gate": True, "norm_offset": 1.0, "qk_norm": "head", "gated_mlp": True}),
    ("S*-SE", {"mamba_inner_epsilon": 0.1, "use_bias": True, "mamba_state_size": 5}),
    ("SRS", {"use_conv_bias": False, "conv_kernel": 2}),
    ("*-*", {"qk_norm": "each", "attention_scale": 0.3, "norm_type": "layer", "attention_bias": True}),
    ("**", {"alibi_slopes": (0.5, 0.25, 0.1, 0.0), "embedding_norm": True, "attention_sinks": True}),
    ("*-*", {"attention_types": (TURNS, GROWS), "attention_pattern": "01", "qk_norm": "head", **BEHIND}),
]
# Documents are turned by their own lengths, of which some are longer than the original one
LONGER = [
    Rope(rope_type="dynamic", original_max_position_embeddings=12, factor=4.0),
    Rope(
        rope_type="longrope",
        original_max_position_embeddings=12,
        short_factor=(1.0, 1.5, 2.0, 3.0),
        long_factor=(2.0, 4.0, 8.0, 9.0),
    ),
]


def one_document(length: int, block_size: int, offset: int = 0) -> Layout:
    return make_layout(torch.zeros(1, length, dtype=torch.int64), block_size, offset)


def packed(block_size: int) -> Layout:
    """Rows with documents of different lengths and grids of blocks; the last document of row 0 is padding."""
    lengths = torch.tensor([[9, 1, 20, 10], [17, 17, 3, 3]])
    document = torch.stack([torch.arange(4).repeat_interleave(row) for row in lengths])
    return make_layout(document, block_size, torch.tensor([0, 3]))


def logits(model: TwoTower, x0: Tensor, xt: Tensor, t: Tensor, layout: Layout, **options: Any) -> Tensor:
    with torch.no_grad():
        return model.lm_head.linear(block_parallel_hidden(model, x0, xt, t, layout, **options).denoiser)


def check_decoding(model: TwoTower, trained: Tensor, x0: Tensor, xt: Tensor, t: Tensor, layout: Layout) -> None:
    """Every block of every row against the denoiser over a prefilled state."""
    for row in range(x0.shape[0]):
        block, first, document = (v[row % len(v)] for v in (layout.block, layout.document_start, layout.document))
        for index in block.unique():
            place = (block == index).nonzero()[:, 0]
            start = int(first[place[0]])
            length = int((document == document[start]).sum())
            state = model.prefill(x0[row : row + 1, start : int(place[0])], capacity=length)
            with torch.no_grad():
                modulation = model.time_conditioning(t[row, place[:1]])
                decoded = model.lm_head.linear(model.denoiser_tower.block(xt[row : row + 1, place], state, modulation))
            largest = decoded.abs().max()
            assert (trained[row : row + 1, place] - decoded).abs().max() <= 1e-10 * largest  # float64, sums reordered


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("block_size", "chunk_size"), [(4, 64), (4, 6), (8, 8), (8, 20), (16, 40), (32, 16), (32, 64)])
@pytest.mark.parametrize("offset", [0, 3])
def test_every_block_is_what_cached_decoding_computes(
    pattern: str, block_size: int, chunk_size: int, offset: int, tiny: Callable, ids: Callable, noisy: Callable
) -> None:
    model, x0 = tiny(pattern, dtype=torch.float64), ids(1, 45)
    layout = one_document(45, block_size, offset)
    xt, t = noisy(x0, layout)
    trained = logits(model, x0, xt, t, layout, chunk_size=chunk_size)
    check_decoding(model, trained, x0, xt, t, layout)


@pytest.mark.parametrize("pattern", ["M*-E", "GG*-", "SS*-", "RR*-", "llama"])
@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("chunk_size", [4, 24])
def test_packed_documents_are_decoded_apart(
    pattern: str, block_size: int, chunk_size: int, tiny: Callable, ids: Callable, noisy: Callable
) -> None:
    model, x0 = tiny(pattern, dtype=torch.float64), ids(2, 40)
    layout = packed(block_size)
    xt, t = noisy(x0, layout)
    trained = logits(model, x0, xt, t, layout, chunk_size=chunk_size)
    check_decoding(model, trained, x0, xt, t, layout)


@pytest.mark.parametrize("latents", [{}, LATENTS])
def test_gated_experts_and_latents_are_decoded_as_trained(
    latents: dict[str, Any], tiny: Callable, ids: Callable, noisy: Callable
) -> None:
    experts = {"router": "softmax", "gated_mlp": True, "mlp_hidden_act": "silu", "shared_expert_gate": True}
    model = tiny("*E*E", dtype=torch.float64, moe_latent_size=20, **experts, **latents)
    x0, layout = ids(2, 40), packed(4)
    xt, t = noisy(x0, layout)
    check_decoding(model, logits(model, x0, xt, t, layout, chunk_size=24), x0, xt, t, layout)


@pytest.mark.parametrize(("pattern", "config"), OTHERS)
@pytest.mark.parametrize("block_size", [4, 16])
def test_layers_of_other_families_are_decoded_as_trained(
    pattern: str, config: dict[str, Any], block_size: int, tiny: Callable, ids: Callable, noisy: Callable
) -> None:
    model, x0, layout = tiny(pattern, dtype=torch.float64, **config), ids(2, 40), packed(block_size)
    xt, t = noisy(x0, layout)
    check_decoding(model, logits(model, x0, xt, t, layout), x0, xt, t, layout)


@pytest.mark.parametrize("rope", LONGER)
def test_documents_are_turned_by_their_own_lengths(rope: Rope, tiny: Callable, ids: Callable, noisy: Callable) -> None:
    kinds = (AttentionType(rope_parameters=rope), TURNS)
    model = tiny("*-*", dtype=torch.float64, attention_types=kinds, attention_pattern="01")
    x0, layout = ids(2, 40), packed(4)
    xt, t = noisy(x0, layout)
    check_decoding(model, logits(model, x0, xt, t, layout), x0, xt, t, layout)


def test_views_share_a_context_pass(tiny: Callable, ids: Callable, close: Callable, noisy: Callable) -> None:
    model, x0 = tiny("M*-E", dtype=torch.float64), ids(2, 40)
    layout = packed(4)
    xt, t = noisy(x0, layout)
    other = torch.where(xt == 3, x0, 3)
    both = logits(model, x0, torch.cat((xt, other)), torch.cat((t, 1 - t)), layout)
    close(both[:2], logits(model, x0, xt, t, layout), 1e-13)
    close(both[2:], logits(model, x0, other, 1 - t, layout), 1e-13)


@pytest.mark.parametrize("pattern", ["M*-E", "E*M-", "G-G", "S-S", "R-R", "llama", "-"])
def test_the_context_tower_computes_what_it_does_alone(
    pattern: str, tiny: Callable, ids: Callable, close: Callable, noisy: Callable
) -> None:
    model, x0 = tiny(pattern, dtype=torch.float64), ids(2, 40)
    layout = packed(8)
    with torch.no_grad():
        hidden = block_parallel_hidden(model, x0, *noisy(x0, layout), layout, with_context=True).context
        assert hidden is not None
        ours = model.context_lm_head(hidden)
    for row in range(2):
        for document in layout.document[row].unique():
            place = layout.document[row] == document
            alone = model.context_logits(x0[row : row + 1, place])
            close(ours[row : row + 1, place], alone, 1e-6)  # `context_logits` rounds to float32


def silence(model: TwoTower, keep: str) -> None:
    """Closes all ways from clean tokens to the denoiser of pattern M* but one: SSM state, convolution or keys."""
    with torch.no_grad():
        for tower in (model.context_tower, model.denoiser_tower):
            mamba, attention = (layer.mixer for layer in tower.stack)
            if keep != "conv":
                mamba.conv_taps[:-1] = 0
            if keep != "keys":
                attention.o_proj.weight.zero_()
            if keep != "state":
                mamba.A_log.fill_(20.0)  # exp(-dt·e^20): nothing is left of a state after one token


def moved(before: Tensor, after: Tensor) -> list[bool]:
    return (before != after).any(-1)[0].tolist()


@pytest.mark.parametrize("keep", ["state", "conv", "keys"])
def test_each_way_from_the_block_before_works_alone(keep: str, tiny: Callable, ids: Callable, noisy: Callable) -> None:
    model, x0 = tiny("M*", dtype=torch.float64), ids(1, 24)
    layout = one_document(24, 8)
    xt, t = noisy(x0, layout)
    silence(model, keep)
    before = logits(model, x0, xt, t, layout)
    changed = x0.clone()
    changed[0, 15] = (changed[0, 15] + 1) % 40  # the last clean token before block 2
    reached = moved(before, logits(model, changed, xt, t, layout))
    # through the convolution only the first conv_kernel - 1 positions
    assert reached == [False] * 16 + ([True] * 3 + [False] * 5 if keep == "conv" else [True] * 8)
    silence(model, "nothing")
    quiet = logits(model, x0, xt, t, layout)
    assert not any(moved(quiet, logits(model, changed, xt, t, layout)))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["M", "M*-", "MM", "llama"])
@pytest.mark.parametrize("chunk_size", [8, 12, 64])
def test_no_block_sees_its_own_clean_tokens_or_anything_later(
    pattern: str, chunk_size: int, tiny: Callable, ids: Callable, noisy: Callable
) -> None:
    """To the bit."""
    model, x0 = tiny(pattern, dtype=torch.float64), ids(1, 24)
    layout = one_document(24, 4, 1)
    block = layout.block[0]
    xt, t = noisy(x0, layout)
    before = logits(model, x0, xt, t, layout, chunk_size=chunk_size)
    for at in range(24):
        changed = x0.clone()
        changed[0, at] = (changed[0, at] + 1) % 40
        # clean tokens reach later blocks only, and all of them
        assert (
            moved(before, logits(model, changed, xt, t, layout, chunk_size=chunk_size)) == (block > block[at]).tolist()
        )
        changed = xt.clone()
        changed[0, at] = (changed[0, at] + 1) % 40
        after = moved(before, logits(model, x0, changed, t, layout, chunk_size=chunk_size))
        # noisy tokens reach their own block only: both ways through attention, forwards through the scan
        reached = block == block[at]
        assert after == (reached if "*" in model.config.pattern else reached & (torch.arange(24) >= at)).tolist()


def each_row(x: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    """`apply_experts`, row by row."""
    rows = zip(x.split(1), *(part.split(1) for part in routing), strict=True)
    return torch.cat([apply_experts(row, Routing(*own), experts) for row, *own in rows])


@pytest.mark.parametrize("row_by_row", [True, False])
def test_experts_leak_nothing_either(
    row_by_row: bool, tiny: Callable, ids: Callable, monkeypatch: pytest.MonkeyPatch, noisy: Callable
) -> None:
    """To the bit where every product has one row; otherwise another token goes to other experts, whose products then
    have other shapes and round differently."""
    model, x0 = tiny("M*E", dtype=torch.float64), ids(1, 24)
    if row_by_row:
        monkeypatch.setattr(moe, "apply_experts", each_row)
    layout = one_document(24, 8)
    block = layout.block[0]
    xt, t = noisy(x0, layout)
    before = logits(model, x0, xt, t, layout)
    for at in range(24):
        for clean in (True, False):
            changed = (x0 if clean else xt).clone()
            changed[0, at] = (changed[0, at] + 1) % 40
            after = logits(model, *((changed, xt) if clean else (x0, changed)), t, layout)
            reached = ((after - before).abs() > (0 if row_by_row else 1e-9)).any(-1)[0]
            assert torch.equal(reached, block > block[at] if clean else block == block[at])


def test_levels_of_other_blocks_do_not_matter(tiny: Callable, ids: Callable, noisy: Callable) -> None:
    model, x0 = tiny("M*-", dtype=torch.float64), ids(1, 24)
    layout = one_document(24, 8)
    xt, t = noisy(x0, layout)
    other = torch.where(layout.block == 1, 0.123, t)
    after = moved(logits(model, x0, xt, t, layout), logits(model, x0, xt, other, layout))
    assert after == (layout.block[0] == 1).tolist()


def freeze(model: TwoTower) -> None:
    for module in (model.context_tower, model.context_lm_head):
        module.requires_grad_(False)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_reach_the_denoiser_and_not_a_frozen_context(
    pattern: str, tiny: Callable, ids: Callable, noisy: Callable
) -> None:
    model, x0 = tiny(pattern, dtype=torch.float64), ids(2, 16)
    freeze(model)
    layout = one_document(16, 8)
    hidden = block_parallel_hidden(model, x0, *noisy(x0, layout), layout).denoiser
    model.lm_head.linear(hidden).square().mean().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if n.startswith("context"))
    trained = {n: p.grad for n, p in model.named_parameters() if n.startswith(("denoiser", "lm_head", "time"))}
    # the router's correction bias only chooses
    without = {n for n, g in trained.items() if g is None}
    assert all(n.endswith("correction_bias") for n in without)
    assert all(g.isfinite().all() and bool(g.any()) for n, g in trained.items() if n not in without)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("pattern", ["M*-E", "E-*M"])
def test_recomputing_changes_no_gradient(
    pattern: str, frozen: bool, tiny: Callable, ids: Callable, noisy: Callable
) -> None:
    x0 = ids(2, 40)
    layout = packed(8)
    xt, t = noisy(x0, layout)
    found = []
    for recompute in (False, True):
        model = tiny(pattern, dtype=torch.float64)
        if frozen:
            freeze(model)
        hidden = block_parallel_hidden(model, x0, xt, t, layout, recompute=recompute, with_context=not frozen)
        loss = hidden.denoiser.sin().sum()
        if hidden.context is not None:
            loss = loss + hidden.context.cos().sum()
        loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_what_is_saved_is_linear_in_the_tokens_and_free_of_the_block_length(
    tiny: Callable, ids: Callable, noisy: Callable
) -> None:
    """Nothing of size (t, 2t) and no state per block, whatever is recomputed; much less with `recompute`."""

    def saved(block_size: int, length: int, recompute: bool) -> tuple[int, int]:
        """The elements of all distinct saved tensors, and of the largest."""
        sizes: dict[int, int] = {}
        kept: list[Tensor] = []  # so that no address comes twice

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
            return tensor

        model, x0 = tiny("M*-E", dtype=torch.float64), ids(1, length)
        freeze(model)
        layout = one_document(length, block_size)
        xt, _ = noisy(x0, layout)
        # one level for all: the time modules alone grow with the number of levels
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            block_parallel_hidden(model, x0, xt, torch.full(x0.shape, 0.5), layout, recompute=recompute)
        return sum(sizes.values()), max(sizes.values())

    for recompute in (False, True):
        (short, _), (long, largest) = saved(4, 512, recompute), saved(4, 1024, recompute)
        assert long <= 2.1 * short
        assert largest < 1024 * 1024 / 4
        assert short <= 1.1 * saved(16, 512, recompute)[0]
    assert saved(4, 512, True)[0] < 0.5 * saved(4, 512, False)[0]


@pytest.mark.parametrize(
    ("xt_rows", "layout_rows", "tokens", "message"),
    [(3, 1, 16, "must be .a multiple of rows, tokens"), (2, 1, 15, "the layout is 1 rows of 15"), (2, 3, 16, "3 rows")],
)
def test_shapes_that_disagree_raise(
    xt_rows: int, layout_rows: int, tokens: int, message: str, tiny: Callable, ids: Callable
) -> None:
    x0, xt = ids(2, 16), ids(xt_rows, 16)
    layout = make_layout(torch.zeros(layout_rows, tokens, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match=message):
        block_parallel_hidden(tiny("M*"), x0, xt, torch.ones(xt_rows, 16), layout)

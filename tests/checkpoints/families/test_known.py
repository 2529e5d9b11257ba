"""Every family in every way that a tower runs: transformers' logits, and what follows from them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import twotower
from twotower import SamplingParams
from twotower.backends.native.build import library
from twotower.checkpoints import load_model, save
from twotower.engine.memory_plan import places_before_loading, plan_memory
from twotower.planning.machine import DeviceMemory


def test_a_prompt_has_transformers_logits(family: Any, same_logits: Callable) -> None:
    same_logits(family.ours.context_logits(family.ids), family.logits)


@pytest.mark.parametrize("size", [1, 7])
def test_a_text_has_transformers_logits_however_it_is_cut(size: int, family: Any, same_logits: Callable) -> None:
    state = family.ours.prefill(family.ids[:, :3])
    found, ends = [state.next_logits], [2]
    for block in family.ids[:, 3:].split(size, dim=1):
        state = family.ours.extend(block, state)
        found.append(state.next_logits)
        ends.append(state.length - 1)
    same_logits(torch.stack(found, dim=1), family.logits[:, ends])


def test_rows_of_different_lengths_have_the_logits_that_they_have_alone(family: Any, same_logits: Callable) -> None:
    state = family.ours.prefill(family.ids, lengths=(7, 29))
    same_logits(state.next_logits, torch.stack((family.logits[0, 6], family.logits[1, 28])))


@pytest.mark.parametrize(("prompt_length", "by"), [(5, "fastest"), (30, "ours")])
def test_verified_writes_what_ar_writes(prompt_length: int, by: str, family: Any) -> None:
    prompt = family.ids[0, :prompt_length].tolist()
    one, other = (
        twotower.generate(getattr(family, by), [prompt], SamplingParams(mode=mode, max_new_tokens=24, ignore_eos=True))[
            0
        ]
        for mode in ("ar", "verified")
    )
    assert one.token_ids == other.token_ids


@pytest.mark.parametrize("by", ["ours", "fastest"])
def test_an_engine_has_memory_for_it_by_itself_and_finds_a_prefix(by: str, family: Any) -> None:
    model, prompt = getattr(family, by), family.ids[0].tolist()
    engine = twotower.Engine(model)
    for text in (prompt, prompt):
        engine.generate([text], SamplingParams(mode="ar", max_new_tokens=2, ignore_eos=True))
    assert engine.stats().cache_hit_tokens >= len(prompt)
    assert engine.plan.places.sizes[:2] == (engine._pool.slot_bytes, engine._pool.page_bytes)
    for cards in ((80,), (141,), (80, 80)):
        memory = [DeviceMemory(f"cuda:{i}", size * 10**9, size * 10**9) for i, size in enumerate(cards)]
        places = places_before_loading(model.config, torch.bfloat16, *memory)
        plan = plan_memory(model.config, places, twotower.EngineConfig())
        assert plan.warnings == ()
        assert plan.num_fitting(plan.max_context) == plan.max_num_requests == 16
        assert plan.num_snapshots >= 1


def test_an_untrained_denoiser_is_the_backbone_that_sees_a_block_both_ways(
    maskable_family: Any, same_logits: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modulation changes nothing in a new denoiser. So its logits are transformers' under a mask by which a token of
    the block also sees the later ones that, in a text, would see it: those within the window. ALiBi, which transformers
    computes of keys alone, is of distances, on both sides."""
    start, family = 25, maskable_family

    def both_ways(mask_function: Any, q_length: int, kv_length: int, dtype: torch.dtype, **_: Any) -> Tensor:
        query, key = torch.arange(q_length)[:, None], torch.arange(kv_length)
        zero = torch.zeros((), dtype=torch.long)
        later = mask_function(zero, zero, key.expand(q_length, -1), query.expand(-1, kv_length)) & (query >= start)
        seen = mask_function(zero, zero, query, key) | later
        return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)[None, None]

    given: dict[str, Tensor] = {}
    if family.ours.config.alibi_slopes:
        place = torch.arange(family.ids.shape[1])
        bias = -torch.tensor(family.ours.config.alibi_slopes).view(-1, 1, 1) * (place[:, None] - place).abs()
        theirs = family.theirs.transformer
        monkeypatch.setattr(theirs, "build_alibi_tensor", lambda *_, **__: bias.repeat(2, 1, 1), raising=False)
        monkeypatch.setattr(theirs, "build_mpt_alibi_tensor", lambda *_, **__: bias, raising=False)
        given = {"attention_mask": torch.ones_like(family.ids)}  # without one BLOOM does not call its function
    monkeypatch.setitem(transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, "eager", both_ways)
    with torch.no_grad():
        expected = family.theirs(family.ids, use_cache=False, **given).logits[:, start:]
    assert (expected - family.logits[:, start:]).abs().max() > 0.01 * expected.abs().max(), "the mask changed nothing"
    state = family.ours.prefill(family.ids[:, :start])
    same_logits(family.ours.denoise(family.ids[:, start:], state, t=0.5), expected)


@pytest.mark.skipif(library() is None, reason="this machine has no C compiler")
def test_c_computes_what_the_reference_does(family: Any, close: Callable) -> None:
    choice = family.fastest.backends["context tower"]
    assert choice.name == "native", choice.reason
    start = 25
    # float32, summed in another order
    close(family.fastest.context_logits(family.ids), family.ours.context_logits(family.ids), 1e-5)
    found, expected = (
        model.denoise(family.ids[:, start:], model.prefill(family.ids[:, :start]))
        for model in (family.fastest, family.ours)
    )
    close(found, expected, 1e-5)


def test_a_checkpoint_is_saved_as_it_was_read(family: Any, tmp_path: Path) -> None:
    save(load_model(family.folder), tmp_path / "copy")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (family.folder / name).read_bytes(), name

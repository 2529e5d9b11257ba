"""Greedy generation of every mode against what the released code printed: tokens, NFE and every step's block."""

from collections.abc import Callable

import pytest

from twotower.backends.native.build import library
from twotower.decoding.generate import generate, stream
from twotower.decoding.params import SamplingParams

# A machine without a C compiler has one backend less.
BACKENDS = ["reference", *(["native"] if library() is not None else [])]
pytestmark = [pytest.mark.parametrize("case", ["hybrid", "dense"]), pytest.mark.parametrize("backend", BACKENDS)]


@pytest.mark.parametrize("mode", ["ar", "mock_ar"])
def test_one_token_at_a_time(case: str, backend: str, mode: str, golden: Callable) -> None:
    model, tensors, _ = golden(case, backend)
    params = SamplingParams(mode=mode, max_new_tokens=48, ignore_eos=True)
    result = generate(model, tensors["prompt_ids"].tolist(), params)[0]
    assert result.token_ids == tensors[f"{mode}.tokens"][0].tolist()
    assert result.stats.denoiser_calls == (48 if mode == "mock_ar" else 0)


def test_verified_is_ar(case: str, backend: str, golden: Callable) -> None:
    model, tensors, _ = golden(case, backend)
    params = SamplingParams(mode="verified", max_new_tokens=48, ignore_eos=True)
    result = generate(model, tensors["prompt_ids"].tolist(), params)[0]
    assert result.token_ids == tensors["ar.tokens"][0].tolist()


@pytest.mark.parametrize("k", range(7))
def test_diffusion(case: str, backend: str, k: int, golden: Callable) -> None:
    model, tensors, settings = golden(case, backend)
    settings = dict(settings["diffusion"][k])
    nfe = settings.pop("nfe")
    params = SamplingParams(mode="diffusion", ignore_eos=True, **settings)
    trace, block_index, result = [], 0, None
    masks = [model.config.mask_token_id] * params.block_size
    xt, fresh = masks, True
    for piece in stream(model, tensors["prompt_ids"][0].tolist(), params, every_step=True):
        assert piece.block is not None
        if fresh:  # the released callback shows a block's start once more
            trace.append((block_index, 0, 1.0, masks))
        trace.append((block_index, piece.block.step - 1, xt.count(masks[0]) / len(xt), xt))
        xt, fresh = list(piece.block.ids), piece.block.t == 0
        if fresh:
            block_index, xt = block_index + 1, masks
        result = piece.result
    assert result is not None
    assert result.token_ids == tensors[f"diffusion.{k}.tokens"][0].tolist()
    assert result.stats.denoiser_calls == nfe
    columns = [tensors[f"diffusion.{k}.trace_{name}"].tolist() for name in ("block", "step", "t", "xt")]
    expected = list(zip(*columns, strict=True))
    assert [row[:2] for row in trace] == [row[:2] for row in expected]
    assert [row[2] for row in trace] == pytest.approx([row[2] for row in expected], rel=1e-6)  # float32 in the file
    assert [row[3] for row in trace] == [row[3] for row in expected]

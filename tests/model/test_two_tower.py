from collections.abc import Callable
from typing import Any

import pytest
import torch

from twotower.backends.choose import pack_
from twotower.backends.native.build import library
from twotower.model import two_tower
from twotower.model.state import ContextState

# A machine without a C compiler has one of them.
BACKENDS = ["reference", *(["native"] if library() is not None else [])]
# Every layer kind, alone and together, and a Llama-family model.
PATTERNS = ["M", "*", "G*-", "S*-", "R*-", "M-", "E*", "M*-E", "MEM*MEM*E", "llama"]
# float64 in another order of sums
EXACT = 1e-10


def assert_same_state(ours: ContextState, theirs: ContextState, close: Callable, tolerance: float) -> None:
    assert ours.lengths == theirs.lengths
    for a, b in zip(ours.mamba, theirs.mamba, strict=True):
        close(a.conv, b.conv, tolerance)
        close(a.ssm, b.ssm, tolerance)
    pairs = [*zip(ours.buffer.keys, theirs.buffer.keys), *zip(ours.buffer.values, theirs.buffer.values)]  # noqa: B905
    assert len(ours.buffer.keys) == len(theirs.buffer.keys)
    for a, b in pairs:
        for row, length in enumerate(ours.lengths):
            close(a[row, :, :length], b[row, :, :length], tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_prefill_and_extend_are_one_prefill_wherever_it_is_split(
    pattern: str, tiny: Callable, ids: Callable, close: Callable
) -> None:
    model, tokens = tiny(pattern, dtype=torch.float64), ids(2, 21)
    whole, logits = model.prefill(tokens), model.context_logits(tokens)
    close(whole.next_logits, logits[:, -1], EXACT)
    for cut in range(21):
        state = model.prefill(tokens[:, :cut])
        if cut:
            close(state.next_logits, logits[:, cut - 1], EXACT)
        extended = model.extend(tokens[:, cut:], state)
        assert_same_state(extended, whole, close, EXACT)
        close(extended.next_logits, whole.next_logits, EXACT)


@pytest.mark.parametrize("pattern", ["M*-E", "llama"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_prefill_chunk_changes_nothing(
    pattern: str, chunk: int, tiny: Callable, ids: Callable, close: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens, lengths = tiny(pattern, dtype=torch.float64), ids(3, 70), [70, 5, 33]
    expected, logits = model.prefill(tokens, lengths), model.context_logits(tokens)
    monkeypatch.setattr(two_tower, "PREFILL_CHUNK", chunk)
    state = model.prefill(tokens, lengths)
    assert_same_state(state, expected, close, EXACT)
    close(state.next_logits, expected.next_logits, EXACT)
    close(model.context_logits(tokens), logits, EXACT)


def test_a_prompt_longer_than_a_chunk(tiny: Callable, ids: Callable, close: Callable) -> None:
    model, tokens = tiny("M*", dtype=torch.float64), ids(1, 300)
    stepwise = model.prefill(tokens[:, :0])
    for start in range(0, 300, 100):
        stepwise = model.extend(tokens[:, start : start + 100], stepwise)
    assert_same_state(model.prefill(tokens), stepwise, close, EXACT)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ragged_prefill_is_each_row_alone(pattern: str, tiny: Callable, ids: Callable, close: Callable) -> None:
    model, tokens, lengths = tiny(pattern, dtype=torch.float64), ids(5, 70), [70, 1, 0, 64, 17]
    state = model.prefill(tokens, lengths)
    block = ids(5, 8, seed=1)
    block[:, ::3] = 3
    logits = model.denoise(block, state)
    for row, length in enumerate(lengths):
        alone = model.prefill(tokens[row : row + 1, :length])
        assert_same_state(state.select([row]), alone, close, EXACT)
        if length:
            close(state.next_logits[row], alone.next_logits[0], EXACT)
        close(logits[row], model.denoise(block[row : row + 1], alone)[0], EXACT)


@pytest.mark.parametrize("pattern", ["M*-E", "llama"])
def test_padding_is_never_read(pattern: str, tiny: Callable, ids: Callable) -> None:
    model, tokens, lengths = tiny(pattern), ids(2, 20), [20, 6]
    other = tokens.clone()
    other[1, 6:] = 1
    a, b = model.prefill(tokens, lengths), model.prefill(other, lengths)
    assert torch.equal(a.next_logits, b.next_logits)
    assert torch.equal(model.denoise([[3] * 5] * 2, a), model.denoise([[3] * 5] * 2, b))
    assert all(torch.equal(x.ssm, y.ssm) and torch.equal(x.conv, y.conv) for x, y in zip(a.mamba, b.mamba, strict=True))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_denoise_leaves_the_state_untouched_and_can_be_repeated(pattern: str, tiny: Callable, ids: Callable) -> None:
    model = tiny(pattern)
    state = model.prefill(ids(2, 30), [30, 11])
    tensors = [*state.buffer.keys, *state.buffer.values, *(t for m in state.mamba for t in m), state.next_logits]
    before, tip = [t.clone() for t in tensors], state.buffer.tip
    block = ids(2, 16)
    block[:, 4:] = 3
    first = model.denoise(block, state)
    model.denoise(ids(2, 5), state)
    assert torch.equal(model.denoise(block, state), first)
    assert state.buffer.tip == tip
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


@pytest.mark.parametrize("pattern", ["M*-E", "llama", "-", "E"])
def test_an_empty_prompt_and_a_prompt_of_one_token(pattern: str, tiny: Callable, close: Callable) -> None:
    model = tiny(pattern, dtype=torch.float64)
    empty = model.prefill(torch.empty(1, 0))
    assert empty.lengths == (0,)
    assert empty.next_logits is None
    assert model.denoise([[3, 3, 5]], empty).isfinite().sum() == 3 * 39  # all but the mask's
    one = model.prefill([[7]])
    close(model.extend([[7]], empty).next_logits, one.next_logits, EXACT)
    close(one.next_logits, model.context_logits([[7]])[:, 0], EXACT)
    assert model.prefill([[7, 0], [0, 0]], [1, 0]).lengths == (1, 0)


def test_t_is_each_rows_masked_fraction_by_default(tiny: Callable) -> None:
    model = tiny("M*-E")
    state = model.prefill([[5, 6], [5, 6], [5, 6]])
    block = torch.tensor([[3, 3, 3, 3], [3, 7, 3, 3], [8, 7, 9, 10]])
    logits = model.denoise(block, state)
    assert torch.equal(model.denoise(block, state, torch.tensor([1.0, 0.75, 0.0])), logits)
    for row, level in enumerate((1.0, 0.75, 0.0)):
        assert torch.equal(model.denoise(block, state, level)[row], logits[row])
        assert not torch.equal(model.denoise(block, state, 0.5)[row], logits[row])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([[40]], r"\[40, 40\], must be in \[0, 39\]"),
        ([[5, -1]], r"\[-1, 5\], must be in \[0, 39\]"),
        ([5, 6], r"shape \(2,\), must be \(batch, tokens\)"),
        ([[[5]]], r"shape \(1, 1, 1\), must be \(batch, tokens\)"),
        ([[0.5]], "torch.float32, must be integers"),
        ([[True]], "torch.bool, must be integers"),
    ],
)
def test_bad_ids_raise(bad: Any, message: str, tiny: Callable) -> None:
    model = tiny("M*-E")
    state = model.prefill([[5]])
    calls = (model.context_logits, model.prefill, lambda i: model.extend(i, state), lambda i: model.denoise(i, state))
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call(bad)


def test_bad_batches_lengths_and_levels_raise(tiny: Callable) -> None:
    model = tiny("*")
    state = model.prefill([[5], [6]])
    for call in (model.extend, model.denoise):
        with pytest.raises(ValueError, match="3 rows, the state has 2"):
            call([[5]] * 3, state)
        with pytest.raises(ValueError, match="0 tokens, must have at least 1"):
            call(torch.empty(2, 0), state)
    with pytest.raises(ValueError, match="0 tokens, must have at least 1"):
        model.context_logits(torch.empty(2, 0))
    for lengths in ([1], [1, 3], [-1, 1]):
        with pytest.raises(ValueError, match=r"must be 2 values in \[0, 2\]"):
            model.prefill([[5, 6], [7, 8]], lengths)
    for t in (-0.1, 1.1, float("nan"), [0.5, 2.0]):
        with pytest.raises(ValueError, match=r"t is .*, must be in \[0, 1\]"):
            model.denoise([[3], [3]], state, t)
    for t in ([0.5], [[0.5], [0.5]], [0.1, 0.2, 0.3]):
        with pytest.raises(ValueError, match=r"t has shape .*, must be one number or \(2,\)"):
            model.denoise([[3], [3]], state, t)


@pytest.mark.parametrize("pattern", ["M*-E", "llama"])
def test_bf16_runs_and_is_close(pattern: str, tiny: Callable, ids: Callable, close: Callable) -> None:
    model, exact, tokens = tiny(pattern, dtype=torch.bfloat16), tiny(pattern, dtype=torch.float64), ids(2, 20)
    weights = exact.released_tensors()
    for name, tensor in model.released_tensors().items():
        weights[name].copy_(tensor)
    # 2^-9 at each of some dozen roundings, and the fast sinusoids of a bf16 t
    close(model.context_logits(tokens), exact.context_logits(tokens), 0.1)
    block = torch.tensor([[3, 3, 5, 6]] * 2)
    expected = exact.denoise(block, exact.prefill(tokens))
    close(model.denoise(block, model.prefill(tokens)), expected, 0.15)
    pack_(model)
    close(model.context_logits(tokens), exact.context_logits(tokens), 0.1)
    close(model.denoise(block, model.prefill(tokens)), expected, 0.15)


@pytest.mark.parametrize("pattern", ["M*-E", "llama"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_float32_is_unpacked_float32(
    pattern: str, backend: str, tiny: Callable, ids: Callable, close: Callable
) -> None:
    plain, packed, tokens = tiny(pattern), tiny(pattern), ids(2, 20)
    pack_(packed, backend)
    block = torch.tensor([[3, 3, 5, 6]] * 2)
    # the same float32 products in another order
    close(packed.context_logits(tokens), plain.context_logits(tokens), 1e-5)
    close(packed.denoise(block, packed.prefill(tokens)), plain.denoise(block, plain.prefill(tokens)), 1e-5)


def test_a_packed_model_cannot_be_saved(tiny: Callable) -> None:
    model = tiny("M*-E")
    pack_(model)
    with pytest.raises(ValueError, match="pack=False"):
        model.released_tensors()


@pytest.mark.parametrize("pattern", ["M*-E", "llama"])
def test_released_tensors_are_views_that_name_every_parameter(pattern: str, tiny: Callable) -> None:
    model = tiny(pattern, mlp_bias=True, attention_bias=True, use_bias=True)
    tensors = model.released_tensors()
    parameters = {p.data_ptr(): p.numel() for p in model.parameters()}
    assert sum(t.numel() for t in tensors.values()) == sum(parameters.values())
    for tensor in tensors.values():
        tensor.zero_()
    assert all(not p.any() for p in model.parameters())

"""Each form of quantised weight against a loop over its numbers, as the formats' definitions say them."""

import math

import pytest
import torch

from twotower.checkpoints.hf.dequantise import awq, blocks_of_e2m1, gptq, packed_e2m1, packed_integers, scaled

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


@pytest.fixture
def fp8() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 7, generator=generator).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_of_the_whole_tensor(fp8, shape):
    assert torch.equal(scaled(fp8, torch.full(shape, 0.3), None), fp8.float() * 0.3)


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_one_scale_per_row(fp8, shape):
    scale = torch.arange(1.0, 6.0).reshape(shape)
    assert torch.equal(scaled(fp8, scale.bfloat16(), None), fp8.float() * scale.view(5, 1))


def test_blocks_may_be_cut_off_by_the_edge(fp8):
    scale = torch.rand(3, 2)  # blocks of 2 x 4 in a tensor of 5 x 7
    found = scaled(fp8, scale, (2, 4))
    for r in range(5):
        for c in range(7):
            assert found[r, c] == fp8[r, c].float() * scale[r // 2, c // 4]


def test_without_a_size_blocks_are_equal_and_whole():
    values, scale = torch.randint(-128, 128, (2, 4, 6), dtype=torch.int8), torch.rand(2, 2, 3)
    zero = torch.randint(-128, 128, (2, 2, 3), dtype=torch.int8)
    found = scaled(values, scale, None, zero)
    for e, r, c in torch.cartesian_prod(*(torch.arange(n) for n in values.shape)).tolist():
        block = (e, r // 2, c // 2)
        assert found[e, r, c] == (float(values[e, r, c]) - float(zero[block])) * scale[block]
    with pytest.raises(ValueError, match=r"scales \(3, 2\) do not divide values \(5, 7\) into equal blocks"):
        scaled(torch.zeros(5, 7), torch.ones(3, 2), None)


def test_bytes_as_scales_are_exponents():
    assert scaled(torch.ones(1, 2), torch.tensor([[126, 130]], dtype=torch.uint8), None).tolist() == [[0.5, 8.0]]


def words(values: list[list[int]], bits: int) -> torch.Tensor:
    """Unsigned integers, row by row into int32 words, the lowest bits first."""
    per_word = 32 // bits
    rows = []
    for row in values:
        padded = row + [0] * (-len(row) % per_word)
        starts = range(0, len(padded), per_word)
        packed = [sum(v << (bits * i) for i, v in enumerate(padded[s : s + per_word])) for s in starts]
        rows.append([word - (1 << 32) if word >= 1 << 31 else word for word in packed])
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [64, 50])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_packed_integers(bits, columns, grouped, shifted):
    generator = torch.Generator().manual_seed(bits)
    rows, width = 13, columns // 2 if grouped else columns
    values = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
    scale = torch.rand(rows, columns // width, generator=generator)
    zero = torch.randint(0, 1 << bits, scale.shape, generator=generator)
    packed_zero = words(zero.t().tolist(), bits).t() if shifted else None  # along rows
    found = packed_integers(words(values.tolist(), bits), scale, (rows, columns), packed_zero)
    middle = zero if shifted else torch.full_like(zero, 1 << (bits - 1))
    for r in range(rows):
        for c in range(columns):
            assert found[r, c] == float(values[r, c] - middle[r, c // width]) * scale[r, c // width]


def test_columns_name_their_groups_where_these_are_not_in_order():
    values, scale = [[0, 15, 8, 7, 3, 9, 8, 1] * 4], torch.tensor([[1.0, 10.0]])
    found = packed_integers(words(values, 4), scale, (1, 32), None, torch.tensor([1, 0, 1, 0, 0, 1, 1, 0] * 4))
    assert found.tolist() == [[-80.0, 7.0, 0.0, -1.0, -5.0, 10.0, 0.0, -7.0] * 4]


def test_integers_that_cross_words_are_refused():
    with pytest.raises(ValueError, match="6 words for 64 columns, must be of 1, 2, 4 or 8 bits a value"):
        packed_integers(torch.zeros(1, 6, dtype=torch.int32), torch.ones(1, 1), (1, 64))


@pytest.mark.parametrize(("over", "times"), [(None, None), (4.0, None), (None, 0.25)])
def test_floats_of_4_bits(over, times):
    packed = torch.randint(0, 256, (3, 16), dtype=torch.uint8)
    scale = torch.tensor([[1.0, 0.5], [2.0, 448.0], [0.125, 3.0]]).to(torch.float8_e4m3fn)
    whole = [None if value is None else torch.tensor([value]) for value in (over, times)]
    found = packed_e2m1(packed, scale, *whole)
    for r in range(3):
        for c in range(32):
            nibble = (int(packed[r, c // 2]) >> (4 * (c % 2))) & 15
            assert found[r, c] == E2M1[nibble] * float(scale[r, c // 16]) / (over or 1) * (times or 1)


def test_blocks_of_gpt_oss_have_their_columns_as_rows():
    blocks = torch.randint(0, 256, (2, 3, 4, 16), dtype=torch.uint8)
    scales = torch.randint(120, 130, (2, 3, 4), dtype=torch.uint8)
    found = blocks_of_e2m1(blocks, scales)
    assert found.shape == (2, 128, 3)
    for e, r, c in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(128)).tolist():
        nibble = (int(blocks[e, r, c // 32, c % 32 // 2]) >> (4 * (c % 2))) & 15
        assert found[e, c, r] == math.ldexp(E2M1[nibble], int(scales[e, r, c // 32]) - 127)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("in_order", [True, False])
def test_gptq(bits, shift, in_order):
    generator = torch.Generator().manual_seed(bits)
    rows, columns, count = 32, 64, 4
    values = torch.randint(0, 1 << bits, (columns, rows), generator=generator)
    stored_zero = torch.randint(0, 1 << bits, (count, rows), generator=generator)
    scale = torch.rand(count, rows, generator=generator)
    groups = None if in_order else torch.randint(0, count, (columns,), generator=generator, dtype=torch.int32)
    packed = words(values.t().tolist(), bits).t()
    found = gptq(packed, words(stored_zero.tolist(), bits), scale, bits, shift=shift, groups=groups)
    for r in range(rows):
        for c in range(columns):
            g = c // 16 if groups is None else int(groups[c])
            zero = (int(stored_zero[g, r]) + shift) % (1 << bits)
            assert found[r, c] == float(int(values[c, r]) - zero) * scale[g, r]


def test_awq():
    generator = torch.Generator().manual_seed(1)
    rows, columns, count = 16, 12, 3
    values = torch.randint(0, 16, (columns, rows), generator=generator)
    zero = torch.randint(0, 16, (count, rows), generator=generator)
    scale = torch.rand(count, rows, generator=generator)
    # its packer puts row order[i] of eight into the i-th four bits of a word
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    packed, packed_zero = (words(v.unflatten(1, (-1, 8))[..., order].flatten(1).tolist(), 4) for v in (values, zero))
    found = awq(packed, packed_zero, scale)
    for r in range(rows):
        for c in range(columns):
            assert found[r, c] == float(int(values[c, r]) - int(zero[c // 4, r])) * scale[c // 4, r]
    with pytest.raises(ValueError, match="5 scales do not divide 12 columns into equal groups"):
        awq(packed, packed_zero, torch.rand(5, rows))

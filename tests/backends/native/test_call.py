"""What Python takes from the C header."""

import ctypes

import pytest
import torch

from twotower.backends.native import build
from twotower.backends.native.call import filled, function, read_header


def test_structures_and_functions_are_read_from_a_header() -> None:
    header = read_header(
        """
        /* typedef struct { long no; } NotThis; */
        typedef struct {
            const float *x, *y; /* two pointers */
            long a, b;
            const void *const *memory;
        } Inner;
        typedef struct { Inner first, second; double eps; } Outer;
        API int tt_one(const Inner *in, long n, float scale,
                       int64_t id);
        API void tt_two(double d, int threads);
        API long tt_three(void);
        """
    )
    inner, outer = header.structures["Inner"], header.structures["Outer"]
    pointer, long = ctypes.c_void_p, ctypes.c_long
    assert inner._fields_ == [("x", pointer), ("y", pointer), ("a", long), ("b", long), ("memory", pointer)]
    assert outer._fields_ == [("first", inner), ("second", inner), ("eps", ctypes.c_double)]
    assert header.functions == {
        "tt_one": (ctypes.c_int, [pointer, long, ctypes.c_float, ctypes.c_int64]),
        "tt_two": (None, [ctypes.c_double, ctypes.c_int]),
        "tt_three": (long, []),
    }


def test_a_type_that_is_not_known_is_an_error() -> None:
    with pytest.raises(KeyError, match="size_t"):
        read_header("API void tt_one(size_t n);")


def test_fields_that_c_does_not_have_are_refused() -> None:
    with pytest.raises(AssertionError, match="TowerPass has no widht"):
        filled("TowerPass", b=1, widht=2)


@pytest.mark.skipif(build.library() is None, reason="this machine has no C compiler")
def test_no_memory_is_a_memory_error() -> None:
    """tt_commit takes room for a row's candidates: more of them than any machine has bytes, which it never looks at."""
    none = torch.empty(0)
    read = (none.data_ptr(), none.data_ptr(), none.data_ptr())
    with pytest.raises(MemoryError, match="tt_commit"):
        function("tt_commit")(*read, None, None, 0, 0, 1 << 58, none.data_ptr())

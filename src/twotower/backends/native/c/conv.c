#include "kernels.h"

/* out (b, s, c) = silu(bias + sum_j taps[j] * row[t - w + 1 + j]) over the rows of x (b, s, c; strides in floats) preceded
 * by `past` (b, w-1, c); taps (w, c) */
void tt_conv_silu(const float *x, long batch_stride, long row_stride, const float *past, const float *taps,
                      const float *bias, long b, long s, long c, long w, float *out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && b * s * c >= 8192)
    for (long item = 0; item < b * s; item++) {
        const long row = item / s, t = item % s;
        for (long i = 0; i < c; i += VL) {
            const long n = c - i < VL ? c - i : VL;
            vf total = bias ? load_part(bias + i, n) : (vf){0};
            for (long j = 0; j < w; j++) {
                const long at = t - w + 1 + j;
                const float *from = at >= 0 ? x + row * batch_stride + at * row_stride : past + (row * (w - 1) + w - 1 + at) * c;
                total += load_part(from + i, n) * load_part(taps + j * c + i, n);
            }
            store_part(out + item * c + i, vsilu(total), n);
        }
    }
}

/* out (b, w-1, c): the last w-1 rows of [past | first counts[b] rows of x], all s of them where counts is null */
void tt_next_past(const float *x, long batch_stride, long row_stride, const float *past, const int64_t *counts, long b,
                      long s, long c, long w, float *out) {
    for (long row = 0; row < b; row++)
        for (long j = 0; j < w - 1; j++) {
            const long at = (counts ? counts[row] : s) + j - (w - 1); /* of x, where it is not of past */
            const float *from = at >= 0 ? x + row * batch_stride + at * row_stride : past + (row * (w - 1) + w - 1 + at) * c;
            memcpy(out + (row * (w - 1) + j) * c, from, c * sizeof(float));
        }
}

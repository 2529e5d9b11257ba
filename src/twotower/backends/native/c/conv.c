#include "kernels.h"

typedef struct {
    const float *x, *past, *taps, *bias;
    long batch_stride, row_stride, s, c, w;
    float *out;
} Convolution;

static void convolve_rows(void *job, long first, long last, int slot) {
    const Convolution *in = job;
    const long s = in->s, c = in->c, w = in->w;
    (void)slot;
    for (long item = first; item < last; item++) {
        const long row = item / s, t = item % s;
        for (long i = 0; i < c; i += VL) {
            const long n = c - i < VL ? c - i : VL;
            vf total = in->bias ? load_part(in->bias + i, n) : (vf){0};
            for (long j = 0; j < w; j++) {
                const long at = t - w + 1 + j;
                const float *from = at >= 0 ? in->x + row * in->batch_stride + at * in->row_stride
                                            : in->past + (row * (w - 1) + w - 1 + at) * c;
                total += load_part(from + i, n) * load_part(in->taps + j * c + i, n);
            }
            store_part(in->out + item * c + i, vsilu(total), n);
        }
    }
}

/* out (b, s, c) = silu(bias + sum_j taps[j] * row[t - w + 1 + j]) over the rows of x (b, s, c; strides in floats) preceded
 * by `past` (b, w-1, c); taps (w, c) */
void tt_conv_silu(const float *x, long batch_stride, long row_stride, const float *past, const float *taps,
                      const float *bias, long b, long s, long c, long w, float *out, int threads) {
    Convolution job = {x, past, taps, bias, batch_stride, row_stride, s, c, w, out};
    in_parallel(convolve_rows, &job, b * s, 1, b * s * c >= 8192 ? threads : 1);
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

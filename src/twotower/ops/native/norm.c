#include "common.h"

static float mean_square(const float *x, long d) { return dot(x, x, d) / d; }

/* y (r, d) = x / sqrt(mean(x^2) + eps) * weight. `order` 1 modulates x by x + shift + x * scale before, 2 after;
 * the rows of one sequence, `per` of them, share shift and scale, which lie `stride` apart. */
API void tt_rms_norm(const float *x, long r, long d, const float *weight, float eps, int order, const float *shift,
                     const float *scale, long stride, long per, float *y) {
    for (long m = 0; m < r; m++) {
        const float *in = x + m * d, *a = shift + m / per * stride, *b = scale + m / per * stride;
        float *out = y + m * d;
        if (order == 1) {
            for (long i = 0; i < d; i++) out[i] = in[i] + a[i] + in[i] * b[i];
            in = out;
        }
        const float factor = 1.0f / sqrtf(mean_square(in, d) + eps);
        for (long i = 0; i < d; i++) out[i] = in[i] * factor * weight[i];
        if (order == 2)
            for (long i = 0; i < d; i++) out[i] = out[i] + a[i] + out[i] * b[i];
    }
}

/* out (r, groups * width) = rms_norm per group of y * silu(z), times weight; rows of y and z lie apart as given */
API void tt_gated_group_rms_norm(const float *y, long y_stride, const float *z, long z_stride, long r,
                                 const float *weight, long groups, long width, float eps, float *out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && r * groups * width >= 8192)
    for (long item = 0; item < r * groups; item++) {
        const long m = item / groups, first = item % groups * width;
        const float *a = y + m * y_stride + first, *gate = z + m * z_stride + first, *w = weight + first;
        float *o = out + m * groups * width + first;
        long i = 0;
        for (; i + VL <= width; i += VL) store(o + i, load(a + i) * vsilu(load(gate + i)));
        if (i < width) store_part(o + i, load_part(a + i, width - i) * vsilu(load_part(gate + i, width - i)), width - i);
        const float factor = 1.0f / sqrtf(mean_square(o, width) + eps);
        for (i = 0; i < width; i++) o[i] = o[i] * factor * w[i];
    }
}

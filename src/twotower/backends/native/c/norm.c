#include "kernels.h"

/* One pass over d floats, VL at a time: EACH(i, n) body, n of them at i. */
#define EACH(d) for (long i = 0, n = VL < (d) ? VL : (d); i < (d); i += VL, n = (d) - i < VL ? (d) - i : VL)

static float inverse_rms(const float *x, long d, float eps) { return 1.0f / sqrtf(dot(x, x, d) / d + eps); }

/* out = x normed over its d floats, times weight, plus bias; out may be x */
static void norm_row(const float *x, long d, const Norm *norm, int layer, float eps, float *out) {
    if (layer) { /* less the mean */
        vf total = {0};
        EACH(d) total += load_part(x + i, n);
        const float mean = sum(total) / d;
        EACH(d) store_part(out + i, load_part(x + i, n) - mean, n);
        x = out;
    }
    const float factor = inverse_rms(x, d, eps);
    EACH(d) {
        vf v = load_part(x + i, n) * factor * load_part(norm->weight + i, n);
        if (norm->bias) v += load_part(norm->bias + i, n);
        store_part(out + i, v, n);
    }
}

/* out = x + shift + x * scale; out may be x */
static void modulate_row(const float *x, long d, const float *shift, const float *scale, float *out) {
    EACH(d) {
        const vf v = load_part(x + i, n);
        store_part(out + i, v + load_part(shift + i, n) + v * load_part(scale + i, n), n);
    }
}

/* y (r, d) = norm(x); an RMSNorm, or a LayerNorm where `layer`; x itself without a weight. `order` 1 modulates x before, 2
 * after; the rows of one sequence, `per` of them, share shift and scale, which lie `stride` apart. */
void tt_norm(const float *x, long r, long d, const Norm *norm, int layer, float eps, int order, const float *shift,
             const float *scale, long stride, long per, float *y, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && r * d >= 32768)
    for (long m = 0; m < r; m++) {
        const float *in = x + m * d, *a = shift + m / per * stride, *b = scale + m / per * stride;
        float *out = y + m * d;
        if (order == 1) {
            modulate_row(in, d, a, b, out);
            in = out;
        }
        if (norm->weight)
            norm_row(in, d, norm, layer, eps, out);
        else if (order != 1 && in != out)
            memcpy(out, in, d * sizeof(float));
        if (order == 2) modulate_row(out, d, a, b, out);
    }
}

/* Norms each of `heads` heads of p floats of r rows, which lie `stride` apart, in place; `per_head`: with weights of its
 * own */
void tt_norm_heads(float *x, long r, long stride, long heads, long p, const Norm *norm, int layer, float eps, int per_head,
                   int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && r * heads * p >= 32768)
    for (long item = 0; item < r * heads; item++) {
        const long head = item % heads;
        const long first = per_head ? head * p : 0;
        const Norm own = {norm->weight + first, norm->bias ? norm->bias + first : 0};
        float *row = x + item / heads * stride + head * p;
        norm_row(row, p, &own, layer, eps, row);
    }
}

/* x (b, s, d) += y * scale, or += y * scale * gate (b, d; rows `stride` apart) unless it is null */
void tt_residual(float *x, const float *y, float scale, const float *gate, long stride, long b, long s, long d, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && b * s * d >= 32768)
    for (long m = 0; m < b * s; m++) {
        const float *g = gate ? gate + m / s * stride : 0;
        EACH(d) {
            const vf part = load_part(y + m * d + i, n) * scale;
            store_part(x + m * d + i, load_part(x + m * d + i, n) + (g ? part * load_part(g + i, n) : part), n);
        }
    }
}

/* out (r, groups * width) = rms_norm per group of y * silu(z), times weight; with `norm_first` rms_norm per group of y,
 * times weight * silu(z); without a weight y * silu(z). Rows of y and z lie apart as given. */
void tt_gated_group_rms_norm(const float *y, long y_stride, const float *z, long z_stride, long r, const float *weight,
                                 long groups, long width, float eps, int norm_first, float *out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && r * groups * width >= 8192)
    for (long item = 0; item < r * groups; item++) {
        const long m = item / groups, first = item % groups * width;
        const float *a = y + m * y_stride + first, *gate = z + m * z_stride + first, *w = weight + first;
        float *o = out + m * groups * width + first;
        if (weight && norm_first) {
            const float factor = inverse_rms(a, width, eps);
            EACH(width) {
                const vf normed = load_part(a + i, n) * factor * load_part(w + i, n);
                store_part(o + i, normed * vsilu(load_part(gate + i, n)), n);
            }
            continue;
        }
        EACH(width) store_part(o + i, load_part(a + i, n) * vsilu(load_part(gate + i, n)), n);
        if (!weight) continue;
        const float factor = inverse_rms(o, width, eps);
        EACH(width) store_part(o + i, load_part(o + i, n) * factor * load_part(w + i, n), n);
    }
}

/* x (r, d) *= scales (d) */
void tt_scale_columns(float *x, long r, long d, const float *scales, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && r * d >= 32768)
    for (long m = 0; m < r; m++) EACH(d) store_part(x + m * d + i, load_part(x + m * d + i, n) * load_part(scales + i, n), n);
}

/* x (n) limited to [-limit, limit] */
void tt_clamp(float *x, long n, float limit, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && n >= 32768)
    for (long i = 0; i < n; i++) x[i] = x[i] > limit ? limit : x[i] < -limit ? -limit : x[i];
}

/* x (n) *= sigmoid(gate (n)) */
void tt_sigmoid_gate(float *x, const float *gate, long n, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && n >= 32768)
    for (long i = 0; i < n; i += VL) {
        const long left = n - i < VL ? n - i : VL;
        store_part(x + i, load_part(x + i, left) / (1.0f + vexp(-load_part(gate + i, left))), left);
    }
}

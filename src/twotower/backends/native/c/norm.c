#include "kernels.h"

#define LARGE 32768 /* floats from which on threads gain more than sharing costs, where little is done with each */

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

typedef struct {
    const float *x;
    long d;
    const Norm *norm;
    int layer, order;
    float eps;
    const float *shift, *scale;
    long stride, per;
    float *y;
} Norming;

static void norm_rows(void *job, long from, long to, int slot) {
    const Norming *c = job;
    (void)slot;
    for (long m = from; m < to; m++) {
        const float *in = c->x + m * c->d, *a = c->shift + m / c->per * c->stride, *b = c->scale + m / c->per * c->stride;
        float *out = c->y + m * c->d;
        if (c->order == 1) {
            modulate_row(in, c->d, a, b, out);
            in = out;
        }
        if (c->norm->weight)
            norm_row(in, c->d, c->norm, c->layer, c->eps, out);
        else if (c->order != 1 && in != out)
            memcpy(out, in, c->d * sizeof(float));
        if (c->order == 2) modulate_row(out, c->d, a, b, out);
    }
}

/* y (r, d) = norm(x); an RMSNorm, or a LayerNorm where `layer`; x itself without a weight. `order` 1 modulates x before, 2
 * after; the rows of one sequence, `per` of them, share shift and scale, which lie `stride` apart. */
void tt_norm(const float *x, long r, long d, const Norm *norm, int layer, float eps, int order, const float *shift,
             const float *scale, long stride, long per, float *y, int threads) {
    Norming job = {x, d, norm, layer, order, eps, shift, scale, stride, per, y};
    in_parallel(norm_rows, &job, r, 1, r * d >= LARGE ? threads : 1);
}

typedef struct {
    float *x;
    long stride, heads, p;
    const Norm *norm;
    int layer, per_head;
    float eps;
} HeadNorming;

static void norm_some_heads(void *job, long from, long to, int slot) {
    const HeadNorming *c = job;
    (void)slot;
    for (long item = from; item < to; item++) {
        const long head = item % c->heads;
        const long first = c->per_head ? head * c->p : 0;
        const Norm own = {c->norm->weight + first, c->norm->bias ? c->norm->bias + first : 0};
        float *row = c->x + item / c->heads * c->stride + head * c->p;
        norm_row(row, c->p, &own, c->layer, c->eps, row);
    }
}

/* Norms each of `heads` heads of p floats of r rows, which lie `stride` apart, in place; `per_head`: with weights of its
 * own */
void tt_norm_heads(float *x, long r, long stride, long heads, long p, const Norm *norm, int layer, float eps, int per_head,
                   int threads) {
    HeadNorming job = {x, stride, heads, p, norm, layer, per_head, eps};
    in_parallel(norm_some_heads, &job, r * heads, 1, r * heads * p >= LARGE ? threads : 1);
}

typedef struct {
    float *x;
    const float *y;
    float scale;
    const float *gate;
    long stride, s, d;
} Adding;

static void add_rows(void *job, long from, long to, int slot) {
    const Adding *c = job;
    (void)slot;
    for (long m = from; m < to; m++) {
        const float *g = c->gate ? c->gate + m / c->s * c->stride : 0, *y = c->y + m * c->d;
        float *x = c->x + m * c->d;
        EACH(c->d) {
            const vf part = load_part(y + i, n) * c->scale;
            store_part(x + i, load_part(x + i, n) + (g ? part * load_part(g + i, n) : part), n);
        }
    }
}

/* x (b, s, d) += y * scale, or += y * scale * gate (b, d; rows `stride` apart) unless it is null */
void tt_residual(float *x, const float *y, float scale, const float *gate, long stride, long b, long s, long d, int threads) {
    Adding job = {x, y, scale, gate, stride, s, d};
    in_parallel(add_rows, &job, b * s, 1, b * s * d >= LARGE ? threads : 1);
}

typedef struct {
    const float *y, *z, *weight;
    long y_stride, z_stride, groups, width;
    float eps;
    int norm_first;
    float *out;
} GatedNorming;

static void norm_gated_groups(void *job, long from, long to, int slot) {
    const GatedNorming *c = job;
    const long groups = c->groups, width = c->width;
    (void)slot;
    for (long item = from; item < to; item++) {
        const long m = item / groups, first = item % groups * width;
        const float *a = c->y + m * c->y_stride + first, *gate = c->z + m * c->z_stride + first, *w = c->weight + first;
        float *o = c->out + m * groups * width + first;
        if (c->weight && c->norm_first) {
            const float factor = inverse_rms(a, width, c->eps);
            EACH(width) {
                const vf normed = load_part(a + i, n) * factor * load_part(w + i, n);
                store_part(o + i, normed * vsilu(load_part(gate + i, n)), n);
            }
            continue;
        }
        EACH(width) store_part(o + i, load_part(a + i, n) * vsilu(load_part(gate + i, n)), n);
        if (!c->weight) continue;
        const float factor = inverse_rms(o, width, c->eps);
        EACH(width) store_part(o + i, load_part(o + i, n) * factor * load_part(w + i, n), n);
    }
}

/* out (r, groups * width) = rms_norm per group of y * silu(z), times weight; with `norm_first` rms_norm per group of y,
 * times weight * silu(z); without a weight y * silu(z). Rows of y and z lie apart as given. */
void tt_gated_group_rms_norm(const float *y, long y_stride, const float *z, long z_stride, long r, const float *weight,
                                 long groups, long width, float eps, int norm_first, float *out, int threads) {
    GatedNorming job = {y, z, weight, y_stride, z_stride, groups, width, eps, norm_first, out};
    in_parallel(norm_gated_groups, &job, r * groups, 1, r * groups * width >= 8192 ? threads : 1);
}

typedef struct {
    float *x;
    const float *by;
    long d;
    float limit;
} Scaling;

static void scale_rows(void *job, long from, long to, int slot) {
    const Scaling *c = job;
    (void)slot;
    for (long m = from; m < to; m++)
        EACH(c->d) store_part(c->x + m * c->d + i, load_part(c->x + m * c->d + i, n) * load_part(c->by + i, n), n);
}

static void clamp_some(void *job, long from, long to, int slot) {
    const float limit = ((Scaling *)job)->limit;
    float *x = ((Scaling *)job)->x;
    (void)slot;
    for (long i = from; i < to; i++) x[i] = x[i] > limit ? limit : x[i] < -limit ? -limit : x[i];
}

static void gate_some(void *job, long from, long to, int slot) {
    const Scaling *c = job;
    (void)slot;
    for (long i = from; i < to; i += VL) {
        const long left = to - i < VL ? to - i : VL;
        store_part(c->x + i, load_part(c->x + i, left) / (1.0f + vexp(-load_part(c->by + i, left))), left);
    }
}

/* x (r, d) *= scales (d) */
void tt_scale_columns(float *x, long r, long d, const float *scales, int threads) {
    Scaling job = {.x = x, .by = scales, .d = d};
    in_parallel(scale_rows, &job, r, 1, r * d >= LARGE ? threads : 1);
}

/* x (n) limited to [-limit, limit] */
void tt_clamp(float *x, long n, float limit, int threads) {
    Scaling job = {.x = x, .limit = limit};
    in_parallel(clamp_some, &job, n, VL, n >= LARGE ? threads : 1);
}

/* x (n) *= sigmoid(gate (n)) */
void tt_sigmoid_gate(float *x, const float *gate, long n, int threads) {
    Scaling job = {.x = x, .by = gate};
    in_parallel(gate_some, &job, n, VL, n >= LARGE ? threads : 1);
}

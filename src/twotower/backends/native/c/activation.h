/* What stands between the two products of an MLP or expert, see ops.mlp.Activation, element by element. */
#pragma once
#include "common.h"

/* In the order of config_rules.ACTIVATIONS */
enum { RELU2, RELU, SILU, GELU, GELU_TANH, QUICK_GELU, XIELU };

typedef struct {
    long kind, gated;
    float limit, offset;
    const float *alphas; /* xielu: its curvatures above and below 0, after softplus */
    float gate_scale;
} Activation;

INLINE vf choose(vi where, vf yes, vf no) { return (vf)((where & (vi)yes) | (~where & (vi)no)); }

/* Of a NaN and a number the first argument */
INLINE vf vmin(vf a, vf b) { return choose(a > b, b, a); }

INLINE vf vmax(vf a, vf b) { return choose(a < b, b, a); }

/* erf within 1 ulp or so: a polynomial near 0, elsewhere 1 - exp of one (N. Juffa) */
INLINE vf verf(vf x) {
    const vf t = vmax(x, -x), s = x * x;
    vf near = s * -5.96761703e-4f + 4.99119423e-3f;
    near = near * s + -2.67681349e-2f;
    near = near * s + 1.12819925e-1f;
    near = near * s + -3.76125336e-1f;
    near = near * s + 1.28379166e-1f;
    near = near * x + x;
    vf far = (t * -1.72853470e-5f + 3.83197126e-4f) * s + (t * -3.88396438e-3f + 2.42546219e-2f);
    far = far * t + -1.06777877e-1f;
    far = far * t + -6.34846687e-1f;
    far = far * t + -1.28717512e-1f;
    far = 1.0f - vexp(far * t - t);
    return choose(t > splat(0.927734375f), choose(x < (vf){0}, -far, far), near);
}

/* exp(x) - 1 for x <= 0, without cancellation near 0 */
INLINE vf vexpm1(vf x) {
    vf p = x * 1.3981999507e-3f + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    return choose(x > splat(-0.35f), p * x * x + x, vexp(x) - 1.0f);
}

INLINE vf vphi(const Activation *a, vf x) {
    const vf zero = {0};
    switch (a->kind) {
        case RELU: return vmax(x, zero);
        case SILU: return vsilu(x);
        case GELU: return 0.5f * x * (1.0f + verf(x * 0.70710678f));
        case GELU_TANH: return x / (1.0f + vexp(x * (x * x * -0.0713548163f - 1.59576912f)));
        case QUICK_GELU: return x / (1.0f + vexp(x * -1.702f));
        case XIELU: {
            const vf low = vmin(x, zero);
            return choose(x > zero, a->alphas[0] * x * x, (vexpm1(low) - low) * (0.5f + a->alphas[1])) + 0.5f * x;
        }
        default: return vrelu2(x);
    }
}

/* phi(gate_scale * gate) * (value + offset) where gated, else phi(gate) */
INLINE vf vactivate(const Activation *a, vf gate, vf value) {
    if (!a->gated) return vphi(a, gate);
    const vf limit = splat(a->limit);
    return vphi(a, vmin(gate * a->gate_scale, limit)) * (vmax(vmin(value, limit), -limit) + a->offset);
}

/* Activates hidden values [from, to) of `inner` of one row in place; where gated, the row holds gates and then values */
INLINE void activate_row(const Activation *a, float *row, long inner, long from, long to) {
    const float *values = a->gated ? row + inner : row;
    long i = from;
    for (; i + VL <= to; i += VL) store(row + i, vactivate(a, load(row + i), load(values + i)));
    if (i < to) store_part(row + i, vactivate(a, load_part(row + i, to - i), load_part(values + i, to - i)), to - i);
}

/* Whether the first product's last step computes it already */
INLINE int is_fused(const Activation *a) { return a->kind == RELU2 && !a->gated; }

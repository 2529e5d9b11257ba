#include "kernels.h"

/* out (b, s, h) = softplus(dt + bias) clamped; dt (b, s, h) by strides in floats */
void tt_time_steps(const float *dt, long batch, long token, const float *bias, float low, float high, long b, long s,
                       long h, float *out) {
    for (long item = 0; item < b * s; item++) {
        const float *in = dt + item / s * batch + item % s * token;
        for (long i = 0; i < h; i++) {
            const float x = in[i] + bias[i], step = x > 20.0f ? x : log1pf(expf(x));
            out[item * h + i] = step < low ? low : step > high ? high : step;
        }
    }
}

/* What one head reads: B and C rows `stride` floats apart, the rest dense. */
typedef struct {
    const float *B, *C, *decay, *step, *x; /* (s, n) twice, (s,) twice, (s, p) */
    long stride, s, p, n;
    float D;
} Head;

/* One row i of a head's state H (n) through all tokens: H = decay * H + step * x * B, y = H . C + D * x. `nv` vectors
 * hold the row. */
INLINE void scan_row(float *H, int nv, const Head *in, long i, float *y) {
    vf state[16];
#pragma GCC unroll 16
    for (int v = 0; v < nv; v++) state[v] = load(H + v * VL);
    for (long t = 0; t < in->s; t++) {
        const float x = in->x[t * in->p + i], u = in->step[t] * x, a = in->decay[t];
        const float *B = in->B + t * in->stride, *C = in->C + t * in->stride;
        vf even = {0}, odd = {0};
#pragma GCC unroll 16
        for (int v = 0; v < nv; v += 2) {
            state[v] = state[v] * a + load(B + v * VL) * u;
            state[v + 1] = state[v + 1] * a + load(B + (v + 1) * VL) * u;
            even += state[v] * load(C + v * VL);
            odd += state[v + 1] * load(C + (v + 1) * VL);
        }
        y[t * in->p + i] = sum(even + odd) + in->D * x;
    }
#pragma GCC unroll 16
    for (int v = 0; v < nv; v++) store(H + v * VL, state[v]);
}

static void scan_row_any(float *H, const Head *in, long i, float *y) {
    for (long t = 0; t < in->s; t++) {
        const float x = in->x[t * in->p + i], u = in->step[t] * x, a = in->decay[t];
        const float *B = in->B + t * in->stride, *C = in->C + t * in->stride;
        for (long j = 0; j < in->n; j++) H[j] = H[j] * a + B[j] * u;
        y[t * in->p + i] = dot(H, C, in->n) + in->D * x;
    }
}

/* Token by token from `state` (b, h, p, n): y (b, s, h, p) and the state after the last token, each unless null.
 * x (b, s, h, p), B and C (b, s, g, n), dt (b, s, h) by strides in floats, heads and groups dense, y's rows `y_batch`
 * apart; A (h,), D (h,). Of row b only the first counts[b] tokens, unless that is null. */
int tt_ssd(const float *x, long x_batch, long x_token, const float *B, const float *C, long bc_batch, long bc_token,
                const float *dt, long dt_batch, long dt_token, const float *A, const float *D, const float *state,
                const int64_t *counts, long b, long s, long h, long p, long g, long n, float *y, long y_batch, float *end, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1 && b * s * h * p * n >= 65536)
    {
        /* A head's x and y are copied side by side: whole pages apart, its tokens would fall into one set of the cache. */
        float *decay = malloc((2 * s + n + 2 * s * p) * sizeof(float)), *step = decay + s, *spare = step + s;
        float *dense_x = spare + n, *dense_y = dense_x + s * p;
        if (!decay) FAIL(failed);
#pragma omp for
        for (long item = 0; item < b * h; item++) {
            if (!decay) continue;
            const long row = item / h, head = item % h, first = row * bc_batch + head / (h / g) * n;
            const long own = counts ? counts[row] : s;
            for (long t = 0; t < own; t++) {
                step[t] = dt[row * dt_batch + t * dt_token + head];
                decay[t] = expf(step[t] * A[head]);
                memcpy(dense_x + t * p, x + row * x_batch + t * x_token + head * p, p * sizeof(float));
            }
            const Head in = {B + first, C + first, decay, step, dense_x, bc_token, own, p, n, D[head]};
            for (long i = 0; i < p; i++) {
                const long at = (item * p + i) * n;
                float *H = end ? end + at : spare;
                memcpy(H, state + at, n * sizeof(float));
                if (n == 2 * VL) scan_row(H, 2, &in, i, dense_y);
                else if (n == 4 * VL) scan_row(H, 4, &in, i, dense_y);
                else if (n == 8 * VL) scan_row(H, 8, &in, i, dense_y);
                else if (n == 16 * VL) scan_row(H, 16, &in, i, dense_y);
                else scan_row_any(H, &in, i, dense_y);
            }
            for (long t = 0; y && t < own; t++)
                memcpy(y + row * y_batch + (t * h + head) * p, dense_y + t * p, p * sizeof(float));
        }
        free(decay);
    }
    return failed;
}

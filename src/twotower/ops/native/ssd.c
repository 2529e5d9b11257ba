#include "common.h"

/* out (b, s, h) = softplus(dt + bias) clamped; dt (b, s, h) by strides in floats */
API void tt_time_steps(const float *dt, long batch, long token, const float *bias, float low, float high, long b, long s,
                       long h, float *out) {
    for (long item = 0; item < b * s; item++) {
        const float *in = dt + item / s * batch + item % s * token;
        for (long i = 0; i < h; i++) {
            const float x = in[i] + bias[i], step = x > 20.0f ? x : log1pf(expf(x));
            out[item * h + i] = step < low ? low : step > high ? high : step;
        }
    }
}

typedef struct {
    const float *x, *B, *C, *dt;                     /* (b, s, h, p), (b, s, g, n) twice, (b, s, h) */
    long x_batch, x_token, bc_batch, bc_token, dt_batch, dt_token; /* strides in floats; heads and groups lie dense */
    long b, s, h, p, g, n;
} Scan;

/* One row of a head's state through `s` tokens: H = decay * H + u * B, y = H . C + skip. `nv` vectors hold the row. */
INLINE void scan_row(float *H, int nv, const Scan *in, const float *B, const float *C, const float *decay,
                     const float *dt, const float *x, float D, float *y, long y_token, long s) {
    vf state[16];
    for (int v = 0; v < nv; v++) state[v] = load(H + v * VL);
    for (long t = 0; t < s; t++) {
        const float xt = x[t * in->x_token], u = dt[t] * xt, a = decay[t];
        const float *Bt = B + t * in->bc_token, *Ct = C + t * in->bc_token;
        vf total = {0};
        for (int v = 0; v < nv; v++) {
            state[v] = state[v] * a + load(Bt + v * VL) * u;
            total += state[v] * load(Ct + v * VL);
        }
        if (y) y[t * y_token] = sum(total) + D * xt;
    }
    for (int v = 0; v < nv; v++) store(H + v * VL, state[v]);
}

static void scan_row_any(float *H, const Scan *in, const float *B, const float *C, const float *decay, const float *dt,
                         const float *x, float D, float *y, long y_token, long s) {
    for (long t = 0; t < s; t++) {
        const float xt = x[t * in->x_token], u = dt[t] * xt, a = decay[t];
        const float *Bt = B + t * in->bc_token, *Ct = C + t * in->bc_token;
        for (long i = 0; i < in->n; i++) H[i] = H[i] * a + Bt[i] * u;
        if (y) y[t * y_token] = dot(H, Ct, in->n) + D * xt;
    }
}

/* Token by token from `state` (b, h, p, n): y (b, s, h, p) and the state after the last token, each unless null.
 * A (h,), D (h,). */
API void tt_ssd(const float *x, long x_batch, long x_token, const float *B, const float *C, long bc_batch, long bc_token,
                const float *dt, long dt_batch, long dt_token, const float *A, const float *D, const float *state,
                long b, long s, long h, long p, long g, long n, float *y, float *end, int threads) {
    const Scan in = {x, B, C, dt, x_batch, x_token, bc_batch, bc_token, dt_batch, dt_token, b, s, h, p, g, n};
#pragma omp parallel num_threads(threads) if (threads > 1 && b * s * h * p * n >= 65536)
    {
        float *decay = malloc((2 * s + n) * sizeof(float)), *step = decay + s, *spare = step + s;
#pragma omp for
        for (long item = 0; item < b * h; item++) {
            const long row = item / h, head = item % h, group = head / (h / g);
            for (long t = 0; t < s; t++) {
                step[t] = dt[row * dt_batch + t * dt_token + head];
                decay[t] = expf(step[t] * A[head]);
            }
            const float *Bg = B + row * bc_batch + group * n, *Cg = C + row * bc_batch + group * n;
            for (long i = 0; i < p; i++) {
                const long at = (item * p + i) * n;
                float *H = end ? end + at : spare;
                memcpy(H, state + at, n * sizeof(float));
                const float *xi = x + row * x_batch + head * p + i;
                float *yi = y ? y + (row * s * h + head) * p + i : 0;
#define ROW(NV) scan_row(H, NV, &in, Bg, Cg, decay, step, xi, D[head], yi, h * p, s)
                if (n == 2 * VL) ROW(2);
                else if (n == 4 * VL) ROW(4);
                else if (n == 8 * VL) ROW(8);
                else if (n == 16 * VL) ROW(16);
                else scan_row_any(H, &in, Bg, Cg, decay, step, xi, D[head], yi, h * p, s);
#undef ROW
            }
        }
        free(decay);
    }
}

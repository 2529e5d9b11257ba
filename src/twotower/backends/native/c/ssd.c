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

typedef struct {
    const float *x, *B, *C, *dt, *A, *D, *state;
    long x_batch, x_token, bc_batch, bc_token, dt_batch, dt_token;
    const int64_t *counts;
    long s, h, p, g, n;
    float *y;
    long y_batch;
    float *end, *room; /* room: of each thread, see below */
} Scan;

/* A head's decays, step sizes, a state's row nobody wants, and x and y side by side: whole pages apart, its tokens would
 * fall into one set of the cache. */
static long scan_room(long s, long p, long n) { return 2 * s + n + 2 * s * p; }

static void scan_heads(void *job, long first_item, long last_item, int slot) {
    const Scan *c = job;
    const long s = c->s, h = c->h, p = c->p, n = c->n;
    float *decay = c->room + slot * scan_room(s, p, n), *step = decay + s, *spare = step + s, *x = spare + n, *y = x + s * p;
    for (long item = first_item; item < last_item; item++) {
        const long row = item / h, head = item % h, first = row * c->bc_batch + head / (h / c->g) * n;
        const long own = c->counts ? c->counts[row] : s;
        for (long t = 0; t < own; t++) {
            step[t] = c->dt[row * c->dt_batch + t * c->dt_token + head];
            decay[t] = expf(step[t] * c->A[head]);
            memcpy(x + t * p, c->x + row * c->x_batch + t * c->x_token + head * p, p * sizeof(float));
        }
        const Head in = {c->B + first, c->C + first, decay, step, x, c->bc_token, own, p, n, c->D[head]};
        for (long i = 0; i < p; i++) {
            const long at = (item * p + i) * n;
            float *H = c->end ? c->end + at : spare;
            memcpy(H, c->state + at, n * sizeof(float));
            if (n == 2 * VL) scan_row(H, 2, &in, i, y);
            else if (n == 4 * VL) scan_row(H, 4, &in, i, y);
            else if (n == 8 * VL) scan_row(H, 8, &in, i, y);
            else if (n == 16 * VL) scan_row(H, 16, &in, i, y);
            else scan_row_any(H, &in, i, y);
        }
        for (long t = 0; c->y && t < own; t++)
            memcpy(c->y + row * c->y_batch + (t * h + head) * p, y + t * p, p * sizeof(float));
    }
}

/* Token by token from `state` (b, h, p, n): y (b, s, h, p) and the state after the last token, each unless null.
 * x (b, s, h, p), B and C (b, s, g, n), dt (b, s, h) by strides in floats, heads and groups dense, y's rows `y_batch`
 * apart; A (h,), D (h,). Of row b only the first counts[b] tokens, unless that is null. */
int tt_ssd(const float *x, long x_batch, long x_token, const float *B, const float *C, long bc_batch, long bc_token,
                const float *dt, long dt_batch, long dt_token, const float *A, const float *D, const float *state,
                const int64_t *counts, long b, long s, long h, long p, long g, long n, float *y, long y_batch, float *end, int threads) {
    threads = b * s * h * p * n >= 65536 ? threads : 1;
    float *room = malloc(threads * scan_room(s, p, n) * sizeof(float));
    if (!room) return 1;
    Scan job = {x, B, C, dt, A, D, state, x_batch, x_token, bc_batch, bc_token, dt_batch, dt_token,
                counts, s, h, p, g, n, y, y_batch, end, room};
    in_parallel(scan_heads, &job, b * h, 1, threads);
    free(room);
    return 0;
}

#include "kernels.h"

#define ROWS 4   /* of a state that go through the tokens together: while one's sum waits, another's goes on */
#define PIECE 32 /* tokens whose keys and queries stay in a core's first cache */

typedef struct {
    float *x;
    long stride, heads, n;
    float scale;
} Units;

static void make_units(void *job, long from, long to, int slot) {
    const Units *in = job;
    (void)slot;
    for (long item = from; item < to; item++) {
        float *head = in->x + item / in->heads * in->stride + item % in->heads * in->n;
        const float factor = in->scale / sqrtf(dot(head, head, in->n) + 1e-6f);
        for (long j = 0; j < in->n; j++) head[j] *= factor;
    }
}

/* Each of `heads` heads of n floats of r rows, which lie `stride` apart, divided by its length and times `scale`, in place;
 * see ops.delta.unit */
void tt_unit_heads(float *x, long r, long stride, long heads, long n, float scale, int threads) {
    Units job = {x, stride, heads, n, scale};
    in_parallel(make_units, &job, r * heads, 1, r * heads * n >= 32768 ? threads : 1);
}

/* out (r, 2h): the decays exp(A * softplus(a + bias)) and the step sizes sigmoid(beta) of rows a, beta (2h), which lie
 * `stride` apart */
void tt_delta_steps(const float *gates, long stride, const float *bias, const float *A, long r, long h, float *out) {
    for (long m = 0; m < r; m++)
        for (long i = 0; i < h; i++) {
            const float a = gates[m * stride + i] + bias[i], beta = gates[m * stride + h + i];
            out[m * 2 * h + i] = expf(A[i] * (a > 20.0f ? a : log1pf(expf(a))));
            out[m * 2 * h + h + i] = 1.0f / (1.0f + expf(-beta));
        }
}

/* What one head reads in s tokens of a piece: keys and queries (s, n), values (s, p), decays and step sizes (s); n and p
 * are rounded up, with zeros behind */
typedef struct {
    float *k, *q, *v, *y, *decay, *size;
    long s, n, p;
} Piece;

/* ROWS rows of a head's state H (p, n), from row i on, through the tokens: w = size * (v - decay * H . k),
 * H = decay * H + w * k, y = H . q */
static void scan_rows(float *H, const Piece *in, long i) {
    const long n = in->n;
    H += i * n;
    for (long t = 0; t < in->s; t++) {
        const float *k = in->k + t * n, *q = in->q + t * n, *v = in->v + t * in->p + i, a = in->decay[t];
        vf even[ROWS] = {{0}}, odd[ROWS] = {{0}};
        float w[ROWS];
        for (long j = 0; j < n; j += 2 * VL)
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                even[r] += load(H + r * n + j) * load(k + j);
                odd[r] += load(H + r * n + j + VL) * load(k + j + VL);
            }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            w[r] = in->size[t] * (v[r] - a * sum(even[r] + odd[r]));
            even[r] = odd[r] = (vf){0};
        }
        for (long j = 0; j < n; j += 2 * VL)
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                const vf first = load(H + r * n + j) * a + load(k + j) * w[r];
                const vf second = load(H + r * n + j + VL) * a + load(k + j + VL) * w[r];
                store(H + r * n + j, first);
                store(H + r * n + j + VL, second);
                even[r] += first * load(q + j);
                odd[r] += second * load(q + j + VL);
            }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) in->y[t * in->p + i + r] = sum(even[r] + odd[r]);
    }
}

static long rounded_up(long x, long to) { return (x + to - 1) / to * to; }

typedef struct {
    const float *v, *k, *q, *steps, *state;
    long batch, token, step_batch;
    const int64_t *counts;
    long s, h, p, g, n;
    float *y;
    long y_batch;
    float *end, *room; /* room: of each thread `floats`, with zeros behind the rows of a state and of a piece */
    long floats;
} Rule;

static void apply_rule(void *job, long first_head, long last_head, int slot) {
    const Rule *c = job;
    const long s = c->s, h = c->h, p = c->p, n = c->n, wide = rounded_up(n, 2 * VL), rows = rounded_up(p, ROWS);
    float *H = c->room + slot * c->floats;
    Piece in = {.k = H + rows * wide, .n = wide, .p = rows};
    in.q = in.k + PIECE * wide;
    in.v = in.q + PIECE * wide;
    in.y = in.v + PIECE * rows;
    in.decay = in.y + PIECE * rows;
    in.size = in.decay + PIECE;
    for (long item = first_head; item < last_head; item++) {
        const long row = item / h, head = item % h, group = row * c->batch + head / (h / c->g) * n;
        const long own = c->counts ? c->counts[row] : s;
        memset(H, 0, rows * wide * sizeof(float)); /* another head's NaN or infinity may have reached the padding */
        for (long i = 0; i < p; i++) memcpy(H + i * wide, c->state + (item * p + i) * n, n * sizeof(float));
        for (long first = 0; first < own; first += PIECE) {
            in.s = own - first < PIECE ? own - first : PIECE;
            for (long t = 0; t < in.s; t++) {
                const long at = (first + t) * c->token;
                const float *steps = c->steps + row * c->step_batch + (first + t) * 2 * h;
                memcpy(in.k + t * wide, c->k + group + at, n * sizeof(float));
                memcpy(in.q + t * wide, c->q + group + at, n * sizeof(float));
                memcpy(in.v + t * rows, c->v + row * c->batch + at + head * p, p * sizeof(float));
                in.decay[t] = steps[head];
                in.size[t] = steps[h + head];
            }
            for (long i = 0; i < rows; i += ROWS) scan_rows(H, &in, i);
            for (long t = 0; c->y && t < in.s; t++)
                memcpy(c->y + row * c->y_batch + ((first + t) * h + head) * p, in.y + t * rows, p * sizeof(float));
        }
        for (long i = 0; c->end && i < p; i++) memcpy(c->end + (item * p + i) * n, H + i * wide, n * sizeof(float));
    }
}

/* The gated delta rule token by token from `state` (b, h, p, n), see ops.delta: y (b, s, h, p) and the state after the last
 * token, each unless null. v (b, s, h, p), k and q (b, s, g, n) by strides in floats, heads and groups dense, steps as
 * tt_delta_steps gives them, y's rows `y_batch` apart. Of row b only the first counts[b] tokens, unless that is null. */
int tt_delta(const float *v, const float *k, const float *q, long batch, long token, const float *steps, long step_batch,
             const float *state, const int64_t *counts, long b, long s, long h, long p, long g, long n, float *y, long y_batch,
             float *end, int threads) {
    const long wide = rounded_up(n, 2 * VL), rows = rounded_up(p, ROWS);
    const long floats = rounded_up(rows * wide + PIECE * (2 * wide + 2 * rows + 2), 64 / sizeof(float));
    threads = b * s * h * p * n >= 65536 ? threads : 1;
    float *room = aligned_alloc(64, threads * floats * sizeof(float));
    if (!room) return 1;
    memset(room, 0, threads * floats * sizeof(float));
    Rule job = {v, k, q, steps, state, batch, token, step_batch, counts, s, h, p, g, n, y, y_batch, end, room, floats};
    in_parallel(apply_rule, &job, b * h, 1, threads);
    free(room);
    return 0;
}

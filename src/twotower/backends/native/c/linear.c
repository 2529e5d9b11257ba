#include "amx.h"
#include "kernels.h"

#include <stdatomic.h>

INLINE const void *panel_at(const Weight *w, long panel) {
    const long offset = panel * w->inputs * NR;
    return w->bf16 ? (const void *)((const uint16_t *)w->data + offset) : (const void *)((const float *)w->data + offset);
}

#define SHARED 32768 /* products of inputs, outputs and rows from which on threads gain more than sharing costs */

/* What a tile prefetches while it computes: `step` bytes, from `from` on, for each of its inputs */
typedef struct {
    const char *from;
    long step;
} Ahead;

typedef vf Sums[MR][2];

#define LINE 64 /* bytes of a cache line */

/* Adds rows . panel to the sums: rows of float32, a panel of float32 or of bf16, which is widened */
INLINE void add_products(Sums acc, long k, int bf16, const void *panel, const void *const *rows, int mr, Ahead ahead) {
    for (long i = 0; i < k; i++) {
        __builtin_prefetch(ahead.from, 0, 2);
        if (!bf16 && NR * sizeof(float) > LINE) __builtin_prefetch(ahead.from + LINE, 0, 2);
        ahead.from += ahead.step;
        vf w0, w1;
        if (bf16) {
            vu pair;
            memcpy(&pair, (const uint16_t *)panel + i * NR, sizeof pair);
            w0 = (vf)(pair << 16);
            w1 = (vf)(pair & 0xffff0000u);
        } else {
            w0 = load((const float *)panel + i * NR);
            w1 = load((const float *)panel + i * NR + VL);
        }
#pragma GCC unroll 8
        for (int m = 0; m < mr; m++) {
            vf x = splat(((const float *)rows[m])[i]);
            acc[m][0] += x * w0;
            acc[m][1] += x * w1;
        }
    }
}

#if BF16_PAIRS
/* The same for rows of bf16 whose length is even */
INLINE void add_pairs(Sums acc, long k, const void *panel, const void *const *rows, int mr, Ahead ahead) {
    for (long i = 0; i < (k + 1) / 2; i++) {
        __builtin_prefetch(ahead.from, 0, 2);
        __builtin_prefetch(ahead.from + ahead.step, 0, 2);
        ahead.from += 2 * ahead.step;
        const uint16_t *from = (const uint16_t *)panel + 2 * i * NR;
        __m512i w0, w1;
        if (2 * i + 1 < k) {
            w0 = _mm512_loadu_si512(from);
            w1 = _mm512_loadu_si512(from + NR);
        } else { /* the last of an odd number, beside zeros */
            w0 = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
            w1 = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(from + VL)));
        }
#pragma GCC unroll 8
        for (int m = 0; m < mr; m++) {
            const __m512bh x = (__m512bh)_mm512_set1_epi32(((const int32_t *)rows[m])[i]);
            acc[m][0] = (vf)_mm512_dpbf16_ps((__m512)acc[m][0], x, (__m512bh)w0);
            acc[m][1] = (vf)_mm512_dpbf16_ps((__m512)acc[m][1], x, (__m512bh)w1);
        }
    }
}

typedef struct {
    const float *const *from;
    const void **to;
    uint16_t *values;
    long k, width;
} Rounding;

/* Values of a rounded row and of the zeros behind it */
INLINE long row_width(long k) { return (k + ROW_STEP - 1) / ROW_STEP * ROW_STEP; }

/* Rows of k floats rounded to bf16, with zeros behind them */
static void round_rows(void *job, long first, long last, int slot) {
    const Rounding *in = job;
    (void)slot;
    for (long m = first; m < last; m++) {
        uint16_t *to = in->values + m * in->width;
        for (long i = 0; i < in->k; i += VL) {
            const __m256bh part = _mm512_cvtneps_pbh((__m512)load_part(in->from[m] + i, in->k - i < VL ? in->k - i : VL));
            memcpy(to + i, &part, sizeof part);
        }
        const long written = (in->k + VL - 1) / VL * VL;
        memset(to + written, 0, (in->width - written) * sizeof *to);
        in->to[m] = to;
    }
}

/* What a thread keeps for rounded rows */
static _Thread_local struct {
    uint16_t *values;
    const void **rows;
    long size, num_rows;
    long of; /* the number of the job whose rows were copied into it */
} room;

/* Makes room for r rows of `width`; 0 where there is no memory */
static int has_room(long r, long width) {
    room.of = 0;
    if (room.size < r * width) {
        free(room.values);
        room.values = aligned_alloc(64, r * width * sizeof *room.values); /* whole rows of 64 bytes, see ROW_STEP */
        room.size = room.values ? r * width : 0;
    }
    if (room.num_rows < r) {
        free(room.rows);
        room.rows = malloc(r * sizeof *room.rows);
        room.num_rows = room.rows ? r : 0;
    }
    return room.size >= r * width && room.num_rows >= r;
}

static const void *const *rounded(const float *const *rows, long r, long k, int threads) {
    const long width = row_width(k);
    if (!has_room(r, width)) return 0;
    Rounding job = {rows, room.rows, room.values, k, width};
    in_parallel(round_rows, &job, r, 1, r * k >= 262144 ? threads : 1);
    return room.rows;
}

/* The caller's rounded rows in this thread's own room, unless there is no memory: read in order once, they come from the
 * caller's cache several times as fast as line by line inside of a product */
static const void *const *copied(const void *const *rows, long r, long k, long job) {
    const long width = row_width(k);
    if (room.of == job) return room.rows;
    if (!has_room(r, width)) return rows;
    for (long m = 0; m < r; m++) room.rows[m] = memcpy(room.values + m * width, rows[m], width * sizeof *room.values);
    room.of = job;
    return room.rows;
}
#endif

const void *const *prepared(const float *const *rows, long r, long k, int bf16, int threads) {
#if BF16_PAIRS
    if (bf16) return rounded(rows, r, k, threads);
#endif
    (void)k, (void)bf16, (void)r, (void)threads;
    return (const void *const *)rows;
}

/* y[m][first ... ] = rows[m] . weight + bias for `mr` rows and one panel; mr and bf16 are constants */
INLINE void tile(const Weight *w, int bf16, long panel, const void *const *rows, float *const *y, int mr, const float *bias,
                 int squared_relu, Ahead ahead) {
    Sums acc;
#pragma GCC unroll 8
    for (int m = 0; m < mr; m++) acc[m][0] = acc[m][1] = (vf){0};
#if BF16_PAIRS
    if (bf16)
        add_pairs(acc, w->inputs, panel_at(w, panel), rows, mr, ahead);
    else
#endif
        add_products(acc, w->inputs, bf16, panel_at(w, panel), rows, mr, ahead);
    const long first = panel * NR, n = w->outputs - first < NR ? w->outputs - first : NR;
#pragma GCC unroll 8
    for (int m = 0; m < mr; m++) {
        float out[NR];
        store(out, acc[m][0]);
        store(out + VL, acc[m][1]);
        if (bias)
            for (long i = 0; i < n; i++) out[i] += bias[first + i];
        if (squared_relu)
            for (long i = 0; i < NR; i++) out[i] = out[i] > 0 ? out[i] * out[i] : 0;
        if (n == NR)
            memcpy(y[m] + first, out, sizeof out);
        else
            memcpy(y[m] + first, out, n * sizeof(float));
    }
}

INLINE void some_rows(const Weight *w, int bf16, long panel, const void *const *rows, float *const *y, long r,
                      const float *bias, int squared_relu, Ahead ahead) {
#define CASE(M) \
    case M: tile(w, bf16, panel, rows, y, M, bias, squared_relu, ahead); return
    switch (r) {
        CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6);
#if MR == 8
        CASE(7); CASE(8);
#endif
    }
#undef CASE
}

/* One panel at a time, however few the rows: side by side, two or four panels hide the latency of their sums better, but
 * are as many streams for the CPU's prefetching, and memory is what few rows wait for. */
void panels(const Weight *w, long from, long to, const void *const *rows, float *const *y, long r, const float *bias,
            int squared_relu) {
    if (AMX && w->bf16 && has_tiles()) {
        const long stride = r > 1 ? (const char *)rows[1] - (const char *)rows[0] : 64;
        amx_panels(w, from, to, rows[0], stride, y, r, bias, squared_relu);
        return;
    }
    const long tiles = (r + MR - 1) / MR, height = tiles ? (r + tiles - 1) / tiles : 0; /* 8 rows: 4 + 4, not 6 + 2 */
    for (long panel = from; panel < to; panel++) {
        /* The first tile reads the panel faster than memory gives it, the others find it in the cache: they share the
         * fetching of the next panel. A lone tile fetches what it will read itself: the CPU's own prefetching stops at
         * every page. */
        const long per_input = NR * (w->bf16 ? 2 : 4);
        Ahead ahead = {(const char *)panel_at(w, panel) + BYTES_AHEAD, per_input};
        if (tiles > 1) ahead = (Ahead){panel_at(w, panel + (panel + 1 < to)), per_input / tiles};
        for (long m = 0; m < r; m += height) {
            const long left = r - m < height ? r - m : height;
            if (w->bf16)
                some_rows(w, 1, panel, rows + m, y + m, left, bias, squared_relu, ahead);
            else
                some_rows(w, 0, panel, rows + m, y + m, left, bias, squared_relu, ahead);
            ahead.from += ahead.step * w->inputs;
        }
    }
}

API long tt_panel_width(void) { return NR; }

API long tt_bf16_pairs(void) { return BF16_PAIRS; }

static void row_pointers(const float **rows, const float *x, long stride, long r) {
    for (long m = 0; m < r; m++) rows[m] = x + m * stride;
}

/* The panels of a product, as items of a job */
typedef struct {
    Weight weight;
    const void *const *rows;
    float *const *out;
    long r;
    const float *bias;
    int squared_relu;
    long number; /* of all such jobs */
} Panels;

static void some_panels(void *job, long from, long to, int slot) {
    const Panels *in = job;
    const void *const *rows = in->rows;
    (void)slot;
#if BF16_PAIRS
    if (slot && in->weight.bf16) rows = copied(rows, in->r, in->weight.inputs, in->number);
#endif
    panels(&in->weight, from, to, rows, in->out, in->r, in->bias, in->squared_relu);
}

/* out[m] = rows[m] . weight + bias, then relu(.)^2 if asked; 1 where there is no memory, else 0 */
static int multiply(const Weight *w, const float *const *rows, float *const *out, long r, const float *bias, int squared_relu,
                    int threads) {
    static atomic_long number;
    Panels job = {*w, prepared(rows, r, w->inputs, w->bf16, threads), out, r, bias, squared_relu, atomic_fetch_add(&number, 1) + 1};
    if (!job.rows) return 1;
    in_parallel(some_panels, &job, num_panels(w), 1, r * w->inputs * w->outputs >= SHARED ? threads : 1);
    return 0;
}

/* y (r, o) = x (r, k; rows `stride` apart) . weight + bias */
API int tt_linear(const float *x, long stride, long r, const void *weight, int bf16, long o, long k, const float *bias,
                   float *y, int threads) {
    const Weight w = {weight, o, k, bf16};
    if (r == 0) return 0;
    const float **rows = malloc(2 * r * sizeof *rows);
    if (!rows) return 1;
    float **out = (float **)rows + r;
    row_pointers(rows, x, stride, r);
    row_pointers((const float **)out, y, o, r);
    const int failed = multiply(&w, rows, out, r, bias, 0, threads);
    free(rows);
    return failed;
}

typedef struct {
    const Activation *by;
    float *const *rows;
    long r, inner;
} Activating;

static void activate(void *job, long from, long to, int slot) {
    const Activating *in = job;
    (void)slot;
    for (long m = 0; m < in->r; m++) activate_row(in->by, in->rows[m], in->inner, from, to);
}

/* y (r, d) = down(activation(up(x))), see activation.h; x (r, d), `hidden` is room for (r, up's outputs) */
int tt_mlp(const float *x, long r, const void *up, int up_bf16, long f, const float *up_bias, const void *down,
                int down_bf16, long d, const float *down_bias, const Activation *by, float *hidden, float *y, int threads) {
    const long inner = by->gated ? f / 2 : f;
    const Weight wu = {up, f, d, up_bf16}, wd = {down, d, inner, down_bf16};
    const float **rows = malloc(3 * r * sizeof *rows);
    if (!rows) return 1;
    float **mid = (float **)rows + r, **out = (float **)rows + 2 * r;
    row_pointers(rows, x, d, r);
    row_pointers((const float **)mid, hidden, f, r);
    row_pointers((const float **)out, y, d, r);
    int failed = multiply(&wu, rows, mid, r, up_bias, is_fused(by), threads);
    Activating job = {by, mid, r, inner};
    if (!failed && !is_fused(by)) in_parallel(activate, &job, inner, VL, r * inner >= 8192 ? threads : 1);
    failed = failed || multiply(&wd, (const float *const *)mid, out, r, down_bias, 0, threads);
    free(rows);
    return failed;
}

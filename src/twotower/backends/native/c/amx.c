#include "amx.h"

#if AMX
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ASK_FOR_STATE 0x1023 /* ARCH_REQ_XCOMP_PERM */
#define TILE_DATA 18         /* XFEATURE_XTILEDATA */

int has_tiles(void) {
    static atomic_int known; /* 1 no, 2 yes */
    int answer = atomic_load_explicit(&known, memory_order_relaxed);
    if (!answer) {
        answer = syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA) ? 1 : 2;
        atomic_store(&known, answer);
    }
    return answer == 2;
}

/* The last pairs of a panel, fewer than a tile has, padded with zeros: 16 rows of NR outputs */
static void pad_pairs(const uint16_t *panel, long k, uint16_t *to) {
    const long whole = k / (2 * PAIRS) * PAIRS, pairs = k / 2 - whole;
    const uint16_t *from = panel + whole * 2 * NR;
    memset(to, 0, PAIRS * 2 * NR * sizeof *to);
    memcpy(to, from, pairs * 2 * NR * sizeof *to);
    if (k % 2)
        for (long j = 0; j < NR; j++) to[pairs * 2 * NR + 2 * j] = from[pairs * 2 * NR + j];
}

/* Sums of `height` rows from a buffer (height, NR) to their places */
INLINE void leave(const Weight *w, long panel, const float *sums, float *const *y, long height, const float *bias,
                  int squared_relu) {
    const long first = panel * NR, n = w->outputs - first < NR ? w->outputs - first : NR;
    vf low = {0}, high = {0};
    if (bias) {
        low = load_part(bias + first, n < VL ? n : VL);
        if (n > VL) high = load_part(bias + first + VL, n - VL);
    }
    for (long m = 0; m < height; m++) {
        float *to = y[m] + first;
        vf left = load(sums + m * NR), right = load(sums + m * NR + VL);
        if (bias) {
            left += low;
            right += high;
        }
        if (squared_relu) {
            left = vrelu2(left);
            right = vrelu2(right);
        }
        store_part(to, left, n < VL ? n : VL);
        if (n > VL) store_part(to + VL, right, n - VL);
    }
}

INLINE const uint16_t *panel_of(const Weight *w, long panel) { return (const uint16_t *)w->data + panel * w->inputs * NR; }

#define STRIDE (2 * NR * 2L) /* bytes between two pairs of inputs in a panel */
#define HALF (2 * TILE)      /* values from the first 16 outputs of a panel's pair to the others */

/* One tile of rows with one panel or two */
INLINE void lone_tile(const Weight *w, long panel, long num, const char *rows, long stride, float *const *y, long height,
                      const float *bias, int squared_relu) {
    const long k = w->inputs, whole = k / (2 * PAIRS);
    const uint16_t *a = panel_of(w, panel), *b = panel_of(w, panel + num - 1);
    float sums[2][TILE * NR];
    clear_sums();
#define STEP(X, A, B) \
    _tile_loadd(4, X, stride); \
    _tile_loadd(6, A, STRIDE); \
    _tile_dpbf16ps(0, 4, 6); \
    _tile_loadd(7, (A) + HALF, STRIDE); \
    _tile_dpbf16ps(1, 4, 7); \
    if (num == 2) { \
        _tile_loadd(6, B, STRIDE); \
        _tile_dpbf16ps(2, 4, 6); \
        _tile_loadd(7, (B) + HALF, STRIDE); \
        _tile_dpbf16ps(3, 4, 7); \
    }
    for (long i = 0; i < whole; i++) {
        STEP(rows + i * 64, a + i * PAIRS * 2 * NR, b + i * PAIRS * 2 * NR)
    }
    if (k % (2 * PAIRS)) {
        uint16_t last[2][PAIRS * 2 * NR];
        pad_pairs(a, k, last[0]);
        pad_pairs(b, k, last[1]);
        STEP(rows + whole * 64, last[0], last[1])
    }
#undef STEP
    store_sums(sums[0], sums[1], NR);
    for (long j = 0; j < num; j++) leave(w, panel + j, sums[j], y, height, bias, squared_relu);
}

/* Two tiles of rows, the second `below` rows under the first, with one panel */
static void two_tiles(const Weight *w, long panel, const char *rows, long stride, long below, float *const *y, long height,
                      const float *bias, int squared_relu) {
    const long k = w->inputs, whole = k / (2 * PAIRS);
    const uint16_t *a = panel_of(w, panel);
    const char *under = rows + below * stride;
    float sums[2][TILE * NR];
    clear_sums();
#define STEP(X, Y, A) \
    _tile_loadd(4, X, stride); \
    _tile_loadd(6, A, STRIDE); \
    _tile_dpbf16ps(0, 4, 6); \
    _tile_loadd(7, (A) + HALF, STRIDE); \
    _tile_dpbf16ps(1, 4, 7); \
    _tile_loadd(5, Y, stride); \
    _tile_dpbf16ps(2, 5, 6); \
    _tile_dpbf16ps(3, 5, 7);
    for (long i = 0; i < whole; i++) {
        STEP(rows + i * 64, under + i * 64, a + i * PAIRS * 2 * NR)
    }
    if (k % (2 * PAIRS)) {
        uint16_t last[PAIRS * 2 * NR];
        pad_pairs(a, k, last);
        STEP(rows + whole * 64, under + whole * 64, last)
    }
#undef STEP
    store_sums(sums[0], sums[1], NR);
    leave(w, panel, sums[0], y, height, bias, squared_relu);
    leave(w, panel, sums[1], y + below, height, bias, squared_relu);
}

/* Adds x . w of one more pair of inputs to two sums, of the pairs' first inputs and of their second */
INLINE void add_pair(__m512 *first, __m512 *second, const uint16_t *pair, __m512 x0, __m512 x1) {
    const __m512i w = _mm512_loadu_si512(pair);
    *first = _mm512_fmadd_ps(x0, _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), *first);
    *second = _mm512_fmadd_ps(x1, _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000))), *second);
}

/* What a tile's instruction does to one row, in its order: within 16 pairs the first and the second inputs add up apart. A
 * single row is read in order faster than tile by tile. Expects denormals to count as zeros, as they do in tiles. */
INLINE void lone_row(const Weight *w, long panel, int num, const uint16_t *row, float *const *y, const float *bias,
                     int squared_relu) {
    const long k = w->inputs, pairs = (k + 1) / 2;
    const uint16_t *p[4];
    const char *ahead = (const char *)panel_of(w, panel) + BYTES_AHEAD;
    __m512 sums[4][2];
#pragma GCC unroll 4
    for (int j = 0; j < num; j++) {
        p[j] = panel_of(w, panel + j);
        sums[j][0] = sums[j][1] = _mm512_setzero_ps();
    }
    for (long begin = 0; begin < pairs; begin += PAIRS) {
        const long whole = k / 2 - begin < PAIRS ? k / 2 - begin : PAIRS;
        __m512 parts[4][2][2];
#pragma GCC unroll 4
        for (int j = 0; j < num; j++) parts[j][0][0] = parts[j][0][1] = parts[j][1][0] = parts[j][1][1] = _mm512_setzero_ps();
        for (long i = begin; i < begin + whole; i++) {
            uint32_t x;
            memcpy(&x, row + 2 * i, sizeof x);
            const __m512 x0 = _mm512_castsi512_ps(_mm512_set1_epi32((int)(x << 16)));
            const __m512 x1 = _mm512_castsi512_ps(_mm512_set1_epi32((int)(x & 0xffff0000)));
            __builtin_prefetch(ahead, 0, 2);
            __builtin_prefetch(ahead + 64, 0, 2);
            ahead += 128;
#pragma GCC unroll 4
            for (int j = 0; j < num; j++) {
                add_pair(&parts[j][0][0], &parts[j][0][1], p[j] + i * 2 * NR, x0, x1);
                add_pair(&parts[j][1][0], &parts[j][1][1], p[j] + i * 2 * NR + HALF, x0, x1);
            }
        }
        if (begin + whole < pairs && whole < PAIRS) { /* the last of an odd number */
            const __m512 x = _mm512_castsi512_ps(_mm512_set1_epi32((int)((uint32_t)row[k - 1] << 16)));
#pragma GCC unroll 4
            for (int j = 0; j < num; j++)
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++)
                    parts[j][half][0] =
                        _mm512_fmadd_ps(x, (__m512)load_bf16(p[j] + (k - 1) * NR + half * TILE, TILE), parts[j][half][0]);
        }
#pragma GCC unroll 4
        for (int j = 0; j < num; j++)
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++)
                sums[j][half] = _mm512_add_ps(sums[j][half], _mm512_add_ps(parts[j][half][0], parts[j][half][1]));
    }
#pragma GCC unroll 4
    for (int j = 0; j < num; j++) {
        float out[NR];
        _mm512_storeu_ps(out, sums[j][0]);
        _mm512_storeu_ps(out + TILE, sums[j][1]);
        leave(w, panel + j, out, y, 1, bias, squared_relu);
    }
}

static void row_panels(const Weight *w, long from, long to, const uint16_t *row, float *const *y, const float *bias,
                       int squared_relu) {
    for (; from + 4 <= to; from += 4) lone_row(w, from, 4, row, y, bias, squared_relu);
    for (; from < to; from++) lone_row(w, from, 1, row, y, bias, squared_relu);
}

static void tile_panels(const Weight *w, long from, long to, const void *rows, long stride, float *const *y, long r,
                        const float *bias, int squared_relu) {
    const Groups by = groups_of(r);
    configure(by.height);
    for (long panel = from; panel < to;) {
        const long num = !by.below && to - panel > 1 ? 2 : 1;
        for (long i = 0; i < by.groups; i++) {
            const long m = begin_of(&by, i, r);
            const char *here = (const char *)rows + m * stride;
            if (by.below)
                two_tiles(w, panel, here, stride, by.below, y + m, by.height, bias, squared_relu);
            else if (num == 2)
                lone_tile(w, panel, 2, here, stride, y + m, by.height, bias, squared_relu);
            else
                lone_tile(w, panel, 1, here, stride, y + m, by.height, bias, squared_relu);
        }
        panel += num;
    }
    _tile_release();
}

#define FLUSH 0x8040 /* denormals are zeros, as operands and as results: tiles know no other way */

void amx_panels(const Weight *w, long from, long to, const void *rows, long stride, float *const *y, long r,
                const float *bias, int squared_relu) {
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | FLUSH);
    if (r == 1)
        row_panels(w, from, to, rows, y, bias, squared_relu);
    else if (r > 1)
        tile_panels(w, from, to, rows, stride, y, r, bias, squared_relu);
    _mm_setcsr(before);
}
#else
int has_tiles(void) { return 0; }

void amx_panels(const Weight *w, long from, long to, const void *rows, long stride, float *const *y, long r,
                const float *bias, int squared_relu) {
    (void)w, (void)from, (void)to, (void)rows, (void)stride, (void)y, (void)r, (void)bias, (void)squared_relu;
}
#endif

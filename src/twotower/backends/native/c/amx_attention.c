/* The two products of a tile of attention in the CPU's matrix tiles, from the rows of a bf16 cache; see pairs.c. */
#include "amx.h"
#include "pairs.h"

#if AMX

/* To tiles 0 to 3: products of one tile of lanes, or of two, the second `below` lanes under the first, with 2 TILE outputs.
 * A lane is a row of steps · 2 PAIRS values, `stride` bytes from the next. `packed` (steps, 2, PAIRS, TILE) has pairs of
 * values; its steps are `size` bytes apart, its halves `half` and the pairs of inputs `row`. */
INLINE void four_sums(const char *rows, long stride, long below, const char *packed, long size, long half, long row,
                      long steps) {
    clear_sums();
    for (long i = 0; i < steps; i++) {
        _tile_loadd(4, rows + i * 64, stride);
        _tile_loadd(6, packed + i * size, row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, packed + i * size + half, row);
        _tile_dpbf16ps(1, 4, 7);
        if (!below) continue;
        _tile_loadd(5, rows + below * stride + i * 64, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

void amx_scores(const int32_t *query, long width, long lanes, const void *const *key, long n, long p, float *scores,
                long step) {
    const long chunks = (p + 2 * PAIRS - 1) / (2 * PAIRS);
    float columns[chunks][VL][NR];
    const Groups by = groups_of(lanes);
    configure(by.height);
    for (long j = 0; j < n; j += NR) {
        for (long i = 0; i < chunks; i++) turn_keys(key + j, i * PAIRS, p, columns[i]);
        for (long i = 0; i < by.groups; i++) {
            const long m = begin_of(&by, i, lanes);
            float *to = scores + m * step + j;
            four_sums((const char *)(query + m * width), width * 4, by.below, (const char *)columns, sizeof columns[0],
                      TILE * 4, NR * 4, chunks);
            store_sums(to, by.below ? to + by.below * step : 0, step);
        }
    }
    _tile_release();
}

/* Values [first, first + 2 TILE) of 2 PAIRS places as pairs of places, see store_unpacked */
INLINE void pair_values(const void *const *value, long first, __mmask32 inside, __m512i packed[2][PAIRS]) {
    for (long i = 0; i < PAIRS; i++) {
        fetch(value[2 * i + AHEAD], 2 * first);
        fetch(value[2 * i + 1 + AHEAD], 2 * first);
        const __m512i even = _mm512_maskz_loadu_epi16(inside, (const uint16_t *)value[2 * i] + first);
        const __m512i odd = _mm512_maskz_loadu_epi16(inside, (const uint16_t *)value[2 * i + 1] + first);
        packed[0][i] = _mm512_unpacklo_epi16(even, odd);
        packed[1][i] = _mm512_unpackhi_epi16(even, odd);
    }
}

void amx_mix(const float *weights, long step, long lanes, const void *const *value, long n, long p, float *out,
             long out_step) {
    const long steps = n / (2 * PAIRS);
    __m512i packed[steps][2][PAIRS];
    float sums[2][TILE][NR];
    const Groups by = groups_of(lanes);
    configure(by.height);
    for (long first = 0; first < p; first += 2 * TILE) {
        const long left = p - first;
        const __mmask32 inside = left < 2 * TILE ? ((uint32_t)1 << left) - 1 : ~(uint32_t)0;
        for (long i = 0; i < steps; i++) pair_values(value + i * 2 * PAIRS, first, inside, packed[i]);
        for (long i = 0; i < by.groups; i++) {
            const long m = begin_of(&by, i, lanes);
            four_sums((const char *)(weights + m * step), step * 4, by.below, (const char *)packed, sizeof packed[0],
                      sizeof packed[0][0], 64, steps);
            store_sums(sums[0][0], sums[1][0], NR);
            for (long tile = 0; tile < 1 + (by.below > 0); tile++)
                for (long k = 0; k < by.height; k++)
                    store_unpacked(out + (m + tile * by.below + k) * out_step + first, inside,
                                   _mm512_loadu_ps(sums[tile][k]), _mm512_loadu_ps(sums[tile][k] + TILE));
        }
    }
    _tile_release();
}
#else
void amx_scores(const int32_t *query, long width, long lanes, const void *const *key, long n, long p, float *scores,
                long step) {
    (void)query, (void)width, (void)lanes, (void)key, (void)n, (void)p, (void)scores, (void)step;
}

void amx_mix(const float *weights, long step, long lanes, const void *const *value, long n, long p, float *out,
             long out_step) {
    (void)weights, (void)step, (void)lanes, (void)value, (void)n, (void)p, (void)out, (void)out_step;
}
#endif

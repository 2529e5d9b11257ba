/* What pairs.c gives to tiles of attention. */
#pragma once
#include "common.h"

/* How many rows before it reads one a tile fetches it. Behind the rows of its keys lie those of its values, and behind
 * these as many as this of others, which are only fetched. */
#define AHEAD 64

/* The line at `offset` bytes of a row, into the second cache: the CPU's own fetching stops at every page of memory, and
 * the first cache keeps too few misses under way to wait for memory there */
INLINE void fetch(const void *row, long offset) { __builtin_prefetch((const char *)row + offset, 0, 2); }

#if BF16_PAIRS
/* Words [first, first + VL) of NR keys as columns, zeros behind a row's p values */
INLINE void turn_keys(const void *const *key, long first, long p, float columns[VL][NR]) {
    const long left = p - 2 * first;
    const __mmask32 inside = left < 2 * VL ? ((uint32_t)1 << left) - 1 : ~(uint32_t)0;
    for (long j = 0; j < NR; j += VL) {
        vf rows[VL];
#pragma GCC unroll 16
        for (int k = 0; k < VL; k++) {
            fetch(key[j + k + AHEAD], 4 * first);
            rows[k] = (vf)_mm512_maskz_loadu_epi16(inside, (const char *)key[j + k] + 4 * first);
        }
        transpose(rows);
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++) store(columns[i] + j, rows[i]);
    }
}

/* 2 VL floats from what _mm512_unpacklo_epi16 and _mm512_unpackhi_epi16 had side by side: these go by quarters of a vector,
 * 0 to 3 and 8 to 11 of the first eight and so on, and the others */
INLINE void store_unpacked(float *to, __mmask32 mask, __m512 low, __m512 high) {
    const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    _mm512_mask_storeu_ps(to, mask, _mm512_permutex2var_ps(low, first, high));
    _mm512_mask_storeu_ps(to + VL, mask >> VL, _mm512_permutex2var_ps(low, second, high));
}

/* n floats rounded to bf16, to whole vectors with zeros behind them; `to` may be x */
void round_pairs(const float *x, long n, void *to);

/* scores (lanes, n; rows `step` apart) of n keys of p values, n a multiple of NR; query: rounded, rows `width` pairs apart
 * with zeros behind p values */
void score_pairs(const int32_t *query, long width, long lanes, const void *const *key, long n, long p, float *scores,
                 long step);

/* out (lanes, p; rows `out_step` apart) = weights (lanes, n) . values; the weights are rounded, rows `step` floats apart */
void mix_pairs(const float *weights, long step, long lanes, const void *const *value, long n, long p, float *out,
               long out_step);
#endif

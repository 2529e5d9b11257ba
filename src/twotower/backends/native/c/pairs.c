/* A tile's two products straight from the rows of a bf16 cache, on CPUs that multiply bf16 by pairs. Each sum adds the pairs
 * of a row, or those of places, in order, one lane's whatever the other lanes: as the products of linear.h do.
 */
#include "amx.h"
#include "pairs.h"

#if BF16_PAIRS

/* Adds to the scores of NR keys what those columns give, for `lanes` queries */
INLINE void add_columns(float columns[VL][NR], const int32_t *query, long width, int begins, int lanes, float *scores,
                        long step) {
    __m512 sum[8][2];
#pragma GCC unroll 8
    for (int m = 0; m < lanes; m++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++)
            sum[m][half] = begins ? _mm512_setzero_ps() : _mm512_loadu_ps(scores + m * step + half * VL);
#pragma GCC unroll 4
    for (int i = 0; i < VL; i++) {
        const __m512bh low = (__m512bh)load(columns[i]), high = (__m512bh)load(columns[i] + VL);
#pragma GCC unroll 8
        for (int m = 0; m < lanes; m++) {
            const __m512bh x = (__m512bh)_mm512_set1_epi32(query[m * width + i]);
            sum[m][0] = _mm512_dpbf16_ps(sum[m][0], x, low);
            sum[m][1] = _mm512_dpbf16_ps(sum[m][1], x, high);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < lanes; m++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) _mm512_storeu_ps(scores + m * step + half * VL, sum[m][half]);
}

void score_pairs(const int32_t *query, long width, long lanes, const void *const *key, long n, long p, float *scores,
                 long step) {
    if (AMX && has_tiles()) {
        amx_scores(query, width, lanes, key, n, p, scores, step);
        return;
    }
    float columns[VL][NR];
    for (long j = 0; j < n; j += NR)
        for (long first = 0; 2 * first < p; first += VL) {
            turn_keys(key + j, first, p, columns);
            for (long m = 0; m < lanes; m += 8) {
                const int32_t *some = query + m * width + first;
                float *to = scores + m * step + j;
#define CASE(M) case M: add_columns(columns, some, width, first == 0, M, to, step); break
                switch (lanes - m) {
                    CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6); CASE(7);
                    default: CASE(8);
                }
#undef CASE
            }
        }
}

/* Floats [first, first + units 2 VL) of `lanes` mixtures */
INLINE void mix_some(const float *weights, long step, int lanes, const void *const *value, long n, long first, int units,
                     long p, float *out, long out_step) {
    __m512 sum[6][4];
#pragma GCC unroll 6
    for (int m = 0; m < lanes; m++)
#pragma GCC unroll 4
        for (int i = 0; i < 2 * units; i++) sum[m][i] = _mm512_setzero_ps();
    const long left = p - first - 2 * VL * (units - 1);
    const __mmask32 inside = left < 2 * VL ? ((uint32_t)1 << left) - 1 : ~(uint32_t)0;
    for (long j = 0; j < n; j += 2) {
        __m512bh v[4];
#pragma GCC unroll 2
        for (int i = 0; i < units; i++) {
            const long at = 2 * (first + i * 2 * VL);
            const __mmask32 mask = i == units - 1 ? inside : ~(uint32_t)0;
            fetch(value[j + AHEAD], at);
            fetch(value[j + 1 + AHEAD], at);
            const __m512i even = _mm512_maskz_loadu_epi16(mask, (const char *)value[j] + at);
            const __m512i odd = _mm512_maskz_loadu_epi16(mask, (const char *)value[j + 1] + at);
            v[2 * i] = (__m512bh)_mm512_unpacklo_epi16(even, odd);
            v[2 * i + 1] = (__m512bh)_mm512_unpackhi_epi16(even, odd);
        }
#pragma GCC unroll 6
        for (int m = 0; m < lanes; m++) {
            const __m512bh w = (__m512bh)_mm512_set1_epi32(((const int32_t *)(weights + m * step))[j / 2]);
#pragma GCC unroll 4
            for (int i = 0; i < 2 * units; i++) sum[m][i] = _mm512_dpbf16_ps(sum[m][i], w, v[i]);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < lanes; m++)
#pragma GCC unroll 2
        for (int i = 0; i < units; i++) {
            const __mmask32 mask = i == units - 1 ? inside : ~(uint32_t)0;
            store_unpacked(out + m * out_step + first + i * 2 * VL, mask, sum[m][2 * i], sum[m][2 * i + 1]);
        }
}

void mix_pairs(const float *weights, long step, long lanes, const void *const *value, long n, long p, float *out,
               long out_step) {
    if (AMX && has_tiles()) {
        amx_mix(weights, step, lanes, value, n, p, out, out_step);
        return;
    }
    for (long first = 0; first < p; first += 4 * VL)
        for (long m = 0; m < lanes; m += 6) {
            const long some = lanes - m < 6 ? lanes - m : 6;
            const float *from = weights + m * step;
            float *to = out + m * out_step;
#define CASE(M, UNITS) \
    case (M) * 2 + (UNITS): mix_some(from, step, M, value, n, first, UNITS, p, to, out_step); break
            switch (some * 2 + (p - first > 2 * VL ? 2 : 1)) {
                CASE(1, 1); CASE(2, 1); CASE(3, 1); CASE(4, 1); CASE(5, 1); CASE(6, 1);
                CASE(1, 2); CASE(2, 2); CASE(3, 2); CASE(4, 2); CASE(5, 2); CASE(6, 2);
            }
#undef CASE
        }
}

void round_pairs(const float *x, long n, void *to) {
    for (long i = 0; i < n; i += VL) {
        const __m256bh part = _mm512_cvtneps_pbh((__m512)load_part(x + i, n - i < VL ? n - i : VL));
        memcpy((uint16_t *)to + i, &part, sizeof part);
    }
}

#endif

/* Shared by the CPU kernels: vectors of the machine's width in GCC's and Clang's portable notation.
 *
 * Every sum here runs in an order that depends on the operand's own length alone, never on how many rows or tokens
 * share the call: a row gives the same bits in any batch, and a token the same bits in any chunk.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define VL 16 /* floats in a vector */
#define MR 8  /* rows in a tile: MR x 2 accumulators fill most of the register file */
#elif defined(__AVX2__)
#define VL 8
#define MR 6
#else
#define VL 4
#define MR 6
#endif
#define NR (2 * VL) /* outputs in a panel */
#if VL == 16
#include <immintrin.h>
#endif

/* Whether the CPU multiplies bf16 itself: two inputs of 16 outputs in one instruction */
#if defined(__AVX512BF16__) && VL == 16
#define BF16_PAIRS 1
#else
#define BF16_PAIRS 0
#endif

#define INLINE static inline __attribute__((always_inline))
#define API __attribute__((visibility("default")))

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));

INLINE vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

INLINE vf splat(float x) { return x - (vf){0}; }

/* n <= VL floats, zeros behind them */
INLINE vf load_part(const float *p, long n) {
    if (n == VL) return load(p);
    float padded[VL] = {0};
    memcpy(padded, p, n * sizeof(float));
    return load(padded);
}

INLINE void store_part(float *p, vf v, long n) {
    if (n == VL) {
        store(p, v);
        return;
    }
    float padded[VL];
    store(padded, v);
    memcpy(p, padded, n * sizeof(float));
}

#if VL == 16
#define ROTATE(v, by) \
    __builtin_shufflevector(v, v, (by), (by) + 1, (by) + 2, (by) + 3, (by) + 4, (by) + 5, (by) + 6, (by) + 7, (by) + 8, \
                            (by) + 9, (by) + 10, (by) + 11, (by) + 12, (by) + 13, (by) + 14, (by) + 15)
#elif VL == 8
#define ROTATE(v, by) \
    __builtin_shufflevector(v, v, (by), (by) + 1, (by) + 2, (by) + 3, (by) + 4, (by) + 5, (by) + 6, (by) + 7)
#else
#define ROTATE(v, by) __builtin_shufflevector(v, v, (by), (by) + 1, (by) + 2, (by) + 3)
#endif

/* The first halves of two vectors in turns, and the second halves */
#if VL == 16
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif VL == 8
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#endif

/* VL vectors as rows of a square become its columns */
INLINE void transpose(vf *v) {
    vf w[VL];
#pragma GCC unroll 4
    for (int stage = 1; stage < VL; stage *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < VL / 2; i++) {
            w[2 * i] = ZIP_LOW(v[i], v[i + VL / 2]);
            w[2 * i + 1] = ZIP_HIGH(v[i], v[i + VL / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++) v[i] = w[i];
    }
}

/* n <= VL values of bf16 as float32, zeros behind them */
INLINE vf load_bf16(const uint16_t *p, long n) {
    uint16_t padded[VL] = {0};
    vh half;
    if (n < VL) p = memcpy(padded, p, n * sizeof *p);
    memcpy(&half, p, sizeof half);
#if VL == 16
    return (vf)((vu)_mm512_cvtepu16_epi32((__m256i)half) << 16);
#else
    return (vf)(__builtin_convertvector(half, vu) << 16);
#endif
}

/* n floats rounded to bf16, ties to even; NaN stays NaN */
INLINE void round_to_bf16(const float *from, long n, uint16_t *to) {
    for (long i = 0; i < n; i += VL) {
        const long left = n - i < VL ? n - i : VL;
        const vf x = load_part(from + i, left);
        vu bits = (vu)x;
        bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        bits |= (vu)(x != x) & 0x7fc0;
        const vh half = __builtin_convertvector(bits, vh);
        memcpy(to + i, &half, left * sizeof *to);
    }
}

/* The sums of VL vectors: lane i has that of v[i]; all are added in the same order */
INLINE vf sums(vf *v) {
#pragma GCC unroll 4
    for (int n = VL / 2; n; n /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) v[i] = ZIP_LOW(v[i], v[i + n]) + ZIP_HIGH(v[i], v[i + n]);
    return v[0];
}

INLINE float sum(vf v) {
#if VL >= 16
    v += ROTATE(v, 8);
#endif
#if VL >= 8
    v += ROTATE(v, 4);
#endif
    v += ROTATE(v, 2);
    v += ROTATE(v, 1);
    return v[0];
}

/* The larger and the smaller of two, `b` where either is NaN */
#if VL == 16
INLINE vf at_least(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vf at_most(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#else
INLINE vf at_least(vf a, vf b) { return (vf)(((vi)a & (a > b)) | ((vi)b & ~(a > b))); }
INLINE vf at_most(vf a, vf b) { return (vf)(((vi)a & (a < b)) | ((vi)b & ~(a < b))); }
#endif

INLINE float largest(vf v) {
    float top = v[0];
    for (int i = 1; i < VL; i++) top = v[i] > top ? v[i] : top;
    return top;
}

/* exp within 2 ulp: 2^n times a polynomial in the rest (Cephes) */
INLINE vf vexp(vf x) {
    x = at_most(at_least(x, splat(-87.33f)), splat(88.37f));
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vf n = (x * 1.44269504f + magic) - magic;
    vf r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vi exponent = __builtin_convertvector(n, vi);
    return p * (vf)((exponent + 127) << 23);
}

/* tanh within 4e-7 of itself: an odd polynomial over an even one (Eigen's), which reaches 1 at the clamped end */
INLINE vf vtanh(vf x) {
    x = at_least(at_most(x, splat(7.90531110763549805f)), splat(-7.90531110763549805f));
    const vf x2 = x * x;
    vf p = splat(-2.76076847742355e-16f);
    p = p * x2 + 2.00018790482477e-13f;
    p = p * x2 - 8.60467152213735e-11f;
    p = p * x2 + 5.12229709037114e-08f;
    p = p * x2 + 1.48572235717979e-05f;
    p = p * x2 + 6.37261928875436e-04f;
    p = p * x2 + 4.89352455891786e-03f;
    vf q = splat(1.19825839466702e-06f);
    q = q * x2 + 1.18534705686654e-04f;
    q = q * x2 + 2.26843463243900e-03f;
    q = q * x2 + 4.89352518554385e-03f;
    return x * p / q;
}

INLINE vf vsilu(vf x) { return x / (1.0f + vexp(-x)); }

INLINE vf vrelu2(vf x) {
    vf r = (vf)((vi)x & (x > (vf){0}));
    return r * r;
}

/* a . b over n floats, in two sums that don't wait for each other */
INLINE float dot(const float *a, const float *b, long n) {
    vf even = {0}, odd = {0};
    long i = 0;
    for (; i + 2 * VL <= n; i += 2 * VL) {
        even += load(a + i) * load(b + i);
        odd += load(a + i + VL) * load(b + i + VL);
    }
    for (; i < n; i += VL) {
        const long left = n - i < VL ? n - i : VL;
        even += load_part(a + i, left) * load_part(b + i, left);
    }
    return sum(even + odd);
}

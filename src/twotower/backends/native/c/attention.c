#include "kernels.h"

/* x (b, s, heads, p; strides in floats) with its halves rotated by cos, sin (b or 1, s, p/2) to out (b, s, heads, p) */
void tt_rotate(const float *x, long batch, long token, const float *cosine, const float *sine, long angle_batch,
                   long b, long s, long heads, long p, float *out) {
    const long half = p / 2;
    for (long item = 0; item < b * s; item++) {
        const long row = item / s, t = item % s;
        const float *c = cosine + row * angle_batch + t * half, *d = sine + row * angle_batch + t * half;
        for (long head = 0; head < heads; head++) {
            const float *a = x + row * batch + t * token + head * p;
            float *o = out + (item * heads + head) * p;
            for (long i = 0; i < half; i++) {
                o[i] = a[i] * c[i] - a[half + i] * d[i];
                o[half + i] = a[half + i] * c[i] + a[i] * d[i];
            }
        }
    }
}

typedef struct {
    const float *key, *value;    /* of one head, rows of p floats */
    long key_token, value_token; /* distances of the rows in floats */
    long count;                  /* how many of them the query sees */
} Segment;

static float scores(const float *q, float scale, const Segment *seg, long p, float *out, float top) {
    for (long j = 0; j < seg->count; j++) {
        out[j] = dot(q, seg->key + j * seg->key_token, p) * scale;
        top = out[j] > top ? out[j] : top;
    }
    return top;
}

/* `nv` vectors of the output, from float `first` on */
INLINE void mix(const Segment *seg, long num, const float *weights, float inverse, long first, int nv, float *out) {
    vf acc[8];
#pragma GCC unroll 8
    for (int v = 0; v < nv; v++) acc[v] = (vf){0};
    for (long k = 0; k < num; k++)
        for (long j = 0; j < seg[k].count; j++) {
            const float w = *weights++;
            const float *value = seg[k].value + j * seg[k].value_token + first;
#pragma GCC unroll 8
            for (int v = 0; v < nv; v++) acc[v] += load(value + v * VL) * w;
        }
#pragma GCC unroll 8
    for (int v = 0; v < nv; v++) store(out + first + v * VL, acc[v] * inverse);
}

static void attend(const float *q, float scale, const Segment *seg, long num, long p, float *room, float *out) {
    float top = -INFINITY;
    long total = 0;
    for (long k = 0; k < num; k++) {
        top = scores(q, scale, seg + k, p, room + total, top);
        total += seg[k].count;
    }
    vf mass = {0};
    for (long j = 0; j < total; j += VL) {
        const long n = total - j < VL ? total - j : VL;
        vf e = vexp(load_part(room + j, n) - top);
        store_part(room + j, e, n);
        mass += load_part(room + j, n);
    }
    const float inverse = 1.0f / sum(mass);
    long first = 0;
    for (; first + 8 * VL <= p; first += 8 * VL) mix(seg, num, room, inverse, first, 8, out);
    for (; first + 2 * VL <= p; first += 2 * VL) mix(seg, num, room, inverse, first, 2, out);
    for (; first + VL <= p; first += VL) mix(seg, num, room, inverse, first, 1, out);
    for (; first < p; first++) {
        const float *w = room;
        float acc = 0;
        for (long k = 0; k < num; k++)
            for (long j = 0; j < seg[k].count; j++) acc += seg[k].value[j * seg[k].value_token + first] * *w++;
        out[first] = acc * inverse;
    }
}

/* Queries (b, s, h, p) over past keys and values (b, kv heads, t, p) and, unless null, a block's own (b, s, kv heads, p);
 * all by strides in floats, p dense. Row b sees starts[b] of the past, i + 1 more where causal (query i; the past then
 * holds the new tokens too), and ends[b] of its own block. With `pages` (b, num_pages) the past is (n, kv heads, size, p)
 * and row b's lies in the entries pages[b], one after the other. out (b, s, h, p). */
int tt_attention(const float *q, long q_batch, long q_token, const float *past_key, const float *past_value,
                      long past_batch, long past_head, long past_token, const int64_t *pages, long num_pages, long size,
                      const float *key, long key_batch, long key_token, const float *value, long value_batch,
                      long value_token, const int64_t *starts, const int64_t *ends, int causal, float scale, long b,
                      long s, long h, long kv, long p, float *out, int threads) {
    long longest = 0;
    int failed = 0;
    for (long row = 0; row < b; row++) longest = starts[row] > longest ? starts[row] : longest;
#pragma omp parallel num_threads(threads) if (threads > 1 && b * s * h * longest * p >= 65536)
    {
        float *room = malloc((longest + s) * sizeof(float));
        Segment *seg = malloc((num_pages + 2) * sizeof(Segment));
        const int ready = room && seg;
        if (!ready) FAIL(failed);
#pragma omp for
        for (long item = 0; item < b * h * s; item++) {
            if (!ready) continue;
            const long row = item / (h * s), head = item / s % h, i = item % s, group = head / (h / kv);
            const long seen = starts[row] + (causal ? i + 1 : 0);
            long num = 0;
            for (long first = 0; first < seen; first += pages ? size : seen, num++) {
                const long entry = pages ? pages[row * num_pages + num] : row;
                const long past = entry * past_batch + group * past_head;
                const long count = pages && seen - first > size ? size : seen - first;
                seg[num] = (Segment){past_key + past, past_value + past, past_token, past_token, count};
            }
            if (!causal)
                seg[num++] = (Segment){key + row * key_batch + group * p, value + row * value_batch + group * p,
                                       key_token, value_token, ends[row]};
            attend(q + row * q_batch + i * q_token + head * p, scale, seg, num, p, room,
                   out + ((row * s + i) * h + head) * p);
        }
        free(room);
        free(seg);
    }
    return failed;
}

#include "attention.h"

/* x (b, s, heads, p; strides in floats) to out (b, s, heads, p): the first `turned` of p rotated, halves paired, by cos,
 * sin (b or 1, s, turned/2), and the others as they are */
API void tt_rotate(const float *x, long batch, long token, const float *cosine, const float *sine, long angle_batch, long b,
                   long s, long heads, long p, long turned, float *out) {
    const long half = turned / 2;
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
            memcpy(o + turned, a + turned, (p - turned) * sizeof(float));
        }
    }
}

typedef struct {
    const float *key, *value;    /* of one head, rows of p floats */
    long key_token, value_token; /* distances of the rows in floats */
    long count;                  /* how many of them the query sees */
} Segment;

static long segments(const AttentionPass *in, Span span, long row, long group, Segment *seg) {
    const long end = in->causal || span.to < in->starts[row] ? span.to : in->starts[row]; /* of the past */
    long num = 0;
    for (long first = span.from, last; first < end; first = last, num++) {
        const long entry = in->pages ? first / in->page_size : 0;
        last = in->pages && (entry + 1) * in->page_size < end ? (entry + 1) * in->page_size : end;
        const long past = (in->pages ? in->pages[row * in->num_pages + entry] : row) * in->past_batch +
                          group * in->past_head + (first - entry * in->page_size) * in->past_token;
        seg[num] = (Segment){(const float *)in->past_key + past, (const float *)in->past_value + past, in->past_token, in->past_token, last - first};
    }
    const long first = span.from > end ? span.from - end : 0;
    if (span.to > end + first)
        seg[num++] = (Segment){in->key + row * in->key_batch + first * in->key_token + group * in->p,
                               in->value + row * in->value_batch + first * in->value_token + group * in->p, in->key_token,
                               in->value_token, span.to - end - first};
    return num;
}

/* q . key of VL keys: lane i has that of key i. A key's sum has the same order wherever the key stands, because pages divide
 * keys otherwise than a buffer does. */
INLINE vf score_keys(const float *q, const float *const *key, long p) {
    vf acc[VL];
#pragma GCC unroll 16
    for (int m = 0; m < VL; m++) acc[m] = (vf){0};
    long i = 0;
    for (; i + VL <= p; i += VL) {
        const vf x = load(q + i);
#pragma GCC unroll 16
        for (int m = 0; m < VL; m++) acc[m] += x * load(key[m] + i);
    }
    if (i < p) {
        const vf x = load_part(q + i, p - i);
        for (int m = 0; m < VL; m++) acc[m] += x * load_part(key[m] + i, p - i);
    }
    return sums(acc);
}

/* Each key's score to `out`, scaled, and in `top` lane by lane the largest so far */
static vf scores(const float *q, float scale, const Segment *seg, long p, float *out, vf top) {
    for (long j = 0; j < seg->count; j += VL) {
        const long n = seg->count - j < VL ? seg->count - j : VL;
        const float *key[VL]; /* behind the last one that again, which changes no largest score */
        for (int m = 0; m < VL; m++) key[m] = seg->key + (j + (m < n ? m : n - 1)) * seg->key_token;
        const vf s = scale * score_keys(q, key, p);
        store_part(out + j, s, n);
        top = at_least(s, top);
    }
    return top;
}

/* Scores of n keys side by side less slope * |distance|, where the query is `ahead` of the first; the largest of them */
static float lean(float *scores, long n, float slope, long ahead) {
    float top = -INFINITY;
    for (long j = 0; j < n; j++) {
        scores[j] -= slope * (float)labs(ahead - j);
        top = scores[j] > top ? scores[j] : top;
    }
    return top;
}

INLINE void add_value(vf *acc, const float *value, float weight, int nv) {
#pragma GCC unroll 4
    for (int v = 0; v < nv; v++) acc[v] += load(value + v * VL) * weight;
}

/* `nv` vectors of the output, from float `first` on: keys at even places and at odd ones add up apart, so that sums need not
 * wait for each other */
INLINE void mix(const Segment *seg, long num, const float *weights, float inverse, long first, int nv, float *out) {
    vf even[4], odd[4];
#pragma GCC unroll 4
    for (int v = 0; v < nv; v++) even[v] = odd[v] = (vf){0};
    long place = 0;
    for (; num; num--, seg++) {
        const float *value = seg->value + first;
        const long end = place + seg->count, token = seg->value_token;
        if (place % 2 && place < end) {
            add_value(odd, value, weights[place++], nv);
            value += token;
        }
        for (; place + 2 <= end; place += 2, value += 2 * token) {
            add_value(even, value, weights[place], nv);
            add_value(odd, value + token, weights[place + 1], nv);
        }
        if (place < end) add_value(even, value, weights[place++], nv);
    }
#pragma GCC unroll 4
    for (int v = 0; v < nv; v++) store(out + first + v * VL, (even[v] + odd[v]) * inverse);
}

/* A query of a head, `ahead` of the first key that it sees */
static void attend(const float *q, const AttentionOptions *how, long head, long ahead, const Segment *seg, long num, long p,
                   float *room, float *out) {
    const float *sink = how->sinks ? how->sinks + head : 0;
    vf tops = splat(-INFINITY);
    long total = 0;
    for (long k = 0; k < num; k++) {
        tops = scores(q, how->scale, seg + k, p, room + total, tops);
        total += seg[k].count;
    }
    if (total == 0) { /* padding behind a block, far from its keys: nobody reads it, but it must be finite */
        memset(out, 0, p * sizeof(float));
        return;
    }
    float top = largest(tops);
    if (how->softcap) {
        for (long j = 0; j < total; j += VL) {
            const long n = total - j < VL ? total - j : VL;
            store_part(room + j, how->softcap * vtanh(load_part(room + j, n) / how->softcap), n);
        }
        top = how->softcap * vtanh(splat(top / how->softcap))[0];
    }
    if (how->slopes) top = lean(room, total, how->slopes[head], ahead);
    if (sink && *sink > top) top = *sink;
    vf mass = {0};
    for (long j = 0; j < total; j += VL) {
        const long n = total - j < VL ? total - j : VL;
        vf e = vexp(load_part(room + j, n) - top);
        store_part(room + j, e, n);
        mass += load_part(room + j, n);
    }
    const float inverse = 1.0f / (sum(mass) + (sink ? vexp(splat(*sink - top))[0] : 0));
    long first = 0;
    for (; first + 4 * VL <= p; first += 4 * VL) mix(seg, num, room, inverse, first, 4, out);
    if (first + 3 * VL <= p) mix(seg, num, room, inverse, first, 3, out), first += 3 * VL;
    if (first + 2 * VL <= p) mix(seg, num, room, inverse, first, 2, out), first += 2 * VL;
    if (first + VL <= p) mix(seg, num, room, inverse, first, 1, out), first += VL;
    for (; first < p; first++) {
        const float *w = room;
        float acc = 0;
        for (long k = 0; k < num; k++)
            for (long j = 0; j < seg[k].count; j++) acc += seg[k].value[j * seg[k].value_token + first] * *w++;
        out[first] = acc * inverse;
    }
}

typedef struct {
    const AttentionPass *in;
    const AttentionOptions *how;
    float *room; /* of each thread (FEW + 1) */
    Segment *segments; /* of each thread (num_pages + 2) */
} Alone;

static void attend_some(void *job, long from, long to, int slot) {
    const AttentionPass *in = ((Alone *)job)->in;
    const AttentionOptions *how = ((Alone *)job)->how;
    const long s = in->s, h = in->heads, p = in->p;
    float *room = ((Alone *)job)->room + slot * (FEW + 1);
    Segment *seg = ((Alone *)job)->segments + slot * (in->num_pages + 2);
    for (long item = from; item < to; item++) {
        const long row = item / (h * s), head = item / s % h, i = item % s, group = head / (h / in->kv_heads);
        const Span span = seen(in, how, row, i);
        if (is_tiled(in, span)) continue;
        const long num = segments(in, span, row, group, seg);
        attend(in->query + row * in->query_batch + i * in->query_token + head * p, how, head, in->starts[row] + i - span.from,
               seg, num, p, room, in->out + ((row * s + i) * h + head) * p);
    }
}

static int attend_alone(const AttentionPass *in, const AttentionOptions *how, long longest) {
    const long items = in->b * in->s * in->heads, threads = items * longest * in->p >= 65536 ? in->threads : 1;
    Alone job = {in, how, malloc(threads * (FEW + 1) * sizeof(float)), malloc(threads * (in->num_pages + 2) * sizeof(Segment))};
    const int failed = !job.room || !job.segments;
    if (!failed) in_parallel(attend_some, &job, items, 1, (int)threads);
    free(job.room);
    free(job.segments);
    return failed;
}

API int tt_attention(const AttentionPass *in, const AttentionOptions *how) {
    long longest = 0, alone = 0, tiled = 0;
    for (long row = 0; row < in->b; row++) {
        longest = in->starts[row] > longest ? in->starts[row] : longest;
        for (long i = 0; i < in->s; i++) is_tiled(in, seen(in, how, row, i)) ? tiled++ : alone++;
    }
    return (alone && attend_alone(in, how, longest)) || (tiled && attend_in_tiles(in, how));
}

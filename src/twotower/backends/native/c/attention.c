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

static float scores(const float *q, float scale, const Segment *seg, long p, float *out, float top) {
    for (long j = 0; j < seg->count; j++) {
        out[j] = dot(q, seg->key + j * seg->key_token, p) * scale;
        top = out[j] > top ? out[j] : top;
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

/* A query of a head, `ahead` of the first key that it sees */
static void attend(const float *q, const AttentionOptions *how, long head, long ahead, const Segment *seg, long num, long p,
                   float *room, float *out) {
    const float *sink = how->sinks ? how->sinks + head : 0;
    float top = -INFINITY;
    long total = 0;
    for (long k = 0; k < num; k++) {
        top = scores(q, how->scale, seg + k, p, room + total, top);
        total += seg[k].count;
    }
    if (total == 0) { /* padding behind a block, far from its keys: nobody reads it, but it must be finite */
        memset(out, 0, p * sizeof(float));
        return;
    }
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

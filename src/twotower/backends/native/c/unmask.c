#include "calls.h"
#include "parallel.h"

/* So many terms are summed in float, and these sums in double: then 131,072 terms lose no more than 64 do */
#define SPAN (64 * VL)

INLINE vf load_filled(const float *p, long n, float fill) {
    if (n == VL) return load(p);
    vf v = splat(fill);
    memcpy(&v, p, n * sizeof(float));
    return v;
}

static float maximum(const float *x, long v) {
    vf most = splat(-INFINITY);
    vi strange = {0};
    for (long i = 0; i < v; i += VL) {
        const vf next = load_filled(x + i, v - i < VL ? v - i : VL, -INFINITY);
        const vi more = next > most;
        most = (vf)(((vi)next & more) | ((vi)most & ~more));
        strange |= next != next;
    }
    float found = most[0];
    for (int i = 0; i < VL; i++) {
        if (most[i] > found) found = most[i];
        if (strange[i]) return NAN;
    }
    return found;
}

typedef struct {
    const float *logits;
    long v;
    int64_t *tokens;
    float *p, *log_sum;
} Finding;

static void find_best(void *job, long from, long to, int slot) {
    const Finding *in = job;
    const long v = in->v;
    (void)slot;
    for (long m = from; m < to; m++) {
        const float *x = in->logits + m * v;
        const float most = maximum(x, v);
        long at = 0;
        while (at < v && x[at] != most && (most == most || x[at] == x[at])) at++;
        in->tokens[m] = at;
        if (!in->p) continue;
        in->log_sum[m] = most;
        in->p[m] = NAN;
        if (!isfinite(most)) continue; /* -inf, inf and NaN are their own log of the sum */
        double total = 0;
        for (long start = 0; start < v; start += SPAN) {
            const long end = v - start < SPAN ? v : start + SPAN;
            vf part = {0};
            for (long i = start; i < end; i += VL) part += vexp(load_filled(x + i, end - i < VL ? end - i : VL, -INFINITY) - most);
            total += sum(part);
        }
        in->log_sum[m] = most + (float)log(total);
        in->p[m] = (float)(1.0 / total);
    }
}

/* Of each of r rows of v logits: the place of the first of the largest ones; unless `p` is null also its probability and
 * the log of the sum of all exp */
API void tt_best(const float *logits, long r, long v, int64_t *tokens, float *p, float *log_sum, int threads) {
    Finding job = {logits, v, tokens, p, log_sum};
    in_parallel(find_best, &job, r, 1, r * v >= 65536 ? threads : 1);
}

typedef struct {
    const float *logits;
    long v;
    float *entropy;
} Spread;

/* With d = x - max: H = log Σ exp(d) - Σ d·exp(d) / Σ exp(d) */
static void find_entropy(void *job, long from, long to, int slot) {
    const Spread *in = job;
    const long v = in->v;
    (void)slot;
    for (long m = from; m < to; m++) {
        const float *x = in->logits + m * v;
        const float most = maximum(x, v);
        if (!isfinite(most)) {
            in->entropy[m] = NAN;
            continue;
        }
        const vf least = splat(-104); /* exp(-104) is 0 in float, so that 0·log 0 = 0 */
        double total = 0, weighted = 0;
        for (long start = 0; start < v; start += SPAN) {
            const long end = v - start < SPAN ? v : start + SPAN;
            vf part = {0}, turned = {0};
            for (long i = start; i < end; i += VL) {
                const vf d = load_filled(x + i, end - i < VL ? end - i : VL, -INFINITY) - most;
                const vi some = d > least;
                const vf kept = (vf)(((vi)d & some) | ((vi)least & ~some));
                const vf p = vexp(kept);
                part += p;
                turned += p * kept;
            }
            total += sum(part);
            weighted += sum(turned);
        }
        const double found = log(total) - weighted / total;
        in->entropy[m] = found > 0 ? (float)found : 0;
    }
}

/* Of each of r rows of v logits: the entropy of their softmax */
API void tt_entropy(const float *logits, long r, long v, float *entropy, int threads) {
    Spread job = {logits, v, entropy};
    in_parallel(find_entropy, &job, r, 1, r * v >= 65536 ? threads : 1);
}

typedef struct {
    float sure;
    int place;
} Candidate;

/* The surest first, the earlier of equals; NaN comes before all numbers, as PyTorch sorts it. */
static int surer(const void *one, const void *other) {
    const Candidate *a = one, *b = other;
    const int strange = (b->sure != b->sure) - (a->sure != a->sure);
    if (strange) return strange;
    if (a->sure != b->sure && a->sure == a->sure) return a->sure < b->sure ? 1 : -1;
    return a->place - b->place;
}

/* Which masked places (b, s) commit; `threshold` and `bound` may be null */
API int tt_commit(const float *sure, const uint8_t *masked, const int64_t *left, const float *threshold,
                  const float *bound, int leftmost, long b, long s, uint8_t *out) {
    Candidate *room = malloc(s * sizeof *room);
    if (!room) return 1;
    for (long row = 0; row < b; row++) {
        const float *own = sure + row * s;
        long remaining = 0, above = 0;
        for (long i = 0; i < s; i++) {
            out[row * s + i] = 0;
            if (!masked[row * s + i]) continue;
            above += threshold && own[i] > threshold[row];
            room[remaining++] = (Candidate){own[i], i};
        }
        const long share = left[row] > 1 ? left[row] : 1;
        long wanted = (remaining + share - 1) / share;
        if (wanted < above) wanted = above;
        if (bound) {
            double doubts = 0;
            long allowed = 0;
            qsort(room, remaining, sizeof *room, surer);
            while (allowed < remaining && doubts <= bound[row]) doubts -= room[allowed++].sure;
            if (wanted < allowed) wanted = allowed;
        }
        if (left[row] <= 1) wanted = remaining;
        if (wanted < 1) wanted = 1;
        if (wanted > remaining) wanted = remaining;
        if (!leftmost && wanted < remaining) qsort(room, remaining, sizeof *room, surer);
        if (leftmost)
            for (long i = 0; wanted > 0; i++) wanted -= out[row * s + i] = masked[row * s + i];
        else
            for (long i = 0; i < wanted; i++) out[row * s + room[i].place] = 1;
    }
    free(room);
    return 0;
}

/* A block's ids, masks, confidences and steps (b, s) after a step in which the places `fixed` have their tokens */
API void tt_fix(const int64_t *xt, const uint8_t *masked, const float *confidence, const int64_t *committed_at,
                const uint8_t *valid, const uint8_t *fixed, const int64_t *tokens, const float *proposed,
                const int64_t *step, int64_t mask_token_id, long b, long s, int64_t *xt_out, uint8_t *masked_out,
                float *confidence_out, int64_t *committed_out) {
    for (long i = 0; i < b * s; i++) {
        const int new = fixed[i] && masked[i], open = valid[i] && !fixed[i];
        xt_out[i] = !fixed[i] ? mask_token_id : masked[i] ? tokens[i] : xt[i];
        masked_out[i] = open;
        confidence_out[i] = open ? 0 : new ? proposed[i] : confidence[i];
        committed_out[i] = new ? step[i / s] : committed_at[i];
    }
}

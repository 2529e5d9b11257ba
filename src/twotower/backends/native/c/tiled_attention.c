/* Attention of queries that see many keys: tiles of them by tiles of KEYS places, each as two products, scores and then a
 * mixture of values. All queries and heads that share a KV head share a tile. Where the CPU multiplies bf16 itself and the
 * cache holds it, the products read keys and values as they lie (pairs.c, and amx_attention.c where the CPU has matrix
 * tiles); otherwise these are packed as weights are, and the products are those of linear.h.
 *
 * Tile t holds places [t KEYS, (t + 1) KEYS), whoever sees them. Of each, a query has the largest score m, the mass
 * l = Σ exp(score - m) and Σ exp(score - m) value, and it merges them in order (the online softmax, arXiv 1805.02867). A
 * place that a query doesn't see has the weight 0, which changes no bit of a sum: so its results depend on neither the
 * other queries of its tile nor on how the tiles are shared out to threads.
 */
#include "attention.h"
#include "linear.h"
#include "tiles.h"

#include <stdatomic.h>

/* Floats, or pairs of bf16 with zeros behind them, of a query */
static long query_width(const Plan *plan) { return plan->pairs ? ((plan->in->p + 1) / 2 + VL - 1) / VL * VL : plan->in->p; }

/* The lanes of tile `index` and their queries, rounded where products go by pairs */
static void gather_queries(const Plan *plan, long index, Tile *tile) {
    const AttentionPass *in = plan->in;
    const long per_row = (in->s + plan->queries - 1) / plan->queries, share = in->heads / in->kv_heads;
    const long width = query_width(plan), first = index % per_row * plan->queries;
    tile->group = index / per_row % in->kv_heads;
    tile->row = index / per_row / in->kv_heads;
    tile->num_lanes = 0;
    for (long i = first; i < in->s && i < first + plan->queries; i++) {
        const Span span = seen(in, plan->how, tile->row, i);
        if (!is_tiled(in, span)) continue;
        for (long head = tile->group * share; head < (tile->group + 1) * share; head++) {
            float *to = tile->query + tile->num_lanes * width;
            const float *query = in->query + tile->row * in->query_batch + i * in->query_token + head * in->p;
#if BF16_PAIRS
            if (plan->pairs) {
                memset(to, 0, width * sizeof *to);
                round_pairs(query, in->p, to);
            } else
#endif
                memcpy(to, query, in->p * sizeof(float));
            tile->lanes[tile->num_lanes++] = (Lane){i, head, span};
        }
    }
}

/* The keys, or the values, of places [from, to) of the tile's row and group */
static void list_rows(const Plan *plan, const Tile *tile, int values, long from, long to, const void **rows) {
    const AttentionPass *in = plan->in;
    const long size = in->bf16 ? 2 : 4, past = in->causal ? to : in->starts[tile->row];
    for (long j = from, last; j < to; j = last) {
        const char *row;
        long step = size * in->past_token;
        if (j >= past) {
            last = to;
            step = plan->own_token[values];
            row = (values ? plan->own_value : plan->own_key) + tile->row * plan->own_batch[values] + (j - past) * step +
                  size * tile->group * in->p;
        } else {
            const long page = in->pages ? j / in->page_size : 0, end = to < past ? to : past;
            const long entry = in->pages ? in->pages[tile->row * in->num_pages + page] : tile->row;
            last = in->pages && (page + 1) * in->page_size < end ? (page + 1) * in->page_size : end;
            row = (const char *)(values ? in->past_value : in->past_key) + (j - page * in->page_size) * step +
                  size * (entry * in->past_batch + tile->group * in->past_head);
        }
        for (; j < last; j++, row += step) *rows++ = row;
    }
}

/* Where keys and values of places [base, end) lie, zeros outside of [from, to), and the keys behind them */
static void find_rows(const Plan *plan, long base, long from, long to, long end, Tile *tile) {
    const AttentionPass *in = plan->in;
    const long n = end - base, all = in->starts[tile->row] + (in->causal ? in->s : in->ends[tile->row]);
    tile->value = tile->key + n;
    for (long j = 0; j < from - base; j++) tile->key[j] = tile->value[j] = tile->zeros;
    for (long j = to - base; j < n; j++) tile->key[j] = tile->value[j] = tile->zeros;
    for (long j = 0; j < AHEAD; j++) tile->value[n + j] = tile->zeros;
    list_rows(plan, tile, 0, from, to, tile->key + from - base);
    list_rows(plan, tile, 1, from, to, tile->value + from - base);
    list_rows(plan, tile, 0, end, end + AHEAD < all ? end + AHEAD : all, tile->value + n);
}

INLINE vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }

/* A lane's scores become weights, zeros outside of [from, to) of n; returns the mass and the largest score. The query is
 * `ahead` of the first place, and `slope` is ALiBi's or 0. */
static void weigh(float *scores, long n, long from, long to, const AttentionOptions *how, float slope, long ahead, float *mass,
                  float *top) {
    const long first = from / VL * VL, last = (to + VL - 1) / VL * VL;
    vi place;
    for (int i = 0; i < VL; i++) place[i] = i;
    vf best = splat(-INFINITY), all = {0};
    for (long j = first; j < last; j += VL) {
        vf x = load(scores + j) * how->scale;
        if (how->softcap) x = how->softcap * vtanh(x / how->softcap);
        if (slope != 0) x -= slope * magnitude((float)(ahead - j) - __builtin_convertvector(place, vf));
        if (j < from || j + VL > to) {
            const vi is = (place + (int)j >= (int)from) & (place + (int)j < (int)to);
            x = (vf)(((vi)x & is) | ((vi)splat(-INFINITY) & ~is));
        }
        best = at_least(best, x);
        store(scores + j, x);
    }
    *top = largest(best);
    for (long j = first; j < last; j += VL) {
        vf e = vexp(load(scores + j) - *top);
        if (j < from || j + VL > to)
            e = (vf)((vi)e & (place + (int)j >= (int)from) & (place + (int)j < (int)to));
        all += e;
        store(scores + j, e);
    }
    memset(scores, 0, first * sizeof(float));
    memset(scores + last, 0, (n - last) * sizeof(float));
    *mass = sum(all);
}

/* Each lane's scores of the tile's n places */
static void score(const Plan *plan, Tile *tile, long n) {
    const long p = plan->in->p, lanes = tile->num_lanes;
#if BF16_PAIRS
    if (plan->pairs) {
        score_pairs((const int32_t *)tile->query, query_width(plan), lanes, tile->key, n, p, tile->scores, KEYS);
        return;
    }
#endif
    float **out = (float **)tile->rows + lanes;
    for (long m = 0; m < lanes; m++) {
        tile->rows[m] = tile->query + m * p;
        out[m] = tile->scores + m * KEYS;
    }
    PACK(pack_keys, plan, tile, n);
    const Weight keys = {tile->keys, n, p, 0};
    panels(&keys, 0, n / NR, (const void *const *)tile->rows, out, lanes, 0, 0);
}

/* Each lane's mixture of the values, weighted by what its scores became */
static void mix(const Plan *plan, Tile *tile, long n, float *parts) {
    const long p = plan->in->p, lanes = tile->num_lanes;
#if BF16_PAIRS
    if (plan->pairs) {
        for (long m = 0; m < lanes; m++) round_pairs(tile->scores + m * KEYS, n, tile->scores + m * KEYS);
        mix_pairs(tile->scores, KEYS, lanes, tile->value, n, p, parts, p + 2);
        return;
    }
#endif
    float **out = (float **)tile->rows + lanes;
    for (long m = 0; m < lanes; m++) {
        tile->rows[m] = tile->scores + m * KEYS;
        out[m] = parts + m * (p + 2);
    }
    PACK(pack_values, plan, tile, n);
    const Weight values = {tile->values, p, n, 0};
    panels(&values, 0, num_panels(&values), (const void *const *)tile->rows, out, lanes, 0, 0);
}

/* What each lane has of tile `index` of keys, in parts of p + 2 floats */
static void attend_to(const Plan *plan, Tile *tile, long index, float *parts) {
    const long p = plan->in->p, lanes = tile->num_lanes;
    const long low = index * KEYS, high = low + KEYS;
    const float *slopes = plan->how->slopes;
    long from = high, to = low;
    for (long m = 0; m < lanes; m++) {
        const Span span = tile->lanes[m].span;
        const long first = span.from > low ? span.from : low, last = span.to < high ? span.to : high;
        parts[m * (p + 2) + p] = 0; /* no mass */
        if (first >= last) continue;
        from = first < from ? first : from;
        to = last > to ? last : to;
    }
    if (from >= to) return;
    const long base = from / NR * NR, end = (to + NR - 1) / NR * NR, n = end - base;
    find_rows(plan, base, from, to, end, tile);
    score(plan, tile, n);
    for (long m = 0; m < lanes; m++) {
        const Span span = tile->lanes[m].span;
        const long first = span.from > base ? span.from - base : 0, last = span.to < end ? span.to - base : n;
        float *scores = tile->scores + m * KEYS, *part = parts + m * (p + 2);
        if (first < last)
            weigh(scores, n, first, last, plan->how, slopes ? slopes[tile->lanes[m].head] : 0,
                  plan->in->starts[tile->row] + tile->lanes[m].query - base, part + p, part + p + 1);
        else
            memset(scores, 0, n * sizeof(float));
    }
    mix(plan, tile, n, parts);
}

/* Adds what a lane has of one more tile to what it has. A function of its own: two copies might be rounded differently. */
static __attribute__((noinline)) void merge(const float *part, long p, float *total) {
    if (part[p] == 0) return;
    if (total[p] == 0) {
        memcpy(total, part, (p + 2) * sizeof(float));
        return;
    }
    const float top = part[p + 1] > total[p + 1] ? part[p + 1] : total[p + 1];
    const vf before = vexp(splat(total[p + 1] - top)), now = vexp(splat(part[p + 1] - top));
    for (long i = 0; i < p; i += VL) {
        const long n = p - i < VL ? p - i : VL;
        const vf later = load_part(part + i, n) * now;
        store_part(total + i, load_part(total + i, n) * before + later, n);
    }
    total[p] = total[p] * before[0] + part[p] * now[0];
    total[p + 1] = top;
}

static void finish(const Plan *plan, long row, const Lane *lane, const float *total) {
    const AttentionPass *in = plan->in;
    float *out = in->out + ((row * in->s + lane->query) * in->heads + lane->head) * in->p;
    float mass = total[in->p], share = 1;
    if (plan->how->sinks) {
        const float sink = plan->how->sinks[lane->head], top = total[in->p + 1] > sink ? total[in->p + 1] : sink;
        share = vexp(splat(total[in->p + 1] - top))[0];
        mass = mass * share + vexp(splat(sink - top))[0];
    }
    const float inverse = total[in->p] == 0 ? 0 : share / mass; /* without any key it is padding, but must be finite */
    for (long i = 0; i < in->p; i++) out[i] = inverse == 0 ? 0 : total[i] * inverse;
}

/* A tile's room, in one piece that `tile->query` points to; 0 without memory */
static int take_room(const Plan *plan, Tile *tile) {
    const long lanes = plan->queries * (plan->in->heads / plan->in->kv_heads), p = plan->in->p, width = query_width(plan);
    const long wide = (p + NR - 1) / NR * NR;
    const long floats = p + lanes * (width + KEYS + 2 * (p + 2)) + (plan->pairs ? 0 : KEYS * (p + wide));
    tile->query = malloc(floats * sizeof(float) + lanes * (sizeof(Lane) + 2 * sizeof(float *)));
    if (!tile->query) return 0;
    tile->lanes = (Lane *)(tile->query + lanes * width);
    tile->rows = (const float **)(tile->lanes + lanes);
    tile->keys = (float *)(tile->rows + 2 * lanes);
    tile->values = tile->keys + (plan->pairs ? 0 : KEYS * p);
    tile->scores = tile->values + (plan->pairs ? 0 : KEYS * wide);
    tile->part = tile->scores + lanes * KEYS;
    tile->total = tile->part + lanes * (p + 2);
    tile->zeros = memset(tile->total + lanes * (p + 2), 0, p * sizeof(float));
    return 1;
}

/* Lane by lane, what `parts` has of some tiles of keys, each `step` floats behind the one before */
static void merge_parts(const Plan *plan, Tile *tile, const float *parts, long num, long step) {
    const long p = plan->in->p;
    for (long m = 0; m < tile->num_lanes; m++)
        for (long i = 0; i < num; i++) merge(parts + i * step + m * (p + 2), p, tile->total + m * (p + 2));
}

static void begin_tile(const Plan *plan, long index, Tile *tile) {
    gather_queries(plan, index, tile);
    for (long m = 0; m < tile->num_lanes; m++) tile->total[m * (plan->in->p + 2) + plan->in->p] = 0;
}

static void finish_tile(const Plan *plan, const Tile *tile) {
    for (long m = 0; m < tile->num_lanes; m++)
        finish(plan, tile->row, tile->lanes + m, tile->total + m * (plan->in->p + 2));
}

/* A block's own keys and values in the cache's type; returns their memory, if they take any */
static int find_own(Plan *plan, uint16_t **rounded) {
    const AttentionPass *in = plan->in;
    const long width = in->kv_heads * in->p, rows = in->b * in->s;
    *rounded = 0;
    plan->own_key = (const char *)in->key;
    plan->own_value = (const char *)in->value;
    plan->own_batch[0] = in->key_batch * 4, plan->own_token[0] = in->key_token * 4;
    plan->own_batch[1] = in->value_batch * 4, plan->own_token[1] = in->value_token * 4;
    if (in->causal || !in->bf16) return 1;
    uint16_t *to = *rounded = malloc(2 * rows * width * sizeof *to);
    if (!to) return 0;
    for (long m = 0; m < rows; m++) {
        const long row = m / in->s, i = m % in->s;
        round_to_bf16(in->key + row * in->key_batch + i * in->key_token, width, to + m * width);
        round_to_bf16(in->value + row * in->value_batch + i * in->value_token, width, to + (rows + m) * width);
    }
    plan->own_key = (const char *)to;
    plan->own_value = (const char *)(to + rows * width);
    for (int i = 0; i < 2; i++) plan->own_batch[i] = in->s * width * 2, plan->own_token[i] = width * 2;
    return 1;
}

typedef struct {
    const Plan *plan;
    Tile *tiles; /* of each thread; without room until it takes part */
    float *kept; /* parts of every tile of keys, each `step` floats behind the one before; null where they are merged at once */
    long step;
    atomic_int failed;
} Tiles;

/* The thread's tile, with room; null where there is no memory */
static Tile *own_tile(Tiles *job, int slot) {
    Tile *tile = job->tiles + slot;
    if (tile->query || take_room(job->plan, tile)) return tile;
    job->failed = 1;
    return 0;
}

/* Tiles of queries, or where `kept`, of queries and keys */
static void attend_some_tiles(void *work, long from, long to, int slot) {
    Tiles *job = work;
    const Plan *plan = job->plan;
    Tile *tile = own_tile(job, slot);
    for (long item = from; tile && item < to; item++) {
        if (job->kept) {
            gather_queries(plan, item / plan->key_tiles, tile);
            attend_to(plan, tile, item % plan->key_tiles, job->kept + item * job->step);
            continue;
        }
        begin_tile(plan, item, tile);
        for (long t = 0; t < plan->key_tiles; t++) {
            attend_to(plan, tile, t, tile->part);
            merge_parts(plan, tile, tile->part, 1, 0);
        }
        finish_tile(plan, tile);
    }
}

static void merge_some_tiles(void *work, long from, long to, int slot) {
    Tiles *job = work;
    const Plan *plan = job->plan;
    Tile *tile = own_tile(job, slot);
    for (long item = from; tile && item < to; item++) {
        begin_tile(plan, item, tile);
        merge_parts(plan, tile, job->kept + item * plan->key_tiles * job->step, plan->key_tiles, job->step);
        finish_tile(plan, tile);
    }
}

int attend_in_tiles(const AttentionPass *in, const AttentionOptions *how) {
    const long share = in->heads / in->kv_heads;
    Plan plan = {.in = in, .how = how, .pairs = in->bf16 && BF16_PAIRS};
    plan.queries = share < LANES ? LANES / share : 1;
    plan.queries = plan.queries < in->s ? plan.queries : in->s;
    plan.tiles = in->b * in->kv_heads * ((in->s + plan.queries - 1) / plan.queries);
    for (long row = 0; row < in->b; row++) {
        const long tiles = (in->starts[row] + in->s + KEYS - 1) / KEYS;
        plan.key_tiles = tiles > plan.key_tiles ? tiles : plan.key_tiles;
    }
    /* Few tiles of queries: threads also share their tiles of keys, and what each has is kept until all are there */
    const int split = in->threads > 1 && plan.tiles < 4 * in->threads, threads = (int)in->threads;
    const long items = split ? plan.tiles * plan.key_tiles : plan.tiles;
    Tiles job = {.plan = &plan, .step = plan.queries * share * (in->p + 2)};
    uint16_t *rounded;
    job.tiles = calloc(threads, sizeof(Tile));
    job.kept = split ? malloc(items * job.step * sizeof(float)) : 0;
    if (!find_own(&plan, &rounded) || !job.tiles || (split && !job.kept))
        job.failed = 1;
    else {
        in_parallel(attend_some_tiles, &job, items, 1, threads);
        if (split && !job.failed) in_parallel(merge_some_tiles, &job, plan.tiles, 1, threads);
    }
    for (int i = 0; job.tiles && i < threads; i++) free(job.tiles[i].query);
    free(job.tiles);
    free(rounded);
    free(job.kept);
    return job.failed;
}

/* All layers of a tower in one call, in the order of the loops in model/tower.py. One call per pass, because Python
 * between the layers costs up to a third of a pass once other data has pushed it out of the cache. */
#include "kernels.h"

/* Room for one layer's intermediate results */
typedef struct {
    float *entered, *mixed, *read, *wide, *wider, *widest;
    int64_t *chosen;
    double *weights;
} Room;

static int product(const TowerShape *t, const Product *w, const float *x, long r, long inputs, float *y, int threads) {
    return tt_linear(x, inputs, r, w->weight, t->bf16, w->outputs, inputs, w->bias, y, threads);
}

/* The scan of a recurrent layer over s tokens, which lie in rows of `all` tokens, from the state `before`; y (b, all, h, p)
 * and the state at the end, each unless null */
static int scan(const TowerShape *t, const LayerWeights *l, const float *convolved, const float *steps, const float *before,
                const int64_t *counts, long b, long s, long all, float *y, float *end, int threads) {
    const long h = t->mamba_heads, p = t->mamba_head, g = t->mamba_groups, n = t->state, inner = h * p;
    const long channels = inner + 2 * g * n, batch = all * channels;
    const float *second = convolved + inner, *third = second + g * n;
    if (l->kind == 'G')
        return tt_delta(convolved, second, third, batch, channels, steps, all * 2 * h, before, counts, b, s, h, p, g, n, y,
                        all * inner, end, threads);
    return tt_ssd(convolved, batch, channels, second, third, batch, channels, steps, all * h, h, l->A, l->D, before, counts, b,
                  s, h, p, g, n, y, all * inner, end, threads);
}

static int recurrent(const TowerShape *t, const LayerWeights *l, const TowerPass *in, const Room *room,
                     const void *const *memory, long index, long num_recurrent) {
    const long b = in->b, s = in->s, r = b * s, h = t->mamba_heads, p = t->mamba_head, inner = h * p, g = t->mamba_groups;
    const long n = t->state, channels = inner + 2 * g * n, wide = l->first.outputs, size = b * inner * n, delta = l->kind == 'G';
    const long kept = in->keeps ? index * r : 0, num_steps = delta ? 2 * h : h;
    float *projected = in->projected + kept * (inner + channels + t->gates * h), *convolved = in->convolved + kept * channels;
    float *steps = in->steps + kept * t->gates * h, *y = room->wide;
    const float *gates = projected + inner + channels, *before = memory[1];
    if (product(t, &l->first, room->entered, r, t->width, projected, in->threads)) return 1;
    if (l->scales) tt_scale_columns(projected, r, wide, l->scales, in->threads);
    tt_conv_silu(projected + inner, s * wide, wide, memory[0], l->taps, l->conv_bias, b, s, channels, t->kernel, convolved,
                 in->threads);
    if (delta) {
        tt_unit_heads(convolved + inner, r, channels, g, n, 1.0f, in->threads);
        tt_unit_heads(convolved + inner + g * n, r, channels, g, n, 1.0f / sqrtf(n), in->threads);
        tt_delta_steps(gates, wide, l->dt_bias, l->A, r, h, steps);
    } else
        tt_time_steps(gates, s * wide, wide, l->dt_bias, t->shortest, t->longest, b, s, h, steps);
    long from = 0;
    for (long cut = 0; cut < in->num_cuts || cut == 0; cut++) {
        const long to = in->num_cuts ? in->cuts[cut] : s;
        float *end = in->num_cuts ? in->ends + (cut * num_recurrent + index) * size : 0;
        if (scan(t, l, convolved + from * channels, steps + from * num_steps, before, 0, b, to - from, s, y + from * inner, end,
                 in->threads))
            return 1;
        before = end;
        from = to;
    }
    const long groups = delta ? h : g;
    tt_gated_group_rms_norm(y, inner, projected, wide, r, l->gate_norm, groups, inner / groups, t->eps, delta || t->norm_first,
                            room->wider, in->threads);
    return product(t, &l->second, room->wider, r, inner, room->mixed, in->threads);
}

/* Copies a token's heads, which lie side by side, to its place in the cache */
static void append(const TowerShape *t, const TowerPass *in, const float *heads, long token, void *cache) {
    for (long row = 0; row < in->b; row++)
        for (long i = 0; i < in->s; i++) {
            const long place = in->places ? in->places[row * in->s + i] : in->starts[row] + i;
            const long entry = in->places ? place / in->page_size : row;
            const long to = entry * in->key_batch + (place - (in->places ? entry * in->page_size : 0)) * in->key_token;
            for (long k = 0; k < t->kv_heads; k++) {
                const float *from = heads + (row * in->s + i) * token + k * t->head;
                if (in->bf16_keys)
                    round_to_bf16(from, t->head, (uint16_t *)cache + to + k * in->key_head);
                else
                    memcpy((float *)cache + to + k * in->key_head, from, t->head * sizeof(float));
            }
        }
}

/* Queries and keys of r rows, side by side in rows `stride` apart, through their norms */
static void norm_queries_and_keys(const TowerShape *t, const LayerWeights *l, float *q, long r, long stride, int threads) {
    const long h = t->heads, k = t->kv_heads, p = t->head;
    const int together = t->qk_norm == 3, own = t->qk_norm == 2;
    float *key = q + h * p;
    tt_norm_heads(q, r, stride, together ? 1 : h, together ? h * p : p, &l->q_norm, t->layer_norm, t->eps, own, threads);
    tt_norm_heads(key, r, stride, together ? 1 : k, together ? k * p : p, &l->k_norm, t->layer_norm, t->eps, own, threads);
}

/* Multiplies the first n floats of each token's row of q (b, s; rows `token` apart) by what its position says */
static void scale_queries(float *q, long token, const Positioning *at, long b, long s, long n) {
    for (long m = 0; m < b * s; m++) {
        const float scale = at->query_scale[m / s * at->scale_batch + m % s];
        for (long i = 0; i < n; i++) q[m * token + i] *= scale;
    }
}

/* n of the `from` floats, and zeros up to p */
static void fill_head(float *to, const float *from, long n, long p) {
    memcpy(to, from, n * sizeof(float));
    memset(to + n, 0, (p - n) * sizeof(float));
}

/* Queries, keys and values (3 heads * p) of each token to room->wide, from latents; see model/latent_attention.py */
static int project_latents(const TowerShape *t, const LayerWeights *l, const TowerPass *in, const Room *room) {
    const long r = in->b * in->s, h = t->heads, p = t->head, turned = t->latent_turned, plain = t->latent_plain, v = t->value_head;
    const long latent = l->kv_latent.outputs, rank = latent - turned, own = plain + v, layer = t->layer_norm;
    const float *x = room->entered, eps = (float)l->latent_eps;
    long inputs = t->width;
    if (l->q_latent.weight) {
        inputs = l->q_latent.outputs;
        if (product(t, &l->q_latent, x, r, t->width, room->wider, in->threads)) return 1;
        tt_norm(room->wider, r, inputs, &l->q_latent_norm, layer, eps, 0, 0, 0, 0, 1, room->wider, in->threads);
        x = room->wider;
    }
    if (product(t, &l->first, x, r, inputs, room->widest, in->threads)) return 1;
    for (long i = 0; i < r * h; i++)
        fill_head(room->wide + (i / h * 3 * h + i % h) * p, room->widest + i * (turned + plain), turned + plain, p);
    if (product(t, &l->kv_latent, room->entered, r, t->width, room->wider, in->threads)) return 1;
    tt_norm_heads(room->wider, r, latent, 1, rank, &l->kv_latent_norm, layer, eps, 0, in->threads);
    if (tt_linear(room->wider, latent, r, l->kv_expand.weight, t->bf16, h * own, rank, 0, room->widest, in->threads)) return 1;
    for (long i = 0; i < r * h; i++) {
        float *key = room->wide + (i / h * 3 * h + h + i % h) * p;
        memcpy(key, room->wider + i / h * latent + rank, turned * sizeof(float));
        fill_head(key + turned, room->widest + i * own, plain, p - turned);
        fill_head(key + h * p, room->widest + i * own + plain, v, p);
    }
    return 0;
}

/* What heads have read, in room->widest, to the layer's output: without what pads values, gated, projected */
static int leave_attention(const TowerShape *t, const LayerWeights *l, const TowerPass *in, const Room *room) {
    const long r = in->b * in->s, h = t->heads, v = t->value_head;
    float *read = room->widest;
    for (long i = 1; v < t->head && i < r * h; i++) memmove(read + i * v, read + i * t->head, v * sizeof(float));
    if (l->gate.weight) {
        if (product(t, &l->gate, room->entered, r, t->width, room->wide, in->threads)) return 1;
        tt_sigmoid_gate(read, room->wide, r * h * v, in->threads);
    }
    return product(t, &l->second, read, r, h * v, room->mixed, in->threads);
}

static int attention(const TowerShape *t, const LayerWeights *l, const TowerPass *in, const Room *room, const void *const *memory) {
    const long b = in->b, s = in->s, p = t->head, all = t->heads + 2 * t->kv_heads, turned = t->heads + t->kv_heads;
    const Positioning *at = in->positioning + l->positioning;
    float *q = room->wide;
    const float *value = room->wide + turned * p;
    long token = all * p; /* distance of two tokens' queries, and keys */
    if (l->kv_latent.weight ? project_latents(t, l, in, room)
                            : product(t, &l->first, room->entered, b * s, t->width, room->wide, in->threads))
        return 1;
    if (l->q_norm.weight && !t->norm_behind_rope) norm_queries_and_keys(t, l, q, b * s, token, in->threads);
    if (t->clip) tt_clamp(q, b * s * token, (float)t->clip, in->threads);
    if (at->cosine) {
        tt_rotate(q, s * token, token, at->cosine, at->sine, at->angle_batch, b, s, turned, p, l->turned, room->wider);
        q = room->wider;
        token = turned * p;
    }
    if (l->q_norm.weight && t->norm_behind_rope) norm_queries_and_keys(t, l, q, b * s, token, in->threads);
    if (at->query_scale) scale_queries(q, token, at, b, s, t->heads * p);
    const float *key = q + t->heads * p;
    if (in->causal) {
        append(t, in, key, token, (void *)memory[0]);
        append(t, in, value, all * p, (void *)memory[1]);
    }
    const AttentionPass pass = {
        .b = b, .s = s, .heads = t->heads, .kv_heads = t->kv_heads, .p = p, .causal = in->causal, .threads = in->threads,
        .query = q, .query_batch = s * token, .query_token = token,
        .past_key = memory[0], .past_value = memory[1], .bf16 = in->bf16_keys,
        .past_batch = in->key_batch, .past_head = in->key_head, .past_token = in->key_token,
        .pages = in->pages, .num_pages = in->num_pages, .page_size = in->page_size,
        .key = key, .key_batch = s * token, .key_token = token,
        .value = value, .value_batch = s * all * p, .value_token = all * p,
        .starts = in->starts, .ends = in->widths, .out = room->widest,
    };
    const AttentionOptions how = {
        .window = l->window, .chunk = l->chunk, .scale = (float)l->attention_scale, .softcap = (float)t->softcap, .sinks = l->sinks, .slopes = l->slopes,
    };
    return tt_attention(&pass, &how) || leave_attention(t, l, in, room);
}

static Activation activation(const TowerShape *t, const LayerWeights *l) {
    return (Activation){t->activation, t->gated, (float)t->glu_limit, (float)t->glu_offset, l->alphas, (float)t->glu_gate_scale};
}

static int mlp(const TowerShape *t, const LayerWeights *l, const TowerPass *in, const float *x, float *hidden, float *y) {
    const Product *up = &l->first, *down = &l->second;
    const Activation by = activation(t, l);
    return tt_mlp(x, in->b * in->s, up->weight, t->bf16, up->outputs, up->bias, down->weight, t->bf16, t->width, down->bias, &by,
                  hidden, y, in->threads);
}

/* Multiplies each row of y (r, d) by sigmoid(weight . its row of x) */
static void gate_rows(const float *x, const float *weight, long r, long d, float *y) {
    for (long m = 0; m < r; m++) {
        const float gate = 1.0f / (1.0f + expf(-dot(x + m * d, weight, d)));
        for (long i = 0; i < d; i++) y[m * d + i] *= gate;
    }
}

static int experts(const TowerShape *t, const LayerWeights *l, const TowerPass *in, const Room *room) {
    const long r = in->b * in->s, inputs = t->latent ? t->latent : t->width;
    const Router router = {t->experts, t->active, t->groups, t->kept, t->normalise, t->softmax, t->factor};
    const Activation by = activation(t, l);
    const float *x = t->latent ? room->wide : room->entered;
    float *y = t->latent ? room->wider : room->mixed;
    if (tt_route(room->entered, r, t->width, l->router, l->router_bias, l->correction, &router, room->chosen, room->weights,
                 in->threads))
        return 1;
    if (t->latent && product(t, &l->latent_in, room->entered, r, t->width, room->wide, in->threads)) return 1;
    if (tt_experts(x, r, room->chosen, room->weights, t->active, t->experts, l->up, l->down, t->bf16, inputs, t->expert,
                   l->up_bias, l->down_bias, &by, t->weigh_inputs, y, in->threads))
        return 1;
    if (t->latent && product(t, &l->latent_out, y, r, inputs, room->mixed, in->threads)) return 1;
    if (!l->first.weight) return 0;
    if (mlp(t, l, in, room->entered, room->wide, room->wider)) return 1;
    if (l->shared_gate) gate_rows(room->entered, l->shared_gate, r, t->width, room->wider);
    tt_residual(room->mixed, room->wider, 1, 0, 0, in->b, in->s, t->width, in->threads);
    return 0;
}

static long larger(long a, long b) { return a > b ? a : b; }

API int tt_tower(const TowerShape *t, const LayerWeights *layers, const TowerPass *in) {
    const long b = in->b, s = in->s, d = t->width, inner = t->mamba_heads * t->mamba_head;
    long num_recurrent = 0, wide = larger(larger(inner, d), (t->heads + 2 * t->kv_heads) * t->head);
    for (long i = 0; i < t->num_layers; i++) {
        const LayerWeights *l = layers + i;
        num_recurrent += l->kind == 'M' || l->kind == 'G';
        wide = larger(wide, larger(l->first.outputs, l->latent_in.outputs));
        wide = larger(wide, larger(l->q_latent.outputs, l->kv_latent.outputs));
    }
    float *room = malloc(b * s * (3 * d + 3 * wide + t->active) * sizeof(float) + b * s * t->active * (sizeof(double) + 8));
    if (!room) return 1;
    int failed = 0;
    Room r = {.chosen = (int64_t *)room, .weights = (double *)room + b * s * t->active};
    r.entered = room + 4 * b * s * t->active;
    r.mixed = r.entered + b * s * d;
    r.read = r.mixed + b * s * d;
    r.wide = r.read + b * s * d;
    r.wider = r.wide + b * s * wide;
    r.widest = r.wider + b * s * wide;
    long done = 0; /* of the recurrent layers */
    for (long i = 0; i < t->num_layers && !failed; i++) {
        const LayerWeights *l = layers + i;
        const float *shift = in->modulation ? in->modulation + i * b * 3 * d : 0;
        const int order = !shift ? 0 : l->kind == 'E' || l->kind == '-' ? 2 : 1;
        /* What parallel layers read is kept, as the first of them already adds to the stream. */
        if (!l->joins && i + 1 < t->num_layers && l[1].joins) memcpy(r.read, in->x, b * s * d * sizeof(float));
        const float *read = l->joins ? r.read : in->x;
        tt_norm(read, b * s, d, &l->norm, t->layer_norm, t->eps, order, shift, shift + d, 3 * d, s, r.entered, in->threads);
        if (l->kind == 'M' || l->kind == 'G')
            failed = recurrent(t, l, in, &r, in->memory + 2 * i, done++, num_recurrent);
        else if (l->kind == '*')
            failed = attention(t, l, in, &r, in->memory + 2 * i);
        else if (l->kind == '-')
            failed = mlp(t, l, in, r.entered, r.wide, r.mixed);
        else
            failed = experts(t, l, in, &r);
        if (l->post_norm.weight)
            tt_norm(r.mixed, b * s, d, &l->post_norm, t->layer_norm, t->eps, 0, 0, 0, 0, 1, r.mixed, in->threads);
        tt_residual(in->x, r.mixed, (float)l->scale, shift ? shift + 2 * d : 0, 3 * d, b, s, d, in->threads);
    }
    tt_norm(in->x, b * s, d, &in->norm, t->layer_norm, t->eps, 0, 0, 0, 0, 1, in->hidden, in->threads);
    free(room);
    return failed;
}

/* Conv rows (recurrent layers, b, w-1, c) and, unless null, recurrent states (.., b, h, p, n) after each row's first
 * counts[b] tokens of a pass, all s of them where counts is null; memory, projected, convolved and steps are that pass's. */
API int tt_advance(const TowerShape *t, const LayerWeights *layers, const void *const *memory, const float *projected,
                    const float *convolved, const float *steps, long b, long s, const int64_t *counts, float *conv, float *ssm,
                    int threads) {
    const long h = t->mamba_heads, inner = h * t->mamba_head, channels = inner + 2 * t->mamba_groups * t->state, r = b * s;
    const long size = b * inner * t->state, rows = b * (t->kernel - 1) * channels;
    long index = 0;
    for (long i = 0; i < t->num_layers; i++) {
        const LayerWeights *l = layers + i;
        const long wide = l->first.outputs;
        if (l->kind != 'M' && l->kind != 'G') continue;
        tt_next_past(projected + index * r * (inner + channels + t->gates * h) + inner, s * wide, wide, memory[2 * i], counts, b,
                     s, channels, t->kernel, conv + index * rows);
        if (ssm && scan(t, l, convolved + index * r * channels, steps + index * r * t->gates * h, memory[2 * i + 1], counts, b, s,
                        s, 0, ssm + index * size, threads))
            return 1;
        index++;
    }
    return 0;
}

/* x (r, d): the rows ids (r) of a table (v, d) */
API void tt_embed(const int64_t *ids, long r, const void *table, int bf16, long d, float *x) {
    for (long m = 0; m < r; m++)
        if (bf16)
            for (long i = 0; i < d; i += VL) {
                const long n = d - i < VL ? d - i : VL;
                store_part(x + m * d + i, load_bf16((const uint16_t *)table + ids[m] * d + i, n), n);
            }
        else
            memcpy(x + m * d, (const float *)table + ids[m] * d, d * sizeof(float));
}

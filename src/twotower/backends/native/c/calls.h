/* All that Python calls. ../call.py reads structures and argument lists from here: keep to numbers, pointers and the
 * structures below. Functions that return int give 0, or 1 where they found no memory; their results are then undefined. */
#pragma once
#include "common.h"

/* A packed weight and its bias, which may be null */
typedef struct {
    const void *weight;
    const float *bias;
    long outputs;
} Product;

/* The weight and the bias of a norm; the bias may be null, and without a weight there is no norm */
typedef struct {
    const float *weight, *bias;
} Norm;

/* What the positions of a pass's tokens do in a layer of attention: RoPE's angles (b or 1, s, n/2), and what multiplies
 * queries (b or 1, s); null for neither. Rows lie `..._batch` apart. */
typedef struct {
    const float *cosine, *sine, *query_scale;
    long angle_batch, scale_batch;
} Positioning;

typedef struct {
    long kind;             /* 'M', 'G', '*', '-' or 'E' */
    long joins;            /* reads the residual stream that the layer before it reads */
    double scale;          /* of what the layer adds */
    Norm norm, post_norm;  /* before the mixer, and behind it */
    Product first, second; /* M, G: in, out; *: qkv or, with latents, q, and o; -: up, down; E: up, down of the
                            * shared expert, if any */
    const float *taps, *conv_bias, *dt_bias, *A, *D, *gate_norm, *scales; /* M, G; the last two may be null */
    Norm q_norm, k_norm;                                         /* * */
    const float *sinks, *slopes;
    long positioning, turned, window, chunk; /* which Positioning, RoPE's n, and as in AttentionOptions */
    double attention_scale, latent_eps;
    Product gate, q_latent, kv_latent, kv_expand; /* without weights where there is no gate, and no such latent */
    Norm q_latent_norm, kv_latent_norm;
    const float *alphas;                                         /* -: see activation.h */
    const double *router, *router_bias, *correction;             /* E */
    const void *up, *down;
    const float *up_bias, *down_bias, *shared_gate;
    Product latent_in, latent_out;
} LayerWeights;

/* What every layer of a tower agrees on */
typedef struct {
    long num_layers, width, bf16;
    long layer_norm; /* LayerNorm, not RMSNorm */
    double eps;
    long mamba_heads, mamba_head, mamba_groups, state, kernel, norm_first; /* M, G */
    long gates; /* numbers of a head behind what is convolved: step sizes, or decays and step sizes if any layer is G */
    double shortest, longest;
    long heads, kv_heads, head, qk_norm;                   /* *; qk_norm as in `NORMS` of ../tower.py */
    long norm_behind_rope;
    long latent_turned, latent_plain, value_head; /* parts of a head of latents with and without RoPE; a value's width */
    double clip, softcap; /* of queries, keys and values; of scores. 0: none */
    long activation, gated;                                /* -, E: see activation.h */
    double glu_limit, glu_offset, glu_gate_scale;
    long experts, active, groups, kept, normalise, softmax, expert, latent, weigh_inputs; /* E */
    double factor;
} TowerShape;

/* One pass over x (b, s, d), which becomes the residual stream; hidden (b, s, d) is its last norm.
 * modulation (layers, b, 3, d): shift, scale, gate; or null
 * positioning: one of each kind of attention layers
 * memory, two per layer: the conv and recurrent state before (M, G), keys and values (*)
 * projected, convolved, steps (recurrent layers, b, s, ...): in_proj's output, what the scan reads of it after convolution,
 *   and dt (M) or decays and step sizes (G); of one layer unless `keeps`
 * ends (num_cuts, recurrent layers, b, h, p, n): their states after as many tokens as each of `cuts` says, ascending up to s;
 *   num_cuts may be 0
 * causal: new keys are appended and a query sees those up to its own; otherwise `starts` and `widths` as in tt_attention
 * bf16_keys: whether memory's keys and values are bf16, else float32
 * places (b, s): where they are appended among all places of the pages; null: row b's from starts[b] on */
typedef struct {
    float *x, *hidden;
    Norm norm;
    long b, s, threads;
    const float *modulation;
    const Positioning *positioning;
    const void *const *memory;
    float *projected, *convolved, *steps;
    long keeps;
    float *ends;
    const int64_t *cuts;
    long num_cuts, causal;
    const int64_t *starts, *widths, *places, *pages;
    long num_pages, page_size, bf16_keys, key_batch, key_head, key_token;
} TowerPass;

/* How a layer's queries see keys. With a `window`, the query at position i sees the keys at distances below it, with a
 * `chunk` those of positions with the same i / chunk; 0 is for neither. Its scores are query . key * scale, and with a
 * `softcap` c that is not 0, c tanh(score / c). `sinks` (heads), which may be null, are scores that join the softmax
 * without a value; with `slopes` (heads), unless null, slope * |distance| is subtracted from a score. */
typedef struct {
    long window, chunk;
    float scale, softcap;
    const float *sinks, *slopes;
} AttentionOptions;

/* Queries (b, s, heads, p) over past keys and values (b, kv heads, t, p) and, unless causal, over a block's own
 * (b, s, kv heads, p); all by strides, p dense. Row b has starts[b] earlier tokens. A causal query i sees the past up to
 * its own key, which is in it; a block's queries see the starts[b] of the past and the first ends[b] of the block, both
 * ways. With `pages` (b, num_pages) the past is (n, kv heads, page_size, p) and row b's lies in the entries pages[b],
 * one after the other. The past is float32 or `bf16`. out (b, s, heads, p). */
typedef struct {
    long b, s, heads, kv_heads, p, causal, threads;
    const float *query;
    long query_batch, query_token;
    const void *past_key, *past_value;
    long bf16, past_batch, past_head, past_token;
    const int64_t *pages;
    long num_pages, page_size;
    const float *key, *value;
    long key_batch, key_token, value_batch, value_token;
    const int64_t *starts, *ends;
    float *out;
} AttentionPass;

/* attention.c */
API int tt_attention(const AttentionPass *in, const AttentionOptions *how);
API void tt_rotate(const float *x, long batch, long token, const float *cosine, const float *sine, long angle_batch,
                   long b, long s, long heads, long p, long turned, float *out);

/* tower.c */
API int tt_tower(const TowerShape *t, const LayerWeights *layers, const TowerPass *in);
API int tt_advance(const TowerShape *t, const LayerWeights *layers, const void *const *memory, const float *projected,
                   const float *convolved, const float *steps, long b, long s, const int64_t *counts, float *conv,
                   float *ssm, int threads);

API void tt_embed(const int64_t *ids, long r, const void *table, int bf16, long d, float *x);

/* linear.c */
API long tt_panel_width(void);
API long tt_bf16_pairs(void);
API int tt_linear(const float *x, long stride, long r, const void *weight, int bf16, long o, long k, const float *bias,
                  float *y, int threads);

/* unmask.c */
API void tt_best(const float *logits, long r, long v, int64_t *tokens, float *p, float *log_sum, int threads);
API void tt_entropy(const float *logits, long r, long v, float *entropy, int threads);
API int tt_commit(const float *sure, const uint8_t *masked, const int64_t *left, const float *threshold,
                  const float *bound, int leftmost, long b, long s, uint8_t *out);
API void tt_fix(const int64_t *xt, const uint8_t *masked, const float *confidence, const int64_t *committed_at,
                const uint8_t *valid, const uint8_t *fixed, const int64_t *tokens, const float *proposed,
                const int64_t *step, int64_t mask_token_id, long b, long s, int64_t *xt_out, uint8_t *masked_out,
                float *confidence_out, int64_t *committed_out);

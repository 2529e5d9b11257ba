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

typedef struct {
    long kind;             /* 'M', '*', '-' or 'E' */
    const float *norm;
    Product first, second; /* M: in, out; *: qkv, o; -: up, down; E: up, down of the shared expert */
    const float *taps, *conv_bias, *dt_bias, *A, *D, *gate_norm; /* M */
    const double *router, *correction;                           /* E */
    const void *up, *down;
    const float *up_bias, *down_bias;
} LayerWeights;

/* What every layer of a tower agrees on */
typedef struct {
    long num_layers, width, bf16;
    double eps;
    long mamba_heads, mamba_head, mamba_groups, state, kernel; /* M */
    double shortest, longest;
    long heads, kv_heads, head;                            /* * */
    long gated;                                            /* - */
    long experts, active, groups, kept, normalise, expert; /* E */
    double factor;
} TowerShape;

/* One pass over x (b, s, d), which becomes the residual stream; hidden (b, s, d) is its last norm, by `norm`.
 * modulation (layers, b, 3, d): shift, scale, gate; or null
 * cosine, sine (b or 1, s, p/2), rows `angle_batch` apart; null without RoPE
 * memory, two per layer: the conv and SSM state before (M), keys and values (*)
 * projected, convolved, steps (M layers, b, s, ...): in_proj's output, xBC after its SiLU, dt; of one layer unless `keeps`
 * ends (num_cuts, M layers, b, h, p, n): SSM states after as many tokens as each of `cuts` says, ascending up to s;
 *   num_cuts may be 0
 * causal: new keys are appended and a query sees those up to its own; otherwise `starts` and `widths` as in tt_attention
 * places (b, s): where they are appended among all places of the pages; null: row b's from starts[b] on */
typedef struct {
    float *x, *hidden;
    const float *norm;
    long b, s, threads;
    const float *modulation, *cosine, *sine;
    long angle_batch;
    const void *const *memory;
    float *projected, *convolved, *steps;
    long keeps;
    float *ends;
    const int64_t *cuts;
    long num_cuts, causal;
    const int64_t *starts, *widths, *places, *pages;
    long num_pages, page_size, key_batch, key_head, key_token;
} TowerPass;

/* tower.c */
API int tt_tower(const TowerShape *t, const LayerWeights *layers, const TowerPass *in);
API int tt_advance(const TowerShape *t, const LayerWeights *layers, const void *const *memory, const float *projected,
                   const float *convolved, const float *steps, long b, long s, const int64_t *counts, float *conv,
                   float *ssm, int threads);

/* linear.c */
API long tt_panel_width(void);
API long tt_bf16_pairs(void);
API int tt_linear(const float *x, long stride, long r, const void *weight, int bf16, long o, long k, const float *bias,
                  float *y, int threads);

/* unmask.c */
API void tt_best(const float *logits, long r, long v, int64_t *tokens, float *values, float *log_sum, int threads);
API int tt_commit(const float *sure, const uint8_t *masked, const int64_t *left, const float *threshold, int leftmost,
                  long b, long s, uint8_t *out);
API void tt_fix(const int64_t *xt, const uint8_t *masked, const float *confidence, const int64_t *committed_at,
                const uint8_t *valid, const uint8_t *fixed, const int64_t *tokens, const float *proposed,
                const int64_t *step, int64_t mask_token_id, long b, long s, int64_t *xt_out, uint8_t *masked_out,
                float *confidence_out, int64_t *committed_out);

/* What the layers of a tower are made of, each described where it is defined. Those that return int give 0, or 1 where
 * they found no memory; their results are then undefined. */
#pragma once
#include "activation.h"
#include "calls.h"
#include "parallel.h"

/* norm.c */
void tt_norm(const float *x, long r, long d, const Norm *norm, int layer, float eps, int order, const float *shift,
             const float *scale, long stride, long per, float *y, int threads);
void tt_norm_heads(float *x, long r, long stride, long heads, long p, const Norm *norm, int layer, float eps, int per_head,
                   int threads);
void tt_residual(float *x, const float *y, float scale, const float *gate, long stride, long b, long s, long d, int threads);
void tt_gated_group_rms_norm(const float *y, long y_stride, const float *z, long z_stride, long r, const float
                                 *weight, long groups, long width, float eps, int norm_first, float *out, int threads);
void tt_clamp(float *x, long n, float limit, int threads);
void tt_scale_columns(float *x, long r, long d, const float *scales, int threads);
void tt_sigmoid_gate(float *x, const float *gate, long n, int threads);

/* linear.c */
int tt_mlp(const float *x, long r, const void *up, int up_bf16, long f, const float *up_bias, const void *down,
                int down_bf16, long d, const float *down_bias, const Activation *by, float *hidden, float *y, int threads);

/* conv.c */
void tt_conv_silu(const float *x, long batch_stride, long row_stride, const float *past, const float *taps, const
                      float *bias, long b, long s, long c, long w, float *out, int threads);
void tt_next_past(const float *x, long batch_stride, long row_stride, const float *past, const int64_t *counts, long
                      b, long s, long c, long w, float *out);

/* ssd.c */
void tt_time_steps(const float *dt, long batch, long token, const float *bias, float low, float high, long b, long
                       s, long h, float *out);
int tt_ssd(const float *x, long x_batch, long x_token, const float *B, const float *C, long bc_batch, long
                bc_token, const float *dt, long dt_batch, long dt_token, const float *A, const float *D, const float
                *state, const int64_t *counts, long b, long s, long h, long p, long g, long n, float *y, long y_batch,
                float *end, int threads);

/* delta.c */
void tt_unit_heads(float *x, long r, long stride, long heads, long n, float scale, int threads);
void tt_delta_steps(const float *gates, long stride, const float *bias, const float *A, long r, long h, float *out);
int tt_delta(const float *v, const float *k, const float *q, long batch, long token, const float *steps, long step_batch,
             const float *state, const int64_t *counts, long b, long s, long h, long p, long g, long n, float *y, long y_batch,
             float *end, int threads);

/* moe.c */
typedef struct {
    long experts, active, groups, kept, normalise, softmax;
    double factor;
} Router;

int tt_route(const float *x, long r, long d, const double *weight, const double *bias, const double *correction, const
                  Router *by, int64_t *experts, double *weights, int threads);
int tt_experts(const float *x, long r, const int64_t *experts, const double *weights, long active, long e, const
                    void *up, const void *down, int bf16, long d, long f, const float *up_bias, const float *down_bias,
                    const Activation *by, int weigh_inputs, float *y, int threads);

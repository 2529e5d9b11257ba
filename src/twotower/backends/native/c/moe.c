#include "kernels.h"
#include "linear.h"

#include <omp.h>

typedef double wide __attribute__((vector_size(4 * VL)));
typedef float narrow __attribute__((vector_size(2 * VL)));

static double wide_dot(const float *x, const double *w, long d) {
    wide sums[2] = {{0}, {0}};
    long i = 0;
    for (; i + VL <= d; i += VL)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            narrow a;
            wide b;
            memcpy(&a, x + i + j * VL / 2, sizeof a);
            memcpy(&b, w + i + j * VL / 2, sizeof b);
            sums[j] += __builtin_convertvector(a, wide) * b;
        }
    const wide both = sums[0] + sums[1];
    double total = 0;
    for (int j = 0; j < VL / 2; j++) total += both[j];
    for (; i < d; i++) total += x[i] * w[i];
    return total;
}

/* Index of the largest value not yet taken (a taken one is NaN), the first of equal ones */
static long index_of_largest(const double *v, long n) {
    long best = -1;
    for (long i = 0; i < n; i++)
        if (v[i] == v[i] && (best < 0 || v[i] > v[best])) best = i;
    return best;
}

/* Logits (e,) to scores: a softmax */
static void softmax(double *v, long e) {
    double largest = -INFINITY, total = 0;
    for (long j = 0; j < e; j++) largest = v[j] > largest ? v[j] : largest;
    for (long j = 0; j < e; j++) total += v[j] = exp(v[j] - largest);
    for (long j = 0; j < e; j++) v[j] /= total;
}

/* See ops.moe.route: x (r, d), weight (e, d), bias (e,) or null, correction (e,); experts and weights (r, active) */
int tt_route(const float *x, long r, long d, const double *weight, const double *bias, const double *correction,
                  const Router *by, int64_t *experts, double *weights, int threads) {
    const long e = by->experts, active = by->active, groups = by->groups;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1 && r * d * e >= 65536)
    {
        double *scores = malloc((2 * e + groups) * sizeof(double)), *choice = scores + e, *best = choice + e;
        if (!scores) FAIL(failed);
#pragma omp for
        for (long m = 0; m < r; m++) {
            if (!scores) continue;
            for (long j = 0; j < e; j++) {
                scores[j] = wide_dot(x + m * d, weight + j * d, d) + (bias ? bias[j] : 0.0);
                if (!by->softmax) scores[j] = 1.0 / (1.0 + exp(-scores[j]));
            }
            if (by->softmax) softmax(scores, e);
            for (long j = 0; j < e; j++) {
                const double chosen_by = scores[j] + correction[j];
                choice[j] = chosen_by == chosen_by ? chosen_by : INFINITY; /* where x overflowed; as topk orders NaN */
            }
            const long size = e / groups;
            for (long k = 0; groups > 1 && k < groups; k++) {
                double first = -INFINITY, second = -INFINITY;
                for (long j = k * size; j < (k + 1) * size; j++) {
                    if (choice[j] > first) {
                        second = first;
                        first = choice[j];
                    } else if (choice[j] > second)
                        second = choice[j];
                }
                best[k] = size > 1 && !by->softmax ? first + second : first;
            }
            if (groups > 1) {
                for (long k = 0; k < by->kept; k++) best[index_of_largest(best, groups)] = NAN; /* NaN: kept */
                for (long j = 0; j < e; j++)
                    if (best[j / size] == best[j / size]) choice[j] = -INFINITY;
            }
            double total = 0;
            for (long k = 0; k < active; k++) {
                const long j = index_of_largest(choice, e);
                choice[j] = NAN;
                experts[m * active + k] = j;
                weights[m * active + k] = scores[j];
                total += scores[j];
            }
            for (long k = 0; k < active; k++)
                weights[m * active + k] = weights[m * active + k] / (by->normalise ? total + 1e-20 : 1.0) * by->factor;
        }
        free(scores);
    }
    return failed;
}

/* y (r, d) = sum over a row's experts of weight * down(activation(up(x))), or without the weight of an expert that gets
 * weight * x. up (e, panels of u, d, NR), where u is 2f if gated and else f, down (e, panels of d, f, NR), biases (e, u) and
 * (e, d) or null. Products are shared out panel by panel over all chosen experts. */
int tt_experts(const float *x, long r, const int64_t *experts, const double *weights, long active, long e,
                    const void *up, const void *down, int bf16, long d, long f, const float *up_bias,
                    const float *down_bias, const Activation *by, int weigh_inputs, float *y, int threads) {
    const long slots = r * active, u = by->gated ? 2 * f : f;
    const long up_panels = (u + NR - 1) / NR, down_panels = (d + NR - 1) / NR, size = bf16 ? 2 : 4;
    float *hidden = malloc(slots * (u + d) * sizeof(float)), *parts = hidden + slots * u;
    const float **in = malloc(3 * slots * sizeof *in);
    float **mid = (float **)in + slots, **out = (float **)in + 2 * slots;
    long *first = calloc(e + 2, sizeof(long)), *chosen = malloc(e * sizeof(long)), num = 0;
    int failed = !hidden || !in || !first || !chosen;
    if (failed) goto done;
    for (long i = 0; i < slots; i++) first[experts[i] + 2]++;
    for (long j = 0; j < e; j++) {
        if (first[j + 2]) chosen[num++] = j;
        first[j + 2] += first[j + 1];
    }
    for (long i = 0; i < slots; i++) { /* slots of one expert side by side; afterwards first[j] .. first[j + 1] */
        const long at = first[experts[i] + 1]++;
        in[at] = weigh_inputs ? parts + i * d : x + i / active * d;
        mid[at] = hidden + i * u;
        out[at] = parts + i * d;
        for (long k = 0; weigh_inputs && k < d; k++) parts[i * d + k] = x[i / active * d + k] * (float)weights[i];
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int me = omp_get_thread_num(), all = omp_get_num_threads();
        for (int phase = 0; phase < 2; phase++) {
            const long per = phase ? down_panels : up_panels;
            long from, to;
            share(num * per, 4, me, all, &from, &to);
            while (from < to) {
                const long j = chosen[from / per], start = from % per;
                const long stop = to - from < per - start ? start + to - from : per;
                const Weight w = phase ? (Weight){(const char *)down + j * per * f * NR * size, d, f, bf16}
                                       : (Weight){(const char *)up + j * per * d * NR * size, u, d, bf16};
                const long at = first[j], count = first[j + 1] - at;
                const float *const *rows = phase ? (const float *const *)mid + at : in + at;
                const float *bias = phase ? down_bias : up_bias;
                if (panels(&w, start, stop, rows, (phase ? out : mid) + at, count, bias ? bias + j * w.outputs : 0,
                           !phase && is_fused(by)))
                    FAIL(failed);
                from += stop - start;
            }
#pragma omp barrier
            if (!phase && !is_fused(by)) {
#pragma omp for
                for (long i = 0; i < slots; i++) activate_row(by, hidden + i * u, f, 0, f);
            }
        }
#pragma omp for
        for (long m = 0; m < r; m++)
            for (long i = 0; i < d; i += VL) {
                const long n = d - i < VL ? d - i : VL;
                vf total = {0};
                for (long k = m * active; k < (m + 1) * active; k++)
                    total += load_part(parts + k * d + i, n) * (weigh_inputs ? 1.0f : (float)weights[k]);
                store_part(y + m * d + i, total, n);
            }
    }
done:
    free(hidden);
    free(in);
    free(first);
    free(chosen);
    return failed;
}

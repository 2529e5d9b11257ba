#include "kernels.h"
#include "linear.h"

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

typedef struct {
    const float *x;
    const double *weight, *bias, *correction;
    const Router *by;
    long d;
    int64_t *experts;
    double *weights, *room; /* room: for each thread scores and what chooses (experts, each), and the best of groups */
} Routing;

/* Of each group the best, then the scores of groups that aren't kept are -inf; choice (experts), best (groups) */
static void keep_groups(const Router *by, double *choice, double *best) {
    const long e = by->experts, groups = by->groups, size = e / groups;
    for (long k = 0; k < groups; k++) {
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
    for (long k = 0; k < by->kept; k++) best[index_of_largest(best, groups)] = NAN; /* NaN: kept */
    for (long j = 0; j < e; j++)
        if (best[j / size] == best[j / size]) choice[j] = -INFINITY;
}

static void route_rows(void *job, long from, long to, int slot) {
    const Routing *in = job;
    const Router *by = in->by;
    const long e = by->experts, active = by->active, d = in->d;
    double *scores = in->room + slot * (2 * e + by->groups), *choice = scores + e;
    for (long m = from; m < to; m++) {
        for (long j = 0; j < e; j++) {
            scores[j] = wide_dot(in->x + m * d, in->weight + j * d, d) + (in->bias ? in->bias[j] : 0.0);
            if (!by->softmax) scores[j] = 1.0 / (1.0 + exp(-scores[j]));
        }
        if (by->softmax) softmax(scores, e);
        for (long j = 0; j < e; j++) {
            const double chosen_by = scores[j] + in->correction[j];
            choice[j] = chosen_by == chosen_by ? chosen_by : INFINITY; /* where x overflowed; as topk orders NaN */
        }
        if (by->groups > 1) keep_groups(by, choice, choice + e);
        int64_t *experts = in->experts + m * active;
        double *weights = in->weights + m * active, total = 0;
        for (long k = 0; k < active; k++) {
            const long j = index_of_largest(choice, e);
            choice[j] = NAN;
            experts[k] = j;
            weights[k] = scores[j];
            total += scores[j];
        }
        for (long k = 0; k < active; k++) weights[k] = weights[k] / (by->normalise ? total + 1e-20 : 1.0) * by->factor;
    }
}

/* See ops.moe.route: x (r, d), weight (e, d), bias (e,) or null, correction (e,); experts and weights (r, active) */
int tt_route(const float *x, long r, long d, const double *weight, const double *bias, const double *correction,
                  const Router *by, int64_t *experts, double *weights, int threads) {
    threads = r * d * by->experts >= 65536 ? threads : 1;
    double *room = malloc(threads * (2 * by->experts + by->groups) * sizeof *room);
    if (!room) return 1;
    Routing job = {x, weight, bias, correction, by, d, experts, weights, room};
    in_parallel(route_rows, &job, r, 1, threads);
    free(room);
    return 0;
}

/* Products of the rows of each chosen expert with its weight; the items are panels, of one expert after the other */
typedef struct {
    const char *weights;
    const float *bias;
    const long *chosen, *first; /* the experts; expert j's slots are first[j] .. first[j + 1] */
    const void *const *rows;    /* of each slot */
    float *const *out;
    long outputs, inputs;
    int bf16, squared_relu;
} Products;

static void expert_panels(void *job, long from, long to, int slot) {
    const Products *in = job;
    const long per = (in->outputs + NR - 1) / NR, size = in->bf16 ? 2 : 4;
    (void)slot;
    while (from < to) {
        const long j = in->chosen[from / per], start = from % per, at = in->first[j];
        const long stop = to - from < per - start ? start + to - from : per;
        const Weight w = {in->weights + j * per * in->inputs * NR * size, in->outputs, in->inputs, in->bf16};
        panels(&w, start, stop, in->rows + at, in->out + at, in->first[j + 1] - at, in->bias ? in->bias + j * w.outputs : 0,
               in->squared_relu);
        from += stop - start;
    }
}

typedef struct {
    const Activation *by;
    float *hidden;
    long width, inner;
} Activating;

static void activate_slots(void *job, long from, long to, int slot) {
    const Activating *in = job;
    (void)slot;
    for (long i = from; i < to; i++) activate_row(in->by, in->hidden + i * in->width, in->inner, 0, in->inner);
}

typedef struct {
    const float *parts;
    const double *weights; /* null where inputs were weighed */
    long active, d;
    float *y;
} Summing;

static void sum_rows(void *job, long from, long to, int slot) {
    const Summing *in = job;
    const long active = in->active, d = in->d;
    (void)slot;
    for (long m = from; m < to; m++)
        for (long i = 0; i < d; i += VL) {
            const long n = d - i < VL ? d - i : VL;
            vf total = {0};
            for (long k = m * active; k < (m + 1) * active; k++)
                total += load_part(in->parts + k * d + i, n) * (in->weights ? (float)in->weights[k] : 1.0f);
            store_part(in->y + m * d + i, total, n);
        }
}

/* y (r, d) = sum over a row's experts of weight * down(activation(up(x))), or without the weight of an expert that gets
 * weight * x. up (e, panels of u, d, NR), where u is 2f if gated and else f, down (e, panels of d, f, NR), biases (e, u) and
 * (e, d) or null. Products are shared out panel by panel over all chosen experts. */
int tt_experts(const float *x, long r, const int64_t *experts, const double *weights, long active, long e,
                    const void *up, const void *down, int bf16, long d, long f, const float *up_bias,
                    const float *down_bias, const Activation *by, int weigh_inputs, float *y, int threads) {
    const long slots = r * active, u = by->gated ? 2 * f : f;
    const long up_panels = (u + NR - 1) / NR, down_panels = (d + NR - 1) / NR;
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
    Products job = {up, up_bias, chosen, first, prepared(in, slots, d, bf16, threads), mid, u, d, bf16, is_fused(by)};
    if ((failed = !job.rows)) goto done;
    in_parallel(expert_panels, &job, num * up_panels, 4, threads);
    Activating activating = {by, hidden, u, f};
    if (!is_fused(by)) in_parallel(activate_slots, &activating, slots, 1, slots * f >= 8192 ? threads : 1);
    job = (Products){down, down_bias, chosen, first, prepared((const float *const *)mid, slots, f, bf16, threads), out, d, f, bf16, 0};
    if ((failed = !job.rows)) goto done;
    in_parallel(expert_panels, &job, num * down_panels, 4, threads);
    Summing summing = {parts, weigh_inputs ? 0 : weights, active, d, y};
    in_parallel(sum_rows, &summing, r, 1, slots * d >= 32768 ? threads : 1);
done:
    free(hidden);
    free(in);
    free(first);
    free(chosen);
    return failed;
}

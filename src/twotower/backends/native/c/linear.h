/* Products of a few rows with a packed weight.
 *
 * A weight (o, k) is packed in panels of NR outputs, (o / NR, k, NR), padded with zeros to whole panels: the inner loop
 * reads it once, front to back. A tile of MR rows and one panel keeps its sums in registers; each sum runs over k in
 * order. bf16 weights are widened as they are read. Where the CPU multiplies bf16 itself, rows are rounded to it and k
 * goes by pairs, (o / NR, k / 2, NR, 2), behind which lies the last input of an odd k, (NR).
 */
#pragma once
#include "common.h"

typedef struct {
    const void *data;
    long outputs, inputs;
    int bf16;
} Weight;

INLINE long num_panels(const Weight *w) { return (w->outputs + NR - 1) / NR; }

#define BYTES_AHEAD 16384 /* how many bytes ahead of its reading a lone tile prefetches */
#define ROW_STEP 32 /* values that a rounded row is a multiple of: a matrix tile's */

/* Rows of k floats as panels() reads them beside a weight: themselves, or beside bf16 where the CPU multiplies it, copies
 * rounded to it. These lie in room that the calling thread keeps, until it calls again; null where there is no memory. */
const void *const *prepared(const float *const *rows, long r, long k, int bf16, int threads);

/* Panels [from, to) of y[m] = rows[m] . weight + bias for r prepared rows, then relu(.)^2 if asked */
void panels(const Weight *w, long from, long to, const void *const *rows, float *const *y, long r, const float *bias,
            int squared_relu);

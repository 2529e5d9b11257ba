/* Products of rows of bf16 with a packed weight in the CPU's own matrix tiles (AMX): 16 rows at once, so that a block of 16
 * tokens costs hardly more than one token where reading the weight is what takes time. */
#pragma once
#include "linear.h"

#if defined(__AMX_BF16__) && BF16_PAIRS && defined(__linux__)
#define AMX 1
#else
#define AMX 0
#endif

/* Whether this process may use tiles. The system has to be asked once; it says no in some sandboxes. The same answer always:
 * tiles add in an order of their own, so that every product of a process goes through them or none does. */
int has_tiles(void);

/* Products of panels [from, to) for r prepared rows, which lie `stride` bytes apart and are padded with zeros to a multiple
 * of ROW_STEP. Each row's sums go to `y[m] + panel * NR` through `leave`. */
void amx_panels(const Weight *w, long from, long to, const void *rows, long stride, float *const *y, long r, const float *bias,
                int squared_relu);

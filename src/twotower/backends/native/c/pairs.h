/* What pairs.c gives to tiles of attention. */
#pragma once
#include "common.h"

/* How many rows before it reads one a tile fetches it. Behind the rows of its keys lie those of its values, and behind
 * these as many as this of others, which are only fetched. */
#define AHEAD 64

/* The line at `offset` bytes of a row, into the second cache: the CPU's own fetching stops at every page of memory, and
 * the first cache keeps too few misses under way to wait for memory there */
INLINE void fetch(const void *row, long offset) { __builtin_prefetch((const char *)row + offset, 0, 2); }

#if BF16_PAIRS
/* n floats rounded to bf16, to whole vectors with zeros behind them; `to` may be x */
void round_pairs(const float *x, long n, void *to);

/* scores (lanes, n; rows `step` apart) of n keys of p values, n a multiple of NR; query: rounded, rows `width` pairs apart
 * with zeros behind p values */
void score_pairs(const int32_t *query, long width, long lanes, const void *const *key, long n, long p, float *scores,
                 long step);

/* out (lanes, p; rows `out_step` apart) = weights (lanes, n) . values; the weights are rounded, rows `step` floats apart */
void mix_pairs(const float *weights, long step, long lanes, const void *const *value, long n, long p, float *out,
               long out_step);
#endif

/* What tiled_attention.c works on, and how keys and values become the weights of its products. */
#pragma once
#include "attention.h"
#include "pairs.h"

#define KEYS 512 /* a tile's keys, values and scores lie in a core's second cache */
#define LANES 96 /* queries times heads in a tile, about */

typedef struct {
    long query, head;
    Span span;
} Lane;

/* What a query has of one or more tiles: the mixture (p) is not yet divided by the mass. Stored as p + 2 floats: mixture,
 * mass, top */
typedef struct {
    const AttentionPass *in;
    const AttentionOptions *how;
    const char *own_key, *own_value; /* a block's, of the cache's type */
    long own_batch[2], own_token[2]; /* distances in bytes, of keys and values */
    long queries, tiles, key_tiles;  /* queries in a tile; tiles of queries; most tiles of keys */
    int pairs;                       /* products of bf16 */
} Plan;

/* One thread's room for a tile */
typedef struct {
    const void *key[2 * KEYS + AHEAD], **value; /* of each place, zeros where no query of the tile sees it; see AHEAD */
    float *zeros;
    Lane *lanes;
    float *query, *keys, *values, *scores, *part, *total;
    const float **rows;
    long num_lanes, row, group;
} Tile;

/* VL floats of a row of p from `first` on, zeros behind its end */
INLINE vf part_of(const void *row, int bf16, long first, long p) {
    const long n = p - first < VL ? p - first : VL;
    if (n <= 0) return (vf){0};
    return bf16 ? load_bf16((const uint16_t *)row + first, n) : load_part((const float *)row + first, n);
}

/* Keys as a weight of n outputs */
INLINE void pack_keys(const Plan *plan, const Tile *tile, long n, int bf16) {
    const long p = plan->in->p;
    for (long j = 0; j < n; j += VL)
        for (long first = 0; first < p; first += VL) {
            float *to = tile->keys + (j / NR * p + first) * NR + j % NR;
            vf rows[VL];
#pragma GCC unroll 16
            for (int k = 0; k < VL; k++) {
                fetch(tile->key[j + k + AHEAD], first * (bf16 ? 2 : 4));
                rows[k] = part_of(tile->key[j + k], bf16, first, p);
            }
            transpose(rows);
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++)
                if (first + i < p) store(to + i * NR, rows[i]);
        }
}

/* Values as a weight of n inputs */
INLINE void pack_values(const Plan *plan, const Tile *tile, long n, int bf16) {
    const long p = plan->in->p;
    float *to = tile->values;
    for (long panel = 0; panel < p; panel += NR)
        for (long j = 0; j < n; j++)
            for (long first = panel; first < panel + NR; first += VL, to += VL) {
                fetch(tile->value[j + AHEAD], first * (bf16 ? 2 : 4));
                store(to, part_of(tile->value[j], bf16, first, p));
            }
}

/* `what` is one of the two above; constants make a loop for each type */
#define PACK(what, plan, tile, n) (plan)->in->bf16 ? what(plan, tile, n, 1) : what(plan, tile, n, 0)

/* What the two ways of attending share. A query that sees few keys goes over them alone (attention.c): what it adds, and in
 * which order, is as it was before there were tiles. One that sees many shares tiles of keys with others
 * (tiled_attention.c). Which way a query takes depends on nothing but the keys that it sees. */
#pragma once
#include "kernels.h"

#define FEW 512 /* keys; where the cache holds bf16, every query is tiled */

/* The keys that a query sees lie side by side: places [from, to) of the past with the block's own behind it */
typedef struct {
    long from, to;
} Span;

INLINE Span seen(const AttentionPass *in, const AttentionOptions *how, long row, long i) {
    const long start = in->starts[row], place = start + i;
    Span span = {0, in->causal ? place + 1 : start + in->ends[row]};
    if (how->window) {
        span.from = place + 1 - how->window;
        span.to = place + how->window < span.to ? place + how->window : span.to;
    }
    if (how->chunk) {
        const long first = place / how->chunk * how->chunk;
        span.from = first > span.from ? first : span.from;
        span.to = first + how->chunk < span.to ? first + how->chunk : span.to;
    }
    span.from = span.from > 0 ? span.from : 0;
    return span;
}

INLINE int is_tiled(const AttentionPass *in, Span span) { return in->bf16 || span.to - span.from > FEW; }

/* The queries that are tiled; 1 where there is no memory, else 0 */
int attend_in_tiles(const AttentionPass *in, const AttentionOptions *how);

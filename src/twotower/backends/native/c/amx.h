/* Products in the CPU's own matrix tiles (AMX): of rows of bf16 with a packed weight (amx.c), and attention's with the rows
 * of a cache (amx_attention.c). A tile has 16 rows, so that a block of 16 tokens costs hardly more than one token where
 * reading the weight is what takes time. */
#pragma once
#include "linear.h"

#if defined(__AMX_BF16__) && BF16_PAIRS && defined(__linux__)
#define AMX 1
#else
#define AMX 0
#endif

#if AMX
#define PAIRS 16 /* of inputs in a tile, 64 bytes of a row */
#define TILE 16  /* rows of a tile at most, and outputs */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

/* Tiles 0 to 3 hold sums and 4 and 5 rows of the caller's, `height` of each; 6 and 7 16 pairs of inputs of 16 outputs. */
INLINE void configure(long height) {
    TileConfig config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = tile < 6 ? (uint8_t)height : PAIRS;
    }
    _tile_loadconfig(&config);
}

INLINE void clear_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* The sums of two tiles of rows with 2 TILE outputs, or of one with twice as many: rows of `step` floats to `first`, `second` */
INLINE void store_sums(float *first, float *second, long step) {
    _tile_stored(0, first, step * 4);
    _tile_stored(1, first + TILE, step * 4);
    if (!second) return;
    _tile_stored(2, second, step * 4);
    _tile_stored(3, second + TILE, step * 4);
}

/* Rows go in groups of one tile or two, all of one height. Groups and tiles may overlap: a row that is computed twice has the
 * same bits twice. The second tile of a group lies `below` rows under the first; 0 where there is none. */
typedef struct {
    long groups, group, height, below;
} Groups;

INLINE Groups groups_of(long rows) {
    Groups by = {.groups = (rows + 2 * TILE - 1) / (2 * TILE)};
    by.group = (rows + by.groups - 1) / by.groups;
    by.height = by.group > TILE ? (by.group + 1) / 2 : by.group;
    by.below = by.group - by.height;
    return by;
}

INLINE long begin_of(const Groups *by, long i, long rows) { return i < by->groups - 1 ? i * by->group : rows - by->group; }
#endif

/* Whether this process may use tiles. The system has to be asked once; it says no in some sandboxes. The same answer always:
 * tiles add in an order of their own, so that every product of a process goes through them or none does. */
int has_tiles(void);

/* panels() of linear.h for r prepared rows, which lie `stride` bytes apart and are padded with zeros to a multiple of
 * ROW_STEP */
void amx_panels(const Weight *w, long from, long to, const void *rows, long stride, float *const *y, long r,
                const float *bias, int squared_relu);

/* As score_pairs and mix_pairs of pairs.h */
void amx_scores(const int32_t *query, long width, long lanes, const void *const *key, long n, long p, float *scores,
                long step);
void amx_mix(const float *weights, long step, long lanes, const void *const *value, long n, long p, float *out,
             long out_step);

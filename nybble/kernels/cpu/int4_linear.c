/* y = x · Wᵀ + bias with 4-bit W.
 *
 * W lies in tiles of TILE output columns: [tile][k / 8][TILE] words of 32 bits; nibble i of a word is the code of its
 * column at k + i. A tile is read once, front to back; lanes are columns, so nothing is ever added across lanes. scales
 * and zeros are [tile][group][TILE].
 *
 * A code is masked where it stands and converted: q · 16^i. That is two instructions for a vector of weights, because
 * the activations are made once as x · 16^-i, which is exact. Zero points cost nothing in the inner loop:
 *
 *     y += scale · (Σ q·x − zero · Σ x)          for each group of k, all in fp32
 *
 * Each y is one chain of fused multiply-adds in the order of k, whatever the shape of the block it is computed in. So a
 * row's result depends neither on how many other rows there are nor on the number of threads.
 */
#include <string.h>

#include "threads.h"
#include "vectors.h"

#define TILE 32
#define VECTORS (TILE / LANES)
#define BLOCK_ROWS 4
#define CHUNK_ROWS 96 /* whose sums are kept at once, on the stack */

struct weight { /* known to the Python side */
    const uint32_t *codes; /* [tiles, in_features / 8, TILE] */
    const void *scales;    /* [tiles, groups, TILE] of scale_type */
    const uint8_t *zeros;  /* [tiles, groups, TILE] */
    int64_t in_features, out_features, group_size, scale_type;
};

struct job {
    const struct weight *weight;
    const void *x, *bias; /* [rows, in_features], [out_features] or NULL; of `type`, as y */
    void *y;              /* [rows, out_features] */
    float *shifted;       /* [rows, in_features]: x · 16^-i */
    float *sums;          /* [rows, groups]: Σx */
    int64_t rows, groups;
    enum type type;
};

INLINE void shift(const struct job *j, enum type type, int64_t row) {
    static const float powers[16] = {1, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 1,
                                     1, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 1};
    const int64_t group_size = j->weight->group_size;
    for (int64_t group = 0, at = row * j->weight->in_features; group < j->groups; group++) {
        floats sum = {0};
        for (int64_t k = 0; k < group_size; k += LANES, at += LANES) {
            const floats x = load(type, j->x, at);
            *(floats *)(j->shifted + at) = x * *(const floats *)(powers + k % 8);
            sum += x;
        }
        j->sums[row * j->groups + group] = sum_of(sum);
    }
}

static void shift_row(const void *job, int64_t row) {
    const struct job *j = job;
    if (j->type == FLOAT32)
        shift(j, FLOAT32, row);
    else if (j->type == BFLOAT16)
        shift(j, BFLOAT16, row);
    else
        shift(j, FLOAT16, row);
}

/* Nibble i of each word, times 16^i; the topmost is moved down instead: it would reach the sign. */
INLINE floats code(words w, int i) {
    const words q = i < 7 ? (words)(w & (15u << 4 * i)) : (words)(w >> 28);
    return __builtin_convertvector((ints)q, floats);
}

struct group { /* one group of k in one tile */
    const uint32_t *codes;
    floats scales[VECTORS], zeros[VECTORS];
};

/* y[rows][TILE] += one group's products, in `vectors` vectors from `first` on. rows and vectors are constants where it
 * is inlined: rows · vectors sums in registers hide the latency of an addition. x and sums point at the first row. */
INLINE void block(int rows, int vectors, const struct job *j, const struct group *g, int first, const float *x,
                  const float *sums, float *y) {
    const int64_t x_stride = j->weight->in_features, group_size = j->weight->group_size;
    const uint32_t *codes = g->codes + first * LANES;
    floats acc[BLOCK_ROWS][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) acc[r][v] = (floats){0};
    for (int64_t k = 0; k < group_size; k += 8, codes += TILE, x += 8) {
        if (rows <= 2) { /* memory is the limit; the hardware looks less far ahead. Past the end it does nothing. */
            __builtin_prefetch((const char *)codes + 2048);
            __builtin_prefetch((const char *)codes + 2048 + 64);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            for (int v = 0; v < vectors; v++) {
                const floats q = code(*(const words *)(codes + v * LANES), i);
                for (int r = 0; r < rows; r++) acc[r][v] += x[r * x_stride + i] * q;
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            floats *total = (floats *)(y + r * TILE + (first + v) * LANES);
            *total += g->scales[first + v] * (acc[r][v] - g->zeros[first + v] * sums[r * j->groups]);
        }
}

/* Functions of their own: inlined into one another they would compete for registers, and the sums would lose. */
#define BLOCK(name, rows, vectors)                                                                                \
    static __attribute__((noinline)) void name(const struct job *j, const struct group *g, const float *x,        \
                                               const float *sums, float *y) {                                     \
        for (int first = 0; first < VECTORS; first += (vectors)) block(rows, vectors, j, g, first, x, sums, y);   \
    }
#define HALF (LANES == 16 ? VECTORS : VECTORS / 2) /* AVX-512 has registers for all columns of four rows */
BLOCK(one_row, 1, VECTORS)
BLOCK(two_rows, 2, VECTORS)
BLOCK(three_rows, 3, HALF)
BLOCK(four_rows, BLOCK_ROWS, HALF)

static void group_rows(const struct job *j, const struct group *g, int64_t rows, const float *x, const float *sums,
                       float *y) {
    for (; rows >= BLOCK_ROWS; rows -= BLOCK_ROWS) {
        four_rows(j, g, x, sums, y);
        x += BLOCK_ROWS * j->weight->in_features;
        sums += BLOCK_ROWS * j->groups;
        y += BLOCK_ROWS * TILE;
    }
    if (rows == 3) three_rows(j, g, x, sums, y);
    if (rows == 2) two_rows(j, g, x, sums, y);
    if (rows == 1) one_row(j, g, x, sums, y);
}

static void write_rows(const struct job *j, int64_t first, int64_t rows, int64_t column, const float *y) {
    const int64_t out_features = j->weight->out_features, left = out_features - column;
    const int64_t size = j->type == FLOAT32 ? 4 : 2;
    char line[TILE * sizeof(float)];
    for (int64_t r = 0; r < rows; r++, y += TILE) {
        for (int c = 0; c < TILE; c += LANES) store(j->type, line, c, *(const floats *)(y + c));
        memcpy((char *)j->y + ((first + r) * out_features + column) * size, line, (left < TILE ? left : TILE) * size);
    }
}

static void multiply_tile(const void *job, int64_t tile) {
    const struct job *j = job;
    const struct weight *w = j->weight;
    const int64_t column = tile * TILE;
    float y[CHUNK_ROWS * TILE], bias[TILE] = {0};
    for (int c = 0; j->bias && c < TILE && column + c < w->out_features; c++)
        bias[c] = load_one(j->type, j->bias, column + c);
    for (int64_t first = 0; first < j->rows; first += CHUNK_ROWS) {
        const int64_t rows = j->rows - first < CHUNK_ROWS ? j->rows - first : CHUNK_ROWS;
        for (int64_t r = 0; r < rows; r++) memcpy(y + r * TILE, bias, sizeof bias);
        for (int64_t n = 0; n < j->groups; n++) {
            const int64_t k = n * w->group_size, at = (tile * j->groups + n) * TILE;
            struct group g = {w->codes + (tile * w->in_features + k) / 8 * TILE, {{0}}, {{0}}};
            for (int v = 0; v < VECTORS; v++) {
                g.scales[v] = load(w->scale_type, w->scales, at + v * LANES);
                g.zeros[v] = __builtin_convertvector(*(const bytes *)(w->zeros + at + v * LANES), floats);
            }
            group_rows(j, &g, rows, j->shifted + first * w->in_features + k, j->sums + first * j->groups + n, y);
        }
        write_rows(j, first, rows, column, y);
    }
}

/* scratch: rows · (in_features + groups) floats; y need not be initialized. */
void int4_linear(const struct weight *weight, const void *x, const void *bias, void *y, float *scratch, int64_t rows,
                 int64_t type, parallel *run, int64_t threads) {
    const struct threads pool = {run, threads};
    const int64_t tiles = (weight->out_features + TILE - 1) / TILE, elements = rows * weight->in_features;
    const struct job job = {.weight = weight, .x = x, .bias = bias, .y = y, .shifted = scratch,
                            .sums = scratch + elements, .rows = rows, .type = (enum type)type,
                            .groups = weight->in_features / weight->group_size};
    for_each(pool, elements, rows, shift_row, &job);
    for_each(pool, elements * weight->out_features, tiles, multiply_tile, &job);
}

/* y = x · Wᵀ with W [out_features, in_features] in 16 bits, as torch keeps it.
 *
 * Lanes are consecutive k. A piece of work is PIECE_ROWS rows of W; they stay in the L2 cache while blocks of up to
 * BLOCK_ROWS rows of x pass over them. Each y is one chain of fused multiply-adds for each lane and one addition across
 * lanes at the end, whatever else is computed with it: the result does not depend on the number of rows or threads.
 */
#include "threads.h"
#include "vectors.h"

#define PIECE_ROWS 32
#define BLOCK_ROWS 4
#define COLUMNS 4 /* most rows of W at a time */

struct job {
    const void *x, *weight; /* [rows, in_features], [out_features, in_features] of `type` */
    void *y;                /* [rows, out_features] of y_type */
    float *wide;            /* [rows, in_features]: x in fp32 */
    int64_t rows, in_features, out_features;
    enum type type, y_type;
};

static void widen_row(const void *job, int64_t row) {
    const struct job *j = job;
    for (int64_t k = row * j->in_features; k < (row + 1) * j->in_features; k += LANES)
        *(floats *)(j->wide + k) = load(j->type, j->x, k);
}

INLINE void store_one(const struct job *j, int64_t row, int64_t column, float value) {
    const int64_t at = row * j->out_features + column;
    const floats f = {value};
    if (j->y_type == FLOAT32)
        ((float *)j->y)[at] = value;
    else
        ((uint16_t *)j->y)[at] = (uint16_t)(j->y_type == BFLOAT16 ? to_bfloat16(f) : to_float16(f))[0];
}

/* y[row …][column …]; the type and both counts are constants where this is inlined. */
INLINE void block(enum type type, int rows, int columns, const struct job *j, int64_t row, int64_t column) {
    const int64_t size = j->in_features;
    const float *x = j->wide + row * size;
    const uint16_t *weight = (const uint16_t *)j->weight + column * size;
    floats acc[BLOCK_ROWS][COLUMNS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) acc[r][c] = (floats){0};
    for (int64_t k = 0; k < size; k += LANES)
        for (int c = 0; c < columns; c++) {
            /* The hardware follows a row, but not from its end to the next rows: these are asked for early. */
            __builtin_prefetch(weight + (columns + c) * size + k);
            const floats w = load(type, weight + c * size, k);
            for (int r = 0; r < rows; r++) acc[r][c] += *(const floats *)(x + r * size + k) * w;
        }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) store_one(j, row + r, column + c, sum_of(acc[r][c]));
}

INLINE void columns_of(enum type type, int rows, const struct job *j, int64_t row, int64_t begin, int64_t end) {
    const int columns = rows <= 2 ? COLUMNS : COLUMNS / 2; /* 4 to 8 sums in registers hide an addition's latency */
    for (; begin + columns <= end; begin += columns) block(type, rows, columns, j, row, begin);
    for (; begin < end; begin++) block(type, rows, 1, j, row, begin);
}

INLINE void multiply(enum type type, const struct job *j, int64_t begin, int64_t end) {
    int64_t row = 0;
    for (; row + BLOCK_ROWS <= j->rows; row += BLOCK_ROWS) columns_of(type, BLOCK_ROWS, j, row, begin, end);
    switch (j->rows - row) {
    case 3: columns_of(type, 3, j, row, begin, end); break;
    case 2: columns_of(type, 2, j, row, begin, end); break;
    case 1: columns_of(type, 1, j, row, begin, end); break;
    default: break;
    }
}

static void multiply_piece(const void *job, int64_t piece) {
    const struct job *j = job;
    const int64_t begin = piece * PIECE_ROWS, left = j->out_features - begin;
    const int64_t end = begin + (left < PIECE_ROWS ? left : PIECE_ROWS);
    if (j->type == BFLOAT16)
        multiply(BFLOAT16, j, begin, end);
    else
        multiply(FLOAT16, j, begin, end);
}

/* scratch: rows · in_features floats; y need not be initialized. */
void dense_linear(const void *x, const void *weight, void *y, float *scratch, int64_t rows, int64_t in_features,
                  int64_t out_features, int64_t type, int64_t y_type, parallel *run, int64_t threads) {
    const struct threads pool = {run, threads};
    const struct job job = {x, weight, y, scratch, rows, in_features, out_features, (enum type)type, (enum type)y_type};
    for_each(pool, rows * in_features, rows, widen_row, &job);
    const int64_t pieces = (out_features + PIECE_ROWS - 1) / PIECE_ROWS;
    for_each(pool, rows * in_features * out_features, pieces, multiply_piece, &job);
}

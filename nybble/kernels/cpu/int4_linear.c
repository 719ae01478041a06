/* y = x · W^T for a 4-bit W, on any CPU with vectors of floats; GCC and Clang vector extensions, no intrinsics.
 *
 * W is stored in tiles of 32 output columns. Eight consecutive k of a tile are 32 words of 32 bits, one a column; nibble s
 * of a word is the code of the s-th k. scales and zeros are [tile][group][32]. All sums are fp32: the result is as exact as
 * a float GEMM's.
 *
 * Few rows: a code is masked in place and converted, so it is 16^s times too large; the caller gives x a second time with
 * every k multiplied by 16^-(k mod 8), which is exact. A group's sum is corrected by zero · Σx before the scale is applied.
 * Many rows: a group of a tile becomes floats in a scratch of at most 32 KB that serves all rows.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define TILE 32
#define VECTORS 4 /* of 8 floats: one tile row */
#define MAX_GROUP 256
#define FEW_ROWS 4
#define ROWS 6 /* 6 rows × 16 columns = 12 accumulators: what 16 vector registers can feed */

typedef float f8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t i8 __attribute__((vector_size(32), aligned(4)));
typedef uint32_t u8 __attribute__((vector_size(32), aligned(4)));

#define INLINE static inline __attribute__((always_inline))

INLINE f8 load(const float *p) { return *(const f8 *)p; }

/* Nibble s of each word, times 16^s; the topmost one is shifted down, because it would reach the sign. */
INLINE f8 nibble(u8 words, int s) {
    const u8 code = s < 7 ? words & (15u << 4 * s) : words >> 28;
    return __builtin_convertvector((i8)code, f8);
}

/* y[rows][TILE] for one tile; `rows` is 1 or 2, a constant where inlined. */
INLINE void few_rows(int rows, const float *x, const float *x_shifted, ptrdiff_t x_stride, const uint32_t *tile,
                     const float *scales, const float *zeros, ptrdiff_t groups, ptrdiff_t group_size, float *y,
                     ptrdiff_t y_stride) {
    f8 acc[2][VECTORS] = {{{0}}};
    for (ptrdiff_t g = 0; g < groups; g++, scales += TILE, zeros += TILE) {
        f8 part[2][VECTORS] = {{{0}}}; /* of row r; a single row has two chains, to hide the latency of additions */
        f8 sums[2] = {{0}};
        for (ptrdiff_t k = g * group_size; k < (g + 1) * group_size; k += 8, tile += 8 * TILE / 8) {
            for (int r = 0; r < rows; r++) sums[r] += load(x + r * x_stride + k);
            for (int v = 0; v < VECTORS; v++) {
                const u8 words = *(const u8 *)(tile + 8 * v);
                for (int s = 0; s < 8; s++) {
                    const f8 w = nibble(words, s);
                    if (rows == 1)
                        part[s & 1][v] += x_shifted[k + s] * w;
                    else
                        for (int r = 0; r < rows; r++) part[r][v] += x_shifted[r * x_stride + k + s] * w;
                }
            }
        }
        for (int r = 0; r < rows; r++) {
            float sum = 0;
            for (int i = 0; i < 8; i++) sum += sums[r][i];
            for (int v = 0; v < VECTORS; v++) {
                const f8 total = rows == 1 ? part[0][v] + part[1][v] : part[r][v];
                acc[r][v] += load(scales + 8 * v) * (total - load(zeros + 8 * v) * sum);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) *(f8 *)(y + r * y_stride + 8 * v) = acc[r][v];
}

/* y[rows][16] += x[rows][group_size] · w[group_size][TILE], 16 columns of it; `rows` is a constant where inlined. */
INLINE void block(int rows, const float *x, ptrdiff_t x_stride, const float *w, ptrdiff_t group_size, float *y,
                  ptrdiff_t y_stride) {
    f8 acc[ROWS][2];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2; v++) acc[r][v] = load(y + r * y_stride + 8 * v);
    for (ptrdiff_t k = 0; k < group_size; k++, w += TILE) {
        const f8 a = load(w), b = load(w + 8);
        for (int r = 0; r < rows; r++) {
            const float scalar = x[r * x_stride + k];
            acc[r][0] += scalar * a;
            acc[r][1] += scalar * b;
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2; v++) *(f8 *)(y + r * y_stride + 8 * v) = acc[r][v];
}

static void many_rows(const float *x, ptrdiff_t rows, ptrdiff_t in_features, const uint32_t *tile, const float *scales,
                      const float *zeros, ptrdiff_t group_size, float *y, ptrdiff_t y_stride) {
    float w[MAX_GROUP * TILE];
    for (ptrdiff_t r = 0; r < rows; r++) memset(y + r * y_stride, 0, TILE * sizeof *y);
    for (ptrdiff_t first = 0; first < in_features; first += group_size, scales += TILE, zeros += TILE) {
        for (ptrdiff_t k = 0; k < group_size; k += 8, tile += TILE)
            for (int v = 0; v < VECTORS; v++) {
                const u8 words = *(const u8 *)(tile + 8 * v);
                const f8 scale = load(scales + 8 * v), zero = load(zeros + 8 * v);
                for (int s = 0; s < 8; s++) {
                    const f8 code = __builtin_convertvector((i8)((words >> 4 * s) & 15u), f8);
                    *(f8 *)(w + (k + s) * TILE + 8 * v) = (code - zero) * scale;
                }
            }
        for (ptrdiff_t r = 0; r < rows; r += ROWS) {
            const float *xr = x + r * in_features + first;
            for (int half = 0; half < TILE; half += 16) {
                float *yr = y + r * y_stride + half;
                switch (rows - r) {
                case 1: block(1, xr, in_features, w + half, group_size, yr, y_stride); break;
                case 2: block(2, xr, in_features, w + half, group_size, yr, y_stride); break;
                case 3: block(3, xr, in_features, w + half, group_size, yr, y_stride); break;
                case 4: block(4, xr, in_features, w + half, group_size, yr, y_stride); break;
                case 5: block(5, xr, in_features, w + half, group_size, yr, y_stride); break;
                default: block(ROWS, xr, in_features, w + half, group_size, yr, y_stride);
                }
            }
        }
    }
}

/* x [rows, in_features] → y [rows, tiles · 32], contiguous; y need not be initialized. x_shifted holds x · 16^-(k mod 8),
 * with 1 in place of 16^-7 where k mod 8 is 7; it is read for at most FEW_ROWS rows. group_size: a multiple of 8. */
void int4_linear(const float *x, const float *x_shifted, const uint32_t *words, const float *scales, const float *zeros,
                 float *y, int64_t rows, int64_t in_features, int64_t tiles, int64_t group_size, int threads) {
    const ptrdiff_t groups = in_features / group_size, y_stride = tiles * TILE;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tiles; t++) {
        const uint32_t *tile = words + t * in_features * (TILE / 8);
        const float *s = scales + t * groups * TILE, *z = zeros + t * groups * TILE;
        float *yt = y + t * TILE;
        if (rows > FEW_ROWS) {
            many_rows(x, rows, in_features, tile, s, z, group_size, yt, y_stride);
            continue;
        }
        ptrdiff_t r = 0;
        for (; r + 2 <= rows; r += 2)
            few_rows(2, x + r * in_features, x_shifted + r * in_features, in_features, tile, s, z, groups, group_size,
                     yt + r * y_stride, y_stride);
        if (r < rows)
            few_rows(1, x + r * in_features, x_shifted + r * in_features, in_features, tile, s, z, groups, group_size,
                     yt + r * y_stride, y_stride);
    }
}

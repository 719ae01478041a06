/* What is done to each token's row on its own: norm, activation, rotation, and the way into the cache.
 *
 * Meanings and shapes: rms_norm.py, silu_mul.py, rotary.py and kv_write.py in nybble/kernels. Sums and products are in
 * fp32 and rounded once; a row is one piece of work, so its result depends on no other.
 */
#include <string.h>

#include "threads.h"
#include "vectors.h"

/* Call `function(type constant, …)`: each type gets code of its own. */
#define FOR_TYPE(type, function, ...)                                \
    do {                                                             \
        if ((type) == FLOAT32)                                       \
            function(FLOAT32, __VA_ARGS__);                          \
        else if ((type) == BFLOAT16)                                 \
            function(BFLOAT16, __VA_ARGS__);                         \
        else                                                         \
            function(FLOAT16, __VA_ARGS__);                          \
    } while (0)

struct norm { /* rows x_stride apart in x; residual: NULL, and then total too */
    const void *x, *weight, *residual;
    void *y, *total;
    int64_t x_stride, size;
    double eps;
    enum type type;
};

INLINE void norm_as(enum type type, const struct norm *n, int64_t row) {
    const int64_t from = row * n->x_stride, to = row * n->size;
    const void *source = n->residual ? n->total : n->x;
    const int64_t at = n->residual ? to : from;
    floats squares = {0};
    for (int64_t i = 0; i < n->size; i += LANES) {
        if (n->residual) store(type, n->total, to + i, load(type, n->x, from + i) + load(type, n->residual, to + i));
        const floats r = load(type, source, at + i); /* as it was rounded */
        squares += r * r;
    }
    const float inverse = 1 / __builtin_sqrtf(sum_of(squares) / (float)n->size + (float)n->eps);
    for (int64_t i = 0; i < n->size; i += LANES)
        store(type, n->y, to + i, load(type, source, at + i) * inverse * load(type, n->weight, i));
}

static void norm_row(const void *job, int64_t row) {
    const struct norm *n = job;
    FOR_TYPE(n->type, norm_as, n, row);
}

void rms_norm(const void *x, const void *weight, const void *residual, void *y, void *total, int64_t rows,
              int64_t x_stride, int64_t size, double eps, int64_t type, parallel *run, int64_t threads) {
    const struct norm job = {x, weight, residual, y, total, x_stride, size, eps, (enum type)type};
    for_each((struct threads){run, threads}, 4 * rows * size, rows, norm_row, &job);
}

struct gate {
    const void *gate_up;
    void *y;
    int64_t size;
    enum type type;
};

INLINE void gate_as(enum type type, const struct gate *g, int64_t row) {
    for (int64_t i = 0; i < g->size; i += LANES) {
        const floats a = load(type, g->gate_up, 2 * row * g->size + i);
        const floats up = load(type, g->gate_up, (2 * row + 1) * g->size + i);
        const floats e = exponential((floats)((words)a | 0x80000000)); /* e^-|a| does not overflow */
        const floats part = select(a < 0, (words)e, (words)((floats){0} + 1));
        store(type, g->y, row * g->size + i, a * part / (1 + e) * up);
    }
}

static void gate_row(const void *job, int64_t row) {
    const struct gate *g = job;
    FOR_TYPE(g->type, gate_as, g, row);
}

void silu_mul(const void *gate_up, void *y, int64_t rows, int64_t size, int64_t type, parallel *run, int64_t threads) {
    const struct gate job = {gate_up, y, size, (enum type)type};
    for_each((struct threads){run, threads}, 16 * rows * size, rows, gate_row, &job);
}

struct turn {
    void *x[2];                     /* queries and keys: token x_stride apart, heads head_dim */
    int64_t x_stride[2], heads[2];
    const int64_t *positions;
    const float *cos_sin;           /* [positions, 2 · half]: cosines, then sines */
    int64_t head_dim, half;
    enum type type;
};

INLINE void turn_as(enum type type, const struct turn *t, int64_t token) {
    const float *cosines = t->cos_sin + 2 * t->half * t->positions[token], *sines = cosines + t->half;
    for (int which = 0; which < 2; which++)
        for (int64_t head = 0; head < t->heads[which]; head++) {
            const int64_t first = token * t->x_stride[which] + head * t->head_dim;
            for (int64_t i = 0; i < t->half; i += LANES) {
                const floats cosine = *(const floats *)(cosines + i), sine = *(const floats *)(sines + i);
                const floats a = load(type, t->x[which], first + i), b = load(type, t->x[which], first + t->half + i);
                store(type, t->x[which], first + i, a * cosine - b * sine);
                store(type, t->x[which], first + t->half + i, b * cosine + a * sine);
            }
        }
}

static void turn_row(const void *job, int64_t token) {
    const struct turn *t = job;
    FOR_TYPE(t->type, turn_as, t, token);
}

void rotary(void *q, void *k, const int64_t *positions, const float *cos_sin, int64_t tokens, int64_t q_stride,
            int64_t k_stride, int64_t q_heads, int64_t k_heads, int64_t head_dim, int64_t half, int64_t type,
            parallel *run, int64_t threads) {
    const struct turn job = {{q, k}, {q_stride, k_stride}, {q_heads, k_heads}, positions, cos_sin,
                             head_dim, half, (enum type)type};
    for_each((struct threads){run, threads}, 8 * tokens * (q_heads + k_heads) * half, tokens, turn_row, &job);
}

struct keep { /* bytes throughout: nothing is computed */
    const char *k, *v;
    char *keys, *values;
    const int64_t *slots;
    int64_t k_stride, v_stride, heads, head_bytes, block_size;
};

static void keep_row(const void *job, int64_t token) {
    const struct keep *s = job;
    const int64_t slot = s->slots[token], block = slot / s->block_size, offset = slot % s->block_size;
    if (slot < 0) return;
    for (int64_t head = 0; head < s->heads; head++) {
        const int64_t to = ((block * s->heads + head) * s->block_size + offset) * s->head_bytes;
        const int64_t from = head * s->head_bytes;
        memcpy(s->keys + to, s->k + token * s->k_stride + from, s->head_bytes);
        memcpy(s->values + to, s->v + token * s->v_stride + from, s->head_bytes);
    }
}

void kv_write(const void *k, const void *v, void *keys, void *values, const int64_t *slots, int64_t tokens,
              int64_t k_stride, int64_t v_stride, int64_t heads, int64_t head_bytes, int64_t block_size, parallel *run,
              int64_t threads) {
    const struct keep job = {k, v, keys, values, slots, k_stride, v_stride, heads, head_bytes, block_size};
    for_each((struct threads){run, threads}, tokens * heads * head_bytes, tokens, keep_row, &job);
}

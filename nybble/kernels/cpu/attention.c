/* Causal attention over the paged cache. Meaning and shapes: nybble/kernels/attention.py.
 *
 * A piece of work is a few tokens of one sequence with the query heads of one KV head, so that keys and values are
 * read once for all of them, KEYS at a time. The softmax is corrected as its maximum grows (Milakov and Gimelshein
 * 2018).
 *
 * All in fp32. Chunks of keys begin at multiples of KEYS and a hidden key counts as exactly nothing, so without a window
 * a token's result depends neither on its neighbours in the step nor on the number of threads.
 */
#include <string.h>

#include "threads.h"
#include "vectors.h"

#define KEYS 16
#define VECTORS (KEYS / LANES)
#define MOST_ROWS 16 /* pairs of token and head in a piece */
#define MOST_DIM 256
#define PART 4 /* vectors of a head summed together: enough to hide the latency of an addition */
#define NOTHING -1e30f

struct attention { /* known to the Python side */
    const void *q;             /* [tokens, heads, head_dim], tokens q_stride apart */
    const void *keys, *values; /* [blocks, kv_heads, block_size, head_dim] */
    void *output;              /* [tokens, heads, head_dim] */
    const int32_t *tables, *lengths, *starts; /* [sequences, table_stride], [sequences], [sequences + 1] */
    int64_t sequences, q_stride, table_stride, heads, kv_heads, head_dim, block_size;
    int64_t window; /* 0: none */
    int64_t type, most_queries, most_keys;
    double scale;
};

struct job {
    const struct attention *a;
    int64_t group, slice, slices; /* query heads of a KV head; at most as many in a piece; pieces of a group */
    int64_t tokens, pieces;       /* in a piece; pieces of a sequence's tokens */
};

struct state { /* of a piece's rows; a row is a token and a head */
    float q[MOST_ROWS][MOST_DIM], out[MOST_ROWS][MOST_DIM];
    floats sum[MOST_ROWS];
    float top[MOST_ROWS]; /* the largest score so far */
    int32_t position[MOST_ROWS];
    int64_t rows;
};

/* Scores of a row with LANES keys: for each the sums of every LANES-th dimension, then those as a tree. */
INLINE floats score(int64_t dim, const float *q, const float (*keys)[MOST_DIM]) {
    floats acc[LANES];
    for (int j = 0; j < LANES; j++) acc[j] = *(const floats *)q * *(const floats *)keys[j];
    for (int64_t d = LANES; d < dim; d += LANES)
        for (int j = 0; j < LANES; j++) acc[j] += *(const floats *)(q + d) * *(const floats *)(keys[j] + d);
    return sums_of(acc);
}

/* Scores to weights, in place: e^(score − top), 0 where the key is hidden. Returns what the sums so far shrink by. */
INLINE float weigh(struct state *s, int64_t row, int64_t key, int64_t count, int64_t window, float *scores) {
    const int32_t last = s->position[row], first = window ? last - (int32_t)window + 1 : 0;
    const int32_t end = (int32_t)(key + count);
    ints seen[VECTORS];
    floats values[VECTORS], most = (floats){0} + s->top[row];
    for (int v = 0; v < VECTORS; v++) {
        const ints j = lanes() + (int32_t)(key + v * LANES);
        seen[v] = (j <= last) & (j >= first) & (j < end);
        values[v] = select(seen[v], (words) * (floats *)(scores + v * LANES), (words)((floats){0} + NOTHING));
        most = largest(most, values[v]);
    }
    float top = most[0];
    for (int i = 1; i < LANES; i++) top = most[i] > top ? most[i] : top;
    const float shrink = exponential((floats){0} + (s->top[row] - top))[0];
    s->top[row] = top;
    s->sum[row] *= shrink;
    for (int v = 0; v < VECTORS; v++) {
        const floats x = values[v] - top, weight = exponential(x) + x * 0; /* a NaN must show */
        const floats kept = select(seen[v], (words)weight, (words)((floats){0}));
        *(floats *)(scores + v * LANES) = kept;
        s->sum[row] += kept;
    }
    return shrink;
}

/* Shrinks what a row has of `vectors` vectors of the head, and adds the weighted values. */
INLINE void add_part(int vectors, float *out, int64_t count, float shrink, const float *weights,
                     const float (*values)[MOST_DIM], int64_t d) {
    floats sum[PART];
    for (int v = 0; v < vectors; v++) sum[v] = *(const floats *)(out + d + v * LANES) * shrink;
    for (int64_t j = 0; j < count; j++)
        for (int v = 0; v < vectors; v++) sum[v] += weights[j] * *(const floats *)(values[j] + d + v * LANES);
    for (int v = 0; v < vectors; v++) *(floats *)(out + d + v * LANES) = sum[v];
}

INLINE void add_values(float *out, int64_t dim, int64_t count, float shrink, const float *weights,
                       const float (*values)[MOST_DIM]) {
    int64_t d = 0;
    for (; d + PART * LANES <= dim; d += PART * LANES) add_part(PART, out, count, shrink, weights, values, d);
    for (; d < dim; d += LANES) add_part(1, out, count, shrink, weights, values, d);
}

/* Keys key … key + count − 1, which lie side by side from `at` on. */
INLINE void chunk(const struct attention *a, enum type type, struct state *s, int64_t at, int64_t key, int64_t count) {
    const int64_t dim = a->head_dim;
    float keys[KEYS][MOST_DIM], values[KEYS][MOST_DIM], scores[KEYS];
    for (int64_t j = 0; j < KEYS; j++)
        for (int64_t d = 0; d < dim; d += LANES)
            if (j < count) {
                *(floats *)(keys[j] + d) = load(type, a->keys, at + j * dim + d);
                *(floats *)(values[j] + d) = load(type, a->values, at + j * dim + d);
            } else {
                *(floats *)(keys[j] + d) = (floats){0}; /* in memory past the end may be anything */
            }
    for (int64_t row = 0; row < s->rows; row++) {
        for (int v = 0; v < VECTORS; v++) *(floats *)(scores + v * LANES) = score(dim, s->q[row], keys + v * LANES);
        const float shrink = weigh(s, row, key, count, a->window, scores);
        add_values(s->out[row], dim, count, shrink, scores, values);
    }
}

INLINE void attend(const struct job *j, enum type type, int64_t index) {
    const struct attention *a = j->a;
    const int64_t slice = index % j->slices, kv_head = index / j->slices % a->kv_heads;
    const int64_t piece = index / j->slices / a->kv_heads % j->pieces;
    const int64_t sequence = index / j->slices / a->kv_heads / j->pieces;
    const int64_t begin = a->starts[sequence], queries = a->starts[sequence + 1] - begin, first = piece * j->tokens;
    if (first >= queries) return;
    const int64_t tokens = queries - first < j->tokens ? queries - first : j->tokens;
    const int64_t head = kv_head * j->group + slice * j->slice, left = j->group - slice * j->slice;
    const int64_t heads = left < j->slice ? left : j->slice, dim = a->head_dim, length = a->lengths[sequence];
    const int64_t position = length - queries + first; /* of the first token */
    const size_t size = type == FLOAT32 ? 4 : 2;

    struct state s;
    s.rows = tokens * heads;
    for (int64_t row = 0; row < s.rows; row++) {
        s.position[row] = (int32_t)(position + row / heads);
        s.top[row] = NOTHING;
        s.sum[row] = (floats){0};
        for (int64_t d = 0; d < dim; d += LANES) {
            const int64_t at = (begin + first + row / heads) * a->q_stride + (head + row % heads) * dim + d;
            *(floats *)(s.q[row] + d) = load(type, a->q, at) * (float)a->scale;
            *(floats *)(s.out[row] + d) = (floats){0};
        }
    }
    const int64_t end = length ? position + tokens : 0, oldest = position - a->window + 1;
    int64_t key = a->window && oldest > 0 ? oldest : 0;
    while (key < end) {
        const int64_t offset = key % a->block_size, in_block = a->block_size - offset, in_chunk = KEYS - key % KEYS;
        int64_t count = in_block < in_chunk ? in_block : in_chunk;
        count = end - key < count ? end - key : count;
        const int64_t block = a->tables[sequence * a->table_stride + key / a->block_size];
        chunk(a, type, &s, ((block * a->kv_heads + kv_head) * a->block_size + offset) * dim, key, count);
        key += count;
    }
    for (int64_t row = 0; row < s.rows; row++) {
        const float share = length ? 1 / sum_of(s.sum[row]) : 0;
        char *out = (char *)a->output + ((begin + first + row / heads) * a->heads + head + row % heads) * dim * size;
        for (int64_t d = 0; d < dim; d += LANES) store(type, out, d, *(floats *)(s.out[row] + d) * share);
    }
}

static void attend_piece(const void *job, int64_t index) {
    const struct job *j = job;
    if (j->a->type == FLOAT32)
        attend(j, FLOAT32, index);
    else if (j->a->type == BFLOAT16)
        attend(j, BFLOAT16, index);
    else
        attend(j, FLOAT16, index);
}

void attention(const struct attention *a, parallel *run, int64_t threads) {
    const struct threads pool = {run, threads};
    struct job job = {.a = a, .group = a->heads / a->kv_heads};
    job.slice = job.group < MOST_ROWS ? job.group : MOST_ROWS;
    job.slices = (job.group + job.slice - 1) / job.slice;
    job.tokens = MOST_ROWS / job.slice;
    job.pieces = (a->most_queries + job.tokens - 1) / job.tokens;
    const int64_t multiplications = 2 * a->starts[a->sequences] * a->heads * a->head_dim * a->most_keys;
    for_each(pool, multiplications, a->sequences * job.pieces * a->kv_heads * job.slices, attend_piece, &job);
}

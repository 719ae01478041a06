// What becomes of a warp's sums of 16 rows of y. A lane holds, for tokens 8 j + 2 (lane % 4) and its neighbour, those of row
// g = lane / 4 in sums[4 j], [4 j + 1] and of row g + 8 in [4 j + 2], [4 j + 3].
#pragma once
#include "w4a16_units.cuh"

#define EARLY_TURNS (ROTATED && !WGMMA)  // few tokens leave the registers for it

// What turns two features of a token's head into their places: rotation by an angle, and where the token goes in the cache.
struct Turn {
    float cosine, sine;
    int slot;  // negative: nowhere
};

template <class Target>
__device__ __forceinline__ void each_token(int tokens, int lane, Target target) {
#pragma unroll
    for (int i = 0; i < 2 * kTokenTiles; ++i) {
        const int token = i / 2 * 8 + 2 * (lane % 4) + i % 2;
        if (token < tokens) target(token, i / 2 * 4 + i % 2);
    }
}

// What results take besides sums: it is asked for before the last sums are there.
struct Early {
    float16 bias[2];  // of rows g and g + 8, as it lies in memory
#if EARLY_TURNS
    Turn turns[2 * kTokenTiles];  // of the lane's tokens
#endif
};

// `row`: row g of y; the other one is `apart` below it. Rows that y has not give 0.
__device__ __forceinline__ Early fetch_bias(const Linear& linear, int row, int apart) {
    Early early;
#pragma unroll
    for (int i = 0; i < 2; ++i)
        early.bias[i] = linear.bias && row + i * apart < linear.out_features ? linear.bias[row + i * apart] : 0;
    return early;
}

// y = sums + bias.
__device__ __forceinline__ void store_rows(const Linear& linear, const float (&sums)[kSums], const Early& early, int tokens,
                                           int first_row, int lane) {
    const int row = first_row + lane / 4;
    each_token(tokens, lane, [&](int token, int sum) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (row + 8 * i < linear.out_features)
                linear.y[(long long)token * linear.out_features + row + 8 * i] = from_float(sums[sum + 2 * i] + to_float(early.bias[i]));
    });
}

__device__ __forceinline__ float silu(float gate) { return gate / (1.f + __expf(-gate)); }

// y = silu(gate) * up; rows g and g + 8 of 16 are a gate and its up row.
__device__ __forceinline__ void store_gated(const Linear& linear, const float (&sums)[kSums], int tokens, int first_row, int lane) {
    const int feature = first_row / 2 + lane / 4;
    if (feature >= linear.half) return;
    each_token(tokens, lane, [&](int token, int sum) {
        linear.y[(long long)token * linear.half + feature] = from_float(silu(sums[sum]) * sums[sum + 2]);
    });
}

// Rotary embedding and where its results go.
struct Rotation {
    const long long* positions;  // [tokens]
    const long long* slots;      // [tokens], where in the cache; negative: nowhere
    const float* cos_sin;        // [positions, 2 half]: cosines, then sines
    float16 *key_cache, *value_cache;  // [blocks, kv_heads, block_size, 2 half]
    int q_heads, kv_heads, block_size;
};

// Rows g and g + 8 of 16 are the halves of a head that the embedding mixes.
struct HeadRows {
    int head, row;
    __device__ __forceinline__ HeadRows(const Linear& linear, int first_row, int lane)
        : head(first_row / 16 / (linear.half / 8)), row(first_row / 16 % (linear.half / 8) * 8 + lane / 4) {}
    __device__ __forceinline__ int index(const Linear& linear) const { return head * 2 * linear.half + row; }
};

__device__ __forceinline__ Turn find_turn(const Linear& linear, const Rotation& to, const HeadRows& rows, int token) {
    Turn turn{1.f, 0.f, int(to.slots[token])};
    if (rows.head < to.q_heads + to.kv_heads) {
        const float* angles = to.cos_sin + to.positions[token] * 2 * linear.half + rows.row;
        turn.cosine = angles[0], turn.sine = angles[linear.half];
    }
    return turn;
}

// Queries go to y, keys and values to the cache.
__device__ __forceinline__ void store_heads(const Linear& linear, const Rotation& to, const float (&sums)[kSums],
                                            const Early& early, int tokens, int first_row, int lane) {
    const HeadRows rows(linear, first_row, lane);
    if (rows.head >= to.q_heads + 2 * to.kv_heads) return;
    const int size = 2 * linear.half, kv_head = (rows.head - to.q_heads) % to.kv_heads;
    const bool is_query = rows.head < to.q_heads, is_value = rows.head >= to.q_heads + to.kv_heads;
    float16* cache = is_value ? to.value_cache : to.key_cache;
    each_token(tokens, lane, [&](int token, int sum) {
#if EARLY_TURNS
        const Turn& turn = early.turns[sum / 4 * 2 + sum % 2];
#else
        const Turn turn = find_turn(linear, to, rows, token);
#endif
        const float lower = sums[sum] + to_float(early.bias[0]), upper = sums[sum + 2] + to_float(early.bias[1]);
        float16* target = linear.y + (long long)token * to.q_heads * size + rows.index(linear);
        if (!is_query) {
            if (turn.slot < 0) return;
            const unsigned block = unsigned(turn.slot) / to.block_size, within = unsigned(turn.slot) % to.block_size;
            target = cache + (((long long)block * to.kv_heads + kv_head) * to.block_size + within) * size + rows.row;
        }
        target[0] = from_float(lower * turn.cosine - upper * turn.sine);
        target[linear.half] = from_float(upper * turn.cosine + lower * turn.sine);
    });
}

// What rows of heads take.
__device__ __forceinline__ Early fetch_turns(const Linear& linear, const Rotation& to, int tokens, int first_row, int lane) {
    const HeadRows rows(linear, first_row, lane);
    Early early = fetch_bias(linear, rows.index(linear), linear.half);
#if EARLY_TURNS
    each_token(tokens, lane, [&](int token, int sum) { early.turns[sum / 4 * 2 + sum % 2] = find_turn(linear, to, rows, token); });
#endif
    return early;
}

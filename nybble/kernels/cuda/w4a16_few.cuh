// consume() by mma.sync, for up to 16 tokens: 16 rows x 16 k of the weights are its A operand, 8 tokens its B operand. wgmma is
// no faster for 8 columns than for 64; this takes a third less time.
//
// Numbers. Zero points cost nothing inside: with S the sum of x over a group, sum (q - z) x = sum (1024 + q) x - (1024 + z) S,
// once a group and row. One warp sums x for the others.
#pragma once
#include "w4a16_results.cuh"

static_assert(kTokenTiles <= 2 && !FOLD, "");

__device__ __forceinline__ void load_matrices(unsigned (&b)[4], unsigned at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ float2 load_shared2(unsigned at) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at));
    return v;
}

// The B operands of a slot, 32 k (a quarter of its columns) at a time: b[0], b[1] of the first 16 k, b[2], b[3] of the others.
struct Columns {
    unsigned base;
    __device__ __forceinline__ Columns(const Shared& shared, int lane)
        : base(shared_address(shared.x[0]) + lane % 8 * 128 + (lane / 8 ^ lane % 8) * 16) {}
    __device__ __forceinline__ void load(unsigned (&b)[kTokenTiles][4], int slot, int quarter) const {
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j)
            load_matrices(b[j], (base ^ quarter % 2 * 64) + slot * kXBytes + quarter / 2 * (kXBytes / 2) + j * 1024);
    }
};

// What one warp does for all others: sums the columns of each slot, group by group.
__device__ __forceinline__ void sum_columns(Shared& shared, int steps, Place& place) {
    const int lane = threadIdx.x % 32;
    const Columns columns(shared, lane);
    constexpr unsigned kOnes = BF16 ? 0x3f803f80 : 0x3c003c00;
    const unsigned ones[4] = {kOnes, kOnes, kOnes, kOnes};
    for (int step = 0; step < steps; ++step, place.advance()) {
        barrier_wait(shared_address(&shared.full[place.slot]), place.parity);
        float sums[4][kTokenTiles][4];  // of 32 k each; all rows are the same
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter) {
            unsigned b[kTokenTiles][4];
            columns.load(b, place.slot, quarter);
#pragma unroll
            for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[quarter][j][i] = 0.f;
                mma(sums[quarter][j], ones, b[j][0], b[j][1]);
                mma(sums[quarter][j], ones, b[j][2], b[j][3]);
            }
        }
        constexpr int kQuarters = 4 / kGroups;  // of a group
        if (lane < 4)
#pragma unroll
            for (int i = 0; i < kGroups * kTokenTiles * 2; ++i) {
                const int group = i / 2 / kTokenTiles, j = i / 2 % kTokenTiles;
                float sum = sums[group * kQuarters][j][i % 2];
#pragma unroll
                for (int q = 1; q < kQuarters; ++q) sum += sums[group * kQuarters + q][j][i % 2];
                shared.x_sums[place.slot][group][j * 8 + 2 * lane + i % 2] = sum;
            }
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&shared.summed[place.slot]));
    }
}

// What a warp of the warpgroups does: its rows of all steps of block `mine`. `store(sums, early, first row)` takes finished sums
// and what `fetch(first row)` asked for before they were all there.
template <class Fetch, class Store>
__device__ __forceinline__ void consume(Shared& shared, const Linear& linear, const Parts& parts, int tokens, int mine, int warp,
                                        Place& place, Fetch fetch, Store store) {
    const int lane = threadIdx.x % 32, units_k = linear.units_k, begin = linear.begin(mine), end = linear.begin(mine + 1);
    const UnitPlaces at(shared_address(shared.units[0][warp / 4]), warp % 4, lane);
    const unsigned x_sums_at = shared_address(shared.x_sums) + lane % 4 * 8;
    const unsigned summed = shared_address(shared.summed), empty = shared_address(shared.empty);
    const Columns columns(shared, lane);
    const unsigned magic = opaque_magic();
    float out[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) out[i] = 0.f;

    for (int tile = begin / units_k, step = begin; step < end; ++tile) {
        for (const int stop = min(end, (tile + 1) * units_k); step < stop; ++step, place.advance()) {
            barrier_wait(summed + place.slot * 8, place.parity);
            const int offset = place.slot * kWarpgroups * kUnitBytes;
            float sums[kGroups][kSums];
            unsigned scales[kGroups], zeros[kGroups];
            float2 x_sums[kGroups][kTokenTiles];
#pragma unroll
            for (int g = 0; g < kGroups; ++g)
#pragma unroll
                for (int i = 0; i < kSums; ++i) sums[g][i] = 0.f;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint4 four = load_shared4(at.words + offset + half * 512);
                const unsigned words[4] = {four.x, four.y, four.z, four.w};
                unsigned b[2][kTokenTiles][4];
                columns.load(b[0], place.slot, 2 * half);
                columns.load(b[1], place.slot, 2 * half + 1);
#pragma unroll
                for (int s = 0; s < 4; ++s) {
                    const unsigned word = words[s], high = word >> 8;
                    const unsigned a[4] = {pick<0x000f000f>(word, magic),
                                           kHigh ? pick<0x00f000f0>(word, magic) : pick<0x000f000f>(word >> 4, magic),
                                           pick<0x000f000f>(high, magic),
                                           kHigh ? pick<0x00f000f0>(high, magic) : pick<0x000f000f>(word >> 12, magic)};
#pragma unroll
                    for (int j = 0; j < kTokenTiles; ++j)
                        mma(*(float(*)[4])&sums[(half * 64 + s * 16) / GROUP][4 * j], a, b[s / 2][j][s % 2 * 2], b[s / 2][j][s % 2 * 2 + 1]);
                }
            }
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
                scales[g] = load_shared(at.scales + offset + g * 128);
                zeros[g] = load_shared_byte(at.zeros + offset + g * 32);
#pragma unroll
                for (int j = 0; j < kTokenTiles; ++j)
                    x_sums[g][j] = load_shared2(x_sums_at + ((place.slot * kGroups + g) * kTokens + j * 8) * 4);
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + place.slot * 8);
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
                const float scale[2] = {low_half(scales[g]), high_half(scales[g]) * (kHigh ? 0.0625f : 1.f)};
                const float offsets[2] = {to_float(float16((kMagic & 0xffff) + (zeros[g] & 15))),
                                          to_float(float16((kMagic & 0xffff) + (kHigh ? zeros[g] & 0xf0 : zeros[g] >> 4)))};
#pragma unroll
                for (int i = 0; i < kSums; ++i) {
                    const float x_sum = i % 2 ? x_sums[g][i / 4].y : x_sums[g][i / 4].x;
                    out[i] += scale[i % 4 / 2] * (sums[g][i] - offsets[i % 4 / 2] * x_sum);
                }
            }
        }
        const bool opened = begin <= tile * units_k;
        const int last = linear.owner((tile + 1) * units_k - 1), first_row = tile * kTileRows + warp * 16;
        decltype(fetch(0)) early;
        if (opened) early = fetch(first_row);
        contribute(parts, out, tokens, opened, mine, last, warp, lane);
        if (opened) store(out, early, first_row);
#pragma unroll
        for (int i = 0; i < kSums; ++i) out[i] = 0.f;
    }
}

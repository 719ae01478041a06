// consume() by wgmma, for up to 128 tokens: weights are its A operand, from registers, 64 rows x 16 k an instruction.
//
// Numbers. Subtracting 1024 + z leaves q - z, exactly. FOLD 0: products are summed in fp32 over the group of 128, then scaled in
// fp32. FOLD 1 (small groups; many tokens, where that would cost more than the weights): the weight is scaled in 16 bit, as a
// dequantized model has it.
#pragma once
#include "w4a16_results.cuh"
#include "wgmma.cuh"

static_assert(FOLD || GROUP == kUnitK, "");

#if BF16
#define NYBBLE_PAIR "bf16x2"
#else
#define NYBBLE_PAIR "f16x2"
#endif
__device__ __forceinline__ unsigned subtract(unsigned a, unsigned b) {
    unsigned c;
    asm("sub.rn." NYBBLE_PAIR " %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
__device__ __forceinline__ unsigned product(unsigned a, unsigned b) {
    unsigned c;
    asm("mul.rn." NYBBLE_PAIR " %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}

// What a lane reads of half a unit, 64 k of its warp's 16 rows.
struct Bite {
    static constexpr int kScales = GROUP < 64 ? 64 / GROUP : 1;
    uint4 words;
    unsigned scales[kScales], zeros[kScales];  // of rows g and g + 8

    __device__ __forceinline__ void load(unsigned unit, int half, const UnitPlaces& at) {
        words = load_shared4(unit + at.words + half * 512);
#pragma unroll
        for (int i = 0; i < kScales; ++i) {
            const int group = half * 64 / GROUP + i;
            scales[i] = load_shared(unit + at.scales + group * 128);
            zeros[i] = load_shared_byte(unit + at.zeros + group * 32);
        }
    }
    // The operands of four products: (1024 + q) - (1024 + z), FOLD: times the scale. `magic`: 128 or 1024, twice.
    __device__ __forceinline__ void unpack(unsigned (&a)[4][4], unsigned magic) const {
        const unsigned word_of[4] = {words.x, words.y, words.z, words.w};
        unsigned zero[2], scale[2];
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            if (s * 16 % (64 / kScales) == 0) {
                const unsigned z = zeros[s * kScales / 4], both = scales[s * kScales / 4];
                zero[0] = magic + (z & 15) * 0x10001;
                zero[1] = magic + (kHigh ? z & 0xf0 : z >> 4) * 0x10001;
                scale[0] = __byte_perm(both, 0, 0x1010), scale[1] = __byte_perm(both, 0, 0x3232);
            }
            const unsigned word = word_of[s];
            a[s][0] = pick<0x000f000f>(word, magic);
            a[s][2] = pick<0x000f000f>(word >> 8, magic);
            a[s][1] = kHigh ? pick<0x00f000f0>(word, magic) : pick<0x000f000f>(word >> 4, magic);
            a[s][3] = kHigh ? pick<0x00f000f0>(word >> 8, magic) : pick<0x000f000f>(word >> 12, magic);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                a[s][i] = subtract(a[s][i], zero[i % 2]);
                if (FOLD) a[s][i] = product(a[s][i], scale[i % 2]);
            }
        }
    }
};

// What a warp of the warpgroups does: its rows of all steps of block `mine`. `store(sums, early, first row)` takes finished sums
// and what `fetch(first row)` gave.
template <class Fetch, class Store>
__device__ __forceinline__ void consume(Shared& shared, const Linear& linear, const Parts& parts, int tokens, int mine,
                                        int warp_of_block, Place& place, Fetch fetch, Store store) {
    const int warpgroup = warp_of_block / 4, warp = warp_of_block % 4, lane = threadIdx.x % 32;
    const int units_k = linear.units_k, begin = linear.begin(mine), end = linear.begin(mine + 1);
    const unsigned magic = opaque_magic();
    float out[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) out[i] = 0.f;
    const UnitPlaces at(0, warp, lane);  // in any unit
    const unsigned units = shared_address(shared.units[0][warpgroup]), barriers = shared_address(shared.full);
    int tile = begin / units_k, k = begin % units_k;
    unsigned a[2][4][4];  // operands of the two halves of a unit
    Bite bite;
    unsigned scales = 0;
    if (begin < end) {
        barrier_wait(barriers + place.slot * 8, place.parity);
        bite.load(units + place.slot * kWarpgroups * kUnitBytes, 0, at);
        scales = bite.scales[0];
        bite.unpack(a[0], magic);
    }
    for (int step = begin; step < end; ++step) {
        Place next = place;
        next.advance();
        const unsigned unit = units + place.slot * kWarpgroups * kUnitBytes;
        // The shuffle tells the compiler that the slot is the same in all lanes: descriptors then stay in uniform registers.
        const unsigned long long x = swizzled_descriptor(shared.x[0]) + __shfl_sync(kFullWarp, place.slot, 0) * (kXBytes >> 4);
        const unsigned scales_now = scales;
        (void)scales_now;
#if FOLD
        float(&sum)[kSums] = out;
#else
        float sum[kSums];
#endif
        auto multiply = [&](int half) {
            wgmma_begin();
#pragma unroll
            for (int s = 0; s < 4; ++s)
                Wgmma<kTokenTiles>::multiply(sum, a[half][s], x + half * (kXBytes / 2 >> 4) + s * 2, FOLD || half || s);
            wgmma_commit();
        };
        // While the tensor cores multiply one half of the unit, the other (then the next unit's first) is unpacked.
        bite.load(unit, 1, at);
        multiply(0);
        bite.unpack(a[1], magic);
        multiply(1);
        wgmma_wait<1>();
        if (step + 1 < end) {
            barrier_wait(barriers + next.slot * 8, next.parity);
            bite.load(units + next.slot * kWarpgroups * kUnitBytes, 0, at);
            scales = bite.scales[0];
            bite.unpack(a[0], magic);
        }
        wgmma_wait<0>();
        if (lane == 0) barrier_arrive(barriers + (kSlots + place.slot) * 8);
        place = next;
#if !FOLD
        const float lower = low_half(scales_now), upper = high_half(scales_now) * (kHigh ? 0.0625f : 1.f);
#pragma unroll
        for (int i = 0; i < kSums; ++i) out[i] += (i % 4 < 2 ? lower : upper) * sum[i];
#endif
        if (++k < units_k && step + 1 < end) continue;
        const bool opened = begin <= tile * units_k;
        const int last = linear.owner((tile + 1) * units_k - 1), index = warpgroup * 4 + warp;
        const int first_row = tile * kTileRows + index * 16;
        contribute(parts, out, tokens, opened, mine, last, index, lane);
        if (opened) store(out, fetch(first_row), first_row);  // fetched before, it would cost registers
#pragma unroll
        for (int i = 0; i < kSums; ++i) out[i] = 0.f;
        ++tile, k = 0;
    }
}

// Products y[M, N] = x[M, K] * W[N, K]^T for M <= 128 and a 4-bit W on Hopper, as parts of kernels: w4a16_few.cuh multiplies up to
// 16 tokens, w4a16_wide.cuh up to 128, both by tensor cores with the weights as the A operand, so that 8 tokens cost what one does.
//
// Work. W lies in units of 64 rows x 128 k (w4a16_wgmma.py has the bits). A block takes the same 128 k of as many
// neighbouring units as it has warpgroups, a `step`; the steps of all row tiles, K innermost, are dealt to the blocks in
// even runs (stream-K). Steps pass through a ring of slots, each with a step's units and its columns of x.
//
// Who adds up. A warp's 16 rows are nobody else's in its block. Where blocks share a tile, the one that opened it waits for the
// others' parts and adds them in the order of K, so results repeat bit for bit.
//
// Numbers. OR-ing the bits of a code q into those of 1024 gives 1024 + q (bf16: 128 + q): a 16-bit number in one instruction.
//
// Compile-time: BF16, GROUP, TOKEN_TILES (of 8 tokens: 1 2 4 8 16), WGMMA (0: w4a16_few.cuh), FOLD, WARPGROUPS, SLOTS.
#pragma once
#include "parts.cuh"

constexpr int kWarpgroups = WARPGROUPS, kConsumers = 128 * kWarpgroups;
constexpr int kUnitRows = 64, kUnitK = 128, kGroups = kUnitK / GROUP;
constexpr int kTileRows = kUnitRows * kWarpgroups;
constexpr int kCodeBytes = kUnitRows * kUnitK / 2, kScaleBytes = kGroups * kUnitRows * 2, kZeroBytes = kGroups * kUnitRows / 2;
constexpr int kUnitBytes = kCodeBytes + kScaleBytes + kZeroBytes;
constexpr int kTokenTiles = TOKEN_TILES, kTokens = 8 * kTokenTiles, kSums = 4 * kTokenTiles;  // kSums: a lane's, of a unit
constexpr int kSlots = SLOTS, kXBytes = kTokens * kUnitK * 2;

// One product, and how its steps are dealt out.
struct Linear {
    alignas(64) byte x_map[128];  // CUtensorMap of x [tokens, in_features]: boxes of kTokens x 64, swizzled by 128 bytes
    const byte* weight;           // [row units, units of K] of kUnitBytes
    const float16* bias;          // [out_features] or null
    float16* y;                   // [tokens, out_features]; gated: [tokens, out_features / 2]; rotated: the queries
    int out_features, row_units, units_k;
    int quota, extra;  // steps of a block; the first `extra` blocks take one more
    int half;          // gated: gates; rotated: half of a head

    __device__ __forceinline__ int begin(int block) const { return block * quota + min(block, extra); }
    __device__ __forceinline__ int owner(int step) const {
        const int longer = extra * (quota + 1);
        return step < longer ? step / (quota + 1) : extra + (step - longer) / quota;
    }
};

struct Shared {  // slots of x first: atoms of wgmma's operand are 1024-aligned
    byte x[kSlots][kXBytes];
    byte units[kSlots][kWarpgroups][kUnitBytes];
    unsigned long long full[kSlots], empty[kSlots];
#if !WGMMA
    unsigned long long summed[kSlots];
    float x_sums[kSlots][kGroups][kTokens];  // of a slot's columns, see w4a16_few.cuh
#endif
};

// mbarriers, by their address in shared memory.
__device__ __forceinline__ void barrier_init(unsigned barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_expect(unsigned barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits until the phase of this parity is over.
__device__ __forceinline__ void barrier_wait(unsigned barrier, int parity) {
    asm volatile(
        "{.reg .pred p; again: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @p bra over; bra again; over:}"
        ::"r"(barrier), "r"(parity) : "memory");
}

// One thread of the block; all others must wait for it before they use the ring.
__device__ __forceinline__ void open_ring(Shared& shared) {
    for (int i = 0; i < kSlots; ++i) {
        barrier_init(shared_address(&shared.full[i]), 1);
        barrier_init(shared_address(&shared.empty[i]), kConsumers / 32);
#if !WGMMA
        barrier_init(shared_address(&shared.summed[i]), 1);
#endif
    }
    asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
}

// A place in the ring, for whoever goes around it.
struct Place {
    int slot, parity;
    __device__ __forceinline__ void advance() {
        if (++slot == kSlots) slot = 0, parity ^= 1;
    }
};

// Brings the weights of a block's steps, one step a call, by one thread. Each slot is told to expect its columns of x too.
struct WeightFeed {
    const Linear& linear;
    const long long row_bytes;
    int tile, k;
    const byte* source;
    unsigned long long policy;  // weights are read once

    __device__ __forceinline__ WeightFeed(const Linear& of, int begin)
        : linear(of), row_bytes((long long)of.units_k * kUnitBytes), tile(begin / of.units_k), k(begin % of.units_k),
          source(of.weight + tile * kWarpgroups * row_bytes + (long long)k * kUnitBytes) {
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    }
    __device__ __forceinline__ int units() const { return min(kWarpgroups, linear.row_units - tile * kWarpgroups); }
    __device__ __forceinline__ void next() {
        source += kUnitBytes;
        if (++k == linear.units_k) k = 0, ++tile, source += (kWarpgroups - 1) * row_bytes;
    }
    __device__ __forceinline__ void fetch(Shared& shared, int slot) {
        const unsigned full = shared_address(&shared.full[slot]);
        barrier_expect(full, units() * kUnitBytes + kXBytes);
#pragma unroll
        for (int u = 0; u < kWarpgroups; ++u)
            if (u < units())
                asm volatile(
                    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                    ::"r"(shared_address(shared.units[slot][u])), "l"(source + u * row_bytes), "n"(kUnitBytes), "r"(full),
                    "l"(policy) : "memory");
        next();
    }
};

// Brings their columns of x, likewise.
struct ColumnFeed {
    const Linear& linear;
    int x_k;

    __device__ __forceinline__ ColumnFeed(const Linear& of, int begin) : linear(of), x_k(begin % of.units_k * kUnitK) {}
    __device__ __forceinline__ void fetch(Shared& shared, int slot) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
            asm volatile(
                "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                ::"r"(shared_address(shared.x[slot] + half * (kXBytes / 2))), "l"(linear.x_map), "r"(x_k + half * 64), "r"(0),
                "r"(shared_address(&shared.full[slot])) : "memory");
        x_k = x_k + kUnitK < linear.units_k * kUnitK ? x_k + kUnitK : 0;
    }
};

// bits & mask | magic, in one instruction: with both constants immediate the compiler makes two.
template <unsigned kMask>
__device__ __forceinline__ unsigned pick(unsigned bits, unsigned magic) {
    unsigned picked;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(picked) : "r"(bits), "n"(kMask), "r"(magic));
    return picked;
}

// fp16 may leave the codes of rows 8-15 four bits higher, as 1024 + 16 q, and put the 1/16 into the scale; a folded scale
// of a sixteenth could be subnormal.
constexpr bool kHigh = !BF16 && !FOLD;
constexpr unsigned kMagic = BF16 ? 0x43004300 : 0x64006400;  // 128 or 1024, twice
// The compiler is not to know that it is a constant, see pick().
__device__ __forceinline__ unsigned opaque_magic() {
    unsigned magic;
    asm volatile("mov.b32 %0, %1;" : "=r"(magic) : "n"(kMagic));
    return magic;
}

__device__ __forceinline__ uint4 load_shared4(unsigned address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}
__device__ __forceinline__ unsigned load_shared(unsigned address) {
    unsigned v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}
__device__ __forceinline__ unsigned load_shared_byte(unsigned address) {
    unsigned v;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}

// Where a lane finds what it reads of a warp's 16 rows, in the unit at that address.
struct UnitPlaces {
    unsigned words, scales, zeros;
    __device__ __forceinline__ UnitPlaces(unsigned unit, int warp, int lane)
        : words(unit + warp * 1024 + lane * 16), scales(unit + kCodeBytes + (warp * 8 + lane / 4) * 4),
          zeros(unit + kCodeBytes + kScaleBytes + warp * 8 + lane / 4) {}
};

// Where blocks leave their sums of a tile that another one opened.
struct Parts {
    float* sums;      // [blocks, kTileRows * kTokens], all missing between products unless kFlagged
    unsigned* flags;  // [blocks, kTileRows / 16], all 0 between products
};

// Few sums are waited for one by one: a part is then its own flag. Many are waited for by a flag for all of a warp.
constexpr bool kFlagged = WGMMA;

__device__ __forceinline__ void raise(unsigned* flag) {
    asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
}
__device__ __forceinline__ void await_and_lower(unsigned* flag) {
    unsigned raised = 0;
    while (!raised) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(raised) : "l"(flag) : "memory");
    *flag = 0;
}
__device__ __forceinline__ void add(float (&out)[kSums], int tile, float4 value) {
    out[4 * tile] += value.x, out[4 * tile + 1] += value.y, out[4 * tile + 2] += value.z, out[4 * tile + 3] += value.w;
}

// A warp's sums over this block's part of 16 rows of a tile are ready. The block that opened the tile adds the others'
// parts, from block mine + 1 to `last`, and has the result; the others leave theirs. `index`: which 16 rows of the tile.
__device__ __forceinline__ void contribute(const Parts& scratch, float (&out)[kSums], int tokens, bool opened, int mine,
                                           int last, int index, int lane) {
    constexpr int kPart = kTileRows * kTokens / 4, kStrips = kTileRows / 16;  // a part: float4s
    float4* parts = (float4*)scratch.sums + index * kTokenTiles * 32 + lane;
    unsigned* flags = scratch.flags + index;
    const bool used = 2 * (lane % 4) < tokens;  // other lanes hold no token's sums
    if (!opened) {
        if (used)
#pragma unroll
            for (int j = 0; j < kTokenTiles; ++j)
                store_part(parts + mine * kPart + j * 32, make_float4(out[4 * j], out[4 * j + 1], out[4 * j + 2], out[4 * j + 3]));
        if (kFlagged) {
            __syncwarp();
            if (lane == 0) raise(flags + mine * kStrips);
        }
        return;
    }
    if (kFlagged) {
        if (lane == 0)
            for (int block = mine + 1; block <= last; ++block) await_and_lower(flags + block * kStrips);
        __syncwarp();
        for (int block = mine + 1; block <= last; ++block)
#pragma unroll
            for (int j = 0; j < kTokenTiles; ++j) add(out, j, __ldcg(parts + block * kPart + j * 32));
    } else if (used) {
        constexpr int kBatch = kTokenTiles == 1 ? 6 : 2;  // parts in flight; more would cost registers
        for (int base = mine + 1; base <= last; base += kBatch) {
            float4 values[kBatch][kTokenTiles];
            bool all;
            do {  // all are asked for at once: one that is late costs no more than one way
                all = true;
#pragma unroll
                for (int i = 0; i < kBatch * kTokenTiles; ++i)
                    if (base + i / kTokenTiles <= last)
                        values[i / kTokenTiles][i % kTokenTiles] =
                            load_part(parts + (base + i / kTokenTiles) * kPart + i % kTokenTiles * 32);
#pragma unroll
                for (int i = 0; i < kBatch * kTokenTiles; ++i)
                    if (base + i / kTokenTiles <= last) all &= !is_missing(values[i / kTokenTiles][i % kTokenTiles]);
            } while (!all);
#pragma unroll
            for (int i = 0; i < kBatch * kTokenTiles; ++i) {
                if (base + i / kTokenTiles > last) continue;
                clear_part(parts + (base + i / kTokenTiles) * kPart + i % kTokenTiles * 32);
                add(out, i % kTokenTiles, values[i / kTokenTiles][i % kTokenTiles]);
            }
        }
    }
}

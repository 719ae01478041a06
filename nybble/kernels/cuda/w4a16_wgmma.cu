// y[M, N] = x[M, K] * W[N, K]^T + bias for M <= 128 and a 4-bit W, on Hopper: the weights are the A operand of wgmma, from
// registers, so up to 8 tokens cost one tensor instruction for 64 rows x 16 k and 128 tokens cost one too.
//
// Work. W lies in units of 64 rows x 128 k (w4a16_wgmma.py has the bits). A block takes the same 128 k of as many
// neighbouring units as its warpgroups hold, a `step`; the steps of all row tiles, K innermost, are dealt to the blocks in
// even runs (stream-K). One more warp feeds them: it fills a ring of slots with a step's units and its columns of x. Weights
// do not depend on the kernel before, so the ring fills with them before that has ended.
//
// Who adds up. A warp's rows are nobody else's in its block. Where blocks share a tile, the one that opened it waits for the
// others' parts and adds them in the order of K, so results repeat bit for bit.
//
// Numbers. OR-ing the bits of a code q into those of 1024 gives 1024 + q (bf16: 128 + q), and subtracting 1024 + z leaves
// q - z, exactly. FOLD 0: products are summed in fp32 over the group of 128, then scaled in fp32. FOLD 1 (small groups; many
// tokens, where that would cost more than the weights): the weight is scaled in 16 bit, as a dequantized model has it.
//
// Compile-time: BF16, GROUP, GATED (rows g and g + 8 of 16 are a gate and its up row, y = silu(gate) * up), ROTATED (they are the
// halves of a head that rotary embedding mixes: queries go to y, keys and values to the cache), TOKEN_TILES (of 8 tokens: 1 2 4
// 8 16), FOLD, WARPGROUPS, SLOTS.
#include "wgmma.cuh"

constexpr int kWarpgroups = WARPGROUPS, kConsumers = 128 * kWarpgroups, kThreads = kConsumers + 32;
constexpr int kUnitRows = 64, kUnitK = 128, kGroups = kUnitK / GROUP;
constexpr int kTileRows = kUnitRows * kWarpgroups;
constexpr int kCodeBytes = kUnitRows * kUnitK / 2, kScaleBytes = kGroups * kUnitRows * 2, kZeroBytes = kGroups * kUnitRows / 2;
constexpr int kUnitBytes = kCodeBytes + kScaleBytes + kZeroBytes;
constexpr int kTokenTiles = TOKEN_TILES, kTokens = 8 * kTokenTiles, kSums = 4 * kTokenTiles;  // kSums: a lane's, of a unit
constexpr int kSlots = SLOTS, kXBytes = kTokens * kUnitK * 2;
static_assert(FOLD || GROUP == kUnitK, "");

struct Rotation {
    const long long* positions;  // [tokens]
    const long long* slots;      // [tokens], where in the cache; negative: nowhere
    const float* cos_sin;        // [positions, 2 half]: cosines, then sines
    float16 *key_cache, *value_cache;  // [blocks, kv_heads, block_size, 2 half]
    int q_heads, kv_heads, block_size;
};

struct Arguments {
    alignas(64) byte x_map[128];  // CUtensorMap of x [tokens, in_features]: boxes of kTokens x 64, swizzled by 128 bytes
    const byte* weight;           // [row units, units of K] of kUnitBytes
    const float16* bias;          // [out_features] or null
    float16* y;                   // [tokens, out_features], GATED: [tokens, out_features / 2]
    float* partial;               // [blocks, kTileRows * kTokens], all missing between launches unless kFlagged
    unsigned* flags;              // [blocks, kTileRows / 16], all 0 between launches
    int tokens, out_features, row_units, units_k;
    int quota, extra;             // steps of a block; the first `extra` blocks take one more
    int half;                     // GATED: gates; ROTATED: half of a head
    Rotation rotation;
};

struct Shared {  // slots of x first: atoms of wgmma's operand are 1024-aligned
    byte x[kSlots][kXBytes];
    byte units[kSlots][kWarpgroups][kUnitBytes];
    unsigned long long full[kSlots], empty[kSlots];
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

// How the steps are dealt out.
struct Deal {
    int quota, extra;
    __device__ __forceinline__ int begin(int block) const { return block * quota + min(block, extra); }
    __device__ __forceinline__ int owner(int step) const {
        const int longer = extra * (quota + 1);
        return step < longer ? step / (quota + 1) : extra + (step - longer) / quota;
    }
};

// One lane fills the slots.
__device__ __forceinline__ void feed(const Arguments& args, Shared& shared, int begin, int end) {
    const int units_k = args.units_k;
    const long long row_bytes = (long long)units_k * kUnitBytes;
    int tile = begin / units_k, k = begin % units_k, slot = 0, parity = 1;  // the first wait for a slot passes at once
    const byte* source = args.weight + tile * kWarpgroups * row_bytes + (long long)k * kUnitBytes;
    unsigned long long policy;  // weights are read once
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    auto weights = [&] {
        const int units = min(kWarpgroups, args.row_units - tile * kWarpgroups);
        const unsigned full = shared_address(&shared.full[slot]);
        barrier_expect(full, units * kUnitBytes + kXBytes);
#pragma unroll
        for (int u = 0; u < kWarpgroups; ++u)
            if (u < units)
                asm volatile(
                    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                    ::"r"(shared_address(shared.units[slot][u])), "l"(source + u * row_bytes), "n"(kUnitBytes), "r"(full),
                    "l"(policy) : "memory");
        source += kUnitBytes;
        if (++k == units_k) k = 0, ++tile, source += (kWarpgroups - 1) * row_bytes;
    };
    int x_k = k * kUnitK;
    auto columns = [&] {
#pragma unroll
        for (int half = 0; half < 2; ++half)
            asm volatile(
                "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                ::"r"(shared_address(shared.x[slot] + half * (kXBytes / 2))), "l"(args.x_map), "r"(x_k + half * 64), "r"(0),
                "r"(shared_address(&shared.full[slot])) : "memory");
        x_k = x_k + kUnitK < units_k * kUnitK ? x_k + kUnitK : 0;
    };
    asm volatile("prefetch.tensormap [%0];" ::"l"(args.x_map) : "memory");
    const int early = min(end - begin, kSlots);
    for (; slot < early; ++slot) weights();
    wait_for_dependencies();
    for (slot = 0; slot < early; ++slot) columns();
    slot = 0, parity = 0;
    for (int step = begin + early; step < end; ++step) {
        barrier_wait(shared_address(&shared.empty[slot]), parity);
        weights();
        columns();
        if (++slot == kSlots) slot = 0, parity ^= 1;
    }
}

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

// What a lane reads of half a unit, 64 k of its warp's 16 rows, and where it does so.
struct Bite {
    static constexpr int kScales = GROUP < 64 ? 64 / GROUP : 1;
    uint4 words;
    unsigned scales[kScales], zeros[kScales];  // of rows g and g + 8

    struct Offsets {
        unsigned words, scales, zeros;
        __device__ Offsets(int warp, int lane)
            : words(warp * 1024 + lane * 16), scales(kCodeBytes + (warp * 8 + lane / 4) * 4),
              zeros(kCodeBytes + kScaleBytes + warp * 8 + lane / 4) {}
    };
    __device__ __forceinline__ void load(unsigned unit, int half, const Offsets& at) {
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

__device__ __forceinline__ float silu(float gate) { return gate / (1.f + __expf(-gate)); }

#if ROTATED
// The cosine and sine by which a lane's two rows turn for one token.
struct Turn {
    float cosine, sine;
    __device__ __forceinline__ Turn(const Arguments& args, int token, int row, bool is_turned) : cosine(1.f), sine(0.f) {
        if (!is_turned || token >= args.tokens) return;
        const float* angles = args.rotation.cos_sin + args.rotation.positions[token] * 2 * args.half + row;
        cosine = angles[0], sine = angles[args.half];
    }
};

// Rows `row` and `row` + half of a head, for all tokens.
__device__ __forceinline__ void store_head(const Arguments& args, const float (&out)[kSums], int head, int row, int lane) {
    const Rotation& to = args.rotation;
    const int size = 2 * args.half, at = head * size + row;
    const bool is_query = head < to.q_heads, is_value = head >= to.q_heads + to.kv_heads;
    const float bias[2] = {args.bias ? to_float(args.bias[at]) : 0.f, args.bias ? to_float(args.bias[at + args.half]) : 0.f};
    const int kv_head = (head - to.q_heads) % to.kv_heads;
    float16* cache = is_value ? to.value_cache : to.key_cache;
#pragma unroll
    for (int i = 0; i < 2 * kTokenTiles; ++i) {
        const int token = i / 2 * 8 + 2 * (lane % 4) + i % 2;
        if (token >= args.tokens) continue;
        const Turn turn(args, token, row, !is_value);
        const float lower = out[i / 2 * 4 + i % 2] + bias[0], upper = out[i / 2 * 4 + 2 + i % 2] + bias[1];
        float16* target = args.y + (long long)token * to.q_heads * size + at;
        if (!is_query) {
            const long long slot = to.slots[token];
            if (slot < 0) continue;
            const unsigned block = unsigned(slot) / to.block_size, within = unsigned(slot) % to.block_size;
            target = cache + (((long long)block * to.kv_heads + kv_head) * to.block_size + within) * size + row;
        }
        target[0] = from_float(lower * turn.cosine - upper * turn.sine);
        target[args.half] = from_float(upper * turn.cosine + lower * turn.sine);
    }
}
#endif

__device__ __forceinline__ void store_result(const Arguments& args, const float (&out)[kSums], int first_row, int lane) {
    const int g = lane / 4;
#if ROTATED
    const int eights = args.half / 8, head = first_row / 16 / eights;
    if (head < args.rotation.q_heads + 2 * args.rotation.kv_heads)
        store_head(args, out, head, first_row / 16 % eights * 8 + g, lane);
#else
#pragma unroll
    for (int i = 0; i < 2 * kTokenTiles; ++i) {
        const int token = i / 2 * 8 + 2 * (lane % 4) + i % 2;
        if (token >= args.tokens) continue;
        const float lower = out[i / 2 * 4 + i % 2], upper = out[i / 2 * 4 + 2 + i % 2];
#if GATED
        const int feature = first_row / 2 + g;
        if (feature < args.half) args.y[(long long)token * args.half + feature] = from_float(silu(lower) * upper);
#else
        float16* y = args.y + (long long)token * args.out_features;
        const int row = first_row + g;
        if (row < args.out_features) y[row] = from_float(lower + (args.bias ? to_float(args.bias[row]) : 0.f));
        if (row + 8 < args.out_features)
            y[row + 8] = from_float(upper + (args.bias ? to_float(args.bias[row + 8]) : 0.f));
#endif
    }
#endif
}

// What stands in place of a part that is not there yet: a NaN that no arithmetic makes.
constexpr unsigned kMissing = 0xffffffff;
// Few sums are waited for one by one: a part is then its own flag. Many are waited for by a flag for all of a warp.
constexpr bool kFlagged = kTokenTiles > 2;

__device__ __forceinline__ float4 load_part(const float4* at) {
    float4 v;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
        : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(at) : "memory");
    return v;
}
__device__ __forceinline__ void store_part(float4* at, float x, float y, float z, float w) {
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}
__device__ __forceinline__ bool is_missing(float4 v) {
    return __float_as_uint(v.x) == kMissing || __float_as_uint(v.y) == kMissing || __float_as_uint(v.z) == kMissing ||
           __float_as_uint(v.w) == kMissing;
}
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
// parts, from block mine + 1 to `last`, and stores the result; the others leave theirs. `index`: which 16 rows of the tile.
__device__ __forceinline__ void contribute(const Arguments& args, float (&out)[kSums], bool opened, int mine, int last,
                                           int tile, int index, int lane) {
    constexpr int kPart = kTileRows * kTokens / 4, kStrips = kTileRows / 16;  // a part: float4s
    float4* parts = (float4*)args.partial + index * kTokenTiles * 32 + lane;
    unsigned* flags = args.flags + index;
    const bool used = 2 * (lane % 4) < args.tokens;  // other lanes hold no token's sums
    if (!opened) {
        if (used)
#pragma unroll
            for (int j = 0; j < kTokenTiles; ++j)
                store_part(parts + mine * kPart + j * 32, out[4 * j], out[4 * j + 1], out[4 * j + 2], out[4 * j + 3]);
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
        constexpr int kBatch = kTokenTiles < 8 ? 8 / kTokenTiles : 1;  // parts in flight
        const float missing = __uint_as_float(kMissing);
        for (int base = mine + 1; base <= last; base += kBatch) {
            float4 values[kBatch][kTokenTiles];
#pragma unroll
            for (int p = 0; p < kBatch; ++p)
#pragma unroll
                for (int j = 0; j < kTokenTiles; ++j)
                    if (base + p <= last) values[p][j] = load_part(parts + (base + p) * kPart + j * 32);
#pragma unroll
            for (int p = 0; p < kBatch; ++p)
#pragma unroll
                for (int j = 0; j < kTokenTiles; ++j) {
                    if (base + p > last) continue;
                    float4* at = parts + (base + p) * kPart + j * 32;
                    while (is_missing(values[p][j])) values[p][j] = load_part(at);
                    store_part(at, missing, missing, missing, missing);  // for the next launch
                    add(out, j, values[p][j]);
                }
        }
    }
    store_result(args, out, tile * kTileRows + index * 16, lane);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) w4a16(const __grid_constant__ Arguments args) {
    extern __shared__ __align__(1024) byte memory[];
    Shared& shared = *(Shared*)memory;
    const int lane = threadIdx.x % 32;
    const int units_k = args.units_k;
    const Deal deal{args.quota, args.extra};
    // Blocks wait only for parts of blocks that were started before them.
    const int mine = gridDim.x - 1 - blockIdx.x, begin = deal.begin(mine), end = deal.begin(mine + 1);

    if (threadIdx.x == kConsumers) {
        for (int i = 0; i < kSlots; ++i) {
            barrier_init(shared_address(&shared.full[i]), 1);
            barrier_init(shared_address(&shared.empty[i]), kConsumers / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    launch_dependents();  // they wait for this kernel's end before they read y; until then they fill their own rings
    const int warp_of_block = __shfl_sync(kFullWarp, threadIdx.x / 32, 0);  // so the compiler knows that a warp stays together
    if (warp_of_block == kConsumers / 32) {
        if (lane == 0) feed(args, shared, begin, end);
        return;
    }

    const int warpgroup = warp_of_block / 4, warp = warp_of_block % 4;
    unsigned magic;  // opaque to the compiler, see pick()
    asm volatile("mov.b32 %0, %1;" : "=r"(magic) : "n"(BF16 ? 0x43004300 : 0x64006400));
    float out[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) out[i] = 0.f;
    const Bite::Offsets at(warp, lane);
    const unsigned units = shared_address(shared.units[0][warpgroup]), barriers = shared_address(shared.full);
    int tile = begin / units_k, k = begin % units_k;
    int slot = 0, parity = 0;
    unsigned a[2][4][4];  // operands of the two halves of a unit
    Bite bite;
    unsigned scales = 0;
    if (begin < end) {
        barrier_wait(barriers, 0);
        bite.load(units, 0, at);
        scales = bite.scales[0];
        bite.unpack(a[0], magic);
    }
    for (int step = begin; step < end; ++step) {
        const int next_slot = slot + 1 == kSlots ? 0 : slot + 1, next_parity = parity ^ (next_slot == 0);
        const unsigned unit = units + slot * kWarpgroups * kUnitBytes;
        // The shuffle tells the compiler that the slot is the same in all lanes: descriptors then stay in uniform registers.
        const unsigned long long x = swizzled_descriptor(shared.x[0]) + __shfl_sync(kFullWarp, slot, 0) * (kXBytes >> 4);
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
            barrier_wait(barriers + next_slot * 8, next_parity);
            bite.load(units + next_slot * kWarpgroups * kUnitBytes, 0, at);
            scales = bite.scales[0];
            bite.unpack(a[0], magic);
        }
        wgmma_wait<0>();
        if (lane == 0) barrier_arrive(barriers + (kSlots + slot) * 8);
        slot = next_slot, parity = next_parity;
#if !FOLD
        const float lower = low_half(scales_now), upper = high_half(scales_now) * (kHigh ? 0.0625f : 1.f);
#pragma unroll
        for (int i = 0; i < kSums; ++i) out[i] += (i % 4 < 2 ? lower : upper) * sum[i];
#endif
        if (++k < units_k && step + 1 < end) continue;
        const bool opened = begin <= tile * units_k;
        const int last = deal.owner((tile + 1) * units_k - 1);
        contribute(args, out, opened, mine, last, tile, warpgroup * 4 + warp, lane);
#pragma unroll
        for (int i = 0; i < kSums; ++i) out[i] = 0.f;
        ++tile, k = 0;
    }
}

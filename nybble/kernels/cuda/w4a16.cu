// y[M, N] = x[M, K] * W[N, K]^T + bias for M <= 32 and a 4-bit W: a kernel that reads weights as fast as memory gives them.
//
// Weights lie in units of kRows rows x 128 k, each one contiguous chunk (see w4a16.py for the bits): codes in the order
// in which the lanes of a warp want them as the A operand of mma.m16n8k16, then scales, then zero points. So x is the
// B operand, and up to 8 tokens cost one mma.
//
// Who does what. K is cut into `slices`, so that a block's part of x fits its shared memory. The blocks of one slice
// share its units evenly, row tiles outermost (stream-K): each takes `quota` of them in a row, each of its warps an even
// part of those. A warp streams its units through a ring of its own and needs nobody until its last one.
//
//     one slice, 3 row tiles x 4 units, 2 blocks of 2 warps:   | tile 0        | tile 1        | tile 2        |
//                                                              | b0w0      | b0w1      | b1w0      | b1w1      |
//
// Who adds up. Within a block the warp that opens a tile adds what the warps after it found; across blocks (and slices)
// each writes its part to `partial`, and the last to arrive adds all of them. Every sum is taken in one fixed order, so
// results repeat bit for bit.
//
// Zero points cost nothing inside. OR-ing the bits of a code q into those of 1024 gives 1024 + q (bf16: 128 + q), so
// with S = sum of x over a group:  sum (q - z) x = sum (1024 + q) x - (1024 + z) S, once a group and row. In fp16 the
// codes of rows 8-15 of a tile stay four bits higher, as 1024 + 16 q, and the 1/16 goes into the scale.
//
// Compile-time: BF16, GROUP, GATED (rows g and g + 8 of a tile are a gate and its up row, y = silu(gate) * up),
// TOKEN_TILES (of 8 tokens, up to 4), WARPS, SLOTS.
#include "ptx.cuh"
#include "ring.cuh"

constexpr int kWarps = WARPS, kThreads = 32 * kWarps;
constexpr int kRowTiles = 2, kRows = 16 * kRowTiles;  // rows of a unit, in tiles of an mma
constexpr int kTokenTiles = TOKEN_TILES, kTokens = 8 * kTokenTiles;
constexpr int kUnitK = 128, kGroups = kUnitK / GROUP;
constexpr int kCodeBytes = kRows * kUnitK / 2, kScaleBytes = kGroups * kRows * 2, kZeroBytes = kGroups * kRows / 2;
constexpr int kUnitBytes = kCodeBytes + kScaleBytes + kZeroBytes;
constexpr int kSlots = SLOTS;

typedef Ring<kSlots, kUnitBytes> UnitRing;
typedef float Tile[kRowTiles][kTokenTiles][4];  // accumulators of a lane, kRows x kTokens a warp

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Where one slice of K begins, how wide it is (in units) and how many of its units a block takes.
struct Slice {
    int begin, width, quota;

    __device__ Slice(int index, int slices, int units_k, int tiles, int blocks) {
        int extra = units_k % slices;
        width = units_k / slices + (index < extra);
        begin = units_k / slices * index + min(index, extra);
        quota = ceil_div(tiles * width, blocks);
    }

    // The blocks that work on a row tile: the first one, and how many.
    __device__ int first_block(int tile) const { return tile * width / quota; }
    __device__ int parts(int tile) const { return ((tile + 1) * width - 1) / quota - first_block(tile) + 1; }
};

__device__ __forceinline__ void clear(Tile& tile) {
#pragma unroll
    for (int i = 0; i < kRowTiles * kTokenTiles * 4; ++i) (&tile[0][0][0])[i] = 0.f;
}

// One word holds a lane's eight codes of one mma (rows g and g+8, k 0 1 2 3 of its four), as 16-bit floats plus an offset.
__device__ __forceinline__ void unpack(unsigned word, unsigned (&a)[4]) {
#if BF16
    constexpr unsigned kMagic = 0x43004300;  // 128, twice
    a[0] = (word & 0x000f000f) | kMagic;
    a[1] = ((word >> 4) & 0x000f000f) | kMagic;
    a[2] = ((word >> 8) & 0x000f000f) | kMagic;
    a[3] = ((word >> 12) & 0x000f000f) | kMagic;
#else
    constexpr unsigned kMagic = 0x64006400;  // 1024, twice
    a[0] = (word & 0x000f000f) | kMagic;
    a[1] = (word & 0x00f000f0) | kMagic;
    word >>= 8;
    a[2] = (word & 0x000f000f) | kMagic;
    a[3] = (word & 0x00f000f0) | kMagic;
#endif
}

// The offset plus zero point that unpack's codes carry, for a row of the lower (0) or upper (1) half of a tile.
__device__ __forceinline__ float offset_plus_zero(unsigned zero, int upper) {
#if BF16
    return __uint_as_float(0x43000000u | zero << 16);  // 128 + zero
#else
    return __uint_as_float(0x44800000u | zero << (upper ? 17 : 13));  // 1024 + zero, 1024 + 16 zero
#endif
}

// Adds one group, accumulated from offset codes, to `out`:  out += scale * (sum - (offset + zero) * sum of x).
__device__ __forceinline__ void add_group(Tile& out, const Tile& sum, const byte* unit, int group, const float* x_sums,
                                          int lane) {
    const int g = lane / 4, t = lane % 4;
    const byte* scale_at = unit + kCodeBytes + (group * 8 + g) * kRowTiles * 4;
    const byte* zero_at = unit + kCodeBytes + kScaleBytes + (group * 8 + g) * kRowTiles;
    // kRowTiles bytes: low nibble row g, high nibble row g + 8.
    unsigned zeros = *(const unsigned short*)zero_at;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
        unsigned scales = ((const unsigned*)scale_at)[r];
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
            float scale = upper ? high_half(scales) : low_half(scales);
            float zero = offset_plus_zero(zeros >> (8 * r + 4 * upper) & 15, upper);
            if (upper && !BF16) scale *= 0.0625f;
#pragma unroll
            for (int j = 0; j < kTokenTiles; ++j) {
                float2 x_sum = *(const float2*)(x_sums + group * kTokens + j * 8 + 2 * t);
                out[r][j][2 * upper] += scale * (sum[r][j][2 * upper] - zero * x_sum.x);
                out[r][j][2 * upper + 1] += scale * (sum[r][j][2 * upper + 1] - zero * x_sum.y);
            }
        }
    }
}

// out += one unit times its 128 columns of x. `x_unit` is laid out by stage_x, `token` is the row of it this lane reads.
__device__ __forceinline__ void multiply(Tile& out, const byte* unit, const byte* x_unit, const float* x_sums,
                                         const int (&x_offset)[kTokenTiles], int x_stride, int lane) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
        Tile sum;
        clear(sum);
#pragma unroll
        for (int chunk = group * GROUP / 32; chunk < (group + 1) * GROUP / 32; ++chunk) {  // 32 k: two mma steps
            uint4 x[kTokenTiles];
#pragma unroll
            for (int j = 0; j < kTokenTiles; ++j) x[j] = *(const uint4*)(x_unit + chunk * x_stride + x_offset[j]);
            unsigned words[2 * kRowTiles];
#pragma unroll
            for (int i = 0; i < 2 * kRowTiles; i += 4)
                *(uint4*)&words[i] = *(const uint4*)(unit + chunk * kRows * 16 + i * 128 + lane * 16);
#pragma unroll
            for (int step = 0; step < 2; ++step)
#pragma unroll
                for (int r = 0; r < kRowTiles; ++r) {
                    unsigned a[4];
                    unpack(words[step * kRowTiles + r], a);
#pragma unroll
                    for (int j = 0; j < kTokenTiles; ++j)
                        mma(sum[r][j], a, step ? x[j].z : x[j].x, step ? x[j].w : x[j].y);
                }
        }
        add_group(out, sum, unit, group, x_sums, lane);
    }
}

// Copies the block's columns of x into shared memory, 16 bytes (8 k) at a time, as [unit][32 k][token][8 k], which puts
// what the lanes of a warp read together side by side; and sums them over each group, as [unit][group][kTokens].
__device__ __forceinline__ void stage_x(byte* x_shared, float* x_sums, const float16* x, int x_row, int tokens,
                                        int in_features, Slice slice) {
    constexpr int kBatch = 4;  // loads in flight
    const int chunks = slice.width * tokens * 16;
    for (int base = 0; base < chunks; base += kBatch * kThreads) {
        uint4 values[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            int chunk = base + i * kThreads + threadIdx.x, pair = chunk / 16, unit = pair / tokens;
            int k = (slice.begin + unit) * kUnitK + chunk % 16 * 8;
            values[i] = make_uint4(0, 0, 0, 0);
            if (chunk < chunks && k < in_features)
                values[i] = *(const uint4*)(x + (long long)(pair - unit * tokens) * x_row + k);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            int chunk = base + i * kThreads + threadIdx.x, pair = chunk / 16, unit = pair / tokens;
            int token = pair - unit * tokens, part = chunk % 16;
            uint4 v = values[i];
            float sum = (low_half(v.x) + high_half(v.x)) + (low_half(v.y) + high_half(v.y)) +
                        ((low_half(v.z) + high_half(v.z)) + (low_half(v.w) + high_half(v.w)));
#pragma unroll
            for (int distance = 1; distance < GROUP / 8; distance *= 2)
                sum += __shfl_xor_sync(kFullWarp, sum, distance);
            if (chunk >= chunks) continue;
            *(uint4*)(x_shared + (((unit * 4 + part / 4) * tokens + token) * 4 + part % 4) * 16) = v;
            if (part % (GROUP / 8) == 0) x_sums[(unit * kGroups + part / (GROUP / 8)) * kTokens + token] = sum;
        }
    }
}

struct Arguments {
    const float16* x;       // [tokens, in_features], rows x_row elements apart
    const byte* weight;     // [row tiles, units of K] of kUnitBytes
    const float16* bias;    // [out_features] or null
    float16* y;             // [tokens, out_features], GATED: [tokens, out_features / 2]
    float* partial;         // [row tiles, slices, max_parts, kRows * kTokens]
    unsigned* arrivals;     // [row tiles], zero between launches
    int x_row, tokens, in_features, out_features, slices, max_parts;
};

__device__ __forceinline__ void store_result(const Arguments& args, const Tile& out, int tile, int lane) {
#if GATED
    const int size = args.out_features / 2;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
        int feature = tile * kRows / 2 + r * 8 + lane / 4;
        if (feature >= size) continue;
#pragma unroll
        for (int i = 0; i < kTokenTiles * 2; ++i) {
            int token = i / 2 * 8 + lane % 4 * 2 + i % 2;
            float gate = out[r][i / 2][i % 2], up = out[r][i / 2][2 + i % 2];
            if (token < args.tokens)
                args.y[(long long)token * size + feature] = from_float(gate / (1.f + __expf(-gate)) * up);
        }
    }
    return;
#endif
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
            int row = tile * kRows + r * 16 + upper * 8 + lane / 4;
            if (row >= args.out_features) continue;
            float bias = args.bias ? to_float(args.bias[row]) : 0.f;
#pragma unroll
            for (int i = 0; i < kTokenTiles * 2; ++i) {
                int token = i / 2 * 8 + lane % 4 * 2 + i % 2;
                if (token < args.tokens)
                    args.y[(long long)token * args.out_features + row] =
                        from_float(out[r][i / 2][2 * upper + i % 2] + bias);
            }
        }
}

// One block's sum for a tile is ready. If others work on the tile too, leave it for the last of them to add up.
__device__ __forceinline__ void contribute(const Arguments& args, Tile& out, int tile, const Slice& slice, int slice_index,
                                           int units_k, int tiles, int blocks, int block, int lane) {
    int parts = 0;
    for (int s = 0; s < args.slices; ++s) parts += Slice(s, args.slices, units_k, tiles, blocks).parts(tile);
    if (parts > 1) {
        constexpr int kPart = kRows * kTokens / 4;  // float4s; lanes whose token columns are unused leave theirs alone
        float4* tile_parts = (float4*)args.partial + (long long)tile * args.slices * args.max_parts * kPart + lane;
        const bool used = lane % 4 * 2 < args.tokens;
        float4* mine = tile_parts + (slice_index * args.max_parts + block - slice.first_block(tile)) * kPart;
        if (used)
#pragma unroll
            for (int i = 0; i < kRowTiles * kTokenTiles; ++i)
                __stcg(mine + i * 32, *(float4*)out[i / kTokenTiles][i % kTokenTiles]);
        __syncwarp();
        unsigned arrived = 0;
        if (lane == 0) {
            __threadfence();
            arrived = atomicAdd(args.arrivals + tile, 1u);
            __threadfence();
        }
        if (__shfl_sync(kFullWarp, arrived, 0) != parts - 1) return;
        if (lane == 0) args.arrivals[tile] = 0;
        clear(out);
        for (int s = 0; s < args.slices; ++s) {
            int count = Slice(s, args.slices, units_k, tiles, blocks).parts(tile);
            for (int part = 0; part < count && used; ++part) {
                const float4* theirs = tile_parts + (s * args.max_parts + part) * kPart;
#pragma unroll
                for (int i = 0; i < kRowTiles * kTokenTiles; ++i) {
                    float4 value = __ldcg(theirs + i * 32);
                    float(&sum)[4] = out[i / kTokenTiles][i % kTokenTiles];
                    sum[0] += value.x, sum[1] += value.y, sum[2] += value.z, sum[3] += value.w;
                }
            }
        }
    }
    store_result(args, out, tile, lane);
}

// Walks along a block's units in memory: `width` of each row tile's `units_k`.
struct Cursor {
    const byte* at;
    int k, width, skip;

    __device__ Cursor(const byte* weight, int unit, const Slice& slice, int units_k) {
        k = unit % slice.width;
        at = weight + ((long long)(unit / slice.width) * units_k + slice.begin + k) * kUnitBytes;
        width = slice.width;
        skip = (units_k - width) * kUnitBytes;
    }
    __device__ __forceinline__ void next() {
        at += kUnitBytes;
        if (++k == width) k = 0, at += skip;
    }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1) w4a16(const Arguments args) {
    extern __shared__ __align__(128) byte shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int units_k = ceil_div(args.in_features, kUnitK), tiles = ceil_div(args.out_features, kRows);
    const int blocks = gridDim.x / args.slices, block = blockIdx.x / args.slices, slice_index = blockIdx.x % args.slices;
    const Slice slice(slice_index, args.slices, units_k, tiles, blocks);
    const int begin = min(block * slice.quota, tiles * slice.width), end = min(begin + slice.quota, tiles * slice.width);
    auto warp_begin = [&](int w) { return begin + (end - begin) * w / kWarps; };
    const int first = warp_begin(warp), count = warp_begin(warp + 1) - first;

    byte* rings = shared;
    unsigned long long* barriers = (unsigned long long*)(rings + kWarps * UnitRing::kSharedBytes);
    float* x_sums = (float*)(barriers + kWarps * kSlots + (kWarps * kSlots & 1));
    byte* x_shared = (byte*)(x_sums + ceil_div(units_k, args.slices) * kGroups * kTokens);

    // Weights never depend on the kernel before: ask for them before waiting for it.
    UnitRing ring{rings + warp * UnitRing::kSharedBytes, barriers + warp * kSlots, lane};
    ring.start();
    Cursor ahead(args.weight, first, slice, units_k);
    for (int i = 0; i < kSlots; ++i, ahead.next()) ring.fill(i, ahead.at, i < count);
    launch_dependents();  // they wait for this kernel's end before they read y; until then they fill their own rings

    wait_for_dependencies();
    stage_x(x_shared, x_sums, args.x, args.x_row, args.tokens, args.in_features, slice);
    __syncthreads();

    const int x_stride = args.tokens * 64;  // bytes of x for 32 k
    int x_offset[kTokenTiles];              // lanes of tokens that do not exist read another's: their sums go nowhere
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) x_offset[j] = min(j * 8 + lane / 4, args.tokens - 1) * 64 + lane % 4 * 16;

    Tile out, head;  // `head`: this warp's end of a tile that a warp before it opened
    clear(out);
    int tile = first / slice.width, k = first % slice.width, slot = 0, turn = 0;
    // The block's first warp that has any units opens a tile too: with fewer units than warps that is a later one.
    bool opened = first == begin || k == 0, has_head = false, pending = false;
    for (int i = 0; i < count; ++i) {
        ring.wait(slot, turn);
        multiply(out, ring.slot(slot), x_shared + k * 4 * x_stride, x_sums + k * kGroups * kTokens, x_offset, x_stride, lane);
        __syncwarp();
        ring.fill(slot, ahead.at, i + kSlots < count);
        ahead.next();
        if (++slot == kSlots) slot = 0, ++turn;

        const bool closed = ++k == slice.width || first + i + 1 == end;
        if (!closed && i + 1 < count) continue;
        if (opened && !closed) {
            pending = true;  // the last unit: `out` stays for after the barrier
        } else if (opened) {
            contribute(args, out, tile, slice, slice_index, units_k, tiles, blocks, block, lane);
            clear(out);
        } else {
            has_head = true;
#pragma unroll
            for (int j = 0; j < kRowTiles * kTokenTiles * 4; ++j) (&head[0][0][0])[j] = (&out[0][0][0])[j];
            clear(out);
        }
        if (closed) ++tile, k = 0, opened = true;
    }

    constexpr int kHead = kRowTiles * kTokenTiles;  // float4s of a lane, in the warp's ring, which nothing fills any more
    static_assert(kHead * 512 <= UnitRing::kSharedBytes, "a ring must hold a tile's sums");
    if (has_head)
#pragma unroll
        for (int i = 0; i < kHead; ++i)
            ((float4*)(rings + warp * UnitRing::kSharedBytes))[i * 32 + lane] =
                *(float4*)head[i / kTokenTiles][i % kTokenTiles];
    __syncthreads();
    if (!pending) return;
    for (int w = warp + 1; w < kWarps && warp_begin(w) < min((tile + 1) * slice.width, end); ++w) {
        if (warp_begin(w) == warp_begin(w + 1)) continue;
#pragma unroll
        for (int i = 0; i < kHead; ++i) {
            float4 value = ((const float4*)(rings + w * UnitRing::kSharedBytes))[i * 32 + lane];
            float(&sum)[4] = out[i / kTokenTiles][i % kTokenTiles];
            sum[0] += value.x, sum[1] += value.y, sum[2] += value.z, sum[3] += value.w;
        }
    }
    contribute(args, out, tile, slice, slice_index, units_k, tiles, blocks, block, lane);
}

// The 16-bit weight of a packed 4-bit one (its layout is described in w4a16.py), for products with so many tokens that
// a tensor-core library does them best. Each element is (q - z) * s, rounded once.
//
// A warp takes one unit at a time: its lanes read the codes 16 bytes each, as w4a16 does, and write 16 bytes (8 k) a row.
//
// Compile-time: BF16, GROUP, PAIRED (rows g and g + 8 of sixteen are `half` apart in the weight).
#include "ptx.cuh"

constexpr int kRowTiles = 2, kRows = 16 * kRowTiles;
constexpr int kUnitK = 128, kGroups = kUnitK / GROUP;
constexpr int kCodeBytes = kRows * kUnitK / 2, kScaleBytes = kGroups * kRows * 2, kZeroBytes = kGroups * kRows / 2;
constexpr int kUnitBytes = kCodeBytes + kScaleBytes + kZeroBytes;

struct Arguments {
    const byte* weight;  // [row tiles, units of K] of kUnitBytes
    float16* out;        // [out_features, in_features]
    int out_features, in_features, half;
};

__device__ __forceinline__ unsigned pair_of(float low, float high) {
    return unsigned(from_float(low)) | unsigned(from_float(high)) << 16;
}

extern "C" __global__ void __launch_bounds__(256) dequantize(const Arguments args) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int units_k = (args.in_features + kUnitK - 1) / kUnitK;
    const int warps = gridDim.x * blockDim.x / 32, total = (args.out_features + kRows - 1) / kRows * units_k;
    for (int index = (blockIdx.x * blockDim.x + threadIdx.x) / 32; index < total; index += warps) {
        const byte* unit = args.weight + (long long)index * kUnitBytes;
        const int tile = index / units_k, unit_k = index % units_k;
#pragma unroll
        for (int chunk = 0; chunk < 4; ++chunk) {
            unsigned words[2 * kRowTiles];  // [step][row tile]
#pragma unroll
            for (int i = 0; i < 2 * kRowTiles; i += 4)
                *(uint4*)&words[i] = *(const uint4*)(unit + chunk * kRows * 16 + i * 128 + lane * 16);
            const int group = chunk * 32 / GROUP, k = unit_k * kUnitK + chunk * 32 + t * 8;
            const byte* scales = unit + kCodeBytes + (group * 8 + g) * kRowTiles * 4;
            const byte* zeros = unit + kCodeBytes + kScaleBytes + (group * 8 + g) * kRowTiles;
            if (k >= args.in_features) continue;  // in_features is a multiple of 8
#pragma unroll
            for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
                for (int upper = 0; upper < 2; ++upper) {
#if PAIRED
                    const int row = paired_row(tile * kRowTiles + r, upper * 8 + g, args.half);
#else
                    const int row = tile * kRows + r * 16 + upper * 8 + g;
#endif
                    if (row < 0 || row >= args.out_features) continue;
                    const unsigned both = ((const unsigned*)scales)[r];
                    const float scale = upper ? high_half(both) : low_half(both);
                    const int zero = zeros[r] >> (4 * upper) & 15;
                    uint4 value;
                    unsigned* out = (unsigned*)&value;
#pragma unroll
                    for (int step = 0; step < 2; ++step) {
                        // Nibbles from the lowest: k0 of rows g and g + 8, k0 + 2 of both, k0 + 1 of both, k0 + 3 of both.
                        const unsigned word = words[step * kRowTiles + r] >> (4 * upper);
                        auto at = [&](int shift) { return scale * (int(word >> shift & 15) - zero); };
                        out[2 * step] = pair_of(at(0), at(16));
                        out[2 * step + 1] = pair_of(at(8), at(24));
                    }
                    *(uint4*)(args.out + (long long)row * args.in_features + k) = value;
                }
        }
    }
}

// What dequantize.cu does, from the layout of w4a16_wgmma.py. A warp takes 16 rows x 128 k at a time and turns them in shared
// memory, so that it writes whole rows of 256 bytes.
//
// Compile-time: BF16, GROUP, PAIRED (rows g and g + 8 of sixteen are `half` apart in the weight).
#include "ptx.cuh"

constexpr int kUnitRows = 64, kUnitK = 128, kGroups = kUnitK / GROUP, kWarps = 8;
constexpr int kCodeBytes = kUnitRows * kUnitK / 2, kScaleBytes = kGroups * kUnitRows * 2, kZeroBytes = kGroups * kUnitRows / 2;
constexpr int kUnitBytes = kCodeBytes + kScaleBytes + kZeroBytes;
constexpr int kRowWords = kUnitK / 2 + 4;  // of a row in shared memory; eight rows apart start in different banks

struct Arguments {
    const byte* weight;  // [row units, units of K] of kUnitBytes
    float16* out;        // [out_features, in_features]
    int out_features, in_features, half;
};

extern "C" __global__ void __launch_bounds__(32 * kWarps) dequantize(const Arguments args) {
    __shared__ __align__(16) unsigned tiles[kWarps][16][kRowWords];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    unsigned(&tile)[16][kRowWords] = tiles[warp];
    const int units_k = (args.in_features + kUnitK - 1) / kUnitK;
    const int strips = (args.out_features + 15) / 16 * units_k, step = gridDim.x * kWarps;
    for (int index = blockIdx.x * kWarps + warp; index < strips; index += step) {
        const int strip = index / units_k, unit_k = index % units_k, sixteenth = strip % 4;
        const byte* unit = args.weight + ((long long)(strip / 4) * units_k + unit_k) * kUnitBytes;
        unsigned words[8];
#pragma unroll
        for (int half = 0; half < 2; ++half)
            *(uint4*)&words[4 * half] = *(const uint4*)(unit + (sixteenth * 2 + half) * 512 + lane * 16);
#pragma unroll
        for (int s = 0; s < 8; ++s) {
            const int at = (s * 16 / GROUP * 4 + sixteenth) * 8 + g;
            const unsigned scales = *(const unsigned*)(unit + kCodeBytes + at * 4);
            const unsigned zeros = unit[kCodeBytes + kScaleBytes + at];
#pragma unroll
            for (int upper = 0; upper < 2; ++upper) {
                const float scale = upper ? high_half(scales) : low_half(scales);
                const int zero = zeros >> (4 * upper) & 15;
                const unsigned word = words[s] >> (4 * upper);
                auto value = [&](int shift) { return unsigned(from_float(scale * (int(word >> shift & 15) - zero))); };
                tile[upper * 8 + g][s * 8 + t] = value(0) | value(16) << 16;
                tile[upper * 8 + g][s * 8 + 4 + t] = value(8) | value(24) << 16;
            }
        }
        __syncwarp();
        const int part = lane % 16, k = unit_k * kUnitK + part * 8;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int within = 2 * i + lane / 16;
#if PAIRED
            const int row = paired_row(strip, within, args.half);
#else
            const int row = strip * 16 + within;
#endif
            if (row >= 0 && row < args.out_features && k < args.in_features)  // in_features is a multiple of 8
                *(uint4*)(args.out + (long long)row * args.in_features + k) = *(const uint4*)&tile[within][part * 4];
        }
        __syncwarp();
    }
}

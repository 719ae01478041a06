// Hopper's warpgroup products, d[64 x N] (+)= a[64 x 16] * b[16 x N], behind named functions. sm_90a only.
// Warp w of the four owns rows 16 w to 16 w + 15; of those a lane holds of `a` and of each 8 columns of `d` what it holds of
// the operands of mma.m16n8k16 (ptx.cuh). `b` is [N][16] (K innermost) in shared memory, described by a descriptor.
#pragma once
#include "ptx.cuh"

// Shared memory as rows of 128 bytes (64 k), 8 rows an atom of 1024 bytes, atoms 1024-aligned and one after another; the
// 16-byte columns of row r are permuted by XOR with r % 8. Adding 2 moves on by 16 k.
__device__ __forceinline__ unsigned long long swizzled_descriptor(const void* at) {
    return (unsigned long long)(shared_address(at) >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// Registers that a product will read or add to may be touched before wgmma_begin() and after wgmma_wait(), not between.
__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kLeft>  // how many committed groups may still run
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

#if BF16
#define NYBBLE_WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {"
#else
#define NYBBLE_WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 {"
#endif
#define NYBBLE_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define NYBBLE_D16(i) NYBBLE_D4(i), NYBBLE_D4(i + 4), NYBBLE_D4(i + 8), NYBBLE_D4(i + 12)

// `add` false: d = a b.
template <int kTokenTiles>
struct Wgmma;

template <>
struct Wgmma<4> {
    static __device__ __forceinline__ void multiply(float (&d)[16], const unsigned (&a)[4], unsigned long long b, int add) {
        asm volatile("{.reg .pred p; setp.ne.b32 p, %21, 0;" NYBBLE_WGMMA(32)
            "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, p, 1, 1, 0;}"
            : NYBBLE_D16(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
    }
};

template <>
struct Wgmma<8> {
    static __device__ __forceinline__ void multiply(float (&d)[32], const unsigned (&a)[4], unsigned long long b, int add) {
        asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0;" NYBBLE_WGMMA(64)
            "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"
            "%30,%31}, {%32,%33,%34,%35}, %36, p, 1, 1, 0;}"
            : NYBBLE_D16(0), NYBBLE_D16(16) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
    }
};

template <>
struct Wgmma<16> {
    static __device__ __forceinline__ void multiply(float (&d)[64], const unsigned (&a)[4], unsigned long long b, int add) {
        asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0;" NYBBLE_WGMMA(128)
            "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"
            "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,"
            "%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, p, 1, 1, 0;}"
            : NYBBLE_D16(0), NYBBLE_D16(16), NYBBLE_D16(32), NYBBLE_D16(48)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
    }
};

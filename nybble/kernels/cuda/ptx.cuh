// The few PTX instructions the kernels need, behind named functions; no CUDA header is included anywhere.
// Compile-time switch: BF16 (0 or 1) chooses the 16-bit floating-point type of activations, scales and results.
#pragma once

typedef unsigned char byte;
typedef unsigned short float16;  // bits of an fp16 or, with BF16, a bf16 number; arithmetic is done in fp32

constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ float to_float(float16 bits) {
    float value;
#if BF16
    value = __uint_as_float(unsigned(bits) << 16);
#else
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
#endif
    return value;
}

__device__ __forceinline__ float16 from_float(float value) {
    float16 bits;
#if BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
    return bits;
}

__device__ __forceinline__ float low_half(unsigned pair) { return to_float(float16(pair & 0xffffu)); }
__device__ __forceinline__ float high_half(unsigned pair) { return to_float(float16(pair >> 16)); }

// c[16 x 8] += a[16 x 16] * b[16 x 8]. With g = lane / 4 and t = lane % 4 a lane holds
//   a: (g, 2t), (g+8, 2t), (g, 2t+8), (g+8, 2t+8), each with its right neighbour;  b: (2t, g), (2t+8, g), each with
//   the one below;  c: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
__device__ __forceinline__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Where `paired` of packed.py took row `within` of sixteen from; -1: it is filling.
__device__ __forceinline__ int paired_row(int sixteenth, int within, int half) {
    const int eights = (half + 7) / 8, row = sixteenth % eights * 8 + within % 8;
    return row < half ? (sixteenth / eights * 2 + within / 8) * half + row : -1;
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return unsigned(__cvta_generic_to_shared(pointer));
}

// Programmatic dependent launch: the next kernel of the stream may start, and what the kernel before wrote is visible.
// Both do nothing in a kernel that was launched the ordinary way, and before sm_90.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_dependencies() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

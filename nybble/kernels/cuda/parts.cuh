// Sums that blocks of one launch leave for each other in memory, without flags: a value says by itself whether it is there.
#pragma once
#include "ptx.cuh"

// What stands in place of a value that is not there yet: a NaN that no arithmetic makes.
constexpr unsigned kMissing = 0xffffffff;

__device__ __forceinline__ float4 load_part(const float4* at) {
    float4 v;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
        : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(at) : "memory");
    return v;
}
__device__ __forceinline__ float2 load_part(const float2* at) {
    float2 v;
    asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(at) : "memory");
    return v;
}
__device__ __forceinline__ void store_part(float4* at, float4 v) {
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};"
        ::"l"(at), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
__device__ __forceinline__ void store_part(float2* at, float2 v) {
    asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};" ::"l"(at), "f"(v.x), "f"(v.y) : "memory");
}
__device__ __forceinline__ bool is_missing(float x) { return __float_as_uint(x) == kMissing; }
__device__ __forceinline__ bool is_missing(float2 v) { return is_missing(v.x) || is_missing(v.y); }
__device__ __forceinline__ bool is_missing(float4 v) {
    return is_missing(v.x) || is_missing(v.y) || is_missing(v.z) || is_missing(v.w);
}

__device__ __forceinline__ void clear_part(float4* at) {
    const float x = __uint_as_float(kMissing);
    store_part(at, make_float4(x, x, x, x));
}
__device__ __forceinline__ void clear_part(float2* at) {
    const float x = __uint_as_float(kMissing);
    store_part(at, make_float2(x, x));
}

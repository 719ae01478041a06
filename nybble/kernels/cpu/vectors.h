/* Vectors of floats as wide as the machine's registers, and how bf16, fp16 and fp32 memory becomes them and back.
 *
 * GCC's and Clang's vector extensions only: one source serves AVX-512, AVX2, NEON and whatever comes. The 16-bit
 * conversions are integer arithmetic because older GCCs know no _Float16 on x86; results are rounded to nearest even.
 */
#ifndef NYBBLE_VECTORS_H
#define NYBBLE_VECTORS_H

#include <stddef.h>
#include <stdint.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))

/* Alignment of one element: memory is read and written anywhere. may_alias: buffers come as bytes. */
#define VECTOR(type) __attribute__((vector_size(LANES * sizeof(type)), aligned(sizeof(type)), may_alias))
typedef float floats VECTOR(float);
typedef int32_t ints VECTOR(int32_t);
typedef uint32_t words VECTOR(uint32_t);
typedef uint16_t halves VECTOR(uint16_t);
typedef uint8_t bytes VECTOR(uint8_t);

enum type { FLOAT32, BFLOAT16, FLOAT16 }; /* known to the Python side */

INLINE floats select(ints mask, words yes, words no) { return (floats)((yes & (words)mask) | (no & ~(words)mask)); }

INLINE floats from_bfloat16(words h) { return (floats)(h << 16); }

INLINE floats from_float16(words h) {
    const words magnitude = (h & 0x7fff) << 13, sign = (h & 0x8000) << 16;
    const floats finite = (floats)magnitude * 0x1p112f; /* moves the exponent's bias; subnormals come out right */
    return (floats)((words)select((ints)magnitude >= 0x7c00 << 13, magnitude | 0x7f800000, (words)finite) | sign);
}

INLINE words to_bfloat16(floats f) {
    const words u = (words)f;
    return (words)select(f != f, (u >> 16) | 0x40, (u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

INLINE words to_float16(floats f) {
    const words sign = (words)f & 0x80000000, u = (words)f ^ sign;
    const words normal = (u - (112u << 23) + 0xfff + ((u >> 13) & 1)) >> 13;
    /* Below 2^-14 the sum with 0.5 is rounded at 2^-24, which is fp16's smallest step. */
    const words subnormal = (words)((floats)u + 0.5f) - 0x3f000000;
    const words finite = (words)select((ints)u < 113 << 23, subnormal, normal);
    const words special = (words)select((ints)u > 0x7f800000, u * 0 + 0x7e00, u * 0 + 0x7c00);
    return (words)select((ints)u >= 143 << 23, special, finite) | (sign >> 16);
}

INLINE floats load(enum type type, const void *base, ptrdiff_t index) {
    if (type == FLOAT32) return *(const floats *)((const float *)base + index);
    const words h = __builtin_convertvector(*(const halves *)((const uint16_t *)base + index), words);
    return type == BFLOAT16 ? from_bfloat16(h) : from_float16(h);
}

INLINE void store(enum type type, void *base, ptrdiff_t index, floats f) {
    if (type == FLOAT32)
        *(floats *)((float *)base + index) = f;
    else
        *(halves *)((uint16_t *)base + index) =
            __builtin_convertvector(type == BFLOAT16 ? to_bfloat16(f) : to_float16(f), halves);
}

/* One element; the rest of a vector may lie outside the buffer. */
INLINE float load_one(enum type type, const void *base, ptrdiff_t index) {
    if (type == FLOAT32) return ((const float *)base)[index];
    const words h = {((const uint16_t *)base)[index]};
    return (type == BFLOAT16 ? from_bfloat16(h) : from_float16(h))[0];
}

INLINE floats largest(floats a, floats b) { return select(a > b, (words)a, (words)b); }

/* e^x for x ≤ 0, to 2 units in the last place: 2^n · e^r with |r| ≤ ln 2 / 2. Adding 1.5 · 2^23 rounds to a whole n,
 * which then stands in the lowest bits. */
INLINE floats exponential(floats x) {
    x = largest(x, (floats){0} - 87);
    const floats shifted = x * 0x1.715476p0f + 0x1.8p23f, n = shifted - 0x1.8p23f;
    const floats r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
    floats p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1;
    p = p * r + 1;
    return (floats)((words)p + ((words)shifted << 23));
}

INLINE ints lanes(void) {
    ints each;
    for (int i = 0; i < LANES; i++) each[i] = i;
    return each;
}

/* Lane i of the result is lane i ^ distance, a constant power of two below LANES. */
#if !defined(__clang__)
#define SWAPPED(f, distance) __builtin_shuffle(f, lanes() ^ (distance))
#elif LANES == 16
#define SWAPPED(f, d) __builtin_shufflevector(f, f, 0 ^ (d), 1 ^ (d), 2 ^ (d), 3 ^ (d), 4 ^ (d), 5 ^ (d), 6 ^ (d), \
        7 ^ (d), 8 ^ (d), 9 ^ (d), 10 ^ (d), 11 ^ (d), 12 ^ (d), 13 ^ (d), 14 ^ (d), 15 ^ (d))
#elif LANES == 8
#define SWAPPED(f, d) \
    __builtin_shufflevector(f, f, 0 ^ (d), 1 ^ (d), 2 ^ (d), 3 ^ (d), 4 ^ (d), 5 ^ (d), 6 ^ (d), 7 ^ (d))
#else
#define SWAPPED(f, d) __builtin_shufflevector(f, f, 0 ^ (d), 1 ^ (d), 2 ^ (d), 3 ^ (d))
#endif

/* Of two vectors' sums of `distance` lanes apart: the second's in the lanes that have this bit, the first's elsewhere. */
#define FOLDED(a, b, distance)                                                                           \
    (select((lanes() & (distance)) != 0, (words)(b), (words)(a)) +                                       \
     SWAPPED(select((lanes() & (distance)) != 0, (words)(a), (words)(b)), distance))

/* Lane i: the sum of f[i], as a tree. Overwrites f. */
INLINE floats sums_of(floats f[LANES]) {
#if LANES == 16
    for (int i = 0; i < 8; i++) f[i] = FOLDED(f[i], f[i + 8], 8);
#endif
#if LANES >= 8
    for (int i = 0; i < 4; i++) f[i] = FOLDED(f[i], f[i + 4], 4);
#endif
    for (int i = 0; i < 2; i++) f[i] = FOLDED(f[i], f[i + 2], 2);
    return FOLDED(f[0], f[1], 1);
}

INLINE float sum_of(floats f) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += f[i];
    return total;
}

#endif

/* What decoders in C share: a team of threads, and 16-bit numbers. Part of every library's key in vqdm/compiled.py. */

#include <stdint.h>
#include <string.h>

/* A team of threads that calls a function: GOMP_parallel of an OpenMP library. */
typedef void Team(void (*function)(void *), void *argument, unsigned threads, unsigned flags);

enum { FLOAT32, BFLOAT16, FLOAT16 };

#define INLINE static inline __attribute__((always_inline))

/* To the nearest bfloat16, to an even one where two are as near; not for NaN. */
INLINE uint16_t bfloat16(float value) {
    uint32_t u;
    memcpy(&u, &value, 4);
    return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}

/* To the nearest float16, likewise. Below 2^-14 an addition rounds: the last bit of 0.5 + x is worth 2^-24. */
INLINE uint16_t float16(float value) {
    uint32_t u, small;
    memcpy(&u, &value, 4);
    const uint16_t sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    float shifted;
    memcpy(&shifted, &u, 4);
    shifted += 0.5f;
    memcpy(&small, &shifted, 4);
    const uint32_t normal = (u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13;
    const uint32_t rounded = u < 0x38800000 ? small - 0x3f000000 : normal;
    return sign | (rounded < 0x7c00 ? rounded : 0x7c00);
}

INLINE float from_float16(uint16_t half) {
    uint32_t u = (uint32_t)(half & 0x7fff) << 13;
    float value;
    memcpy(&value, &u, 4);
    value *= 0x1p112f; /* the exponent's bias is 112 more, for small numbers too */
    memcpy(&u, &value, 4);
    u = (half & 0x7c00) == 0x7c00 ? u | 0x7f800000 : u;
    u |= (uint32_t)(half & 0x8000) << 16;
    memcpy(&value, &u, 4);
    return value;
}

INLINE float from_bfloat16(uint16_t half) {
    const uint32_t u = (uint32_t)half << 16;
    float value;
    memcpy(&value, &u, 4);
    return value;
}

/* Values first..first + n of an array of any type. */
static void read(const void *from, int type, int64_t first, int64_t n, float *restrict to) {
    const uint16_t *halves = (const uint16_t *)from + first;
    if (type == FLOAT32)
        memcpy(to, (const float *)from + first, n * sizeof(float));
    else if (type == BFLOAT16)
        for (int64_t i = 0; i < n; i++) to[i] = from_bfloat16(halves[i]);
    else
        for (int64_t i = 0; i < n; i++) to[i] = from_float16(halves[i]);
}

/* n values to an array of any type, from its `first` on. */
static void write(void *to, int type, int64_t first, int64_t n, const float *restrict values) {
    uint16_t *restrict halves = (uint16_t *)to + first;
    if (type == FLOAT32)
        memcpy((float *)to + first, values, n * sizeof(float));
    else if (type == BFLOAT16)
        for (int64_t i = 0; i < n; i++) halves[i] = bfloat16(values[i]);
    else
        for (int64_t i = 0; i < n; i++) halves[i] = float16(values[i]);
}

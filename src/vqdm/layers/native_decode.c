/* A layer's additive codes to its weight; letters as in vqdm/additive/code.py. Compiled by gcc or clang where it runs. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { FLOAT32, BFLOAT16, FLOAT16 };

typedef struct {
    const uint8_t *codes, *end; /* packed codes [R, G, M] */
    const void *codebooks;      /* [M, K, p, g], or [G, M, K, p, g] */
    const void *scales;         /* [R] or [R, G] */
    const float *input_scales;  /* [G, g], or NULL */
    void *out;                  /* [R, p, G, g] */
    const uint8_t *widths;      /* [G] bits of a code where the rate is variable, or NULL */
    const float *books;         /* the codebooks in float32 */
    int64_t R, G, rows, next;   /* `rows` row groups are taken at once, by any thread, from `next` on */
    int32_t M, bits, p, g, groupwise, group_scales, row_bits;
    int32_t codebooks_type, scales_type, out_type;
} Layer;

/* Of a row, what is decoded at once: its codes and its values stay in the first-level cache. */
enum { CODES = 1024, VALUES = 4096 };

/* A team of threads that calls a function: GOMP_parallel of an OpenMP library. */
typedef void Team(void (*function)(void *), void *argument, unsigned threads, unsigned flags);

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint64_t Words __attribute__((vector_size(32), aligned(8), may_alias));

#define INLINE static inline __attribute__((always_inline))

/* Eight bytes, little end first as on every machine that torch runs on, zero past the end. */
INLINE uint64_t word_at(const uint8_t *at, const uint8_t *end) {
    uint64_t word = 0;
    if (end - at >= 8)
        memcpy(&word, at, 8);
    else if (end > at)
        memcpy(&word, at, end - at);
    return word;
}

/* Codes first..first + n. Eight codes fill `bits` bytes, and four of them lie in one word. */
static const uint64_t *unpack(const Layer *layer, int64_t first, int64_t n, uint64_t *codes) {
    const uint64_t b = layer->bits, mask = ((uint64_t)1 << b) - 1, odd = b % 2 * 4;
    const Words masks = {mask, mask, mask, mask}, low = {0, b, 2 * b, 3 * b}, high = low + (Words){odd, odd, odd, odd};
    uint64_t *out = codes;
    for (int64_t bundle = first / 8; bundle * 8 < first + n; bundle++, out += 8) {
        const uint8_t *at = layer->codes + bundle * b;
        const uint64_t x = word_at(at, layer->end), y = word_at(at + b / 2, layer->end);
        *(Words *)out = (Words){x, x, x, x} >> low & masks;
        *(Words *)(out + 4) = (Words){y, y, y, y} >> high & masks;
    }
    return codes + first % 8;
}

/* Variable rate: codes of groups j..j + n of a row, whose first bit is `bit`; moves that on. The codebook holds those of
   all widths, that of width w from entry 2^w - 1 on. */
static const uint64_t *unpack_variable(const Layer *layer, int64_t *bit, int64_t j, int64_t n, uint64_t *codes) {
    const int64_t together = 57 / layer->bits; /* codes that lie in one word, whatever their widths and its first bit */
    const uint8_t *width = layer->widths + j;
    int64_t at = *bit;
    for (int64_t i = 0; i < n;) {
        uint64_t word = word_at(layer->codes + (at >> 3), layer->end) >> (at & 7);
        for (const int64_t last = i + together < n ? i + together : n; i < last; i++) {
            const uint64_t mask = ((uint64_t)1 << width[i]) - 1;
            codes[i] = mask + (word & mask);
            word >>= width[i];
            at += width[i];
        }
    }
    *bit = at;
    return codes;
}

/* The values [n, d] of groups j..j + n of a row. With M, d and `same` known to the compiler, its loops become a few
   vector instructions. Sums run from left to right as elsewhere, and are equal to the last bit.
   same: all groups have the same codebooks and scale. */
INLINE void add_up(const Layer *layer, const uint64_t *restrict code, int64_t j, int64_t n, const float *restrict scale,
                   float *restrict out, const int M, const int d, const int same) {
    const int64_t K = (int64_t)1 << layer->bits, own = layer->groupwise ? M * K * d : 0;
    const float *restrict books = layer->books + j * own;
#pragma GCC unroll 4
    for (int64_t i = 0; i < n; i++, code += M, out += d, books += same ? 0 : own) {
        const float s = scale[!same && layer->group_scales ? i : 0];
        int c = 0;
        for (; c + 4 <= d; c += 4) {
            Four sum = *(const Four *)(books + code[0] * d + c);
            for (int m = 1; m < M; m++) sum += *(const Four *)(books + (m * K + code[m]) * d + c);
            *(Four *)(out + c) = sum * s;
        }
        for (; c < d; c++) {
            float sum = books[code[0] * d + c];
            for (int m = 1; m < M; m++) sum += books[(m * K + code[m]) * d + c];
            out[c] = sum * s;
        }
    }
}

#define CASE(COUNT, SIZE) \
    if (same && layer->M == COUNT && d == SIZE) { \
        add_up(layer, code, j, n, scale, out, COUNT, SIZE, 1); \
        return; \
    }

static void decode_groups(const Layer *layer, const uint64_t *code, int64_t j, int64_t n, const float *scale,
                          float *out, int d) {
    const int same = !layer->groupwise && !layer->group_scales;
    CASE(1, 4) CASE(2, 4) CASE(3, 4) CASE(4, 4) CASE(5, 4) CASE(6, 4)
    CASE(1, 8) CASE(2, 8) CASE(3, 8) CASE(4, 8)
    CASE(1, 16) CASE(2, 16) CASE(3, 16) CASE(4, 16)
    add_up(layer, code, j, n, scale, out, layer->M, d, same);
}

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
static void read(const void *from, int type, int64_t first, int64_t n, float *to) {
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

/* `values` [n, p, g] of row group r, from group j on, to their places. */
static void put(const Layer *layer, int64_t r, int64_t j, int64_t n, const float *values) {
    const int64_t p = layer->p, g = layer->g, I = layer->G * g;
    if (p == 1) {
        write(layer->out, layer->out_type, r * I + j * g, n * g, values);
        return;
    }
    for (int64_t a = 0; a < p; a++)
        for (int64_t i = 0; i < n; i++)
            write(layer->out, layer->out_type, (r * p + a) * I + (j + i) * g, g, values + (i * p + a) * g);
}

/* `values` [n, p, g] times `factors` [n, g]. */
static void multiply(float *restrict values, const float *restrict factors, int64_t n, int64_t p, int64_t g) {
    if (p == 1) {
        for (int64_t i = 0; i < n * g; i++) values[i] *= factors[i];
        return;
    }
    for (int64_t i = 0; i < n; i++, factors += g)
        for (int64_t a = 0; a < p; a++, values += g)
            for (int64_t c = 0; c < g; c++) values[c] *= factors[c];
}

static void decode_row(const Layer *layer, int64_t r) {
    const int64_t M = layer->M, G = layer->G, p = layer->p, g = layer->g, d = p * g;
    const int64_t most = CODES / M < VALUES / d ? CODES / M : VALUES / d;
    const int direct = p == 1 && layer->out_type == FLOAT32;
    int64_t bit = r * layer->row_bits;
    uint64_t codes[CODES + 16];
    float values[VALUES], scale[CODES];
    for (int64_t j = 0; j < G; j += most) {
        const int64_t n = G - j < most ? G - j : most;
        float *to = direct ? (float *)layer->out + (r * G + j) * g : values;
        read(layer->scales, layer->scales_type, layer->group_scales ? r * G + j : r, layer->group_scales ? n : 1, scale);
        const uint64_t *code = layer->widths ? unpack_variable(layer, &bit, j, n, codes)
                                             : unpack(layer, (r * G + j) * M, n * M, codes);
        decode_groups(layer, code, j, n, scale, to, d);
        if (layer->input_scales) multiply(to, layer->input_scales + j * g, n, p, g);
        if (!direct) put(layer, r, j, n, to);
    }
}

/* Decode until no row is left. */
static void work(void *argument) {
    Layer *layer = argument;
    int64_t r;
    while ((r = __atomic_fetch_add(&layer->next, layer->rows, __ATOMIC_RELAXED)) < layer->R)
        for (int64_t last = r + layer->rows; r < last && r < layer->R; r++) decode_row(layer, r);
}

/* Decode a layer by `team`, or without one by the caller alone. Returns 0, or 1 where memory is short. */
int vqdm_decode(Layer *layer, Team *team, int threads) {
    const int64_t K = layer->widths ? ((int64_t)2 << layer->bits) - 1 : (int64_t)1 << layer->bits;
    const int64_t count = layer->M * K * layer->p * layer->g;
    const int64_t values = layer->groupwise ? layer->G * count : count;
    float *converted = NULL;
    layer->books = layer->codebooks;
    if (layer->codebooks_type != FLOAT32) {
        if (!(converted = malloc(values * sizeof(float)))) return 1;
        read(layer->codebooks, layer->codebooks_type, 0, values, converted);
        layer->books = converted;
    }
    if (team && threads > 1)
        team(work, layer, threads, 0);
    else
        work(layer);
    free(converted);
    return 0;
}

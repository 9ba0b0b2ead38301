/* A layer's additive codes to its weight; letters as in vqdm/additive/code.py. Compiled by gcc or clang where it runs. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { FLOAT32, BFLOAT16, FLOAT16 };

typedef struct {
    const uint8_t *codes, *end; /* packed codes [R, G, M] */
    const void *codebooks;      /* [M, K, p, g], or [G, M, K, p, g] */
    const void *scales;         /* [R] or [R, G] */
    const void *input_scales;   /* [G, g], or NULL */
    void *out;                  /* [R, p, G, g] */
    const uint8_t *widths;      /* [G] bits of a code where the rate is variable, or NULL */
    int64_t R, G, rows;         /* `rows` row groups are taken at once, by any thread */
    int32_t M, bits, p, g, groupwise, group_scales, row_bits;
    int32_t codebooks_type, scales_type, input_scales_type, out_type;
    /* The rest is set here. */
    int64_t next;               /* row group that no thread has taken */
    const float *books;         /* the codebooks in float32, where they are added up */
    const float *factors;       /* the input scales in float32, or NULL */
    const uint32_t *byte, *shift, *mask; /* [G] where the rate is variable: where a code begins in its row group, and its bits */
} Layer;

/* Of a row, what is decoded at once: its codes and its values stay in the first-level cache. */
enum { CODES = 256, VALUES = 1024 };

/* A team of threads that calls a function: GOMP_parallel of an OpenMP library. */
typedef void Team(void (*function)(void *), void *argument, unsigned threads, unsigned flags);

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t Codes __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint64_t Words __attribute__((vector_size(32)));

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
static const uint32_t *unpack(const Layer *layer, int64_t first, int64_t n, uint32_t *codes) {
    const uint64_t b = layer->bits, mask = ((uint64_t)1 << b) - 1, odd = b % 2 * 4;
    const Words masks = {mask, mask, mask, mask}, low = {0, b, 2 * b, 3 * b}, high = low + (Words){odd, odd, odd, odd};
    uint32_t *out = codes;
    for (int64_t bundle = first / 8; bundle * 8 < first + n; bundle++, out += 8) {
        const uint8_t *at = layer->codes + bundle * b;
        const uint64_t x = word_at(at, layer->end), y = word_at(at + b / 2, layer->end);
        *(Codes *)out = __builtin_convertvector((Words){x, x, x, x} >> low & masks, Codes);
        *(Codes *)(out + 4) = __builtin_convertvector((Words){y, y, y, y} >> high & masks, Codes);
    }
    return codes + first % 8;
}

/* Variable rate: codes of groups j..j + n of row group r. The codebook holds those of all widths, that of width w from
   entry 2^w - 1 on. A code begins in the first 15 bits of its word: 7 of the row group's first byte, 7 of its own. */
INLINE const uint32_t *unpack_variable(const Layer *layer, int64_t r, int64_t j, int64_t n, uint32_t *codes) {
    const int64_t row = r * layer->row_bits;
    const uint32_t *restrict byte = layer->byte + j, *restrict shift = layer->shift + j, *restrict mask = layer->mask + j;
    const uint8_t *from = layer->codes + (row >> 3);
    const uint32_t phase = row & 7;
    uint32_t words[CODES];
    if (layer->end - from >= byte[n - 1] + 4)
        for (int64_t i = 0; i < n; i++) memcpy(words + i, from + byte[i], 4);
    else
        for (int64_t i = 0; i < n; i++) words[i] = word_at(from + byte[i], layer->end);
    for (int64_t i = 0; i < n; i++) codes[i] = mask[i] + (words[i] >> (shift[i] + phase) & mask[i]);
    return codes;
}

/* The sums [n, d] of groups j..j + n of a row. With M and d known to the compiler, its loops become a few vector
   instructions. Sums run from left to right as elsewhere, and are equal to the last bit. `own`: values of a group's own
   codebooks, 0 where all groups have the same. */
INLINE void add_up(const Layer *layer, const uint32_t *restrict code, int64_t n, const float *restrict books,
                   int64_t own, float *restrict out, const int M, const int d) {
    const int64_t K = (int64_t)1 << layer->bits;
#pragma GCC unroll 4
    for (int64_t i = 0; i < n; i++, code += M, out += d, books += own) {
        int c = 0;
        for (; c + 4 <= d; c += 4) {
            Four sum = *(const Four *)(books + code[0] * d + c);
            for (int m = 1; m < M; m++) sum += *(const Four *)(books + (m * K + code[m]) * d + c);
            *(Four *)(out + c) = sum;
        }
        for (; c < d; c++) {
            float sum = books[code[0] * d + c];
            for (int m = 1; m < M; m++) sum += books[(m * K + code[m]) * d + c];
            out[c] = sum;
        }
    }
}

/* Entries [n, d] of one codebook of 16 bit, as they are. */
INLINE void copy(const uint16_t *restrict book, const uint32_t *restrict code, int64_t n, int64_t own,
                 uint16_t *restrict out, const int d) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < n; i++, book += own) memcpy(out + i * d, book + code[i] * (int64_t)d, 2 * d);
}

#define CASE(COUNT, SIZE) \
    if (!own && layer->M == COUNT && d == SIZE) { \
        add_up(layer, code, n, books, 0, out, COUNT, SIZE); \
        return; \
    }

/* The sums [n, d] of groups j..j + n of a row. */
static void decode_groups(const Layer *layer, const uint32_t *code, int64_t j, int64_t n, float *out, int d) {
    const int64_t own = layer->groupwise ? (int64_t)layer->M * d << layer->bits : 0;
    if (!layer->books) {
        const uint16_t *book = (const uint16_t *)layer->codebooks + j * own;
        uint16_t entries[VALUES];
        if (d == 4 && !own)
            copy(book, code, n, 0, entries, 4);
        else if (d == 8 && !own)
            copy(book, code, n, 0, entries, 8);
        else
            copy(book, code, n, own, entries, d);
        read(entries, layer->codebooks_type, 0, n * d, out);
        return;
    }
    const float *books = layer->books + j * own;
    CASE(1, 4) CASE(2, 4) CASE(3, 4) CASE(4, 4) CASE(5, 4) CASE(6, 4)
    CASE(1, 8) CASE(2, 8) CASE(3, 8) CASE(4, 8)
    CASE(1, 16) CASE(2, 16) CASE(3, 16) CASE(4, 16)
    add_up(layer, code, n, books, own, out, layer->M, d);
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

/* `values` [n, d] times the scale of every group, or of the row. */
static void scale_groups(float *restrict values, const float *restrict scale, int each, int64_t n, int64_t d) {
    if (!each) {
        n *= d;
        for (int64_t c = 0; c < n; c++) values[c] *= scale[0];
        return;
    }
    for (int64_t i = 0; i < n; i++, values += d)
        for (int64_t c = 0; c < d; c++) values[c] *= scale[i];
}

/* `values` [n, p, g] times `factors` [n, g]. */
static void scale_columns(float *restrict values, const float *restrict factors, int64_t n, int64_t p, int64_t g) {
    if (p == 1) {
        for (int64_t c = 0; c < n * g; c++) values[c] *= factors[c];
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
    uint32_t codes[CODES + 16];
    float values[VALUES], scale[CODES];
    for (int64_t j = 0; j < G; j += most) {
        const int64_t n = G - j < most ? G - j : most;
        float *to = direct ? (float *)layer->out + (r * G + j) * g : values;
        const uint32_t *code = layer->widths ? unpack_variable(layer, r, j, n, codes)
                                             : unpack(layer, (r * G + j) * M, n * M, codes);
        decode_groups(layer, code, j, n, to, d);
        read(layer->scales, layer->scales_type, layer->group_scales ? r * G + j : r, layer->group_scales ? n : 1, scale);
        scale_groups(to, scale, layer->group_scales, n, d);
        if (layer->factors) scale_columns(to, layer->factors + j * g, n, p, g);
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

/* Where the code of every group lies. A width of more bits than the codebook has would lead past its end. */
static void find_places(const Layer *layer, uint32_t *byte, uint32_t *shift, uint32_t *mask) {
    uint32_t bit = 0;
    for (int64_t j = 0; j < layer->G; j++) {
        const uint32_t width = layer->widths[j] < layer->bits ? layer->widths[j] : layer->bits;
        byte[j] = bit >> 3;
        shift[j] = bit & 7;
        mask[j] = ((uint32_t)1 << width) - 1;
        bit += width;
    }
}

/* Decode a layer by `team`, or without one by the caller alone. Returns 0, or 1 where memory is short. */
int vqdm_decode(const Layer *given, Team *team, int threads) {
    Layer layer = *given;
    const int64_t K = layer.widths ? ((int64_t)2 << layer.bits) - 1 : (int64_t)1 << layer.bits;
    const int64_t I = layer.G * layer.g, sets = layer.groupwise ? layer.G : 1;
    const int64_t values = layer.M == 1 || layer.codebooks_type == FLOAT32 ? 0 : sets * layer.M * K * layer.p * layer.g;
    float *books = malloc((values + I + 3 * layer.G) * sizeof(float)), *factors = books + values;
    uint32_t *places = (uint32_t *)(factors + I);
    if (!books) return 1;
    layer.books = layer.codebooks_type == FLOAT32 ? layer.codebooks : values ? books : NULL;
    read(layer.codebooks, layer.codebooks_type, 0, values, books);
    layer.factors = layer.input_scales ? factors : NULL;
    if (layer.input_scales) read(layer.input_scales, layer.input_scales_type, 0, I, factors);
    layer.byte = places;
    layer.shift = places + layer.G;
    layer.mask = places + 2 * layer.G;
    if (layer.widths) find_places(&layer, places, places + layer.G, places + 2 * layer.G);
    if (team && threads > 1)
        team(work, &layer, threads, 0);
    else
        work(&layer);
    free(books);
    return 0;
}

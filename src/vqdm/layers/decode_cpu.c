/* A layer's additive codes to its weight; letters as in vqdm/additive/code.py. Compiled by gcc or clang where it runs. */

#include <stddef.h>
#include <stdlib.h>

#include "decode_cpu.h"

/* Of a single codebook, where a column group's code lies in a row group. */
typedef struct {
    uint32_t byte, shift, mask; /* the byte, the bit of that byte where it begins, its bits */
    uint32_t first;             /* the entry that code 0 stands for */
} Place;

typedef struct {
    const uint8_t *codes, *end; /* packed codes [R, G, M] */
    const void *codebooks;      /* [M, K, p, g], or [G, M, K, p, g] */
    const void *scales;         /* [R] or [R, G] */
    const void *input_scales;   /* [G, g], or NULL */
    void *out;                  /* [R, p, G, g] */
    const uint8_t *widths;      /* [G] bits of a code where the rate is variable, or NULL */
    int64_t R, G, row_bits;
    int64_t rows;               /* that are taken at once, by any thread */
    int32_t M, bits, p, g, groupwise, group_scales;
    int32_t codebooks_type, scales_type, input_scales_type, out_type;
    /* The rest is set here. */
    int64_t next;         /* the first row group that no thread has taken */
    const Place *places;  /* [G] where M is 1 */
    const float *books;   /* the codebooks in float32 */
    const float *factors; /* [G, p, g] where there are input scales, else ones [p, g] */
} Layer;

_Static_assert(offsetof(Layer, next) == 128 && sizeof(Layer) == 160, "decode_cpu.py packs 128 bytes and 32 for the rest");

/* Of a row, the most that is decoded at once, which leaves the first-level cache to the codebooks; and the bytes that
   such codes of up to 16 bits take, with those that are read beside them. */
enum { CODES = 256, VALUES = 4096, BYTES = 2 * CODES + 64 };

typedef float Two __attribute__((vector_size(8), aligned(4), may_alias));
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t Codes __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint64_t Words __attribute__((vector_size(32)));

/* BYTES of the packed codes from a byte on: in `copy` where fewer are left, with zeros after the last. They are read as
   words, little end first as on every machine that torch runs on. */
static const uint8_t *codes_at(const Layer *layer, int64_t byte, uint8_t *copy) {
    const int64_t left = layer->end - layer->codes - byte;
    if (left >= BYTES) return layer->codes + byte;
    memset(copy, 0, BYTES);
    if (left > 0) memcpy(copy, layer->codes + byte, left);
    return copy;
}

#define SUM(TYPE, WIDTH) \
    for (; c + WIDTH <= d; c += WIDTH) { \
        TYPE sum = *(const TYPE *)(entry[0] + c); \
        for (int m = 1; m < M; m++) sum += *(const TYPE *)(entry[m] + c); \
        *(TYPE *)(out + c) = sum * scale * *(const TYPE *)(factor + c); \
    }

/* The values [d] of a group from its M entries, added up from left to right as elsewhere: equal to the last bit. With
   M and d known to the compiler it becomes a few vector instructions. */
INLINE void add_up(const float *const *entry, float scale, const float *factor, float *restrict out, const int M,
                   const int d) {
    int c = 0;
    SUM(Eight, 8)
    SUM(Four, 4)
    SUM(Two, 2)
    SUM(float, 1)
}

/* A single codebook: values [n, d] of groups j..j + n of row group r. `same`: all have the first scale. Places hold for
   every row group: one that does not begin a byte shifts them by its `phase`, and no code leaves its four bytes. */
INLINE void decode_single(const Layer *layer, int64_t r, int64_t j, int64_t n, const float *restrict scale,
                          float *restrict out, const int d, const int same) {
    const int64_t row = r * layer->row_bits, step = layer->input_scales ? d : 0;
    const Place *place = layer->places + j;
    const int64_t start = place->byte, phase = row & 7;
    const float *restrict books = layer->books, *factor = layer->factors + j * step;
    uint8_t copy[BYTES];
    const uint8_t *from = codes_at(layer, (row >> 3) + start, copy);
#pragma GCC unroll 4
    for (int64_t i = 0; i < n; i++) {
        uint32_t word;
        memcpy(&word, from + (place[i].byte - start), 4);
        const uint64_t code = place[i].first + (word >> (place[i].shift + phase) & place[i].mask);
        const float *entry = books + code * d;
        add_up(&entry, scale[same ? 0 : i], factor + i * step, out + i * d, 1, d);
    }
}

/* Codes first..first + n. Eight codes fill `bits` bytes, and four of them lie in one word. */
static const uint32_t *unpack(const Layer *layer, int64_t first, int64_t n, uint32_t *codes) {
    const uint64_t b = layer->bits, mask = ((uint64_t)1 << b) - 1, odd = b % 2 * 4;
    const Words masks = {mask, mask, mask, mask}, low = {0, b, 2 * b, 3 * b}, high = low + (Words){odd, odd, odd, odd};
    uint8_t copy[BYTES];
    const uint8_t *from = codes_at(layer, first / 8 * b, copy);
    for (int64_t i = 0; i < first % 8 + n; i += 8, from += b) {
        uint64_t x, y;
        memcpy(&x, from, 8);
        memcpy(&y, from + b / 2, 8);
        *(Codes *)(codes + i) = __builtin_convertvector((Words){x, x, x, x} >> low & masks, Codes);
        *(Codes *)(codes + i + 4) = __builtin_convertvector((Words){y, y, y, y} >> high & masks, Codes);
    }
    return codes + first % 8;
}

/* Several codebooks, of constant rate: likewise. */
INLINE void decode_several(const Layer *layer, int64_t r, int64_t j, int64_t n, const float *restrict scale,
                           float *restrict out, const int M, const int d, const int same) {
    const int64_t step = layer->input_scales ? d : 0;
    const int64_t K = (int64_t)1 << layer->bits, set = layer->groupwise ? M * K * d : 0;
    const float *restrict books = layer->books + j * set, *factor = layer->factors + j * step;
    uint32_t codes[CODES + 16];
    const uint32_t *code = unpack(layer, (r * layer->G + j) * M, n * M, codes);
#pragma GCC unroll 4
    for (int64_t i = 0; i < n; i++, code += M, books += set) {
        const float *entry[16];
        for (int m = 0; m < M; m++) entry[m] = books + (m * K + code[m]) * d;
        add_up(entry, scale[same ? 0 : i], factor + i * step, out + i * d, M, d);
    }
}

INLINE void decode_groups(const Layer *layer, int64_t r, int64_t j, int64_t n, const float *scale, float *out,
                          const int M, const int d, const int same) {
    if (M == 1)
        decode_single(layer, r, j, n, scale, out, d, same);
    else
        decode_several(layer, r, j, n, scale, out, M, d, same);
}

#define CASE(COUNT, SIZE) \
    if (same && layer->M == COUNT && d == SIZE) { \
        decode_groups(layer, r, j, n, scale, out, COUNT, SIZE, 1); \
        return; \
    }

/* Values [n, p, g] of groups j..j + n of row group r; `scale`: theirs, or that of all. */
static void decode_part(const Layer *layer, int64_t r, int64_t j, int64_t n, const float *scale, float *out) {
    const int d = layer->p * layer->g, same = !layer->group_scales;
    CASE(1, 1) CASE(1, 2) CASE(1, 4) CASE(2, 4) CASE(3, 4) CASE(4, 4) CASE(5, 4) CASE(6, 4)
    CASE(1, 8) CASE(2, 8) CASE(3, 8) CASE(4, 8)
    CASE(1, 16) CASE(2, 16) CASE(3, 16) CASE(4, 16)
    decode_groups(layer, r, j, n, scale, out, layer->M, d, same);
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

static void decode_row(const Layer *layer, int64_t r) {
    const int64_t G = layer->G, p = layer->p, g = layer->g, d = p * g;
    const int64_t most = CODES / layer->M < VALUES / d ? CODES / layer->M : VALUES / d;
    const int direct = p == 1 && layer->out_type == FLOAT32;
    float values[VALUES], scale[CODES];
    if (!layer->group_scales) read(layer->scales, layer->scales_type, r, 1, scale);
    for (int64_t j = 0; j < G; j += most) {
        const int64_t n = G - j < most ? G - j : most;
        float *to = direct ? (float *)layer->out + (r * G + j) * g : values;
        if (layer->group_scales) read(layer->scales, layer->scales_type, r * G + j, n, scale);
        decode_part(layer, r, j, n, scale, to);
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

/* The places of M = 1. Where the rate is variable, the codebook holds those of all widths, that of width w from entry
   2^w - 1 on; a larger width than the largest would lead past its end. */
static void find_places(const Layer *layer, Place *places) {
    uint32_t bit = 0;
    for (int64_t j = 0; j < layer->G; j++) {
        const uint32_t most = layer->bits, wanted = layer->widths ? layer->widths[j] : most;
        const uint32_t width = wanted < most ? wanted : most, mask = ((uint32_t)1 << width) - 1;
        places[j] = (Place){bit >> 3, bit & 7, mask, layer->widths ? mask : layer->groupwise ? (uint32_t)j << most : 0};
        bit += width;
    }
}

/* Input scales [G, g] to factors [G, p, g]: where p is 1, all at once. */
static void find_factors(const Layer *layer, float *factors) {
    const int64_t p = layer->p, I = layer->G * layer->g, n = p == 1 ? I : layer->g;
    for (int64_t i = 0; i * n < I * p; i++)
        read(layer->input_scales, layer->input_scales_type, i / p * n, n, factors + i * n);
}

/* Decode a layer by `team`, or without one by the caller alone. Returns 0, or 1 where memory is short. */
int vqdm_decode(const Layer *given, Team *team, int threads) {
    Layer layer = *given;
    const int64_t G = layer.G, d = layer.p * layer.g;
    const int64_t K = layer.widths ? ((int64_t)2 << layer.bits) - 1 : (int64_t)1 << layer.bits;
    const int64_t values = layer.codebooks_type == FLOAT32 ? 0 : (layer.groupwise ? G : 1) * layer.M * K * d;
    Place *places = malloc(G * sizeof(Place) + (G * d + values) * sizeof(float));
    float *factors = (float *)(places + G), *books = factors + G * d;
    if (!places) return 1;
    layer.places = places;
    layer.factors = factors;
    layer.books = values ? books : layer.codebooks;
    if (layer.M == 1) find_places(&layer, places);
    if (layer.input_scales)
        find_factors(&layer, factors);
    else
        for (int64_t c = 0; c < d; c++) factors[c] = 1;
    read(layer.codebooks, layer.codebooks_type, 0, values, books);
    if (team && threads > 1)
        team(work, &layer, threads, 0);
    else
        work(&layer);
    free(places);
    return 0;
}

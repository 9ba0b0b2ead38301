/* The states of a bitshift trellis to the weight; letters as in vqdm/additive/trellis.py. Compiled by gcc or clang where
   it runs. */

#include <stddef.h>
#include <stdlib.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "decode_cpu.h"

enum { LOGARITHM = FLOAT16 + 1 }; /* of scales: bytes that stand for the values of a table */

typedef struct {
    const uint8_t *codes;               /* packed rings, segment by segment and column by column */
    const uint8_t *widths;              /* [I] quarter bits per weight */
    const void *codebook;               /* [2^L] */
    const void *scales, *input_scales;  /* [O] and [I] */
    const float *values, *input_values; /* [256] where they are logarithms */
    void *out;                          /* [O, I] */
    int64_t bytes, O, I, T, segment_bits;
    int32_t L, codebook_type, scales_type, input_scales_type, out_type, unused;
    /* The rest is set here. */
    int64_t next;          /* the first tile that no thread has taken */
    const int64_t *first;  /* [I] bit of a column's ring in a segment */
    const float *table, *rows, *factors; /* in float32: values of states [2^L], scales [O], input scales [I] */
} Trellis;

_Static_assert(offsetof(Trellis, next) == 128 && sizeof(Trellis) == 168, "decode_cpu.py packs 128 bytes and 40");

/* A word holds WORD bits at least from any bit on. The bits of a tile's columns, a line of cache each, and the table should
   fit in the first-level cache, whose lines are of LINE bytes. */
enum { PERIOD = 4, WORD = 57, MOST = 2 * PERIOD, ROWS = 512, COLUMNS = 128, LINE = 64 };

/* Vectors as wide as the processor's: numbers of LANES columns, words of WIDE. */
#ifdef __AVX512F__
enum { LANES = 16, WIDE = LANES / 2 };
#else
enum { LANES = 8, WIDE = LANES / 2 };
#endif
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Integers __attribute__((vector_size(4 * LANES), may_alias));
typedef uint32_t Half __attribute__((vector_size(4 * WIDE), may_alias));
typedef int64_t Bits __attribute__((vector_size(8 * WIDE), may_alias));
typedef uint64_t Words __attribute__((vector_size(8 * WIDE)));

/* Columns of a tile in one segment; those after its last have no bits. A column's word begins with the window of a row; it
   holds those of `rows` rows, and 32 bits of it those of half of them. Bits count from `codes` on. */
typedef struct {
    Bits bit[COLUMNS / WIDE];              /* where the word begins: before the ring where the window begins at its end */
    Bits first[COLUMNS / WIDE];            /* where the ring begins */
    Bits ring[COLUMNS / WIDE];             /* bits of it, and of `rows` rows */
    Bits step[COLUMNS / WIDE];
    Bits middle[COLUMNS / WIDE];           /* from the window of the first row to that of the middle one */
    Half coded[COLUMNS / WIDE];            /* all bits set where the column has bits */
    Integers half[2][COLUMNS / LANES];     /* of the word, from the window of the first row and from that of the middle one */
    Integers later[MOST][COLUMNS / LANES]; /* from the window of the first row of a half to that of a row */
    const uint8_t *codes;
    int64_t last;                          /* the last byte where eight can be read */
    uint32_t narrowest;                    /* bits of PERIOD rows, of columns that have any */
    int n, rows;                           /* columns, rows of a word */
} Tile;

/* The tile from row t of a segment and a column on. */
static void begin(const Trellis *trellis, int64_t segment, uint32_t t, int64_t column, Tile *tile) {
    const uint32_t L = trellis->L, most = PERIOD * L, T = trellis->T;
    const int64_t rings = segment * trellis->segment_bits, last = trellis->bytes - 8;
    const int64_t from = (rings + trellis->first[column]) / 8, byte = from < last ? from : last;
    uint32_t width[COLUMNS] = {0}, widest = 0, narrowest = most, *coded = (uint32_t *)tile->coded;
    int64_t *bit = (int64_t *)tile->bit, *first = (int64_t *)tile->first, *ring = (int64_t *)tile->ring;
    int64_t *step = (int64_t *)tile->step, *middle = (int64_t *)tile->middle;
    tile->codes = trellis->codes + byte;
    tile->last = last - byte;
    tile->n = trellis->I - column < COLUMNS ? trellis->I - column : COLUMNS;
    memset(first, 0, sizeof tile->first);
    for (int j = 0; j < tile->n; j++) {
        const uint32_t wanted = trellis->widths[column + j], q = wanted < PERIOD ? 0 : wanted < most ? wanted : most;
        width[j] = q;
        first[j] = rings + trellis->first[column + j] - 8 * byte;
        widest = q > widest ? q : widest;
        narrowest = q && q < narrowest ? q : narrowest;
    }
    const uint32_t kept = L - widest / PERIOD; /* bits of the first row's window that rows before it have added */
    const uint32_t fitting = widest + kept <= 32 && 2 * widest + kept <= WORD ? MOST : PERIOD;
    const uint32_t rows = widest + kept <= WORD ? fitting : 1, half = rows / 2;
    tile->narrowest = narrowest;
    tile->rows = rows;
    for (int j = 0; j < COLUMNS; j++) {
        const uint32_t q = width[j];
        bit[j] = first[j] + (t + 1) * q / PERIOD - (q ? L : 0);
        ring[j] = T * q / PERIOD;
        step[j] = rows * q / PERIOD;
        middle[j] = (half + 1) * q / PERIOD - q / PERIOD;
        coded[j] = q ? -1 : 0;
    }
    for (uint32_t i = 0; i < rows; i++) {
        const uint32_t start = i < half ? 0 : half;
        uint32_t *later = (uint32_t *)tile->later[i];
        for (int j = 0; j < COLUMNS; j++) later[j] = (i + 1) * width[j] / PERIOD - (start + 1) * width[j] / PERIOD;
    }
}

/* Eight bytes from each of some bytes on. A gather waits for the register that it fills, unless that has just been cleared;
   compilers leave that out where they know that all lanes are filled. */
INLINE Words words_at(const uint8_t *codes, Bits bytes) {
#if defined(__AVX512F__)
    __mmask8 all = -1;
    __asm__("" : "+Yk"(all));
    return (Words)_mm512_mask_i64gather_epi64(_mm512_setzero_si512(), all, (__m512i)bytes, codes, 1);
#elif defined(__AVX2__)
    __m256i all = _mm256_set1_epi64x(-1);
    __asm__("" : "+x"(all));
    return (Words)_mm256_mask_i64gather_epi64(_mm256_setzero_si256(), (const void *)codes, (__m256i)bytes, all, 1);
#else
    uint64_t words[WIDE]; /* little end first, as on every machine that torch runs on */
    Words found;
    for (int k = 0; k < WIDE; k++) memcpy(words + k, codes + bytes[k], 8);
    memcpy(&found, words, sizeof found);
    return found;
#endif
}

/* Values of the table at LANES states. */
INLINE Floats look_up(const float *table, Integers states) {
#if defined(__AVX512F__)
    __mmask16 all = -1;
    __asm__("" : "+Yk"(all));
    return (Floats)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), all, (__m512i)states, table, 4);
#elif defined(__AVX2__)
    __m256 all = (__m256)_mm256_set1_epi32(-1);
    __asm__("" : "+x"(all));
    return (Floats)_mm256_mask_i32gather_ps(_mm256_setzero_ps(), table, (__m256i)states, all, 4);
#else
    Floats values;
    for (int k = 0; k < LANES; k++) values[k] = table[states[k]];
    return values;
#endif
}

INLINE Bits larger(Bits a, Bits b) {
    const Bits above = a > b;
    return (a & above) | (b & ~above);
}

/* Bits from some bits on. No byte outside of the codes is read, wherever they are. */
INLINE Words bits_at(const Tile *tile, Bits bit) {
    const Bits byte = -larger(-(bit >> 3), (Bits){} - tile->last);
    return words_at(tile->codes, byte) >> (Words)((bit - (byte << 3)) & 63);
}

/* The halves of the words, which then move on. `edge`: windows may begin at the end of their rings, or words reach beyond
   the codes. */
INLINE void find_halves(Tile *tile, const int edge) {
    Half *first_half = (Half *)tile->half[0], *second_half = (Half *)tile->half[1];
    for (int k = 0; k < COLUMNS / WIDE; k++) {
        const Bits bit = tile->bit[k];
        Words word;
        if (edge) {
            const Bits first = tile->first[k], start = larger(bit, first), early = start - bit;
            const Words end = bits_at(tile, larger(bit + tile->ring[k], first));
            word = (end & ((((Words){} + 1) << (Words)early) - 1)) | bits_at(tile, start) << (Words)early;
        } else {
            word = words_at(tile->codes, bit >> 3) >> (Words)(bit & 7);
        }
        first_half[k] = __builtin_convertvector(word, Half) & tile->coded[k];
        second_half[k] = __builtin_convertvector(word >> (Words)tile->middle[k], Half) & tile->coded[k];
        tile->bit[k] = bit + tile->step[k];
    }
}

/* Weights of the first n rows of the words, from a row and column on. */
INLINE void decode_rows(const Trellis *trellis, const Tile *tile, int64_t row, int64_t column, const int rows, const int n) {
    const Integers mask = (Integers){} + ((1u << trellis->L) - 1);
    const float *table = trellis->table, *factors = trellis->factors + column;
    Floats scales[MOST];
    for (int i = 0; i < n; i++) scales[i] = (Floats){} + trellis->rows[row + i];
    for (int j = 0; j < tile->n; j += LANES) {
        const int64_t place = row * trellis->I + column + j;
        const int wide = tile->n - j < LANES ? tile->n - j : LANES, direct = trellis->out_type == FLOAT32 && wide == LANES;
        float values[MOST * LANES], *to = direct ? (float *)trellis->out + place : values;
        const int64_t stride = direct ? trellis->I : LANES;
        const Integers first = tile->half[0][j / LANES], second = tile->half[1][j / LANES];
        const Floats factor = *(const Floats *)(factors + j);
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) {
            const Integers states = (i < rows / 2 ? first : second) >> tile->later[i][j / LANES] & mask;
            *(Floats *)(to + i * stride) = look_up(table, states) * scales[i] * factor;
        }
        for (int i = 0; i < n && !direct; i++)
            write(trellis->out, trellis->out_type, place + i * trellis->I, wide, values + i * LANES);
    }
}

/* Weights from row t of a segment and a column on. */
static void decode_tile(const Trellis *trellis, int64_t segment, int64_t t, int64_t column) {
    const int64_t T = trellis->T, stop = T - t < ROWS ? T : t + ROWS;
    Tile tile;
    begin(trellis, segment, t, column, &tile);
    const int64_t *end = (const int64_t *)tile.bit + tile.n - 1; /* the last of all words, but for bits of a window */
    const int64_t bytes = (((int64_t *)tile.first)[tile.n - 1] + ((int64_t *)tile.ring)[tile.n - 1]) / 8;
    const uint8_t *next = tile.codes + bytes;
    for (const int rows = tile.rows; t < stop; t += rows) {
        const int n = stop - t < rows ? stop - t : rows;
        /* Meanwhile, as much of the next tile's codes. */
        for (; next < tile.codes + bytes + bytes * (t + n) / T; next += LINE) __builtin_prefetch(next);
        if (rows == 1) { /* after which no window need begin at a whole bit */
            begin(trellis, segment, t, column, &tile);
            find_halves(&tile, 1);
        } else if ((t + 1) * tile.narrowest / PERIOD < trellis->L || (*end + trellis->L) / 8 > tile.last) {
            find_halves(&tile, 1);
        } else {
            find_halves(&tile, 0);
        }
        if (n == MOST)
            decode_rows(trellis, &tile, segment * T + t, column, MOST, MOST);
        else
            decode_rows(trellis, &tile, segment * T + t, column, rows, n);
    }
}

/* Decode until no tile is left. */
static void work(void *argument) {
    Trellis *trellis = argument;
    const int64_t across = (trellis->I + COLUMNS - 1) / COLUMNS, down = (trellis->T + ROWS - 1) / ROWS;
    const int64_t tiles = trellis->O / trellis->T * down * across;
    int64_t tile;
    while ((tile = __atomic_fetch_add(&trellis->next, 1, __ATOMIC_RELAXED)) < tiles)
        decode_tile(trellis, tile / across / down, tile / across % down * ROWS, tile % across * COLUMNS);
}

/* n scales in float32. */
static void read_scales(const void *from, int type, const float *values, int64_t n, float *restrict to) {
    if (type == LOGARITHM)
        for (int64_t i = 0; i < n; i++) to[i] = values[((const uint8_t *)from)[i]];
    else
        read(from, type, 0, n, to);
}

/* Decode a layer by `team`, or without one by the caller alone. Returns 0, or 1 where memory is short. */
int vqdm_trellis(const Trellis *given, Team *team, int threads) {
    Trellis trellis = *given;
    const int64_t O = trellis.O, I = trellis.I, K = (int64_t)1 << trellis.L;
    /* Factors are read in whole vectors. */
    int64_t *first = malloc(I * sizeof(int64_t) + (O + I + LANES + K) * sizeof(float)), bit = 0;
    float *rows = (float *)(first + I), *factors = rows + O, *table = factors + I + LANES;
    if (!first) return 1;
    uint8_t few[8] = {0};
    if (trellis.bytes < 8) {
        memcpy(few, trellis.codes, trellis.bytes);
        trellis.codes = few;
        trellis.bytes = 8;
    }
    for (int64_t j = 0; j < I; bit += trellis.T * trellis.widths[j++] / PERIOD) first[j] = bit;
    read_scales(trellis.scales, trellis.scales_type, trellis.values, O, rows);
    read_scales(trellis.input_scales, trellis.input_scales_type, trellis.input_values, I, factors);
    read(trellis.codebook, trellis.codebook_type, 0, K, table);
    trellis.first = first;
    trellis.rows = rows;
    trellis.factors = factors;
    trellis.table = table;
    if (team && threads > 1)
        team(work, &trellis, threads, 0);
    else
        work(&trellis);
    free(first);
    return 0;
}

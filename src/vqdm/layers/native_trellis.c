/* The states of a bitshift trellis to the weight; letters as in vqdm/additive/trellis.py. Compiled by gcc or clang where
   it runs. */

#include <stddef.h>
#include <stdlib.h>

#include "decoding.h"

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

_Static_assert(offsetof(Trellis, next) == 128 && sizeof(Trellis) == 168, "native_trellis.py packs 128 bytes and 40");

/* Of a tile, whose values fit in the first-level cache beside the table and a line of codes per column. */
enum { ROWS = 64, COLUMNS = 64 };

/* Rows after which the bits of a column repeat their places, and rows that are decoded at once. */
enum { PERIOD = 4, AT_ONCE = 8, WORD = 57 };

_Static_assert(ROWS % AT_ONCE == 0, "a tile has room for whole turns");

/* At least WORD bits from a bit on, or as many as there are; before the first bit are zeros. No byte outside of the codes
   is read, wherever the bit is. */
INLINE uint64_t bits_at(const Trellis *trellis, int64_t bit) {
    const int64_t last = trellis->bytes - 8, byte = bit < 0 ? 0 : bit >> 3 < last ? bit >> 3 : last;
    uint64_t word; /* little end first, as on every machine that torch runs on */
    memcpy(&word, trellis->codes + byte, 8);
    return bit < 0 ? word << (-bit & 63) : word >> ((bit - 8 * byte) & 63);
}

/* The values of the states of a column down some rows, the first a multiple of PERIOD, AT_ONCE by AT_ONCE. `bit` is where
   the first window begins, `fresh` are the bits by which each is later than the one before it. A word holds the windows
   of `per_word` rows. */
INLINE void decode_rows(const Trellis *trellis, int64_t bit, const int fresh[PERIOD], uint32_t mask, int rows,
                        float *restrict to, const int per_word) {
    const float *restrict table = trellis->table;
    const int half = fresh[1] + fresh[2], width = half + fresh[3] + fresh[0];
    for (int t = 0; t < rows; t += AT_ONCE, to += AT_ONCE * COLUMNS, bit += AT_ONCE / PERIOD * width) {
        uint64_t word = 0;
#pragma GCC unroll 8
        for (int i = 0; i < AT_ONCE; i++, word >>= fresh[i % PERIOD]) {
            if (i % per_word == 0) word = bits_at(trellis, bit + i / PERIOD * width + i % PERIOD / 2 * half);
            to[i * COLUMNS] = table[word & mask];
        }
    }
}

/* Values [rows, COLUMNS] of column j, from row t of a segment on. */
INLINE void decode_column(const Trellis *trellis, int64_t segment, int64_t t, int64_t j, int rows, float *restrict to) {
    const int L = trellis->L, q = trellis->widths[j] < PERIOD * L ? trellis->widths[j] : PERIOD * L;
    const uint32_t mask = q ? (1u << L) - 1 : 0; /* where there are no bits, the state is 0 */
    const int64_t first = segment * trellis->segment_bits + trellis->first[j];
    const int64_t bit = first + t / PERIOD * q + q / PERIOD - L;
    int fresh[PERIOD];
    for (int i = 0; i < PERIOD; i++) fresh[i] = (i + 1) * q / PERIOD - i * q / PERIOD;
    if (2 * q - fresh[0] + L <= WORD)
        decode_rows(trellis, bit, fresh, mask, rows, to, 8);
    else if (q - fresh[0] + L <= WORD)
        decode_rows(trellis, bit, fresh, mask, rows, to, 4);
    else
        decode_rows(trellis, bit, fresh, mask, rows, to, 2);
    if (t || !q) return;
    /* The windows of early rows begin at the end of the ring. */
    const int64_t ring = trellis->T * q / PERIOD;
    const uint64_t tail = bits_at(trellis, first + ring - L) & mask;
    const uint64_t joined = tail | bits_at(trellis, first) << L;
    for (int row = 0; row < rows && (row + 1) * q / PERIOD < L; row++)
        to[row * COLUMNS] = trellis->table[joined >> (row + 1) * q / PERIOD & mask];
}

static void decode_tile(const Trellis *trellis, int64_t segment, int64_t t, int64_t j) {
    const int64_t T = trellis->T, I = trellis->I;
    const int rows = T - t < ROWS ? T - t : ROWS, columns = I - j < COLUMNS ? I - j : COLUMNS;
    float values[ROWS][COLUMNS], scaled[COLUMNS];
    for (int c = 0; c < columns; c++) decode_column(trellis, segment, t, j + c, rows, values[0] + c);
    for (int row = 0; row < rows; row++) {
        const int64_t r = segment * T + t + row;
        const float scale = trellis->rows[r], *restrict factors = trellis->factors + j;
        if (trellis->out_type == FLOAT32) {
            float *restrict to = (float *)trellis->out + r * I + j;
            for (int c = 0; c < columns; c++) to[c] = values[row][c] * scale * factors[c];
        } else {
            for (int c = 0; c < columns; c++) scaled[c] = values[row][c] * scale * factors[c];
            write(trellis->out, trellis->out_type, r * I + j, columns, scaled);
        }
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
    int64_t *first = malloc(I * sizeof(int64_t) + (O + I + K) * sizeof(float)), bit = 0;
    float *rows = (float *)(first + I), *factors = rows + O, *table = factors + I;
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

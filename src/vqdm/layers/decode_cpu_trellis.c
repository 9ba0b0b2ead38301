/* The states of a bitshift trellis to the weight; letters as in vqdm/additive/trellis.py. Compiled by gcc or clang where
   it runs. */

#include <stddef.h>
#include <stdlib.h>

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

/* A word holds WORD bits at least from any bit on. From row LATE on no window begins at the end of its ring. The bits of a
   tile's columns, a line of cache each, and the table should fit in the first-level cache. */
enum { PERIOD = 4, WORD = 57, LATE = 16, ROWS = 256, COLUMNS = 128 };

/* Columns of a tile in one segment. Bits count from `codes` on. */
typedef struct {
    const uint8_t *codes;
    uint64_t bytes;                   /* that there are, 8 at least */
    int n, per_word;                  /* columns; rows whose windows one word holds */
    uint64_t first[COLUMNS];          /* where a ring begins */
    uint64_t width[COLUMNS];          /* bits of PERIOD rows */
    uint64_t later[PERIOD][COLUMNS];  /* bits by which the window of a row of a period is after that of the first */
    uint64_t word[COLUMNS];
} Tile;

static void begin(const Trellis *trellis, int64_t segment, int64_t column, Tile *tile) {
    const uint64_t most = PERIOD * trellis->L, rings = segment * trellis->segment_bits;
    const uint64_t from = (rings + trellis->first[column]) / 8, last = trellis->bytes - 8, byte = from < last ? from : last;
    uint32_t widest = 0;
    tile->codes = trellis->codes + byte;
    tile->bytes = trellis->bytes - byte;
    tile->n = trellis->I - column < COLUMNS ? trellis->I - column : COLUMNS;
    for (int j = 0; j < tile->n; j++) {
        const uint32_t wanted = trellis->widths[column + j], q = wanted < PERIOD ? 0 : wanted < most ? wanted : most;
        tile->first[j] = rings + trellis->first[column + j] - 8 * byte;
        tile->width[j] = q;
        for (uint32_t i = 0; i < PERIOD; i++) tile->later[i][j] = (i + 1) * q / PERIOD - q / PERIOD;
        widest = q > widest ? q : widest;
    }
    const uint32_t beyond = widest - widest / PERIOD + trellis->L; /* bits that the windows of PERIOD rows take */
    tile->per_word = widest + beyond <= WORD ? 2 * PERIOD : beyond <= WORD ? PERIOD : PERIOD / 2;
}

/* Bits from a bit on. No byte outside of the codes is read, wherever the bit is. */
static uint64_t bits_at(const Tile *tile, uint64_t bit) {
    const uint64_t last = tile->bytes - 8, byte = bit >> 3 < last ? bit >> 3 : last;
    uint64_t word; /* little end first, as on every machine that torch runs on */
    memcpy(&word, tile->codes + byte, 8);
    return word >> ((bit - 8 * byte) & 63);
}

/* Words that begin with the windows of row t of a segment of T, in the way that is always right. */
static void find_first_words(Tile *tile, uint32_t t, uint64_t T, uint32_t L) {
    for (int j = 0; j < tile->n; j++) {
        const uint32_t stop = (t + 1) * (uint32_t)tile->width[j] / PERIOD;
        const uint64_t first = tile->first[j], ring = T * tile->width[j] / PERIOD;
        if (!stop) {
            tile->word[j] = 0; /* the state where there are no bits */
        } else if (stop >= L) {
            tile->word[j] = bits_at(tile, first + stop - L);
        } else { /* the window begins at the end of the ring */
            const uint32_t early = L - stop;
            const uint64_t end = bits_at(tile, first + ring - early) & ((1u << early) - 1);
            tile->word[j] = end | bits_at(tile, first) << early;
        }
    }
}

/* Likewise from row LATE on, and not near the end of the codes. */
static void find_words(Tile *tile, uint32_t t, uint32_t L) {
    const uint8_t *codes = tile->codes;
    for (int j = 0; j < tile->n; j++) {
        const uint32_t stop = (t + 1) * (uint32_t)tile->width[j] / PERIOD;
        const uint64_t bit = tile->first[j] + (stop < L ? 0 : stop - L);
        memcpy(tile->word + j, codes + (bit >> 3), 8);
        tile->word[j] = stop ? tile->word[j] >> (bit & 7) : 0;
    }
}

/* Weights [n] of a row. */
INLINE void decode_row(const Trellis *trellis, const Tile *tile, int64_t t, float scale, const float *restrict factors,
                       float *restrict to) {
    const float *restrict table = trellis->table;
    const uint64_t *restrict later = tile->later[t % PERIOD], *restrict since = tile->later[t % PERIOD / 2 * 2];
    const int n = tile->n, mask = (1 << trellis->L) - 1;
    if (tile->per_word < PERIOD)
        for (int j = 0; j < n; j++) to[j] = table[(int)(tile->word[j] >> (later[j] - since[j])) & mask] * scale * factors[j];
    else
        for (int j = 0; j < n; j++) to[j] = table[(int)(tile->word[j] >> later[j]) & mask] * scale * factors[j];
}

/* Weights from row t of a segment and a column on. */
static void decode_tile(const Trellis *trellis, int64_t segment, int64_t t, int64_t column) {
    const int64_t T = trellis->T, I = trellis->I, stop = T - t < ROWS ? T : t + ROWS;
    Tile tile;
    begin(trellis, segment, column, &tile);
    const int n = tile.n, per_word = tile.per_word;
    const uint64_t end = tile.first[n - 1] + T * tile.width[n - 1] / PERIOD;
    const int last = end / 8 + 2 * sizeof(uint64_t) > tile.bytes;
    for (; t < stop; t++) {
        const int64_t r = segment * T + t, place = r * I + column;
        float row[COLUMNS], *to = trellis->out_type == FLOAT32 ? (float *)trellis->out + place : row;
        if (t % per_word) {
            if (t % PERIOD == 0)
                for (int j = 0; j < n; j++) tile.word[j] >>= tile.width[j];
        } else if (t < LATE || last)
            find_first_words(&tile, t, T, trellis->L);
        else
            find_words(&tile, t, trellis->L);
        decode_row(trellis, &tile, t, trellis->rows[r], trellis->factors + column, to);
        if (to == row) write(trellis->out, trellis->out_type, place, n, row);
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

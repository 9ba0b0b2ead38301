/* Groups of additive codes to their values; letters as in vqdm/additive/code.py. Compiled by gcc or clang where it runs. */

#include <stdint.h>
#include <string.h>

typedef struct {
    const uint8_t *codes, *end; /* packed codes of the whole layer */
    const float *books;         /* [M, K, d], or [G, M, K, d] */
    const float *scales;        /* of the first group on, one for `per_scale` groups */
    const float *input_scales;  /* [G, g], or NULL */
    float *values;              /* [n, d] */
    const uint8_t *widths;      /* [G] bits of a code where the rate is variable, or NULL */
    int64_t first, n, G, per_scale; /* groups first..first + n, the first of a row */
    int32_t M, bits, d, g, groupwise, row_bits;
} Job;

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

/* Eight bytes, little end first as on every machine that torch runs on, zero past the end. */
static inline __attribute__((always_inline)) uint64_t word_at(const uint8_t *at, const uint8_t *end) {
    uint64_t word = 0;
    if (end - at >= 8)
        memcpy(&word, at, 8);
    else
        memcpy(&word, at, end - at);
    return word;
}

/* With M and d known to the compiler, the loops over them become a few vector instructions. */
static inline __attribute__((always_inline)) void decode(const Job *job, const int M, const int d) {
    const int bits = job->bits, together = M * bits <= 57; /* with up to seven bits before them */
    const int64_t K = (int64_t)1 << bits, own = job->groupwise ? M * K * d : 0, n = job->n, G = job->G;
    const uint64_t mask = K - 1;
    const float *scale = job->scales, *t = job->input_scales;
    float *out = job->values;
    int64_t bit = job->first * M * bits, j = 0, left = job->per_scale;
    for (int64_t i = 0; i < n; i++, out += d) {
        const float *row[16], *book = job->books + j * own;
        uint64_t word = word_at(job->codes + (bit >> 3), job->end) >> (bit & 7);
        for (int m = 0; m < M; m++, book += K * d, word >>= bits) {
            if (!together) word = word_at(job->codes + ((bit + m * bits) >> 3), job->end) >> ((bit + m * bits) & 7);
            row[m] = book + (word & mask) * d;
        }
        bit += M * bits;
        const float s = *scale;
        int c = 0;
        for (; c + 4 <= d; c += 4) {
            Four sum = *(const Four *)(row[0] + c);
            for (int m = 1; m < M; m++) sum += *(const Four *)(row[m] + c);
            *(Four *)(out + c) = sum * s;
        }
        for (; c < d; c++) {
            float sum = row[0][c];
            for (int m = 1; m < M; m++) sum += row[m][c];
            out[c] = sum * s;
        }
        if (t)
            for (c = 0; c < d; c++) out[c] *= t[j * job->g + c % job->g];
        if (++j == G) j = 0;
        if (--left == 0) left = job->per_scale, scale++;
    }
}

/* Variable rate: one codebook [K, d] that holds those of all widths; that of width w begins at entry 2^w - 1. */
static inline __attribute__((always_inline)) void decode_variable(const Job *job, const int d) {
    const int64_t n = job->n, G = job->G;
    const float *scale = job->scales, *t = job->input_scales;
    float *out = job->values;
    int64_t bit = job->first / G * job->row_bits, j = 0, left = job->per_scale;
    for (int64_t i = 0; i < n; i++, out += d) {
        const int width = job->widths[j];
        const uint64_t mask = ((uint64_t)1 << width) - 1;
        const uint64_t code = width ? word_at(job->codes + (bit >> 3), job->end) >> (bit & 7) & mask : 0;
        const float *row = job->books + (mask + code) * d;
        bit += width;
        const float s = *scale;
        for (int c = 0; c < d; c++) out[c] = row[c] * s;
        if (t)
            for (int c = 0; c < d; c++) out[c] *= t[j * job->g + c % job->g];
        if (++j == G) j = 0;
        if (--left == 0) left = job->per_scale, scale++;
    }
}

#define CASE(COUNT, SIZE) \
    if (job->M == COUNT && job->d == SIZE) { \
        decode(job, COUNT, SIZE); \
        return; \
    }

void vqdm_decode(const Job *job) {
    if (job->widths) {
        if (job->d == 4)
            decode_variable(job, 4);
        else if (job->d == 8)
            decode_variable(job, 8);
        else
            decode_variable(job, job->d);
        return;
    }
    CASE(1, 4) CASE(2, 4) CASE(3, 4) CASE(4, 4)
    CASE(1, 8) CASE(2, 8) CASE(3, 8) CASE(4, 8)
    CASE(1, 16) CASE(2, 16) CASE(3, 16) CASE(4, 16)
    decode(job, job->M, job->d);
}

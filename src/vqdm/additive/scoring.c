/* Codes of vectors by a beam over codebooks; letters as in vqdm/additive/encode.py. Compiled by gcc or clang where it runs. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const float *targets; /* [N, d] */
    const float *books;   /* [M, K, d] */
    const float *columns; /* [M, d, K], -2 times the same */
    const float *norms;   /* [M, K] */
    int64_t *codes;       /* [N, M] */
    int64_t N, K;
    int32_t M, d, B;
} Job;

typedef struct {
    float score;
    int32_t parent, entry;
} Pick;

enum { LANES = 16, CHUNK = 64 };

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Marks __attribute__((vector_size(4 * LANES)));

/* Put a pick where it belongs among at most `want` ascending ones. */
static inline int insert(Pick *picks, int held, int want, Pick one) {
    int at = held < want ? held++ : want - 1;
    for (; at > 0 && picks[at - 1].score > one.score; at--) picks[at] = picks[at - 1];
    picks[at] = one;
    return held;
}

/* The lesser of each pair. */
static inline Lanes lesser(Lanes a, Lanes b) {
    Marks less = a < b; /* all bits set where true */
    return (Lanes)(((Marks)a & less) | ((Marks)b & ~less));
}

/* Scores of CHUNK entries for one hypothesis, and the least of them. */
static inline __attribute__((always_inline)) float score(
    const float *norms, const float *columns, int64_t K, const float *residual, float base, const int d, float *out
) {
    Lanes sums[CHUNK / LANES];
    for (int v = 0; v < CHUNK / LANES; v++) sums[v] = *(const Lanes *)(norms + v * LANES) + base;
    for (int i = 0; i < d; i++)
        for (int v = 0; v < CHUNK / LANES; v++) sums[v] += residual[i] * *(const Lanes *)(columns + i * K + v * LANES);
    Lanes least = sums[0];
    for (int v = 1; v < CHUNK / LANES; v++) least = lesser(least, sums[v]);
    memcpy(out, sums, sizeof sums);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int k = 0; k < width; k++) least[k] = least[k + width] < least[k] ? least[k + width] : least[k];
    return least[0];
}

/* The same for less than CHUNK entries. */
static float score_few(
    const float *norms, const float *columns, int64_t K, const float *residual, float base, const int d, float *out,
    int count
) {
    float least = 3.4e38f;
    for (int k = 0; k < count; k++) {
        out[k] = base + norms[k];
        for (int i = 0; i < d; i++) out[k] += residual[i] * columns[i * K + k];
        least = out[k] < least ? out[k] : least;
    }
    return least;
}

/* The best continuations of one hypothesis by an entry of codebook m join the picks. */
static inline __attribute__((always_inline)) int extend(
    const Job *job, int m, const float *residual, int parent, Pick *picks, int held, int want, const int d
) {
    const float *norms = job->norms + m * job->K, *columns = job->columns + m * job->K * d;
    float scores[CHUNK], base = 0;
    for (int i = 0; i < d; i++) base += residual[i] * residual[i];
    for (int64_t start = 0; start < job->K; start += CHUNK) {
        const int count = job->K - start < CHUNK ? (int)(job->K - start) : CHUNK;
        const float least = count == CHUNK
            ? score(norms + start, columns + start, job->K, residual, base, d, scores)
            : score_few(norms + start, columns + start, job->K, residual, base, d, scores, count);
        if (held == want && !(least < picks[want - 1].score)) continue;
        for (int k = 0; k < count; k++)
            if (held < want || scores[k] < picks[want - 1].score)
                held = insert(picks, held, want, (Pick){scores[k], parent, (int32_t)(start + k)});
    }
    return held;
}

static inline __attribute__((always_inline)) int encode(const Job *job, const int d) {
    const int M = job->M, B = job->B;
    float *residuals = malloc(sizeof(float) * 2 * B * d);
    int32_t *history = malloc(sizeof(int32_t) * 2 * B * M);
    Pick *picks = malloc(sizeof(Pick) * B);
    if (!residuals || !history || !picks) {
        free(residuals), free(history), free(picks);
        return 1;
    }
    for (int64_t n = 0; n < job->N; n++) {
        float *now = residuals, *next = residuals + B * d;
        int32_t *codes = history, *longer = history + B * M;
        int hypotheses = 1;
        memcpy(now, job->targets + n * d, sizeof(float) * d);
        for (int m = 0; m < M; m++) {
            int held = 0, want = m < M - 1 ? B : 1;
            for (int b = 0; b < hypotheses; b++) held = extend(job, m, now + b * d, b, picks, held, want, d);
            for (int b = 0; b < held; b++) {
                const float *from = now + picks[b].parent * d, *entry = job->books + (m * job->K + picks[b].entry) * d;
                for (int i = 0; i < d; i++) next[b * d + i] = from[i] - entry[i];
                memcpy(longer + b * M, codes + picks[b].parent * M, sizeof(int32_t) * m);
                longer[b * M + m] = picks[b].entry;
            }
            float *old = now;
            now = next, next = old;
            int32_t *shorter = codes;
            codes = longer, longer = shorter;
            hypotheses = held;
        }
        for (int m = 0; m < M; m++) job->codes[n * M + m] = codes[m];
    }
    free(residuals), free(history), free(picks);
    return 0;
}

/* 0, or 1 where memory is short. */
int vqdm_encode(const Job *job) {
    switch (job->d) {
    case 2: return encode(job, 2);
    case 4: return encode(job, 4);
    case 8: return encode(job, 8);
    case 16: return encode(job, 16);
    default: return encode(job, job->d);
    }
}

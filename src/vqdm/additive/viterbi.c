/* Viterbi search for the states of rings of a bitshift trellis; trellis.py has the format, viterbi.py the reference.

   Row t of a ring owns the bits from e(t) to e(t+1), e(t) = t·q/4 rounded down, and its state is the window of L bits that
   ends at e(t+1), the earliest bit lowest. Rows are visited from the last to the first: a state s of row t is followed by
   the states ((s << k) | h) mod 2^L of row t − 1, k = e(t+1) − e(t), so that the predecessors of all 2^k states n with
   n >> k = m are the same ones, m + i·2^(L−k).

   All arithmetic is float32 without contraction, in the order of the reference, which gives equal states. Vectors are as
   wide as the processor's: compilers take wider ones apart into single values. */

#include <stdint.h>

#if defined(__AVX512F__)
#define LANES 16
#define SPREAD(v, c, k) SHUFFLE(v, AT4(c, 0, k), AT4(c, 4, k), AT4(c, 8, k), AT4(c, 12, k))
#elif defined(__AVX__)
#define LANES 8
#define SPREAD(v, c, k) SHUFFLE(v, AT4(c, 0, k), AT4(c, 4, k))
#else
#define LANES 4
#define SPREAD(v, c, k) SHUFFLE(v, AT4(c, 0, k))
#endif

/* SPREAD(v, c, k): lane j is lane (c·LANES + j) >> k of v, the c-th of the 2^k vectors in which every lane stands 2^k times */
#define AT(c, j, k) (((c) * LANES + (j)) >> (k))
#define AT4(c, j, k) AT(c, j, k), AT(c, j + 1, k), AT(c, j + 2, k), AT(c, j + 3, k)
#ifdef __clang__
#define SHUFFLE(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define SHUFFLE(v, ...) __builtin_shuffle(v, (Ints){__VA_ARGS__})
#endif

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define BLOCK 256         /* minima at once; a multiple of LANES */
#define MOST_BYTE_BITS 8  /* new bits of a row whose choices take a byte each; else two */
#define UNREACHABLE 1e30f

typedef struct {
    const float *targets;  /* [N, T] in units of the table */
    const float *weights;  /* [N, T] of the squared errors */
    const float *table;    /* [2^L] */
    const int32_t *widths; /* [N], quarter bits per row */
    int32_t *states;       /* [N, T], the result */
    int64_t N, T, L;
    int64_t memory; /* quarter bits after which a decision is settled */
    int64_t next;   /* the first ring that no thread has taken */
} Rings;

typedef struct {
    const float *targets, *weights, *table;
    int32_t *states;
    float *cost, *other; /* [2^L] each, for the search */
    uint8_t *choices;    /* [2·T][stride] */
    int64_t stride;      /* bytes for the choices of a row */
    int64_t T, L, q;
} Ring;

static int64_t new_bits(int64_t row, int64_t q) { return (row + 1) * q / 4 - row * q / 4; }

static int64_t row_before(int64_t row, int64_t T) { return row ? row - 1 : T - 1; }

/* The least of cost[i·size], i < count, and in `which` its i, the first of equal ones; a lane for each of LANES costs. */
INLINE Floats least_of(const float *cost, int32_t *which, int64_t size, int32_t count) {
    Floats least = *(const Floats *)cost;
    Ints first = {0};
    for (int32_t i = 1; i < count; i++) {
        Floats other = *(const Floats *)(cost + i * size);
        Ints less = other < least;
        least = (Floats)((less & (Ints)other) | (~less & (Ints)least));
        first = (less & (first * 0 + i)) | (~less & first);
    }
    *(Ints *)which = first;
    return least;
}

/* A step for `count` minima: to[n] = least[n >> k] + weight · (target − table[n])². STEP is for 2^k < LANES. */
#define PART(c, k)                                             \
    {                                                          \
        Floats d = target - ((const Floats *)values)[c];       \
        ((Floats *)to)[c] = SPREAD(least, c, k) + d * d * weight; \
    }
#define PARTS2(c, k) PART(c, k) PART(c + 1, k)
#define PARTS4(c, k) PARTS2(c, k) PARTS2(c + 2, k)
#define PARTS8(c, k) PARTS4(c, k) PARTS4(c + 4, k)
#define STEP(PARTS, k)                                              \
    for (int64_t m = 0; m < count; m += LANES) {                    \
        Floats least = least_of(cost + m, which + m, size, 1 << k); \
        const float *values = table + (m << k);                     \
        float *to = next + (m << k);                                \
        PARTS(0, k)                                                 \
    }

INLINE void wide_step(const float *restrict cost, float *restrict next, const float *restrict table, int32_t *which,
                      float target, float weight, int64_t count, int64_t size, int32_t k) {
    float least[LANES];
    for (int64_t m = 0; m < count; m += LANES) {
        *(Floats *)least = least_of(cost + m, which + m, size, 1 << k);
        for (int64_t lane = 0; lane < LANES; lane++)
            for (int64_t n = (m + lane) << k; n < (m + lane + 1) << k; n += LANES) {
                Floats d = target - *(const Floats *)(table + n);
                *(Floats *)(next + n) = least[lane] + d * d * weight;
            }
    }
}

static void block_step(const float *restrict cost, float *restrict next, const float *restrict table, uint8_t *choices,
                       float target, float weight, int64_t count, int64_t size, int32_t k) {
    int32_t which[BLOCK];
    switch (k) {
    case 1: STEP(PARTS2, 1) break;
#if LANES > 4
    case 2: STEP(PARTS4, 2) break;
#else
    case 2: wide_step(cost, next, table, which, target, weight, count, size, 2); break;
#endif
#if LANES > 8
    case 3: STEP(PARTS8, 3) break;
#else
    case 3: wide_step(cost, next, table, which, target, weight, count, size, 3); break;
#endif
    case 4: wide_step(cost, next, table, which, target, weight, count, size, 4); break;
    default: wide_step(cost, next, table, which, target, weight, count, size, k);
    }
    for (int64_t m = 0; m < count; m++) choices[m] = (uint8_t)which[m];
}

/* The same where there are fewer than LANES minima, or more than a byte's choices. */
static void plain_step(const float *restrict cost, float *restrict next, const float *restrict table, uint8_t *choices,
                       float target, float weight, int64_t size, int64_t k) {
    for (int64_t m = 0; m < size; m++) {
        int64_t which = m;
        for (int64_t i = m + size; i < size << k; i += size)
            if (cost[i] < cost[which]) which = i;
        if (k <= MOST_BYTE_BITS) choices[m] = (uint8_t)(which / size);
        else ((uint16_t *)choices)[m] = (uint16_t)(which / size);
        for (int64_t n = m << k; n < (m + 1) << k; n++) {
            float d = target - table[n];
            next[n] = cost[which] + d * d * weight;
        }
    }
}

/* From the costs of row `from` to those of the row before it; the last row stands before the first. */
static void step(Ring *r, int64_t from, uint8_t *choices) {
    int64_t k = new_bits(from, r->q), size = (int64_t)1 << (r->L - k), row = row_before(from, r->T);
    float target = r->targets[row], weight = r->weights[row], *next = r->other;
    if (size < LANES || k > MOST_BYTE_BITS) plain_step(r->cost, next, r->table, choices, target, weight, size, k);
    else
        for (int64_t m = 0; m < size; m += BLOCK)
            block_step(r->cost + m, next + (m << k), r->table + (m << k), choices + m, target, weight,
                       size - m < BLOCK ? size - m : BLOCK, size, (int32_t)k);
    r->other = r->cost, r->cost = next;
}

static float miss(const Ring *r, int64_t row, int64_t state) {
    float d = r->targets[row] - r->table[state];
    return d * d * r->weights[row];
}

/* The state of row `from` that was chosen before `state` of the row before it. */
static int32_t before(const Ring *r, const uint8_t *choices, int64_t from, int32_t state) {
    int64_t k = new_bits(from, r->q), m = state >> k;
    return (int32_t)(m | (int64_t)(k <= MOST_BYTE_BITS ? choices[m] : ((const uint16_t *)choices)[m]) << (r->L - k));
}

/* The state of the last row, from an unconstrained search over `around` rows on each side of the seam. */
static int32_t seam(Ring *r, int64_t around) {
    int64_t states = (int64_t)1 << r->L, row = around - 1, steps = 0, state = 0;
    for (int64_t n = 0; n < states; n++) r->cost[n] = miss(r, row, n);
    for (; steps < 2 * around - 1; steps++, row = row_before(row, r->T)) step(r, row, r->choices + steps * r->stride);
    for (int64_t n = 1; n < states; n++)
        if (r->cost[n] < r->cost[state]) state = n;
    while (steps > around) {
        row = (row + 1) % r->T, steps--;
        state = before(r, r->choices + steps * r->stride, row, (int32_t)state);
    }
    return (int32_t)state;
}

static void search(Ring *r, int64_t around) {
    int64_t states = (int64_t)1 << r->L;
    int32_t state = seam(r, around);
    for (int64_t n = 0; n < states; n++) r->cost[n] = n == state ? miss(r, r->T - 1, n) : UNREACHABLE;
    for (int64_t row = r->T - 1; row >= 0; row--) step(r, row, r->choices + row * r->stride);
    for (int64_t row = 0; row < r->T; row++)
        r->states[row] = state = before(r, r->choices + row * r->stride, row, state);
}

/* Take rings until there are none; `costs` [2, 2^L] and `choices` [T·2^L] are the thread's own. */
void vqdm_viterbi(Rings *all, float *costs, uint8_t *choices) {
    for (int64_t n; (n = __atomic_fetch_add(&all->next, 1, __ATOMIC_RELAXED)) < all->N;) {
        int64_t q = all->widths[n], T = all->T, states = (int64_t)1 << all->L, around = (all->memory + q - 1) / q;
        int64_t stride = (states >> q / 4) * (q / 4 > MOST_BYTE_BITS ? 2 : 1);
        Ring ring = {all->targets + n * T, all->weights + n * T, all->table, all->states + n * T, costs, costs + states,
                     choices, stride, T, all->L, q};
        search(&ring, around < T ? around : T);
    }
}

/* ---------------------------------------------------------------- error feedback through a block of columns */

typedef struct {
    const float *targets;     /* [columns, O], what earlier blocks leave for these columns to aim at */
    const float *original;    /* [columns, O], the weights */
    const float *feedback;    /* [columns, columns], of which row i, column j > i counts */
    const float *scales;      /* [O], of the rows */
    const float *weights;     /* [O], of the squared errors in units of the scales */
    const float *table;       /* [2^L] */
    const float *gains;       /* [columns], the best scale of the table for a column of root mean square 1 */
    const float *errors;      /* [columns], the mean squared error there */
    const float *stretches;   /* [stretch_count], of that scale, ascending from 1 */
    const float *levels;      /* [256], the scales that can be stored, ascending */
    const int32_t *widths;    /* [columns], quarter bits per row */
    float *difference;        /* [columns, O], original less coded weights */
    float *column_scales;     /* [columns] */
    int32_t *states;          /* [columns, O] */
    float *units;             /* [O], memory for the search */
    int64_t columns, O, T, L;
    int64_t memory, stretch_count;
    float largest; /* the largest value of the table */
} Block;

/* The level nearest to a scale, by logarithms: levels are spaced evenly there, but for the first, which is 0. */
static float nearest_level(const float *levels, float scale) {
    int64_t low = 0, high = 255;
    if (!(scale > 0)) return 0;
    while (low < high) { /* the last level that is no larger */
        int64_t middle = (low + high + 1) / 2;
        if (levels[middle] <= scale) low = middle;
        else high = middle - 1;
    }
    if (low == 255) return levels[255];
    if (low == 0) return scale * scale < levels[1] * levels[1] / 1.0905077f ? 0 : levels[1]; /* half a step of 2^(1/16) */
    return scale * scale < levels[low] * levels[low + 1] ? levels[low] : levels[low + 1];
}

/* The scale of a column of values in units of the row scales, as column_scale of trellis_solve.py. */
static float column_scale(const Block *b, const float *relative, int64_t j) {
    double squares = 0, energy = 0, least = 0;
    for (int64_t r = 0; r < b->O; r++) {
        double s = (double)b->scales[r] * b->scales[r];
        squares += s, energy += s * relative[r] * relative[r];
    }
    if (!(energy > 0)) return 0;
    float best = 0, rms = (float)__builtin_sqrt(energy / squares);
    for (int64_t n = 0; n < b->stretch_count; n++) {
        float scale = b->gains[j] * rms * b->stretches[n], limit = scale * b->largest;
        double expected = (double)b->errors[j] * energy * b->stretches[n], beyond = 0;
        for (int64_t r = 0; r < b->O; r++) {
            float over = (relative[r] < 0 ? -relative[r] : relative[r]) - limit;
            if (over > 0) beyond += (double)b->scales[r] * b->scales[r] * over * over;
        }
        if (n == 0 || expected + beyond < least) least = expected + beyond, best = scale;
        if (beyond == 0) break;
    }
    return nearest_level(b->levels, best);
}

/* Code the columns of a block one after another, each towards its target and what the errors before it add to that. */
void vqdm_feedback_block(const Block *b, float *costs, uint8_t *choices) {
    int64_t states = (int64_t)1 << b->L;
    for (int64_t j = 0; j < b->columns; j++) {
        int64_t q = b->widths[j], around = q ? (b->memory + q - 1) / q : 0, O = b->O;
        int64_t stride = (states >> q / 4) * (q / 4 > MOST_BYTE_BITS ? 2 : 1);
        float *difference = b->difference + j * O, *units = b->units;
        int32_t *found = b->states + j * O;
        for (int64_t r = 0; r < O; r++) units[r] = b->targets[j * O + r];
        for (int64_t i = 0; i < j; i++) {
            float factor = b->feedback[i * b->columns + j];
            const float *error = b->difference + i * O;
            for (int64_t r = 0; r < O; r++) units[r] += error[r] * factor;
        }
        for (int64_t r = 0; r < O; r++) units[r] = b->scales[r] > 0 ? units[r] / b->scales[r] : 0;
        float scale = q ? column_scale(b, units, j) : 0;
        b->column_scales[j] = scale;
        for (int64_t r = 0; r < O; r++) {
            units[r] = scale > 0 ? units[r] / scale : 0;
            found[r] = 0, difference[r] = b->original[j * O + r];
        }
        if (!q) continue;
        for (int64_t first = 0; first < O; first += b->T) {
            Ring ring = {units + first, b->weights + first, b->table, found + first, costs, costs + states, choices,
                         stride, b->T, b->L, q};
            search(&ring, around < b->T ? around : b->T);
        }
        for (int64_t r = 0; r < O; r++) difference[r] -= b->table[found[r]] * b->scales[r] * scale;
    }
}

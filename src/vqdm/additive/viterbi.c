/* Viterbi search for the states of rings of a bitshift trellis; trellis.py has the format, viterbi.py the reference.

   Row t of a ring owns the bits from e(t) to e(t+1), e(t) = t·q/4 rounded down, and its state is the window of L bits that
   ends at e(t+1), the earliest bit lowest. Rows are visited from the last to the first: a state s of row t is followed by
   the states ((s << k) | h) mod 2^L of row t − 1, k = e(t+1) − e(t), so that the predecessors of all 2^k states n with
   n >> k = m are the same ones, m + i·2^(L−k).

   All arithmetic is float32 without contraction, in the order of the reference, which gives equal states. */

#include <stdint.h>
#include <string.h>

#define LANES 16
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES), aligned(2)));

#define UNREACHABLE 1e30f

typedef struct {
    const float *targets; /* [T] in units of the table */
    const float *weights; /* [T] of the squared errors */
    const float *table;   /* [2^L] */
    int32_t *states;      /* [T], the result */
    float *cost;          /* [2^L], for the search */
    float *best;          /* [2^L] */
    uint16_t *choices;    /* [2·T][2^(L-q/4)], of which a step with k bits uses 2^(L-k) */
    int64_t T;
    int32_t L, q;
    int32_t overlap; /* rows on each side of the seam from which the state there is found */
} Ring;

static int64_t edge(int64_t row, int32_t q) { return row * q / 4; }

static int32_t width(int64_t row, int32_t q) { return (int32_t)(edge(row + 1, q) - edge(row, q)); }

/* best[m] = the least of cost[m + i·size], choices[m] = its i, the first of equal ones */
static void pick(const float *cost, float *best, uint16_t *choices, int64_t size, int32_t count) {
    int64_t m = 0;
    for (; m + LANES <= size; m += LANES) {
        Floats least = *(const Floats *)(cost + m);
        Ints which = {0};
        for (int32_t i = 1; i < count; i++) {
            Floats other = *(const Floats *)(cost + i * size + m);
            Ints less = other < least;
            least = (Floats)((less & (Ints)other) | (~less & (Ints)least));
            which = (less & (which * 0 + i)) | (~less & which);
        }
        *(Floats *)(best + m) = least;
        *(Shorts *)(choices + m) = __builtin_convertvector(which, Shorts);
    }
    for (; m < size; m++) {
        best[m] = cost[m], choices[m] = 0;
        for (int32_t i = 1; i < count; i++)
            if (cost[i * size + m] < best[m]) best[m] = cost[i * size + m], choices[m] = (uint16_t)i;
    }
}

/* cost[n] = best[n >> k] + weight · (target − table[n])² */
#define ADD(COPIES)                                                        \
    for (int64_t m = 0; m < size; m++)                                     \
        for (int64_t i = 0; i < COPIES; i++) {                             \
            float d = target - table[m * COPIES + i];                      \
            cost[m * COPIES + i] = best[m] + d * d * weight;               \
        }

static void add(float *restrict cost, const float *restrict best, const float *restrict table, float target, float weight,
                int64_t size, int32_t k) {
    int64_t copies = (int64_t)1 << k;
    switch (k) {
    case 0: ADD(1) break;
    case 1: ADD(2) break;
    case 2: ADD(4) break;
    case 3: ADD(8) break;
    case 4: ADD(16) break;
    default: ADD(copies)
    }
}

/* From the costs of row `from` to those of the row before it; the last row stands before the first. */
static void step(const Ring *r, int64_t from, uint16_t *choices) {
    int32_t k = width(from, r->q);
    int64_t size = (int64_t)1 << (r->L - k), row = (from + r->T - 1) % r->T;
    pick(r->cost, r->best, choices, size, 1 << k);
    add(r->cost, r->best, r->table, r->targets[row], r->weights[row], size, k);
}

static void start(const Ring *r, int64_t row) {
    memset(r->best, 0, sizeof(float));
    add(r->cost, r->best, r->table, r->targets[row], r->weights[row], 1, r->L);
}

static int32_t cheapest(const float *cost, int64_t count) {
    int64_t found = 0;
    for (int64_t n = 1; n < count; n++)
        if (cost[n] < cost[found]) found = n;
    return (int32_t)found;
}

/* The state of row `from` that was chosen before state `n` of the row before it. */
static int32_t before(const Ring *r, const uint16_t *choices, int64_t from, int32_t n) {
    int32_t k = width(from, r->q), m = n >> k;
    return m | ((int32_t)choices[m] << (r->L - k));
}

/* The state of the last row, from an unconstrained search over the rows around the seam. */
static int32_t seam(const Ring *r) {
    int64_t states = (int64_t)1 << r->L, stride = states >> r->q / 4, row = r->overlap - 1, steps = 0;
    start(r, row);
    for (; steps < 2 * r->overlap - 1; steps++, row = (row + r->T - 1) % r->T)
        step(r, row, r->choices + steps * stride);
    int32_t state = cheapest(r->cost, states);
    while (steps > r->overlap) {
        row = (row + 1) % r->T, steps--;
        state = before(r, r->choices + steps * stride, row, state);
    }
    return state;
}

void vqdm_viterbi(const Ring *r) {
    int64_t states = (int64_t)1 << r->L, stride = states >> r->q / 4;
    int32_t last = seam(r);
    float kept;
    start(r, r->T - 1);
    kept = r->cost[last];
    for (int64_t n = 0; n < states; n++) r->cost[n] = UNREACHABLE;
    r->cost[last] = kept;
    for (int64_t row = r->T - 1; row > 0; row--) step(r, row, r->choices + row * stride);
    int32_t k = width(0, r->q);
    pick(r->cost, r->best, r->choices, (int64_t)1 << (r->L - k), 1 << k); /* the step over the seam */
    int32_t state = last;
    for (int64_t row = 0; row < r->T; row++) r->states[row] = state = before(r, r->choices + row * stride, row, state);
}

/* The widths of a layer's columns at several prices of a unit of width; as widths_at of trellis_solve.py, which has the
   formulas. Sums of errors are float64. */

#include <stdint.h>

typedef struct {
    const float *factors;   /* [I], D_j */
    const float *weights;   /* [I], of a column's error in the layer's */
    const float *energies;  /* [I], E_j */
    const float *clipped;   /* [I, n], beyond the table's largest value at each of n stretches */
    const float *spread;    /* [I, I], what an error of column i adds to the energy of column j > i */
    const float *prices;    /* [P] */
    const float *errors;    /* [W], of a unit Gaussian at each width */
    const float *stretches; /* [n] */
    const int64_t *widths;  /* [W] */
    float *added;           /* [P, I], zero at first */
    int64_t *found;         /* [P, I], the result */
    double *totals;         /* [P], the summed weighted errors, zero at first */
    int64_t I, P, W, n;
    float gain; /* of rows that differ */
} Layer;

/* The error of a column of some energy at one width, with the table stretched as is best. */
static float column_error(const Layer *l, int64_t j, int64_t w, float energy) {
    if (w == 0) return energy;
    float least = energy * l->errors[w] * l->stretches[0] + l->clipped[j * l->n];
    for (int64_t k = 1; k < l->n && l->clipped[j * l->n + k - 1] > 0; k++) {
        float error = energy * l->errors[w] * l->stretches[k] + l->clipped[j * l->n + k];
        if (error < least) least = error;
    }
    return least * l->gain;
}

void vqdm_widths(const Layer *l) {
    for (int64_t j = 0; j < l->I; j++)
        for (int64_t p = 0; p < l->P; p++) {
            float energy = l->energies[j] + l->added[p * l->I + j], best = 0, chosen = 0;
            int64_t pick = 0;
            for (int64_t w = 0; w < l->W; w++) {
                float error = column_error(l, j, w, energy), cost = l->factors[j] * error + l->prices[p] * l->widths[w];
                if (w == 0 || cost < best) best = cost, chosen = error, pick = w;
            }
            l->found[p * l->I + j] = l->widths[pick];
            l->totals[p] += (double)l->weights[j] * chosen;
            float left = l->factors[j] * chosen, *added = l->added + p * l->I;
            const float *spread = l->spread + j * l->I;
            for (int64_t i = j + 1; i < l->I; i++) added[i] += left * spread[i];
        }
}

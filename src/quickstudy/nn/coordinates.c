/* One step of a stack of LSTM cells for thousands of coordinates, and its derivative.

   Compiled on request (compiled.py), once for each stack, with

     REAL              float or double
     UP(M)             M(0, below, hidden) M(1, below, hidden) ...   the cells, from the input up
     DOWN(M)           the same from the top down
     ROOM              the largest 4 * hidden, and TALL the largest below or hidden
     CELLS             how many there are, and TOP the hidden size of the last

   All arrays are [n, rows, C], where the last two axes are contiguous; `step` gives the distance from one n to the
   next. A state holds h of all cells, then c of all. Weights hold cell after cell a matrix of the columns input, bias,
   hidden state and of the gates forget, input, output, candidate as rows; a first step, from a state of zeros, needs
   neither the rows of the forget gate nor the columns of the hidden state. What is kept for the derivative holds cell
   after cell the gates, then the hyperbolic tangent of c. Coordinates are worked off in blocks that stay in the first
   cache. */

#include <math.h>
#include <string.h>

#define BLOCK 128
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 96")
#define EACH for (int j = 0; j < length; j++)

typedef struct {
    REAL *data;
    long step;
} Array;

INLINE REAL exponential(REAL x) {
    if (sizeof(REAL) == 8) return exp(x);
    /* 2^whole * e^rest; a polynomial, so that compilers vectorise it. Below 1e-7 off, relatively. NaN stays NaN. */
    x = -87 > x ? -87 : x;
    x = 87 < x ? 87 : x;
    float whole = __builtin_rintf(x * 1.44269504f);
    float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * rest + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = p * rest * rest + rest + 1.0f;
    int bits = ((int)whole + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

INLINE REAL sigmoid(REAL x) { return 1 / (1 + exponential(-x)); }
INLINE REAL hyperbolic(REAL x) { return 2 * sigmoid(2 * x) - 1; }

INLINE void cell_forward(const int below, const int hidden, const int first, const int length, const long C,
                         const REAL *restrict weight, const REAL *restrict x, const REAL *restrict h,
                         const REAL *restrict c, REAL *restrict new_h, REAL *restrict new_c, REAL *restrict kept) {
    const int tall = below + 1 + hidden, rows = first ? 3 * hidden : 4 * hidden;
    for (int row = 0; row < rows; row++) {
        const REAL *restrict w = weight + (4 * hidden - rows + row) * tall;
        const REAL two = row < rows - hidden ? 1 : 2; /* the hyperbolic tangent is a sigmoid twice as steep */
        EACH {
            REAL sum = w[below];
            UNROLL for (int k = 0; k < below; k++) sum += w[k] * x[k * C + j];
            if (!first) {
                UNROLL for (int k = 0; k < hidden; k++) sum += w[below + 1 + k] * h[k * C + j];
            }
            kept[row * C + j] = two * sigmoid(two * sum) - (two - 1);
        }
    }
    const REAL *forget = kept, *in = kept + (rows - 3 * hidden) * C, *out = in + hidden * C,
               *candidate = out + hidden * C;
    REAL *tanhs = kept + rows * C;
    for (int u = 0; u < hidden; u++) EACH {
            const long at = u * C + j;
            REAL value = in[at] * candidate[at];
            if (!first) value += forget[at] * c[at];
            const REAL tanh = hyperbolic(value);
            new_c[at] = value;
            tanhs[at] = tanh;
            new_h[at] = out[at] * tanh;
        }
}

INLINE REAL product(const int length, const REAL *restrict a, const REAL *restrict b) {
    REAL sum = 0;
    EACH sum += a[j] * b[j];
    return sum;
}

/* of_above is the slope of the cell's output through what reads it; of_x gets that of the cell's own input. */
INLINE void cell_backward(const int below, const int hidden, const int first, const int length, const long C,
                          const REAL *restrict weight, const REAL *restrict x, const REAL *restrict h,
                          const REAL *restrict c, const REAL *restrict kept, const REAL *restrict of_h,
                          const REAL *restrict of_c, REAL (*restrict of_above)[BLOCK],
                          REAL *restrict of_weight, REAL (*restrict of_x)[BLOCK], REAL *restrict of_old_h,
                          REAL *restrict of_old_c) {
    const int tall = below + 1 + hidden, rows = first ? 3 * hidden : 4 * hidden, left_out = (4 * hidden - rows) * tall;
    REAL slopes[ROOM][BLOCK], ones[BLOCK];
    const REAL *forget = kept, *in = kept + (rows - 3 * hidden) * C, *out = in + hidden * C,
               *candidate = out + hidden * C, *tanhs = kept + rows * C;
    for (int u = 0; u < hidden; u++) EACH {
            const long at = u * C + j;
            REAL of_out = of_above[u][j], of_cell = 0;
            if (of_h) of_out += of_h[at];
            if (of_c) of_cell += of_c[at];
            const REAL t = tanhs[at], o = out[at], i = in[at], g = candidate[at];
            of_cell += of_out * o * (1 - t * t);
            if (!first) {
                const REAL f = forget[at];
                slopes[u][j] = of_cell * c[at] * f * (1 - f);
                of_old_c[at] = of_cell * f;
            }
            slopes[rows - 3 * hidden + u][j] = of_cell * g * i * (1 - i);
            slopes[rows - 2 * hidden + u][j] = of_out * t * o * (1 - o);
            slopes[rows - hidden + u][j] = of_cell * i * (1 - g * g);
        }
    EACH ones[j] = 1;
    for (int row = 0; row < rows; row++) {
        REAL *restrict of_w = of_weight + left_out + row * tall;
        for (int k = 0; k < below; k++) of_w[k] += product(length, slopes[row], x + k * C);
        of_w[below] += product(length, slopes[row], ones);
        if (!first)
            for (int k = 0; k < hidden; k++) of_w[below + 1 + k] += product(length, slopes[row], h + k * C);
    }
    for (int k = 0; k < (first ? below : tall); k++) {
        if (k == below) continue;
        REAL *restrict of_read = k < below ? of_x[k] : of_old_h + (k - below - 1) * C;
        EACH {
            REAL sum = 0;
            UNROLL for (int row = 0; row < rows; row++) sum += weight[left_out + row * tall + k] * slopes[row][j];
            of_read[j] = sum;
        }
    }
}

#define WEIGHTS(cell, below, hidden) + 4 * (hidden) * ((below) + 1 + (hidden))
#define UNITS(cell, below, hidden) + (hidden)
#define AT(array) (array.data ? array.data + n * array.step + start : 0)
#define ROW(data, row) (data ? data + (row) * C : 0)

#define FORWARD(cell, below, hidden)                                                                            \
    cell_forward(below, hidden, first, length, C, weight, cell ? ROW(new, unit - below) : AT(x), ROW(old, unit), \
                 ROW(old, units + unit), ROW(new, unit), ROW(new, units + unit), ROW(keep, each * unit));        \
    weight += WEIGHTS(cell, below, hidden);                                                                     \
    unit += hidden;

INLINE void forward(const int first, long count, long C, Array x, Array weights, Array state, Array new_state,
                    Array kept) {
    const int units = UP(UNITS), each = first ? 4 : 5;
    for (long n = 0; n < count; n++)
        for (long start = 0; start < C; start += BLOCK) {
            const int length = C - start < BLOCK ? C - start : BLOCK;
            const REAL *weight = weights.data + n * weights.step, *old = AT(state);
            REAL *new = AT(new_state), *keep = AT(kept);
            int unit = 0;
            UP(FORWARD)
        }
}

#define BACKWARD(cell, below, hidden)                                                                               \
    unit -= hidden;                                                                                                 \
    weight -= WEIGHTS(cell, below, hidden);                                                                         \
    of_weight -= WEIGHTS(cell, below, hidden);                                                                      \
    cell_backward(below, hidden, first, length, C, weight, cell ? ROW(new, unit - below) : AT(x), ROW(old, unit),    \
                  ROW(old, units + unit), ROW(keep, each * unit), ROW(of_new, unit), ROW(of_new, units + unit),      \
                  passed[(cell + 1) & 1], of_weight, passed[cell & 1], ROW(of_old, unit), ROW(of_old, units + unit)); \
    if (cell == 0)                                                                                                  \
        for (int k = 0; k < below; k++) memcpy(AT(of_x) + k * C, passed[0][k], length * sizeof(REAL));

INLINE void backward(const int first, long count, long C, Array x, Array weights, Array state, Array new_state,
                     Array kept, Array of_output, Array of_new_state, Array of_x, Array of_weights, Array of_state) {
    const int units = UP(UNITS), size = UP(WEIGHTS), each = first ? 4 : 5;
    REAL passed[2][TALL][BLOCK];
    for (long n = 0; n < count; n++)
        for (long start = 0; start < C; start += BLOCK) {
            const int length = C - start < BLOCK ? C - start : BLOCK;
            const REAL *weight = weights.data + n * weights.step + size, *old = AT(state), *new = AT(new_state),
                       *keep = AT(kept), *of_out = AT(of_output), *of_new = AT(of_new_state);
            REAL *of_weight = of_weights.data + n * of_weights.step + size, *of_old = AT(of_state);
            int unit = units;
            for (int u = 0; u < TOP; u++) EACH passed[CELLS & 1][u][j] = of_out ? of_out[u * C + j] : 0;
            DOWN(BACKWARD)
        }
}

/* `a` holds the arrays in the order of the parameters above; one of no data is not there. */

void step(long count, long C, const Array *a) {
    if (a[2].data)
        forward(0, count, C, a[0], a[1], a[2], a[3], a[4]);
    else
        forward(1, count, C, a[0], a[1], a[2], a[3], a[4]);
}

void step_backward(long count, long C, const Array *a) {
    if (a[2].data)
        backward(0, count, C, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9]);
    else
        backward(1, count, C, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9]);
}

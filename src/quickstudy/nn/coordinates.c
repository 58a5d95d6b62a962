/* One step of a stack of LSTM cells for thousands of coordinates, and its derivative.

   Compiled on request (coordinates.py), once for each stack, with

     REAL              float or double
     UP(M)             M(0, below, hidden) M(1, below, hidden) ...   the cells, from the input up
     DOWN(M)           the same from the top down
     ROOM              the largest 4 * hidden, and TALL the largest below + hidden + 1

   All arrays are [n, rows, C], where the last two axes are contiguous; `steps` gives the distance from one n to the
   next. The gates lie in the order input, forget, output, candidate; in a first step, from a state of zeros, there is
   no forget gate and no hidden state. Coordinates are worked off in blocks that stay in the first cache. */

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
                         const REAL *restrict c, REAL *restrict new_h, REAL *restrict new_c, REAL *restrict inward,
                         REAL *restrict gates, REAL *restrict tanhs) {
    const int tall = first ? below + 1 : below + hidden + 1, rows = first ? 3 * hidden : 4 * hidden;
    for (int k = 0; k < below; k++) EACH inward[k * C + j] = x[k * C + j];
    if (!first)
        for (int k = 0; k < hidden; k++) EACH inward[(below + k) * C + j] = h[k * C + j];
    EACH inward[(tall - 1) * C + j] = 1;
    for (int row = 0; row < rows; row++) {
        const REAL *restrict w = weight + row * tall;
        const REAL two = row < rows - hidden ? 1 : 2; /* the hyperbolic tangent is a sigmoid twice as steep */
        EACH {
            REAL sum = w[tall - 1];
            UNROLL for (int k = 0; k < tall - 1; k++) sum += w[k] * inward[k * C + j];
            gates[row * C + j] = two * sigmoid(two * sum) - (two - 1);
        }
    }
    const REAL *in = gates, *forget = gates + hidden * C, *out = gates + (rows - 2 * hidden) * C,
               *candidate = gates + (rows - hidden) * C;
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

/* of_x holds the slope of the cell's own input on return; of_above, if there, that of its output through the next. */
INLINE void cell_backward(const int below, const int hidden, const int first, const int length, const long C,
                          const REAL *restrict weight, const REAL *restrict c, const REAL *restrict inward,
                          const REAL *restrict gates, const REAL *restrict tanhs, const REAL *restrict of_h,
                          const REAL *restrict of_c, const REAL *restrict of_above, REAL *restrict of_weight,
                          REAL *restrict of_x, REAL *restrict of_old_h, REAL *restrict of_old_c) {
    const int tall = first ? below + 1 : below + hidden + 1, rows = first ? 3 * hidden : 4 * hidden;
    REAL slopes[ROOM][BLOCK];
    const REAL *in = gates, *forget = gates + hidden * C, *out = gates + (rows - 2 * hidden) * C,
               *candidate = gates + (rows - hidden) * C;
    for (int u = 0; u < hidden; u++) EACH {
            const long at = u * C + j;
            REAL of_out = 0, of_cell = 0;
            if (of_h) of_out += of_h[at];
            if (of_above) of_out += of_above[u * BLOCK + j];
            if (of_c) of_cell += of_c[at];
            const REAL t = tanhs[at], o = out[at], i = in[at], g = candidate[at];
            of_cell += of_out * o * (1 - t * t);
            slopes[u][j] = of_cell * g * i * (1 - i);
            if (!first) {
                const REAL f = forget[at];
                slopes[hidden + u][j] = of_cell * c[at] * f * (1 - f);
                of_old_c[at] = of_cell * f;
            }
            slopes[rows - 2 * hidden + u][j] = of_out * t * o * (1 - o);
            slopes[rows - hidden + u][j] = of_cell * i * (1 - g * g);
        }
    for (int row = 0; row < rows; row++)
        for (int k = 0; k < tall; k++) {
            REAL sum = 0;
            EACH sum += slopes[row][j] * inward[k * C + j];
            of_weight[row * tall + k] += sum;
        }
    for (int k = 0; k < tall - 1; k++) {
        REAL *restrict of_inward = k < below ? of_x + k * BLOCK : of_old_h + (k - below) * C;
        EACH {
            REAL sum = 0;
            UNROLL for (int row = 0; row < rows; row++) sum += weight[row * tall + k] * slopes[row][j];
            of_inward[j] = sum;
        }
    }
}

#define AT(array) (array.data ? array.data + n * array.step + start : 0)
#define WHOLE(array) (array.data + n * array.step)

#define FORWARD(cell, below, hidden)                                                                             \
    cell_forward(below, hidden, first, length, C, WHOLE(weights[cell]), cell ? AT(new_h[cell - 1]) : AT(x),      \
                 AT(hs[cell]), AT(cs[cell]), AT(new_h[cell]), AT(new_c[cell]), AT(inputs[cell]), AT(gates[cell]), \
                 AT(tanhs[cell]));

INLINE void forward(const int first, long count, long C, Array x, const Array *weights, const Array *hs,
                    const Array *cs, const Array *new_h, const Array *new_c, const Array *inputs, const Array *gates,
                    const Array *tanhs) {
    for (long n = 0; n < count; n++)
        for (long start = 0; start < C; start += BLOCK) {
            const int length = C - start < BLOCK ? C - start : BLOCK;
            UP(FORWARD)
        }
}

#define BACKWARD(cell, below, hidden)                                                                            \
    cell_backward(below, hidden, first, length, C, WHOLE(weights[cell]), AT(cs[cell]), AT(inputs[cell]),         \
                  AT(gates[cell]), AT(tanhs[cell]), AT(of_h[cell]), AT(of_c[cell]), above, WHOLE(of_weights[cell]), \
                  passed[cell & 1][0], AT(of_hs[cell]), AT(of_cs[cell]));                                        \
    above = passed[cell & 1][0];                                                                                 \
    if (cell == 0)                                                                                               \
        for (int k = 0; k < below; k++) memcpy(AT(of_x) + k * C, passed[0][k], length * sizeof(REAL));

INLINE void backward(const int first, long count, long C, const Array *weights, const Array *cs, const Array *inputs,
                     const Array *gates, const Array *tanhs, const Array *of_h, const Array *of_c, Array of_x,
                     const Array *of_weights, const Array *of_hs, const Array *of_cs) {
    REAL passed[2][TALL][BLOCK];
    for (long n = 0; n < count; n++)
        for (long start = 0; start < C; start += BLOCK) {
            const int length = C - start < BLOCK ? C - start : BLOCK;
            const REAL *above = 0;
            DOWN(BACKWARD)
        }
}

/* `arrays` holds x, then the groups of one array a cell, in the order of the parameters above. */
#define GROUP(number) (arrays + 1 + (number) * cells)

void step(long first, long cells, long count, long C, const Array *arrays) {
    if (first)
        forward(1, count, C, arrays[0], GROUP(0), GROUP(1), GROUP(2), GROUP(3), GROUP(4), GROUP(5), GROUP(6), GROUP(7));
    else
        forward(0, count, C, arrays[0], GROUP(0), GROUP(1), GROUP(2), GROUP(3), GROUP(4), GROUP(5), GROUP(6), GROUP(7));
}

void step_backward(long first, long cells, long count, long C, const Array *arrays) {
    if (first)
        backward(1, count, C, GROUP(0), GROUP(1), GROUP(2), GROUP(3), GROUP(4), GROUP(5), GROUP(6), arrays[0], GROUP(7),
                 GROUP(8), GROUP(9));
    else
        backward(0, count, C, GROUP(0), GROUP(1), GROUP(2), GROUP(3), GROUP(4), GROUP(5), GROUP(6), arrays[0], GROUP(7),
                 GROUP(8), GROUP(9));
}

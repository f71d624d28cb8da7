// Vectors by the compilers' own extension (GCC, Clang). It has all operators, so that the kernels are written once.
#pragma once

#include <stdint.h>
#include <string.h>

namespace hf {
namespace {

typedef float float4 __attribute__((vector_size(16)));
typedef int32_t int4 __attribute__((vector_size(16)));
typedef uint32_t uint4 __attribute__((vector_size(16)));
typedef float float8 __attribute__((vector_size(32)));
typedef int32_t int8 __attribute__((vector_size(32)));
typedef uint32_t uint8 __attribute__((vector_size(32)));
typedef float float16 __attribute__((vector_size(64)));
typedef int32_t int16 __attribute__((vector_size(64)));
typedef uint32_t uint16 __attribute__((vector_size(64)));

template <class Floats, class Ints, class Unsigned> struct Vector {
    typedef Floats F;
    typedef Ints I;
    typedef Unsigned U;
    static constexpr int lanes = sizeof(F) / sizeof(float);

    // Keeps a value in a register. If the compiler loaded it again for each use, loads would be the bottleneck.
    template <class T> static inline void keep(T &) {}
    static inline F splat(float x) { return x - F{}; }
    static inline I splat_int(int32_t x) { return x - I{}; }
    static inline F load(const float *p) {
        F x;
        memcpy(&x, p, sizeof x);
        return x;
    }
    static inline void store(float *p, F x) { memcpy(p, &x, sizeof x); }
    static inline F to_float(I x) { return __builtin_convertvector(x, F); }
    static inline F line(F x, F middle, F slope) { return slope * (x - middle); }
    // Lane i of vector j becomes lane j of vector i.
    static inline void transpose(F *x) {
        for (int i = 0; i < lanes; i++)
            for (int j = 0; j < i; j++) {
                const float t = x[i][j];
                x[i][j] = x[j][i];
                x[j][i] = t;
            }
    }
    // acc, with the bit set in lanes where a < b
    static inline I mark(I acc, F a, F b, int32_t bit) { return acc | ((I)(a < b) & bit); }
    static inline I max_int(I a, I b) { return a > b ? a : b; }
    static inline int32_t largest_int(I x) {
        int32_t y = x[0];
        for (int l = 1; l < lanes; l++) y = x[l] > y ? x[l] : y;
        return y;
    }
    // sums[n][c] += scale[n] (2 popcount(nonzero[n] & ~(positive[n] ^ columns[c])) - popcount(nonzero[n])): a sum of up to 64
    // ternary numbers times signs, for each token n and channel c.
    static inline void add_agreement(const uint64_t *nonzero, const uint64_t *positive, int64_t tokens, const uint64_t *columns, int64_t channels, const float *scale, float *sums) {
        for (int64_t n = 0; n < tokens; n++, sums += channels) {
            const int total = __builtin_popcountll(nonzero[n]);
            for (int64_t c = 0; c < channels; c++)
                sums[c] += scale[n] * (float)(2 * __builtin_popcountll(nonzero[n] & ~(positive[n] ^ columns[c])) - total);
        }
    }
    static inline F absolute(F x) { return (F)((I)x & 0x7fffffff); }

    // log2 of x > 0 by the series of artanh; error of the result below 6e-7.
    static inline F log2(F x) {
        I bits = (I)x;
        I exponent = (bits - 0x3f3504f3) >> 23; // mantissa from sqrt(1/2) to sqrt(2)
        F mantissa = (F)(bits - (exponent << 23));
        F s = (mantissa - 1.0f) / (mantissa + 1.0f), s2 = s * s;
        F series = 1.0f + s2 * (0.333333333f + s2 * (0.2f + s2 * (0.142857143f + s2 * 0.111111111f)));
        return to_float(exponent) + s * series * 2.88539008f + (x - x); // NaN stays NaN
    }
};

} // namespace
} // namespace hf

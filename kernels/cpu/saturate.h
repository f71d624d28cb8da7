// tanh(beta x) and sgn(x) of one row, the inputs of the token-weight networks. Compiled once for each instruction set.
#pragma once

#include "convert.h"

namespace hf {
namespace {

// The inner loops run over a block, so that the compiler vectorises them.
inline void saturate_row(const void *row, int64_t type, int64_t dim, float beta, void *tanh, void *sign) {
    constexpr int64_t block = 64;
    const int64_t width = type == HF_FLOAT32 ? 4 : 2;
    for (int64_t first = 0; first < dim; first += block) {
        const int64_t count = dim - first < block ? dim - first : block;
        float x[block], t[block], s[block];
        to_float((const char *)row + first * width, type, count, x);
        for (int64_t i = count; i < block; i++) x[i] = 0;
        for (int64_t i = 0; i < block; i++) {
            s[i] = x[i] >= 0 ? 1.0f : -1.0f;
            // (1 - e) / (1 + e) with e = 2^y, y = -2 log2(e) abs(beta x): an integer part for the exponent, and a
            // polynomial of degree 6.
            const float scaled = beta * x[i], magnitude = float_of(bits_of(scaled) & 0x7fffffff);
            const float exponent = magnitude * -2.88539008f, y = exponent > -125.0f ? exponent : -125.0f;
            const float rounded = y + 12582912.0f, r = y - (rounded - 12582912.0f); // 1.5 * 2^23: the last place is 1
            float p = 1.54035304e-4f;
            p = p * r + 1.33335581e-3f;
            p = p * r + 9.61812911e-3f;
            p = p * r + 5.55041087e-2f;
            p = p * r + 2.40226507e-1f;
            p = p * r + 6.93147181e-1f;
            p = p * r + 1.0f;
            const float e = p * float_of((bits_of(rounded) << 23) + 0x3f800000);
            const float ratio = (1.0f - e) / (1.0f + e);
            // Below 2^-6 the difference loses digits, and two terms of the series have all of them.
            const float small = magnitude - magnitude * magnitude * magnitude * 0.333333333f;
            const float value = magnitude < 0.015625f ? small : ratio;
            t[i] = scaled == scaled ? float_of(bits_of(value) | (bits_of(scaled) & 0x80000000u)) : scaled;
        }
        from_float(t, type, count, (char *)tanh + first * width);
        from_float(s, type, count, (char *)sign + first * width);
    }
}

} // namespace
} // namespace hf

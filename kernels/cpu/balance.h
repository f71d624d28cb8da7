// Balanced bits of one head: centring over tokens, RMS norm over channels, signs, and the way back, each in two passes over
// rows that stay in cache. Compiled once for each instruction set; plain loops, which compilers make vectors of.
#pragma once

#include <math.h>

#include "convert.h"
#include "kernels.h"

namespace hf {
namespace {

// Rows summed up in float32 before they go to the double sums.
constexpr int64_t kBalanceBlock = 64;

inline const char *row_at(const hf_rows &r, int64_t width, int64_t b, int64_t h, int64_t n) {
    return (const char *)r.data + (b * r.batch_stride + h * r.head_stride + n * r.row_stride) * width;
}

// mean[c] over `tokens` rows that `row(n, x)` writes into x.
template <class Row> inline void mean_of_rows(int64_t tokens, int64_t dim, float *x, float *part, double *sum, float *mean, Row row) {
    for (int64_t c = 0; c < dim; c++) sum[c] = 0;
    for (int64_t first = 0; first < tokens; first += kBalanceBlock) {
        const int64_t last = first + kBalanceBlock < tokens ? first + kBalanceBlock : tokens;
        for (int64_t c = 0; c < dim; c++) part[c] = 0;
        for (int64_t n = first; n < last; n++) {
            const float *values = row(n, x);
            for (int64_t c = 0; c < dim; c++) part[c] += values[c];
        }
        for (int64_t c = 0; c < dim; c++) sum[c] += part[c];
    }
    for (int64_t c = 0; c < dim; c++) mean[c] = (float)(sum[c] / (double)tokens);
}

// sum of a[c] b[c], in eight sums of which a compiler makes one vector.
inline float dot(const float *a, const float *b, int64_t dim) {
    float sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    int64_t c = 0;
    for (; c + 8 <= dim; c += 8)
        for (int64_t l = 0; l < 8; l++) sums[l] += a[c + l] * b[c + l];
    for (; c < dim; c++) sums[0] += a[c] * b[c];
    return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

inline void balance_forward(const hf_balance &a, int64_t head, Arena &arena) {
    const int64_t width = a.type == HF_FLOAT32 ? 4 : 2, b = head / a.heads, h = head % a.heads, words = (a.dim + 63) / 64;
    double *sum = (double *)arena.base;
    float *x = (float *)(sum + a.dim), *part = x + a.dim, *mean = part + a.dim;
    if (a.centering)
        mean_of_rows(a.tokens, a.dim, x, part, sum, mean, [&](int64_t n, float *to) {
            to_float(row_at(a.x, width, b, h, n), a.type, a.dim, to);
            return (const float *)to;
        });
    for (int64_t n = 0; n < a.tokens; n++) {
        to_float(row_at(a.x, width, b, h, n), a.type, a.dim, x);
        if (a.centering)
            for (int64_t c = 0; c < a.dim; c++) x[c] -= mean[c];
        float inverse = 1;
        if (a.norm) {
            inverse = 1 / sqrtf(dot(x, x, a.dim) / (float)a.dim + (float)a.epsilon);
            for (int64_t c = 0; c < a.dim; c++) x[c] *= inverse;
        }
        a.inverse_rms[head * a.tokens + n] = inverse;
        void *y = (void *)row_at(a.y, width, b, h, n);
        from_float(x, a.type, a.dim, y);
        // Of the rounded numbers, so that bits are the signs of what the backward sees.
        pack_row(y, a.type, a.dim, a.bits + (head * a.tokens + n) * words);
    }
}

inline void balance_backward(const hf_balance &a, int64_t head, Arena &arena) {
    const int64_t width = a.type == HF_FLOAT32 ? 4 : 2, b = head / a.heads, h = head % a.heads;
    double *sum = (double *)arena.base;
    float *y = (float *)(sum + a.dim), *part = y + a.dim, *mean = part + a.dim, *rows = mean + a.dim;
    const float window = (float)a.window, inverse_dim = 1 / (float)a.dim;
    // The gradient of the centred rows, kept in float32 until their mean is known.
    const auto centred = [&](int64_t n, float *) {
        float *g = rows + n * a.dim;
        to_float(row_at(a.grad, width, b, h, n), a.type, a.dim, g);
        to_float(row_at(a.y, width, b, h, n), a.type, a.dim, y);
        for (int64_t c = 0; c < a.dim; c++) g[c] = fabsf(y[c]) <= window ? g[c] : 0.0f;
        if (a.norm) {
            const float inverse = a.inverse_rms[head * a.tokens + n], along = dot(g, y, a.dim) * inverse_dim;
            for (int64_t c = 0; c < a.dim; c++) g[c] = (g[c] - along * y[c]) * inverse;
        }
        return (const float *)g;
    };
    mean_of_rows(a.tokens, a.dim, y, part, sum, mean, centred);
    for (int64_t n = 0; n < a.tokens; n++) {
        float *g = rows + n * a.dim;
        if (a.centering)
            for (int64_t c = 0; c < a.dim; c++) g[c] -= mean[c];
        from_float(g, a.type, a.dim, (void *)row_at(a.grad_x, width, b, h, n));
    }
}

} // namespace
} // namespace hf

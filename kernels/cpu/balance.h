// Balanced bits of one head: centring over tokens, RMS norm over channels, signs, and the backward pass. Forward and
// backward each make two passes over rows that stay in cache. Compiled once for each instruction set, as plain loops
// that compilers vectorise.
#pragma once

#include <math.h>

#include "convert.h"
#include "kernels.h"

namespace hf {
namespace {

// Number of rows that are summed in float32 before they are added to the sums in double.
constexpr int64_t kBalanceBlock = 64;

inline const char *row_at(const hf_rows &r, int64_t width, int64_t b, int64_t h, int64_t n) {
    return (const char *)r.data + (b * r.batch_stride + h * r.head_stride + n * r.row_stride) * width;
}

// Loops over the channels of a row. Dim is their number if it is known at compile time; 0 means that it is `dim`.
template <int Dim> struct Channels {
    static inline int64_t count(int64_t dim) { return Dim ? Dim : dim; }

    static inline void add(float *__restrict to, const float *__restrict from, int64_t dim) {
        for (int64_t c = 0; c < count(dim); c++) to[c] += from[c];
    }
    static inline void subtract(float *__restrict to, const float *__restrict from, int64_t dim) {
        for (int64_t c = 0; c < count(dim); c++) to[c] -= from[c];
    }
    static inline void scale(float *__restrict to, float factor, int64_t dim) {
        for (int64_t c = 0; c < count(dim); c++) to[c] *= factor;
    }
    // 0 where abs(y) > window
    static inline void cut(float *__restrict g, const float *__restrict y, float window, int64_t dim) {
        for (int64_t c = 0; c < count(dim); c++) g[c] = fabsf(y[c]) <= window ? g[c] : 0.0f;
    }
    static inline void project(float *__restrict g, const float *__restrict y, float along, float factor, int64_t dim) {
        for (int64_t c = 0; c < count(dim); c++) g[c] = (g[c] - along * y[c]) * factor;
    }
    // In eight partial sums, which compilers put into one vector.
    static inline float dot(const float *__restrict a, const float *__restrict b, int64_t dim) {
        float sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        int64_t c = 0;
        for (; c + 8 <= count(dim); c += 8)
            for (int64_t l = 0; l < 8; l++) sums[l] += a[c + l] * b[c + l];
        for (; c < count(dim); c++) sums[0] += a[c] * b[c];
        return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
    }
    // A row as float32: in place if it has that type, else a copy in `room`.
    static inline const float *read(const char *row, int64_t type, int64_t dim, float *room) {
        if (type == HF_FLOAT32) return (const float *)row;
        to_float(row, type, count(dim), room);
        return room;
    }
};

// mean[c] over `tokens` rows; `row(n)` returns row n.
template <int Dim, class Row> inline void mean_of_rows(int64_t tokens, int64_t dim, float *part, double *sum, float *mean, Row row) {
    using Loop = Channels<Dim>;
    for (int64_t c = 0; c < dim; c++) sum[c] = 0;
    for (int64_t first = 0; first < tokens; first += kBalanceBlock) {
        const int64_t last = first + kBalanceBlock < tokens ? first + kBalanceBlock : tokens;
        for (int64_t c = 0; c < dim; c++) part[c] = 0;
        for (int64_t n = first; n < last; n++) Loop::add(part, row(n), dim);
        for (int64_t c = 0; c < dim; c++) sum[c] += part[c];
    }
    for (int64_t c = 0; c < dim; c++) mean[c] = (float)(sum[c] / (double)tokens);
}

template <int Dim> inline void balance_head(const hf_balance &a, int64_t head, Arena &arena) {
    using Loop = Channels<Dim>;
    const int64_t width = a.type == HF_FLOAT32 ? 4 : 2, b = head / a.heads, h = head % a.heads, words = (a.dim + 63) / 64;
    double *sum = (double *)arena.base;
    float *x = (float *)(sum + a.dim), *part = x + a.dim, *mean = part + a.dim;
    if (a.centering)
        mean_of_rows<Dim>(a.tokens, a.dim, part, sum, mean, [&](int64_t n) { return Loop::read(row_at(a.x, width, b, h, n), a.type, a.dim, x); });
    for (int64_t n = 0; n < a.tokens; n++) {
        to_float(row_at(a.x, width, b, h, n), a.type, Loop::count(a.dim), x);
        if (a.centering) Loop::subtract(x, mean, a.dim);
        float inverse = 1;
        if (a.norm) {
            inverse = 1 / sqrtf(Loop::dot(x, x, a.dim) / (float)a.dim + (float)a.epsilon);
            Loop::scale(x, inverse, a.dim);
        }
        a.inverse_rms[head * a.tokens + n] = inverse;
        void *y = (void *)row_at(a.y, width, b, h, n);
        from_float(x, a.type, Loop::count(a.dim), y);
        // Bits of the rounded numbers, because the backward reads those.
        pack_row(y, a.type, Loop::count(a.dim), a.bits + (head * a.tokens + n) * words);
    }
}

template <int Dim> inline void balance_head_backward(const hf_balance &a, int64_t head, Arena &arena) {
    using Loop = Channels<Dim>;
    const int64_t width = a.type == HF_FLOAT32 ? 4 : 2, b = head / a.heads, h = head % a.heads;
    double *sum = (double *)arena.base;
    float *room = (float *)(sum + a.dim), *part = room + a.dim, *mean = part + a.dim, *rows = mean + a.dim;
    // The gradient of the centred rows, kept in float32 until their mean is known.
    const auto centred = [&](int64_t n) {
        float *g = rows + n * a.dim;
        to_float(row_at(a.grad, width, b, h, n), a.type, Loop::count(a.dim), g);
        const float *y = Loop::read(row_at(a.y, width, b, h, n), a.type, a.dim, room);
        Loop::cut(g, y, (float)a.window, a.dim);
        if (a.norm) Loop::project(g, y, Loop::dot(g, y, a.dim) / (float)a.dim, a.inverse_rms[head * a.tokens + n], a.dim);
        return (const float *)g;
    };
    mean_of_rows<Dim>(a.tokens, a.dim, part, sum, mean, centred);
    for (int64_t n = 0; n < a.tokens; n++) {
        float *g = rows + n * a.dim;
        if (a.centering) Loop::subtract(g, mean, a.dim);
        from_float(g, a.type, Loop::count(a.dim), (void *)row_at(a.grad_x, width, b, h, n));
    }
}

inline void balance_forward(const hf_balance &a, int64_t head, Arena &arena) {
    a.dim == 64 ? balance_head<64>(a, head, arena) : balance_head<0>(a, head, arena);
}

inline void balance_backward(const hf_balance &a, int64_t head, Arena &arena) {
    a.dim == 64 ? balance_head_backward<64>(a, head, arena) : balance_head_backward<0>(a, head, arena);
}

} // namespace
} // namespace hf

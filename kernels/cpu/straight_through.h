// The straight-through gradient of the bits (paper Eq. 3): products of dS with signs, in floating point.
#pragma once

#include "bit_sums.h"

namespace hf {
namespace {

template <class V> struct StraightThrough : BitSums<V> {
    using Base = BitSums<V>;
    using typename Base::F;
    using typename Base::I;
    using Base::channels, Base::query_sums, Base::key_sums, Base::L, Base::kParts;
    // Tile of sums that stays in registers: rows, and vectors of channels.
    static constexpr int kRows = 4, kVectors = V::lanes == 8 ? 2 : 4;

    float *query_signs; // (64, channels): w_q sgn(q) of the current block of queries
    float *key_signs;   // (chunk, channels): w_k sgn(k)
    float *d_scores;    // (64, 64): dS of the current block of 64 x 64

    template <class Carver> static StraightThrough carve(const Call &call, Carver &c) {
        StraightThrough s;
        s.channels = (call.a->head_dim + L - 1) / L * L;
        s.carve_sums(call, c);
        s.query_signs = c.template take<float>(64 * s.channels);
        s.key_signs = c.template take<float>(call.chunk * s.channels);
        s.d_scores = c.template take<float>(64 * 64);
        return s;
    }

    // signs[n][c] = weight[n], negative where bit c of token n is 0
    void load_signs(const hf_attention &a, const uint64_t *bits, const float *weight, int64_t tokens, float *signs) const {
        const int64_t words = (a.head_dim + 63) / 64;
        I place;
        for (int l = 0; l < L; l++) place[l] = 1 << l;
        for (int64_t n = 0; n < tokens; n++, bits += words, signs += channels) {
            const I size = (I)V::splat(weight[n]);
            for (int64_t c = 0; c < channels; c += L) {
                const I bit = V::splat_int((int32_t)(bits[c / 64] >> c % 64)) & place;
                V::store(signs + c, (F)(size ^ ((I)(bit == 0) & INT32_MIN)));
            }
        }
    }

    void load_queries(const Call &, int64_t) const {}

    void load_chunk(const Call &call, int64_t head, int64_t first, int64_t last) const {
        const hf_attention &a = *call.a;
        const int64_t row = head * a.keys + first;
        load_signs(a, a.key_bits + row * ((a.head_dim + 63) / 64), a.key_weight + row, last - first, key_signs);
        this->start_chunk(call);
    }

    void start_queries(const Call &call, int64_t head, int64_t i, int64_t count) const {
        const hf_attention &a = *call.a;
        const int64_t row = head * a.queries + i;
        load_signs(a, a.query_bits + row * ((a.head_dim + 63) / 64), a.query_weight + row, count, query_signs);
        this->start_query_sums();
    }

    // Adds dS of the `count` queries from i on and of the keys of tile t of the chunk first .. last; multiplies when 64
    // keys, or the last ones, are there.
    void add_tile(const Call &, int64_t, int64_t, int64_t count, int64_t first, int64_t last, int64_t t, const F *p, const F *dp, const float *delta, F) const {
        const int64_t key = first + t * L, part = t % kParts, block = t / kParts;
        for (int64_t n = 0; n < count; n++) V::store(d_scores + n * 64 + part * L, p[n] * (dp[n] - delta[n]));
        if (part + 1 < kParts && key + L < last) return;
        const int64_t keys = std::min<int64_t>(64, last - first - 64 * block), rows = (count + kRows - 1) / kRows * kRows;
        memset(d_scores + count * 64, 0, (rows - count) * 64 * sizeof(float));
        multiply(d_scores, 64, 1, count, keys, key_signs + 64 * block * channels, query_sums);
        multiply(d_scores, 1, 64, keys, count, query_signs, key_sums + 64 * block * channels);
    }

    // to[r][c] += sum over k < count of a[r row_step + k step] b[k][c], for r < rows
    void multiply(const float *a, int64_t row_step, int64_t step, int64_t rows, int64_t count, const float *b, float *to) const {
        for (int64_t c = 0; c < channels;) {
            const bool wide = channels - c >= kVectors * L;
            for (int64_t r = 0; r < rows; r += kRows) {
                if (wide) add_products<kVectors>(a + r * row_step, row_step, step, count, b + c, to + r * channels + c);
                else add_products<1>(a + r * row_step, row_step, step, count, b + c, to + r * channels + c);
            }
            c += wide ? kVectors * L : L;
        }
    }

    template <int Vectors> void add_products(const float *a, int64_t row_step, int64_t step, int64_t count, const float *b, float *to) const {
        F sums[kRows][Vectors];
        for (int r = 0; r < kRows; r++)
            for (int v = 0; v < Vectors; v++) sums[r][v] = V::splat(0);
        for (int64_t k = 0; k < count; k++, a += step, b += channels) {
            F x[Vectors];
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; v++) {
                x[v] = V::load(b + v * L);
                V::keep(x[v]);
            }
#pragma GCC unroll 4
            for (int r = 0; r < kRows; r++) {
                const F y = V::splat(a[r * row_step]);
#pragma GCC unroll 4
                for (int v = 0; v < Vectors; v++) sums[r][v] = V::fma(y, x[v], sums[r][v]);
            }
        }
        for (int r = 0; r < kRows; r++)
            for (int v = 0; v < Vectors; v++) V::store(to + r * channels + v * L, V::load(to + r * channels + v * L) + sums[r][v]);
    }
};

} // namespace
} // namespace hf

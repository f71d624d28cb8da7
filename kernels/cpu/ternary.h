// The ternary bit gradient: products of drawn numbers -1, 0, 1 (as masks) with columns of sign bits, by popcount.
//
// t_ij = sgn(g_ij) [u_ij < abs(g_ij) / s] as in hf_binaryformer/kernels/draws.py, with u_ij from a hash of (seed, head, i, j) and
// s the largest abs(g) of the row (for a key: of the column) within a block of 64 queries x 64 keys. A query's draws in a
// block are the bits of two words (not zero; dS positive), and so are a key's. g is dS times a weight of the other
// side; the sign of that weight is stored in the other side's bits.
#pragma once

#include <string.h>

#include <algorithm>

#include "bit_sums.h"
#include "convert.h"

namespace hf {
namespace {

inline uint32_t multiply(uint32_t h) {
    h = (h ^ h >> 16) * 0x7feb352du;
    return (h ^ h >> 15) * 0x846ca68bu;
}

inline uint32_t mix(uint32_t h) {
    h = multiply(h);
    return h ^ h >> 16;
}

// Bit j of word i becomes bit i of word j.
inline void transpose(uint64_t *m) {
    uint64_t mask = 0xffffffff;
    for (int j = 32; j; j >>= 1, mask ^= mask << j)
        for (int first = 0; first < 64; first += 2 * j)
            for (int k = first; k < first + j; k++) {
                const uint64_t t = (m[k] >> j ^ m[k + j]) & mask;
                m[k] ^= t << j;
                m[k + j] ^= t;
            }
}

// Sums are of t sgn(k) and of t sgn(q). There are 64 channels for each word.
template <class V> struct Ternary : BitSums<V> {
    using Base = BitSums<V>;
    using typename Base::F;
    using typename Base::I;
    using U = typename V::U;
    using Base::channels, Base::query_sums, Base::key_sums, Base::L, Base::kParts;

    int64_t words;
    uint64_t *query_columns; // (Nq / 64, channels): the bits of 64 queries in each channel, inverted where w_q < 0
    uint64_t *key_columns;   // (chunk / 64, channels): the same for keys and w_k
    uint32_t *row_hash;      // (Nq)
    // For the current block of 64 x 64:
    F *d_scores;             // (64, kParts): dS
    F *key_weight;           // (kParts): abs(w_k), 0 past the end
    I *row_largest;          // (64): largest abs(g), compared as integers: same order, and NaN is the largest
    I *column_largest;       // (kParts)
    uint64_t *row_positive, *row_nonzero, *column_positive, *column_nonzero; // (64)

    template <class Carver> static Ternary carve(const Call &call, Carver &c) {
        const hf_attention &a = *call.a;
        Ternary s;
        s.words = (a.head_dim + 63) / 64;
        s.channels = 64 * s.words;
        s.query_columns = c.template take<uint64_t>((a.queries + 63) / 64 * s.channels);
        s.key_columns = c.template take<uint64_t>(call.chunk / 64 * s.channels);
        s.row_hash = c.template take<uint32_t>(a.queries);
        s.carve_sums(call, c);
        s.d_scores = c.template take<F>(64 * kParts);
        s.key_weight = c.template take<F>(kParts);
        s.row_largest = c.template take<I>(64);
        s.column_largest = c.template take<I>(kParts);
        s.row_positive = c.template take<uint64_t>(64);
        s.row_nonzero = c.template take<uint64_t>(64);
        s.column_positive = c.template take<uint64_t>(64);
        s.column_nonzero = c.template take<uint64_t>(64);
        return s;
    }

    // columns[block][64 w + b], bit n: bit b of word w of token 64 block + n, inverted where the token's weight is negative.
    void load_columns(const uint64_t *bits, const float *weight, int64_t tokens, uint64_t *columns) const {
        for (int64_t first = 0; first < tokens; first += 64, columns += channels)
            for (int64_t w = 0; w < words; w++) {
                for (int64_t n = 0; n < 64; n++)
                    columns[64 * w + n] = first + n < tokens ? bits[(first + n) * words + w] ^ (weight[first + n] < 0 ? ~0ull : 0) : 0;
                transpose(columns + 64 * w);
            }
    }

    void load_queries(const Call &call, int64_t head) const {
        const hf_attention &a = *call.a;
        load_columns(a.query_bits + head * a.queries * words, a.query_weight + head * a.queries, a.queries, query_columns);
        const uint32_t start = mix(mix(mix((uint32_t)a.seed) + (uint32_t)(a.seed >> 32)) + (uint32_t)head);
        for (int64_t i = 0; i < a.queries; i++) row_hash[i] = mix(start + (uint32_t)i);
    }

    void load_chunk(const Call &call, int64_t head, int64_t first, int64_t last) const {
        const hf_attention &a = *call.a;
        load_columns(a.key_bits + (head * a.keys + first) * words, a.key_weight + head * a.keys + first, last - first, key_columns);
        this->start_chunk(call);
    }

    void start_queries(const Call &, int64_t, int64_t, int64_t) const { this->start_query_sums(); }

    // Adds dS of the `count` queries from i on and of the keys of tile t of the chunk first .. last. Draws when 64
    // keys, or the last ones, are there.
    void add_tile(const Call &call, int64_t head, int64_t i, int64_t count, int64_t first, int64_t last, int64_t t, const F *p, const F *dp, const float *delta, F weight) const {
        const hf_attention &a = *call.a;
        const int64_t key = first + t * L, part = t % kParts;
        weight = V::absolute(zero_past_end<V>(key, last, weight));
        key_weight[part] = weight;
        const float *query_weight = a.query_weight + head * a.queries + i;
        I largest = V::splat_int(0);
        for (int64_t n = 0; n < count; n++) {
            const F ds = p[n] * (dp[n] - delta[n]);
            d_scores[n * kParts + part] = ds;
            row_largest[n] = V::max_int(part ? row_largest[n] : V::splat_int(0), (I)V::absolute(ds * weight));
            largest = V::max_int(largest, (I)V::absolute(ds * query_weight[n]));
        }
        column_largest[part] = largest;
        if (part + 1 < kParts && key + L < last) return;

        // If a scale is 0, so is g. 0 / 0 is not above any draw, so t is 0.
        float row_scale[64], row_inverse[64];
        for (int64_t n = 0; n < count; n++) row_scale[n] = float_of((uint32_t)V::largest_int(row_largest[n]));
        for (int64_t n = 0; n < count; n++) row_inverse[n] = 1 / row_scale[n];
        draw(row_hash + i, query_weight, row_inverse, count, (uint32_t)(key - part * L), part + 1);
        const int64_t block = t / kParts;
        V::add_agreement(row_nonzero, row_positive, count, key_columns + block * channels, channels, row_scale, query_sums);
        V::add_agreement(column_nonzero, column_positive, std::min<int64_t>(64, last - first - 64 * block), query_columns + i / 64 * channels, channels,
                         (const float *)column_largest, key_sums + 64 * block * channels);
    }

    // Draws the masks of the block whose first key is `key`.
    void draw(const uint32_t *hash, const float *query_weight, const float *row_inverse, int64_t count, uint32_t key, int64_t parts) const {
        if (parts < kParts || L < 8) // put() does not write all bits, or only adds bits
            for (uint64_t *words : {row_positive, row_nonzero}) memset(words, 0, 64 * sizeof(uint64_t));
        for (int64_t part = 0; part < parts; part++) {
            U steps;
            for (int l = 0; l < L; l++) steps[l] = 0x9e3779b9u * (key + (uint32_t)(part * L + l));
            const F by_column = 1.0f / (F)column_largest[part], weight = key_weight[part], zero = V::splat(0);
            I positive[2], nonzero[2]; // one key per lane, bits of 32 queries
            for (int64_t half = 0; half < 2; half++) {
                I beside = V::splat_int(0), above = V::splat_int(0);
                for (int64_t n = 32 * half; n < std::min(count, 32 * (half + 1)); n++) {
                    U h = steps + hash[n];
                    h = (h ^ h >> 16) * 0x7feb352du;
                    h = (h ^ h >> 15) * 0x846ca68bu;
                    const F draw = (F)(h >> 9 | 0x3f800001u) - 1.0f; // (h >> 10) + 1/2 over 2^22
                    const F ds = d_scores[n * kParts + part], size = V::absolute(ds);
                    const int32_t bit = (int32_t)(1u << n % 32);
                    put(row_positive[n], part, V::below(zero, ds));
                    put(row_nonzero[n], part, V::below(draw, size * (weight * row_inverse[n])));
                    above = V::mark(above, zero, ds, bit);
                    beside = V::mark(beside, draw, size * (by_column * __builtin_fabsf(query_weight[n])), bit);
                }
                positive[half] = above, nonzero[half] = beside;
            }
            for (int l = 0; l < L; l++) {
                column_positive[part * L + l] = (uint32_t)positive[0][l] | (uint64_t)(uint32_t)positive[1][l] << 32;
                column_nonzero[part * L + l] = (uint32_t)nonzero[0][l] | (uint64_t)(uint32_t)nonzero[1][l] << 32;
            }
        }
    }

    // Writes L bits of a word; other tiles write its other bits.
    static void put(uint64_t &word, int64_t part, uint32_t bits) {
        if constexpr (L == 16) ((uint16_t *)&word)[part] = (uint16_t)bits;
        else if constexpr (L == 8) ((uint8_t *)&word)[part] = (uint8_t)bits;
        else word |= (uint64_t)bits << L * part;
    }
};

} // namespace
} // namespace hf

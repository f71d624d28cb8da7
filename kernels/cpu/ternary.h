// The ternary bit gradient: masks of drawn numbers -1, 0, 1 against columns of sign bits, by popcount.
//
// t_ij = floor(g_ij / s + u_ij) as in hf_binaryformer/kernels/draws.py, with u_ij from a hash of (seed, head, i, j). Blocks of
// 64 queries x 64 keys: a query's draws are the bits of two words (not zero; positive), and so are, transposed, a key's.
#pragma once

#include <string.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "kernels.h"

namespace hf {
namespace {

constexpr int kSignBlock = 64;

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

template <class V> struct Signs {
    using F = typename V::F;
    using U = typename V::U;
    static constexpr int L = V::lanes;

    int64_t words, channels;          // 64 words
    uint64_t *query_columns;          // (Nq / 64, channels): the bits of 64 queries in each channel
    uint64_t *key_columns;            // (chunk / 64, channels)
    uint32_t *row_hash;               // (Nq)
    float *row_inverse;               // (Nq): 1 / largest abs(dS w_k)
    F *column_inverse;                // (tiles): 1 / largest abs(dS w_q)
    int32_t *query_counts;            // (64, channels): sum of t sgn(k) of a block
    int32_t *key_counts;              // (chunk, channels): sum of t sgn(q)
    uint64_t *row_positive, *row_nonzero;       // (chunk / 64, 64): draws of 64 queries, a query a word of 64 keys
    uint64_t *column_positive, *column_nonzero; // (64): the same of the 64 keys in work, by the keys' scales

    template <class Carver> static Signs carve(const Call &call, Carver &c) {
        const hf_attention &a = *call.a;
        Signs s;
        s.words = (a.head_dim + 63) / 64;
        s.channels = 64 * s.words;
        s.query_columns = c.template take<uint64_t>((a.queries + 63) / 64 * s.channels);
        s.key_columns = c.template take<uint64_t>(call.chunk / 64 * s.channels);
        s.row_hash = c.template take<uint32_t>(a.queries);
        s.row_inverse = c.template take<float>(a.queries);
        s.column_inverse = c.template take<F>(call.chunk / L);
        s.query_counts = c.template take<int32_t>(64 * s.channels);
        s.key_counts = c.template take<int32_t>(call.chunk * s.channels);
        s.row_positive = c.template take<uint64_t>(call.chunk);
        s.row_nonzero = c.template take<uint64_t>(call.chunk);
        s.column_positive = c.template take<uint64_t>(64);
        s.column_nonzero = c.template take<uint64_t>(64);
        return s;
    }

    // columns[block][64 w + b], bit n: bit b of word w of token 64 block + n
    void load_columns(const uint64_t *bits, int64_t tokens, uint64_t *columns) const {
        for (int64_t first = 0; first < tokens; first += 64, columns += channels)
            for (int64_t w = 0; w < words; w++) {
                for (int64_t n = 0; n < 64; n++) columns[64 * w + n] = first + n < tokens ? bits[(first + n) * words + w] : 0;
                transpose(columns + 64 * w);
            }
    }

    static float inverse(float x) { return x > 0 ? 1 / x : 0; }

    void load_queries(const Call &call, int64_t head) const {
        const hf_attention &a = *call.a;
        load_columns(a.query_bits + head * a.queries * words, a.queries, query_columns);
        const uint32_t start = mix(mix(mix((uint32_t)a.seed) + (uint32_t)(a.seed >> 32)) + (uint32_t)head);
        const float *largest = call.row_maximum + head * call.chunks * a.queries;
        for (int64_t i = 0; i < a.queries; i++) {
            row_hash[i] = mix(start + (uint32_t)i);
            row_inverse[i] = inverse(largest[i]);
        }
    }

    void load_chunk(const Call &call, int64_t head, int64_t first, int64_t last) const {
        const hf_attention &a = *call.a;
        load_columns(a.key_bits + (head * a.keys + first) * words, last - first, key_columns);
        memset(key_counts, 0, call.chunk * channels * sizeof(int32_t));
        memset(key_columns + (last - first + 63) / 64 * channels, 0, (call.chunk / 64 - (last - first + 63) / 64) * channels * sizeof(uint64_t));
        memset(column_inverse, 0, call.chunk * sizeof(float));
        for (uint64_t *words : {column_positive, column_nonzero}) memset(words, 0, 64 * sizeof(uint64_t));
        for (int64_t key = first; key < last; key++)
            ((float *)&column_inverse[(key - first) / L])[(key - first) % L] = inverse(call.column_maximum[head * a.keys + key]);
    }

    void start_block(const Call &call) const {
        for (uint64_t *words : {row_positive, row_nonzero}) memset(words, 0, call.chunk * sizeof(uint64_t));
    }

    // Draws for the `count` queries from i on against the keys of tile t of the chunk first .. last.
    void add_tile(const Call &call, int64_t head, int64_t i, int64_t count, int64_t first, int64_t last, int64_t t, const F *p, const F *dp, F key_weight) const {
        const hf_attention &a = *call.a;
        const int64_t key = first + t * L;
        const int64_t at = t * L % 64, block = t * L / 64;
        U steps;
        for (int l = 0; l < L; l++) {
            steps[l] = 0x9e3779b9u * (uint32_t)(key + l);
            if (key + l >= last) ((float *)&key_weight)[l] = 0; // draws 0, as does column_inverse there
        }
        const F by_column = column_inverse[t], one = V::splat(1), zero = V::splat(0);
        const float *delta = a.delta + head * a.queries + i, *query_weight = a.query_weight + head * a.queries + i;
        uint64_t *positive = row_positive + block * 64, *nonzero = row_nonzero + block * 64;
        F draws[kSignBlock];
        for (int64_t n = 0; n < count; n++) {
            U h = steps + row_hash[i + n];
            h = (h ^ h >> 16) * 0x7feb352du;
            h = (h ^ h >> 15) * 0x846ca68bu;
            draws[n] = (V::to_float((typename V::I)(h >> 10)) + 0.5f) * 0x1p-22f;
        }
        for (int64_t n = 0; n < count; n++) {
            const F draw = draws[n];
            const F ds = p[n] * (dp[n] - delta[n]);
            const F row = ds * key_weight * row_inverse[i + n] + draw, column = ds * query_weight[n] * by_column + draw;
            const uint32_t above = V::at_least(row, one), beside = V::at_least(column, one);
            put(positive[n], at, above);
            put(nonzero[n], at, above | V::below(row, zero));
            put(column_positive[n], at, beside);
            put(column_nonzero[n], at, beside | V::below(column, zero));
        }
        if (at + L < 64 && key + L < last) return;
        // 64 keys are drawn, or the chunk ends.
        transpose(column_positive);
        transpose(column_nonzero);
        for (int64_t j = 0; j < 64 && first + 64 * block + j < last; j++)
            V::add_agreement(column_nonzero + j, column_positive + j, query_columns + i / 64 * channels, 1, channels, key_counts + (64 * block + j) * channels);
        memset(column_positive, 0, 64 * sizeof(uint64_t));
        memset(column_nonzero, 0, 64 * sizeof(uint64_t));
    }

    // L bits of a word, whose other bits were or will be put by other tiles.
    static void put(uint64_t &word, int64_t at, uint32_t bits) {
        if constexpr (L == 16) ((uint16_t *)&word)[at / 16] = (uint16_t)bits;
        else if constexpr (L == 8) ((uint8_t *)&word)[at / 8] = (uint8_t)bits;
        else word |= (uint64_t)bits << at;
    }

    // Sums over the chunk's keys into the memory of the gradient, as integers. Other chunks of the head add theirs, one at a time and in any order: the
    // sums of integers are the same.
    void write_block(const Call &call, int64_t head, int64_t i, int64_t count) const {
        const hf_attention &a = *call.a;
        int32_t *to = (int32_t *)a.grad_query + (head * a.queries + i) * a.head_dim;
        const int64_t blocks = call.chunk / 64;
        memset(query_counts, 0, 64 * channels * sizeof(int32_t));
        for (int64_t n = 0; n < count; n++) V::add_agreement(row_nonzero + n, row_positive + n, key_columns, blocks, channels, query_counts + n * channels);
        std::atomic_flag &busy = call.busy[(head * a.queries + i) / kSignBlock + head];
        while (busy.test_and_set(std::memory_order_acquire)) std::this_thread::yield();
        for (int64_t n = 0; n < count; n++)
            for (int64_t c = 0; c < a.head_dim; c++) to[n * a.head_dim + c] += query_counts[n * channels + c];
        busy.clear(std::memory_order_release);
    }

    void write_chunk(const Call &call, int64_t head, int64_t first, int64_t last) const {
        const hf_attention &a = *call.a;
        for (int64_t key = first; key < last; key++) {
            const float factor = (float)a.scale * a.key_weight[head * a.keys + key] * call.column_maximum[head * a.keys + key];
            float *to = a.grad_key + (head * a.keys + key) * a.head_dim;
            for (int64_t c = 0; c < a.head_dim; c++) to[c] = factor * (float)key_counts[(key - first) * channels + c];
        }
    }
};

} // namespace
} // namespace hf

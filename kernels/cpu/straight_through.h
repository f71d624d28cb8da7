// The straight-through gradient of the bits (paper Eq. 3): sums of dS times signs, in floating point.
//
// No sign is multiplied. Four rows of dS can be added up with signs in 16 ways; a table holds all 16 sums, and each channel adds
// the one that its four sign bits choose (the "method of four Russians"): one addition in place of four multiplications.
#pragma once

#include <type_traits>

#include "bit_sums.h"

namespace hf {
namespace {

constexpr int kSignRows = 4, kSignSums = 1 << kSignRows;

// codes[n / 4][c] = unit times the bits of tokens n .. n + 3 in channel c, the first token's bit lowest.
template <class Code> void load_codes(const uint64_t *bits, int64_t words, int64_t tokens, int64_t channels, Code unit, Code *codes) {
    for (int64_t first = 0; first < tokens; first += kSignRows, codes += channels) {
        memset(codes, 0, channels * sizeof(Code));
        for (int64_t n = 0; n < std::min<int64_t>(kSignRows, tokens - first); n++) {
            const uint64_t *of_token = bits + (first + n) * words;
            for (int64_t c = 0; c < channels; c++) codes[c] = (Code)(codes[c] + ((Code)(of_token[c / 64] >> c % 64 & 1) << n) * unit);
        }
    }
}

// What both forms share. Code: a number that says which of the 16 sums is meant.
template <class V, class Code> struct SignSums : BitSums<V> {
    using Base = BitSums<V>;
    using typename Base::F;
    using typename Base::I;
    using Base::channels, Base::query_sums, Base::key_sums, Base::L, Base::kParts;

    Code *query_codes; // (Nq / 4, channels)
    Code *key_codes;   // (chunk / 4, channels)

    template <class Carver> void carve_codes(const Call &call, Carver &c) {
        channels = (call.a->head_dim + L - 1) / L * L;
        this->carve_sums(call, c);
        query_codes = c.template take<Code>((call.a->queries + kSignRows - 1) / kSignRows * channels);
        key_codes = c.template take<Code>(call.chunk / kSignRows * channels);
    }

    void load_queries(const Call &call, int64_t head, Code unit) const {
        const int64_t words = (call.a->head_dim + 63) / 64;
        load_codes(call.a->query_bits + head * call.a->queries * words, words, call.a->queries, channels, unit, query_codes);
    }

    void load_chunk(const Call &call, int64_t head, int64_t first, int64_t last, Code unit) const {
        const int64_t words = (call.a->head_dim + 63) / 64;
        load_codes(call.a->key_bits + (head * call.a->keys + first) * words, words, last - first, channels, unit, key_codes);
        this->start_chunk(call);
    }

    void start_queries(const Call &, int64_t, int64_t, int64_t) const { this->start_query_sums(); }

    // The gradients of the weights are in those of the signs: dw_q = scale sum over c of sgn(q_c) times the sums of q.
    void write_queries(const Call &call, int64_t head, int64_t chunk, int64_t i, int64_t count) const {
        const hf_attention &a = *call.a;
        const int64_t words = (a.head_dim + 63) / 64, row = head * a.queries + i;
        if (a.grad_query_weight)
            for (int64_t n = 0; n < count; n++)
                call.partial[(head * call.chunks + chunk) * a.queries + i + n] = (float)a.scale * signed_sum(a.query_bits + (row + n) * words, a.head_dim, query_sums + n * channels);
        Base::write_queries(call, head, chunk, i, count);
    }

    void write_chunk(const Call &call, int64_t head, int64_t first, int64_t last) const {
        const hf_attention &a = *call.a;
        const int64_t words = (a.head_dim + 63) / 64, row = head * a.keys;
        if (a.grad_key_weight)
            for (int64_t key = first; key < last; key++)
                a.grad_key_weight[row + key] = (float)a.scale * signed_sum(a.key_bits + (row + key) * words, a.head_dim, key_sums + (key - first) * channels);
        Base::write_chunk(call, head, first, last);
    }

    float signed_sum(const uint64_t *bits, int64_t head_dim, float *sums) const {
        I place;
        for (int l = 0; l < L; l++) place[l] = 1 << l;
        for (int64_t c = head_dim; c < channels; c++) sums[c] = 0;
        F total = V::splat(0);
        for (int64_t c = 0; c < channels; c += L) {
            const I bit = V::splat_int((int32_t)(bits[c / 64] >> c % 64)) & place;
            total += (F)((I)V::load(sums + c) ^ ((I)(bit == 0) & INT32_MIN));
        }
        return V::sum(total);
    }
};

// Sixteen lanes: a register is a table, and a permutation looks up one sum for each of 16 channels.
template <class V> struct SignSumsInRegisters : SignSums<V, int32_t> {
    using Base = SignSums<V, int32_t>;
    using typename Base::F;
    using typename Base::I;
    using Base::channels, Base::query_sums, Base::key_sums, Base::L, Base::kParts, Base::query_codes, Base::key_codes;
    static constexpr int kVectors = 4; // of channels, for each of four rows: these sums stay in registers

    float *by_query; // (64, 64): w_k dS of the current block
    float *by_key;   // (64, 64): w_q dS, in the same order

    template <class Carver> static SignSumsInRegisters carve(const Call &call, Carver &c) {
        SignSumsInRegisters s;
        s.carve_codes(call, c);
        s.by_query = c.template take<float>(kSignBlock * kSignBlock);
        s.by_key = c.template take<float>(kSignBlock * kSignBlock);
        return s;
    }

    void load_queries(const Call &call, int64_t head) const { Base::load_queries(call, head, 1); }
    void load_chunk(const Call &call, int64_t head, int64_t first, int64_t last) const { Base::load_chunk(call, head, first, last, 1); }

    // Adds dS of the `count` queries from i on and of the keys of tile t of the chunk first .. last; sums when 64 keys, or
    // the last ones, are there.
    void add_tile(const Call &call, int64_t head, int64_t i, int64_t count, int64_t first, int64_t last, int64_t t, const F *p, const F *dp, const float *delta, F weight) const {
        const int64_t key = first + t * L, part = t % kParts, block = t / kParts;
        weight = zero_past_end<V>(key, last, weight);
        const float *query_weight = call.a->query_weight + head * call.a->queries + i;
        for (int64_t n = 0; n < count; n++) {
            const F ds = p[n] * (dp[n] - delta[n]);
            V::store(by_query + n * kSignBlock + part * L, ds * weight);
            V::store(by_key + n * kSignBlock + part * L, ds * query_weight[n]);
        }
        if (part + 1 < kParts && key + L < last) return;
        for (int64_t n = count; n % kSignRows; n++)
            for (float *x : {by_query, by_key}) memset(x + n * kSignBlock, 0, kSignBlock * sizeof(float));
        const int64_t keys = std::min<int64_t>(kSignBlock, last - first - kSignBlock * block);
        add_signed(by_query, kSignBlock, 1, count, keys, key_codes + kSignBlock / kSignRows * block * channels, query_sums);
        add_signed(by_key, 1, kSignBlock, keys, count, query_codes + i / kSignRows * channels, key_sums + kSignBlock * block * channels);
    }

    // to[r][c] += sum over k < count of x[r row_step + k step] sgn(k, c), for r < rows, where the codes say the signs.
    // x is 0 from `count` to the next multiple of four.
    void add_signed(const float *x, int64_t row_step, int64_t step, int64_t rows, int64_t count, const int32_t *codes, float *to) const {
        for (int64_t r = 0; r < rows; r += kSignRows, x += kSignRows * row_step, to += kSignRows * channels) {
            int64_t c = 0;
            for (; c + kVectors * L <= channels; c += kVectors * L) add_rows<kVectors>(x, row_step, step, count, codes + c, to + c);
            for (; c < channels; c += L) add_rows<1>(x, row_step, step, count, codes + c, to + c);
        }
    }

    template <int Vectors> void add_rows(const float *x, int64_t row_step, int64_t step, int64_t count, const int32_t *codes, float *to) const {
        F sign[kSignRows]; // of each of four numbers, in the 16 sums
        for (int n = 0; n < kSignRows; n++) {
            for (int s = 0; s < kSignSums; s++) ((float *)&sign[n])[s] = s >> n & 1 ? 1.0f : -1.0f;
            V::keep(sign[n]);
        }
        F sums[kSignRows][Vectors];
#pragma GCC unroll 4
        for (int r = 0; r < kSignRows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; v++) sums[r][v] = V::load(to + r * channels + v * L);
        for (int64_t k = 0; k < count; k += kSignRows, x += kSignRows * step, codes += channels) {
            I code[Vectors];
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; v++) {
                code[v] = (I)V::load((const float *)codes + v * L);
                V::keep(code[v]);
            }
#pragma GCC unroll 2
            for (int pair = 0; pair < kSignRows; pair += 2) { // two tables at a time, so that neither waits for its own last step
                F table[2];
#pragma GCC unroll 8
                for (int m = 0; m < 2 * kSignRows; m++) {
                    const F y = V::splat(x[(pair + m % 2) * row_step + m / 2 * step]);
                    table[m % 2] = m < 2 ? sign[0] * y : V::fma(sign[m / 2], y, table[m % 2]);
                    V::keep(table[m % 2]);
                }
                F chosen[2 * Vectors];
#pragma GCC unroll 8
                for (int v = 0; v < 2 * Vectors; v++) {
                    chosen[v] = V::look_up(table[v / Vectors], code[v % Vectors]);
                    V::keep(chosen[v]);
                }
#pragma GCC unroll 8
                for (int v = 0; v < 2 * Vectors; v++) sums[pair + v / Vectors][v % Vectors] += chosen[v];
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < kSignRows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; v++) V::store(to + r * channels + v * L, sums[r][v]);
    }
};

// Any number of lanes: tables lie in memory, with a token for each lane.
template <class V> struct SignSumsInMemory : SignSums<V, uint16_t> {
    using Base = SignSums<V, uint16_t>; // codes are places in the table of a block, in bytes
    using typename Base::F;
    using Base::channels, Base::query_sums, Base::key_sums, Base::L, Base::kParts, Base::query_codes, Base::key_codes;

    // Until they are written, query_sums and key_sums hold (tiles of L tokens, channels, L).
    float *key_weight; // (64): of the current block, 0 past the end
    F *d_scores;       // (64 queries, kParts): dS of the current block
    F *by_key;         // (64 keys, kParts): the same with queries as lanes
    F *table;          // (16 groups of four, 16)
    float *rows;       // (L, channels)

    template <class Carver> static SignSumsInMemory carve(const Call &call, Carver &c) {
        SignSumsInMemory s;
        s.carve_codes(call, c);
        s.key_weight = c.template take<float>(kSignBlock);
        s.d_scores = c.template take<F>(kSignBlock * kParts);
        s.by_key = c.template take<F>(kSignBlock * kParts);
        s.table = c.template take<F>(kSignBlock / kSignRows * kSignSums);
        s.rows = c.template take<float>(L * s.channels);
        return s;
    }

    void load_queries(const Call &call, int64_t head) const { Base::load_queries(call, head, sizeof(F)); }
    void load_chunk(const Call &call, int64_t head, int64_t first, int64_t last) const { Base::load_chunk(call, head, first, last, sizeof(F)); }

    // As above.
    void add_tile(const Call &call, int64_t head, int64_t i, int64_t count, int64_t first, int64_t last, int64_t t, const F *p, const F *dp, const float *delta, F weight) const {
        const int64_t key = first + t * L, part = t % kParts, block = t / kParts;
        weight = zero_past_end<V>(key, last, weight);
        V::store(key_weight + part * L, weight);
        for (int64_t n = 0; n < count; n++) d_scores[n * kParts + part] = p[n] * (dp[n] - delta[n]);
        for (int64_t n = count; n % L; n++) d_scores[n * kParts + part] = V::splat(0);
        if (part + 1 < kParts && key + L < last) return;

        float query_weight[kSignBlock] = {};
        memcpy(query_weight, call.a->query_weight + head * call.a->queries + i, count * sizeof(float));
        const int64_t keys = std::min<int64_t>(kSignBlock, last - first - kSignBlock * block);
        for (int64_t to = 0; to * L < count; to++) {
            for (int64_t from = 0; from <= part; from++) {
                F x[L];
                for (int l = 0; l < L; l++) x[l] = d_scores[(to * L + l) * kParts + from];
                V::transpose(x);
                for (int l = 0; l < L; l++) by_key[(from * L + l) * kParts + to] = x[l];
            }
            add_signed(by_key + to, key_weight, keys, key_codes + kSignBlock / kSignRows * block * channels, query_sums + to * L * channels);
        }
        for (int64_t to = 0; to <= part; to++)
            add_signed(d_scores + to, query_weight, count, query_codes + i / kSignRows * channels, key_sums + (kSignBlock * block + to * L) * channels);
    }

    // sums[c] += sum over n < tokens of weight[n] x[n kParts] sgn(n, c), where the codes say the signs. From the last token to the
    // next multiple of four, the weight is 0.
    void add_signed(const F *x, const float *weight, int64_t tokens, const uint16_t *codes, float *sums) const {
        const int64_t groups = (tokens + kSignRows - 1) / kSignRows;
        F *to = table;
        for (int64_t g = 0; g < groups; g++, to += kSignSums, x += kSignRows * kParts, weight += kSignRows) {
            F y[kSignRows];
            for (int n = 0; n < kSignRows; n++) y[n] = x[n * kParts] * weight[n];
            const F first[] = {-y[0] - y[1], y[0] - y[1], y[1] - y[0], y[0] + y[1]};
            for (int s = 0; s < 4; s++) {
                to[4 + s] = first[s] + (y[2] - y[3]);
                to[12 + s] = first[s] + (y[2] + y[3]);
                to[11 - s] = -to[4 + s];
                to[3 - s] = -to[12 + s];
            }
        }
        for (int64_t c = 0; c < channels; c += L) {
            F of_channel[L];
            for (int k = 0; k < L; k++) of_channel[k] = V::load(sums + (c + k) * L);
            const uint16_t *code = codes + c;
            const char *from = (const char *)table;
            for (int64_t g = 0; g < groups; g++, code += channels, from += kSignSums * sizeof(F))
#pragma GCC unroll 16
                for (int k = 0; k < L; k++) of_channel[k] += *(const F *)(from + code[k]);
            for (int k = 0; k < L; k++) V::store(sums + (c + k) * L, of_channel[k]);
        }
    }

    // (tiles, channels, L) becomes (tiles, L, channels).
    void turn(float *sums, int64_t tokens) const {
        for (int64_t n = 0; n < tokens; n += L, sums += L * channels) {
            for (int64_t c = 0; c < channels; c += L) {
                F x[L];
                for (int k = 0; k < L; k++) x[k] = V::load(sums + (c + k) * L);
                V::transpose(x);
                for (int l = 0; l < L; l++) V::store(rows + l * channels + c, x[l]);
            }
            memcpy(sums, rows, L * channels * sizeof(float));
        }
    }

    void write_queries(const Call &call, int64_t head, int64_t chunk, int64_t i, int64_t count) const {
        turn(query_sums, count);
        Base::write_queries(call, head, chunk, i, count);
    }

    void write_chunk(const Call &call, int64_t head, int64_t first, int64_t last) const {
        turn(key_sums, last - first);
        Base::write_chunk(call, head, first, last);
    }
};

template <class V> using StraightThrough = std::conditional_t<V::lanes == kSignSums, SignSumsInRegisters<V>, SignSumsInMemory<V>>;

} // namespace
} // namespace hf

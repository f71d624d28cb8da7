// AVX-512 with BF16: for bfloat16 values, P.V, dP and dV are dot products of bfloat16 pairs, summed in float32.
//
// Probabilities are bfloat16 from the start. Scores in 128ths of log2 are rounded to integers. Except for a small
// correction from a table of 128, these integers are the bits of 2^x. A 32-bit lane holds two keys (forward) or two
// queries (backward).
#include "avx512.h"

#include "attention.h"

namespace hf {
namespace {

template <int Halves> struct AttentionBf16 : Attention<Avx512, Halves, 1> {
    using Base = Attention<Avx512, Halves, 1>;
    using V = Avx512;
    using F = V::F;
    using I = V::I;
    using Base::C, Base::L, Base::kValueBlock, Base::kSumBlock, Base::kScoreBlock, Base::kQueryBlock;
    using typename Base::BackwardRoom, typename Base::ForwardRoom, typename Base::Keys, typename Base::Queries;
    static constexpr float kUnit = 128.0f, kOne = 127 * 128.0f; // bits of 2^0
    static constexpr int32_t kOnes = 0x3f803f80;                // 1, 1

    static inline F dot(F sum, I a, I b) { return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
    // The pair at `b` times every lane of a. Otherwise the compiler would broadcast into a register first.
    static inline F dot(F sum, I a, const uint32_t *b) { return dot(sum, a, V::splat_int((int32_t)*b)); }
    static inline I pair(F even, F odd) {
        const __m512i e = _mm512_cvtps_epi32((__m512)even), o = _mm512_slli_epi32(_mm512_cvtps_epi32((__m512)odd), 16);
        return (I)_mm512_mask_blend_epi16(0xaaaaaaaa, e, o);
    }

    // The same for numbers to which kInteger was added: the low bits of such a sum are the integer.
    static constexpr float kInteger = 12582912.0f; // 1.5 * 2^23
    static inline I pair_integers(F even, F odd) { return (I)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)even, _mm512_slli_epi32((__m512i)odd, 16)); }

    struct Table { // k - 128 (2^(k / 128) - 1), rounded
        alignas(64) uint8_t correction[128];
        Table() {
            for (int k = 0; k < 128; k++) correction[k] = (uint8_t)(k - (int)std::lround(128 * (std::exp2(k / 128.0) - 1)));
        }
    };
    struct PairExp2 {
        __m512i low, high;
        PairExp2() {
            static const Table table;
            low = _mm512_load_si512(table.correction);
            high = _mm512_load_si512(table.correction + 64);
            V::keep(low);
            V::keep(high);
        }
        inline I operator()(I x) const {
            return (I)_mm512_sub_epi16((__m512i)x, _mm512_maskz_permutex2var_epi8(0x5555555555555555, low, (__m512i)x, high));
        }
    };

    static const uint16_t *row_of(const hf_attention &a, const hf_rows &r, int64_t head, int64_t row) {
        return rows_of<const uint16_t>(r, a.heads, head) + row * r.row_stride;
    }

    // Packs rows 2 n and 2 n + 1 as pairs: to[n][c] = (x[2 n][c], x[2 n + 1][c]); 0 past the end.
    static void pack_row_pairs(const hf_attention &a, const hf_rows &r, int64_t head, int64_t rows, uint32_t *to) {
        const int64_t values = Base::padded_values(a);
        for (int64_t n = 0; n < rows; n += 2, to += values) {
            const uint16_t *even = row_of(a, r, head, n), *odd = n + 1 < rows ? row_of(a, r, head, n + 1) : nullptr;
            for (int64_t c = 0; c < a.value_dim; c++) to[c] = even[c] | (odd ? (uint32_t)odd[c] << 16 : 0);
            for (int64_t c = a.value_dim; c < values; c++) to[c] = 0;
        }
    }

    // ---------------------------------------------------------------------------------------------------- forward

    static inline void add_values(F *sums, I p, const uint32_t *v) {
#pragma GCC unroll 16
        for (int c = 0; c < C; c++) sums[c] = dot(sums[c], p, &v[c]);
    }

    static void add_block(const I *p, const uint32_t *v, int64_t count, int64_t values, int64_t from, F *sums) {
        for (int64_t c = from; c < values; c += C) {
            F s[C];
            for (int i = 0; i < C; i++) s[i] = V::splat(0);
            for (int64_t j = 0; j < count; j++) add_values(s, p[j], v + j * values + c);
            for (int i = 0; i < C; i++) sums[c + i] += s[i];
        }
    }

    template <bool Wide> static F attend_bounded(const hf_attention &a, const ForwardRoom &r, Queries queries) {
        const PairExp2 exp2;
        const int64_t values = Base::padded_values(a), pairs = a.keys / 2;
        const I ones = V::splat_int(kOnes);
        const F start = V::splat(kOne + kInteger);
        queries.slope[0] *= kUnit;
        auto scores = [&](int64_t n) { return pair_integers(queries.score(r, 2 * n, start), queries.score(r, 2 * n + 1, start)); };
        I *held = (I *)r.scores, probability = exp2(scores(0)), next = scores(1);
        F total = V::splat(0);
        const uint32_t *v = (const uint32_t *)r.value;
        const int64_t step = Wide ? kValueBlock : kSumBlock;
        for (int64_t first = 0; first < pairs; first += step) {
            const int64_t end = std::min<int64_t>(first + step, pairs);
            F sums[C], block = V::splat(0);
            for (int c = 0; c < C; c++) sums[c] = V::splat(0);
            for (int64_t n = first; n < end; n++) {
                const I after = scores(n + 2), following = exp2(next);
                add_values(sums, probability, v + n * values);
                block = dot(block, probability, ones);
                if (Wide) held[n - first] = probability;
                probability = following;
                next = after;
            }
            total += block;
            for (int c = 0; c < C; c++) r.sums[c] += sums[c];
            if (Wide) add_block(held, v + first * values, end - first, values, C, r.sums);
        }
        if (a.keys % 2) {
            probability &= 0xffff;
            total = dot(total, probability, ones);
            add_block(&probability, v + pairs * values, 1, values, 0, r.sums);
        }
        return total;
    }

    static F attend_online(const hf_attention &a, const ForwardRoom &r, const Queries &queries, F &maximum) {
        const PairExp2 exp2;
        const int64_t values = Base::padded_values(a);
        F total = V::splat(0), score[kScoreBlock + 1], poison = V::splat(0);
        I p[kScoreBlock / 2];
        maximum = V::splat(-std::numeric_limits<float>::max() / 2);
        for (int64_t first = 0; first < a.keys; first += kScoreBlock) {
            const int64_t count = std::min<int64_t>(kScoreBlock, a.keys - first), pairs = (count + 1) / 2;
            F higher = maximum;
            for (int64_t j = 0; j < count; j++) {
                score[j] = queries.score(r, first + j, V::splat(0));
                higher = V::max(score[j], higher);
                poison += 0 * score[j]; // integers have no NaN
            }
            const F factor = typename V::Exp2()(V::max(maximum - higher, V::splat(kLowest)));
            maximum = higher;
            for (int64_t c = 0; c < values; c++) r.sums[c] *= factor;
            auto shifted = [&](int64_t j) { return V::max(V::fma(score[j] - maximum, V::splat(kUnit), V::splat(kOne)), V::splat(0)); };
            score[count] = V::splat(0);
            for (int64_t n = 0; n < pairs; n++) p[n] = exp2(pair(shifted(2 * n), shifted(2 * n + 1)));
            if (count % 2) p[pairs - 1] &= 0xffff;
            F block = V::splat(0);
            for (int64_t n = 0; n < pairs; n++) block = dot(block, p[n], V::splat_int(kOnes));
            total = total * factor + block;
            add_block(p, (const uint32_t *)r.value + first / 2 * values, pairs, values, 0, r.sums);
        }
        return total + poison;
    }

    static void forward(const Call &call, int64_t head, int64_t first, int64_t last, Arena &arena) {
        const hf_attention &a = *call.a;
        Carver c{arena.base};
        const ForwardRoom r = Base::carve_forward(a, c);
        if (arena.call != call.id || arena.head != head) {
            Base::pack_keys(a, head, r);
            pack_row_pairs(a, a.value, head, a.keys, (uint32_t *)r.value);
            arena.call = call.id, arena.head = head;
        }
        const int64_t values = Base::padded_values(a);
        for (int64_t i = first; i < last; i += L) {
            Queries queries;
            F maximum = V::splat(0), total;
            const bool bounded = Base::load_queries(a, head, i, last, r, queries);
            for (int64_t n = 0; n < values; n++) r.sums[n] = V::splat(0);
            if (!bounded) total = attend_online(a, r, queries, maximum);
            else if (values > C) total = attend_bounded<true>(a, r, queries);
            else total = attend_bounded<false>(a, r, queries);
            Base::write_queries(a, head, i, last, r, total, maximum);
        }
    }

    // --------------------------------------------------------------------------------------------------- backward

    // Pairs, in the memory that the float32 kernel uses for dO and V.
    struct Pairs {
        uint32_t *channels; // (Nq, padded d_v / 2): dO, channels 2 c and 2 c + 1
        uint32_t *rows;     // (Nq / 2, padded d_v): dO, queries 2 n and 2 n + 1
        I *value;           // (tiles, padded d_v / 2): V with one key per lane, channels 2 c and 2 c + 1
        I *p;               // (kQueryBlock / 2)
    };

    static Pairs pairs_in(const hf_attention &a, const BackwardRoom &r) {
        const int64_t values = Base::padded_values(a);
        return {(uint32_t *)r.grad, (uint32_t *)r.grad + a.queries * values / 2, (I *)r.value, (I *)r.p};
    }

    static void pack_gradient(const hf_attention &a, int64_t head, const BackwardRoom &r, const Pairs &w) {
        const int64_t values = Base::padded_values(a);
        pack_row_pairs(a, a.grad_output, head, a.queries, w.rows);
        for (int64_t n = 0; n < a.queries; n++) {
            const uint32_t *from = w.rows + n / 2 * values;
            uint32_t *to = w.channels + n * values / 2;
            const int shift = n % 2 * 16;
            for (int64_t c = 0; c < values / 2; c++) to[c] = (from[2 * c] >> shift & 0xffff) | (from[2 * c + 1] >> shift & 0xffff) << 16;
            r.start[n] = (float)(kOne + kUnit * kLog2E * r.start[n]);
        }
        for (int64_t n = 0; n < a.queries; n++) // integers have no NaN, so let it reach dV through dO
            if (std::isnan(r.start[n]))
                for (int64_t c = 0; c < values; c++) w.rows[n / 2 * values + c] |= 0x7fc0u << n % 2 * 16;
    }

    static void pack_values(const hf_attention &a, int64_t tiles, const BackwardRoom &r, const Pairs &w) {
        for (int64_t n = 0; n < tiles * Base::padded_values(a) / 2; n++) {
            I both;
            for (int l = 0; l < L; l++)
                both[l] = (int32_t)(float_to_bfloat(r.value[2 * n][l]) | (uint32_t)float_to_bfloat(r.value[2 * n + 1][l]) << 16);
            w.value[n] = both; // entries before 2 n are not read again
        }
    }

    // Keys whose scores are in units of 1/128.
    static Keys scaled(const hf_attention &a, const BackwardRoom &r, int64_t t) {
        Keys keys(a, r, t);
        keys.weight[0] *= (float)(kUnit * kLog2E);
        return keys;
    }

    // P, with two queries per lane, and count - d / 2, of one tile and a block of queries.
    static inline void probabilities(const hf_attention &a, const BackwardRoom &r, const Pairs &w, const Keys &keys, int64_t i, int64_t count) {
        const PairExp2 exp2;
        F middle = V::splat(0.5f * (float)a.head_dim), lowest = V::splat(0);
        V::keep(middle);
        V::keep(lowest);
        for (int64_t n = 0; n < count; n++) r.dp[n] = keys.score(r, i + n, middle, V::splat(r.start[i + n]), r.dot + n);
        r.dp[count] = lowest;
        for (int64_t n = 0; n < count; n += 2) w.p[n / 2] = exp2(pair(V::max(lowest, r.dp[n]), V::max(lowest, r.dp[n + 1])));
        if (count % 2) w.p[count / 2] &= 0xffff;
    }

    // dP of one tile, and dV += P dO, over C channels from c on.
    template <bool First> static inline void products(const hf_attention &a, const BackwardRoom &r, const Pairs &w, int64_t i, int64_t count, int64_t c, const I *value, F *d_value) {
        const int64_t values = Base::padded_values(a);
        F sums[C];
        I v[C / 2];
        for (int k = 0; k < C; k++) sums[k] = V::splat(0);
        for (int k = 0; k < C / 2; k++) v[k] = value[k];
        const uint32_t *row0 = w.channels + (i * values + c) / 2, *both = w.rows + i / 2 * values + c;
        for (int64_t n = 0; n < count; n += 2, row0 += values, both += values) {
            const uint32_t *row1 = n + 1 < count ? row0 + values / 2 : row0;
            const I p = w.p[n / 2];
            F even0 = First ? V::splat(0) : r.dp[n], even1 = First ? V::splat(0) : r.dp[n + 1], odd0 = V::splat(0), odd1 = V::splat(0);
#pragma GCC unroll 8
            for (int k = 0; k < C / 2; k += 2) {
                even0 = dot(even0, v[k], &row0[k]);
                even1 = dot(even1, v[k], &row1[k]);
                odd0 = dot(odd0, v[k + 1], &row0[k + 1]);
                odd1 = dot(odd1, v[k + 1], &row1[k + 1]);
#pragma GCC unroll 4
                for (int m = 2 * k; m < 2 * k + 4; m++) sums[m] = dot(sums[m], p, &both[m]);
            }
            r.dp[n] = even0 + odd0;
            r.dp[n + 1] = even1 + odd1;
        }
        for (int k = 0; k < C; k++) d_value[k] += sums[k];
    }

    static inline void weights(const BackwardRoom &r, const Pairs &w, const float *delta, const float *query_weight, int64_t count, F counted, F *d_weight) {
        F even = V::splat(0), odd = V::splat(0); // a single sum would be a chain of additions that wait for each other
        auto add = [&](int64_t n, F p, F &d_key) {
            const F e = p * (r.dp[n] - delta[n]) * r.dot[n];
            d_key = V::fma(e, V::splat(query_weight[n]), d_key);
            r.d_query[n] = V::fma(e, counted, r.d_query[n]);
        };
        for (int64_t n = 0; n < count; n += 2) {
            const I p = w.p[n / 2];
            add(n, (F)(p << 16), even);
            if (n + 1 < count) add(n + 1, (F)(p & (int32_t)0xffff0000), odd);
        }
        *d_weight += even + odd;
    }

    static void backward(const Call &call, int64_t head, int64_t chunk, Arena &arena) {
        const hf_attention &a = *call.a;
        Carver c{arena.base};
        const BackwardRoom r = Base::carve_backward(call, c);
        const Pairs w = pairs_in(a, r);
        const int64_t values = Base::padded_values(a), row = head * a.queries;
        const int64_t first = chunk * call.chunk, last = std::min(first + call.chunk, a.keys), tiles = (last - first + L - 1) / L;
        if (arena.call != call.id || arena.head != head) {
            Base::pack_queries(a, head, r);
            pack_gradient(a, head, r, w);
            arena.call = call.id, arena.head = head;
        }
        Base::load_chunk(call, head, first, last, r);
        pack_values(a, tiles, r, w);
        for (int64_t i = 0; i < a.queries; i += kQueryBlock) {
            const int64_t count = std::min<int64_t>(kQueryBlock, a.queries - i);
            for (int64_t n = 0; n < count; n++) r.d_query[n] = V::splat(0);
            for (int64_t t = 0; t < tiles; t++) {
                probabilities(a, r, w, scaled(a, r, t), i, count);
                products<true>(a, r, w, i, count, 0, w.value + t * values / 2, r.d_value + t * values);
                for (int64_t c = C; c < values; c += C) products<false>(a, r, w, i, count, c, w.value + (t * values + c) / 2, r.d_value + t * values + c);
                if (!a.grad_query_weight && !a.grad_key_weight) continue;
                const F counted = zero_past_end<V>(first + t * L, last, r.tile_weight[t]);
                weights(r, w, r.delta + i, a.query_weight + row + i, count, counted, r.d_weight + t);
            }
            Base::write_query_block(call, head, chunk, i, count, r);
        }
        Base::write_chunk(call, head, first, last, r);
    }
};

struct Bf16ByShape {
    template <class Task> static void with_shape(const hf_attention &a, Task task) {
        // Draws of the ternary gradient must match the reference's, which are made in float32.
        if (a.type != HF_BFLOAT16 || a.planes == 2 || a.grad_query) ByShape<Avx512>::with_shape(a, task);
        else if (a.head_dim <= 32) task(AttentionBf16<1>{});
        else if (a.head_dim <= 64) task(AttentionBf16<2>{});
        else task(AttentionBf16<0>{});
    }
};

} // namespace

const Kernels kAvx512Bf16 = make_kernels<Bf16ByShape>("avx512-bf16");

} // namespace hf

// Forward: each lane is a query, so that a key's value is broadcast and nothing is reduced across lanes. Scores are in
// units of log2.
#pragma once

#include "tiles.h"

namespace hf {
namespace {

template <class V, int Halves, int Planes> struct Forward : Tiles<V, Halves, Planes> {
    using Base = Tiles<V, Halves, Planes>;
    using typename Base::F;
    using typename Base::I;
    using typename Base::Exp2;
    using Base::L;
    using Base::C;
    using Base::kAhead;
    using Base::kScoreBlock;
    using Base::kValueBlock;
    using Base::kSumBlock;
    using Base::halves;
    using Base::padded_values;
    using Base::pack_bits;
    using Base::load_lanes;

    struct ForwardRoom {
        int32_t *bits;  // (Nk + kAhead, P, halves)
        float *weight;  // (Nk + kAhead, P): w_k
        float *value;   // (Nk, padded d_v), if the caller's own rows cannot be used
        float *largest; // (P): the largest abs(w_k)
        I *lanes;       // (P, halves)
        F *sums;        // (padded d_v)
        F *scores;      // (kValueBlock)
        float *rows;    // (L, padded d_v)
    };

    static ForwardRoom carve_forward(const hf_attention &a, Carver &c) {
        const int64_t values = padded_values(a);
        ForwardRoom r;
        r.bits = c.take<int32_t>((a.keys + kAhead) * Planes * halves(a));
        r.weight = c.take<float>((a.keys + kAhead) * Planes);
        r.value = c.take<float>(FloatRows::needs_room(a, a.value, values) ? a.keys * values : 0);
        r.largest = c.take<float>(Planes);
        r.lanes = c.take<I>(Planes * halves(a));
        r.sums = c.take<F>(values);
        r.scores = c.take<F>(kValueBlock);
        r.rows = c.take<float>(L * values);
        return r;
    }

    static size_t forward_bytes(const hf_attention &a) {
        Carver c{nullptr};
        carve_forward(a, c);
        return c.used;
    }

    static void pack_keys(const hf_attention &a, int64_t head, const ForwardRoom &r) {
        const int h = halves(a);
        const float *w = a.key_weight + head * a.keys * Planes;
        pack_bits(a, a.key_bits + head * a.keys * Planes * words_of(a), a.keys, r.bits);
        float poison = 0;
        for (int p = 0; p < Planes; p++) r.largest[p] = 0;
        for (int64_t n = 0; n < a.keys * Planes; n++) {
            r.weight[n] = w[n];
            r.largest[n % Planes] = std::max(r.largest[n % Planes], std::fabs(w[n]));
            poison += 0 * w[n];
        }
        for (int p = 0; p < Planes; p++) r.largest[p] += poison; // a NaN or infinite weight: no bound is known
        memset(r.bits + a.keys * Planes * h, 0, kAhead * Planes * h * sizeof(int32_t));
        memset(r.weight + a.keys * Planes, 0, kAhead * Planes * sizeof(float));
    }

    struct Queries {
        const I *lanes;
        F slope[Planes]; // -2 scale log2(e) w_q, for counts minus d / 2
        F middle;        // d / 2
        int halves;
        // start + score of key j, for every lane's query
        inline F score(const ForwardRoom &r, int64_t j, F start) const {
            const int32_t *bits = r.bits + j * Planes * halves;
            for (int k = 0; k < Planes; k++)
                for (int q = 0; q < Planes; q++) {
                    const I count = V::template differing<Halves>(lanes + q * halves, bits + k * halves, halves);
                    start = V::fma(V::line(V::to_float(count), middle, slope[q]), V::splat(r.weight[j * Planes + k]), start);
                }
            return start;
        }
    };

    // sums[c] += p v[c] for C channels
    static inline void add_values(F *sums, F p, const float *v) {
#pragma GCC unroll 16
        for (int c = 0; c < C; c++) sums[c] = V::fma(p, V::splat(v[c]), sums[c]);
    }

    // Adds the probabilities of `count` keys times the channels from C on.
    static void add_further_values(const F *p, const FloatRows &v, int64_t first, int64_t count, int64_t values, F *sums) {
        for (int64_t c = C; c < values; c += C) {
            F s[C];
            for (int i = 0; i < C; i++) s[i] = V::splat(0);
            const float *row = v.data + first * v.stride + c;
            for (int64_t j = 0; j < count; j++, row += v.stride) add_values(s, p[j], row);
            for (int i = 0; i < C; i++) sums[c + i] += s[i];
        }
    }

    // For scores whose bound is known beforehand: needs no maximum, and has three keys in flight. Returns the sum of
    // 2^score. With |score| < 80 it neither vanishes nor overflows, and it keeps more digits than with scores shifted
    // by their bound.
    template <bool Wide> static F attend_bounded(const hf_attention &a, const ForwardRoom &r, const FloatRows &v, Queries queries) {
        const Exp2 exp2;
        F total = V::splat(0);
        const F start = V::splat(0);
        F probability = exp2(queries.score(r, 0, start)), next = queries.score(r, 1, start);
        const float *row = v.data;
        const int64_t step = Wide ? kValueBlock : kSumBlock;
        for (int64_t first = 0; first < a.keys; first += step) {
            const int64_t end = std::min<int64_t>(first + step, a.keys);
            F sums[C], block = V::splat(0); // sums of this block: sums of sums lose fewer digits
            for (int c = 0; c < C; c++) sums[c] = V::splat(0);
            for (int64_t j = first; j < end; j++, row += v.stride) {
                F after = queries.score(r, j + 2, start);
                F following = exp2(next);
                add_values(sums, probability, row);
                block += probability;
                if (Wide) r.scores[j - first] = probability;
                probability = following;
                next = after;
            }
            total += block;
            for (int c = 0; c < C; c++) r.sums[c] += sums[c];
            if (Wide) add_further_values(r.scores, v, first, end - first, padded_values(a), r.sums);
        }
        return total;
    }

    // For rows with large scores: keeps a running maximum. Sets `maximum`.
    static F attend_online(const hf_attention &a, const ForwardRoom &r, const FloatRows &v, Queries queries, F &maximum) {
        const Exp2 exp2;
        const int64_t values = padded_values(a);
        F total = V::splat(0);
        maximum = V::splat(-std::numeric_limits<float>::max() / 2);
        for (int64_t first = 0; first < a.keys; first += kScoreBlock) {
            const int64_t count = std::min<int64_t>(kScoreBlock, a.keys - first);
            F higher = maximum;
            for (int64_t j = 0; j < count; j++) {
                r.scores[j] = queries.score(r, first + j, V::splat(0));
                higher = V::max(r.scores[j], higher);
            }
            F factor = exp2(V::max(maximum - higher, V::splat(kLowest)));
            maximum = higher;
            F sums[C], block = V::splat(0);
            for (int c = 0; c < C; c++) sums[c] = V::splat(0);
            for (int64_t j = 0; j < count; j++) {
                // NaN stays NaN, because max then returns its second argument.
                r.scores[j] = exp2(V::max(V::splat(kLowest), r.scores[j] - maximum));
                block += r.scores[j];
                add_values(sums, r.scores[j], v.data + (first + j) * v.stride);
            }
            total = total * factor + block;
            for (int64_t c = 0; c < values; c++) r.sums[c] *= factor;
            for (int c = 0; c < C; c++) r.sums[c] += sums[c];
            add_further_values(r.scores, v, first, count, values, r.sums);
        }
        return total;
    }

    // Loads a tile's queries as lanes: their bits into r.lanes, and their slopes. Returns whether all their scores are
    // bounded.
    static bool load_queries(const hf_attention &a, int64_t head, int64_t i, int64_t last, const ForwardRoom &r, Queries &q) {
        F weight[Planes];
        const int64_t row = head * a.queries;
        load_lanes(a, a.query_bits + row * Planes * words_of(a), a.query_weight + row * Planes, i, last, r.lanes, weight);
        q.lanes = r.lanes;
        q.halves = halves(a);
        q.middle = V::splat(0.5f * (float)a.head_dim);
        F bound = V::splat(0);
        for (int p = 0; p < Planes; p++) {
            // Rounded only once: an error here changes the temperature of the row, and no averaging removes it.
            for (int l = 0; l < L; l++) ((float *)&q.slope[p])[l] = (float)(-2 * a.scale * kLog2E * ((const float *)&weight[p])[l]);
            for (int k = 0; k < Planes; k++) bound += V::absolute(q.slope[p]) * (r.largest[k] * 0.5f * (float)a.head_dim);
        }
        bool bounded = true;
        for (int l = 0; l < L; l++) bounded &= ((const float *)&bound)[l] < kBounded; // false for NaN
        return bounded;
    }

    // Writes the sums of a tile's lanes, divided by `total`, as rows of the output, and writes the log-sum-exp.
    static void write_queries(const hf_attention &a, int64_t head, int64_t i, int64_t last, const ForwardRoom &r, F total, F maximum) {
        const int64_t values = padded_values(a), count = std::min<int64_t>(L, last - i);
        const F inverse = 1.0f / total, rest = V::log2(total);
        for (int l = 0; l < count; l++)
            a.logsumexp[head * a.queries + i + l] = (float)(((double)((const float *)&maximum)[l] + (double)((const float *)&rest)[l]) * kLn2);
        for (int64_t c = 0; c < values; c += L) {
            F x[L];
            for (int l = 0; l < L; l++) x[l] = r.sums[c + l] * inverse;
            V::transpose(x);
            for (int l = 0; l < L; l++) V::store(r.rows + l * values + c, x[l]);
        }
        const int64_t width = width_of(a);
        char *to = first_row(a, a.output, head);
        for (int64_t l = 0; l < count; l++) from_float(r.rows + l * values, a.type, a.value_dim, to + (i + l) * a.output.row_stride * width);
    }

    static void forward(const Call &call, int64_t head, int64_t first, int64_t last, Arena &arena) {
        const hf_attention &a = *call.a;
        Carver c{arena.base};
        const ForwardRoom r = carve_forward(a, c);
        if (arena.call != call.id || arena.head != head) {
            pack_keys(a, head, r);
            FloatRows::of(a, a.value, head, a.keys, padded_values(a), r.value);
            arena.call = call.id, arena.head = head;
        }
        const int64_t values = padded_values(a);
        const FloatRows v = FloatRows::needs_room(a, a.value, values)
                                ? FloatRows{r.value, values}
                                : FloatRows{rows_of<const float>(a.value, a.heads, head), a.value.row_stride};
        for (int64_t i = first; i < last; i += L) {
            Queries queries;
            F maximum = V::splat(0), total;
            const bool bounded = load_queries(a, head, i, last, r, queries);
            for (int64_t n = 0; n < values; n++) r.sums[n] = V::splat(0);
            if (!bounded) total = attend_online(a, r, v, queries, maximum);
            else if (values > C) total = attend_bounded<true>(a, r, v, queries);
            else total = attend_bounded<false>(a, r, v, queries);
            write_queries(a, head, i, last, r, total, maximum);
        }
    }
};

} // namespace
} // namespace hf

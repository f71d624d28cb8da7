// Backward: each lane is a key. Nothing of size Nq x Nk was stored, so tiles are recomputed.
#pragma once

#include "tiles.h"

namespace hf {
namespace {

template <class V, int Halves, int Planes> struct Backward : Tiles<V, Halves, Planes> {
    using Base = Tiles<V, Halves, Planes>;
    using typename Base::F;
    using typename Base::I;
    using typename Base::Exp2;
    using Base::L;
    using Base::C;
    using Base::kQueryBlock;
    using Base::halves;
    using Base::padded_values;
    using Base::pack_bits;
    using Base::load_lanes;

    struct BackwardRoom {
        int32_t *bits;  // (Nq, P, halves)
        float *slope;   // (Nq, P): -2 scale w_q, for counts minus d / 2
        float *start;   // (Nq): -log-sum-exp
        float *delta;   // (Nq): dO . O minus the gradient of the log-sum-exp
        float *grad;    // (Nq, padded d_v): dO, if the caller's own rows cannot be used
        I *lanes;       // (P, halves)
        F *value;       // (tiles of the chunk, padded d_v): V with one key per lane
        F *d_value;     // the same shape: dV
        F *d_weight;    // (tiles, P): dw_k
        I *tile_bits;   // (tiles, P, halves)
        F *tile_weight; // (tiles, P)
        F *p;           // (kQueryBlock)
        F *dot;         // (kQueryBlock, P, P): count - d / 2
        F *dp;          // (kQueryBlock)
        F *d_query;     // (kQueryBlock, P): dw_q, not yet summed over lanes
        float *rows;    // (L, padded d_v)
        Ternary<V> ternary;                  // one of them, if bits have a gradient
        StraightThrough<V> straight_through;
    };

    static BackwardRoom carve_backward(const Call &call, Carver &c) {
        const hf_attention &a = *call.a;
        const int64_t values = padded_values(a), tiles = (call.chunk + L - 1) / L, rows = a.queries;
        BackwardRoom r;
        r.bits = c.take<int32_t>(rows * Planes * halves(a));
        r.slope = c.take<float>(rows * Planes);
        r.start = c.take<float>(rows);
        r.delta = c.take<float>(rows);
        r.grad = c.take<float>(FloatRows::needs_room(a, a.grad_output, values) ? (rows + 1) * values : 0);
        r.value = c.take<F>(tiles * values);
        r.d_value = c.take<F>(tiles * values);
        r.d_weight = c.take<F>(tiles * Planes);
        r.tile_bits = c.take<I>(tiles * Planes * halves(a));
        r.tile_weight = c.take<F>(tiles * Planes);
        r.p = c.take<F>(kQueryBlock + 1);
        r.dot = c.take<F>(kQueryBlock * Planes * Planes);
        r.dp = c.take<F>(kQueryBlock + 1);
        r.d_query = c.take<F>(kQueryBlock * Planes);
        r.rows = c.take<float>(L * values);
        if (a.grad_query && a.straight_through) r.straight_through = StraightThrough<V>::carve(call, c);
        else if (a.grad_query) r.ternary = Ternary<V>::carve(call, c);
        return r;
    }

    // Passes the gradient of the bits to the task, if they have one.
    template <class Task> static inline void with_signs(const hf_attention &a, const BackwardRoom &r, Task task) {
        if (!a.grad_query) return;
        if (a.straight_through) task(r.straight_through);
        else task(r.ternary);
    }

    static size_t backward_bytes(const Call &call) {
        Carver c{nullptr};
        carve_backward(call, c);
        return c.used;
    }

    static void pack_queries(const hf_attention &a, int64_t head, const BackwardRoom &r) {
        const int64_t row = head * a.queries;
        pack_bits(a, a.query_bits + row * Planes * words_of(a), a.queries, r.bits);
        for (int64_t n = 0; n < a.queries * Planes; n++) r.slope[n] = (float)(-2 * a.scale * a.query_weight[row * Planes + n]);
        for (int64_t n = 0; n < a.queries; n++) r.start[n] = -a.logsumexp[row + n];
        load_delta(a, head, r.delta);
    }

    static void load_delta(const hf_attention &a, int64_t head, float *delta) {
        const char *output = first_row(a, a.output, head), *grad = first_row(a, a.grad_output, head);
        const int64_t output_step = a.output.row_stride * width_of(a), grad_step = a.grad_output.row_stride * width_of(a);
        for (int64_t n = 0; n < a.queries; n++) {
            F sum = V::splat(0);
            for (int64_t c = 0; c < a.value_dim; c += L)
                sum = V::fma(load_channels(a, output + n * output_step, c), load_channels(a, grad + n * grad_step, c), sum);
            delta[n] = V::sum(sum) - (a.grad_logsumexp ? a.grad_logsumexp[head * a.queries + n] : 0);
        }
    }

    // Loads the channels from c on, 0 past the end.
    static inline F load_channels(const hf_attention &a, const char *row, int64_t c) {
        F x = V::splat(0);
        if (c + L <= a.value_dim) to_float(row + c * width_of(a), a.type, L, (float *)&x); // a constant count: one load
        else to_float(row + c * width_of(a), a.type, a.value_dim - c, (float *)&x);
        return x;
    }

    // Loads values, bits and weights of the chunk's keys, one key per lane, and sets the sums to zero.
    static void load_chunk(const Call &call, int64_t head, int64_t first, int64_t last, const BackwardRoom &r) {
        const hf_attention &a = *call.a;
        const int64_t values = padded_values(a), row = head * a.keys, width = width_of(a);
        const char *from = first_row(a, a.value, head);
        for (int64_t t = 0; first + t * L < last; t++) {
            const int64_t key = first + t * L;
            load_lanes(a, a.key_bits + row * Planes * words_of(a), a.key_weight + row * Planes, key, last,
                       r.tile_bits + t * Planes * halves(a), r.tile_weight + t * Planes);
            for (int l = 0; l < L; l++) {
                const int64_t n = std::min(key + l, last - 1);
                to_float(from + n * a.value.row_stride * width, a.type, a.value_dim, r.rows + l * values);
                for (int64_t c = a.value_dim; c < values; c++) r.rows[l * values + c] = 0;
            }
            for (int64_t c = 0; c < values; c += L) {
                F x[L];
                for (int l = 0; l < L; l++) x[l] = V::load(r.rows + l * values + c);
                V::transpose(x);
                for (int l = 0; l < L; l++) r.value[t * values + c + l] = x[l];
            }
            for (int64_t c = 0; c < values; c++) r.d_value[t * values + c] = V::splat(0);
            for (int p = 0; p < Planes; p++) r.d_weight[t * Planes + p] = V::splat(0);
        }
    }

    // Keys of one tile, held in registers if there are few words.
    struct Keys {
        I held[Planes * (Halves ? Halves : 1)];
        const I *lanes;
        F weight[Planes];
        int halves;
        Keys(const hf_attention &a, const BackwardRoom &r, int64_t tile) : lanes(r.tile_bits + tile * Planes * Base::halves(a)), halves(Base::halves(a)) {
            if (Halves)
                for (int n = 0; n < Planes * Halves; n++) held[n] = lanes[n];
            for (int p = 0; p < Planes; p++) weight[p] = r.tile_weight[tile * Planes + p];
        }
        // start + score of query i; `dot` (P, P) receives count - d / 2
        inline F score(const BackwardRoom &r, int64_t i, F middle, F start, F *dot) const {
            const I *bits = Halves ? held : lanes;
            for (int q = 0; q < Planes; q++)
                for (int k = 0; k < Planes; k++) {
                    const I differing = V::template differing<Halves>(bits + k * halves, r.bits + (i * Planes + q) * halves, halves);
                    const F product = V::to_float(differing) - middle;
                    dot[q * Planes + k] = product;
                    start = V::fma(weight[k], product * r.slope[i * Planes + q], start);
                }
            return start;
        }
    };

    // P and count - d / 2 of one tile and a block of queries.
    static inline void probabilities(const hf_attention &a, const BackwardRoom &r, const Keys &keys, int64_t i, int64_t count) {
        const Exp2 exp2;
        F middle = V::splat(0.5f * (float)a.head_dim), lowest = V::splat((float)(kLowest * kLn2));
        V::keep(middle);
        V::keep(lowest);
        // Two short loops: one long chain of operations would fill the processor's queues with waiting operations.
        for (int64_t n = 0; n < count; n++) r.p[n] = keys.score(r, i + n, middle, V::splat(r.start[i + n]), r.dot + n * Planes * Planes);
#pragma GCC unroll 4
        for (int64_t n = 0; n < count; n++) r.p[n] = exp2.natural(V::max(lowest, r.p[n]));
        r.p[count] = V::splat(0); // makes the number of queries even
    }

    // What the computation of one tile's weight gradients reads and writes.
    struct Weights {
        const float *delta, *query_weight; // of the block's first query
        F counted[Planes];                 // w_k, or 0 in lanes past the end: those repeat the last key and must not count twice
        F d_key[Planes];                   // dw_k
        // Adds dS of query n to dw_k, and to dw_q, which is not yet summed over lanes.
        inline void add(const BackwardRoom &r, int64_t n, F p, F dp) {
            const F ds = p * (dp - delta[n]), *dot = r.dot + n * Planes * Planes;
            for (int q = 0; q < Planes; q++)
                for (int k = 0; k < Planes; k++) {
                    const F e = ds * dot[q * Planes + k];
                    d_key[k] = V::fma(e, V::splat(query_weight[n * Planes + q]), d_key[k]);
                    r.d_query[n * Planes + q] = V::fma(e, counted[k], r.d_query[n * Planes + q]);
                }
        }
    };

    // dP of one tile, and dV += P dO. Two queries are computed at a time, so that both use a loaded vector of V.
    template <bool First, bool Values, bool Weighs> static inline void products(const BackwardRoom &r, const FloatRows &grad, int64_t i, int64_t count, int64_t c, const F *value, F *d_value, Weights &weights) {
        F sums[C];
        for (int k = 0; k < C; k++) sums[k] = V::splat(0); // sums of this block: sums of sums lose fewer digits
        Weights w = weights;
        const float *row0 = grad.data + i * grad.stride + c;
        for (int64_t n = 0; n < count; n += 2, row0 += 2 * grad.stride) {
            const bool both = n + 1 < count;
            const float *row1 = both ? row0 + grad.stride : row0;
            const F p0 = r.p[n], p1 = r.p[n + 1];
            F even0 = First ? V::splat(0) : r.dp[n], even1 = First ? V::splat(0) : r.dp[n + 1], odd0 = V::splat(0), odd1 = V::splat(0);
#pragma GCC unroll 16
            for (int k = 0; k < C; k += 2) {
                const F g0 = V::splat(row0[k]), g1 = V::splat(row1[k]), h0 = V::splat(row0[k + 1]), h1 = V::splat(row1[k + 1]);
                F v0 = value[k], v1 = value[k + 1];
                V::keep(v0);
                V::keep(v1);
                even0 = V::fma(g0, v0, even0);
                even1 = V::fma(g1, v0, even1);
                odd0 = V::fma(h0, v1, odd0);
                odd1 = V::fma(h1, v1, odd1);
                if (!Values) continue;
                sums[k] = V::fma(p0, g0, sums[k]);
                sums[k] = V::fma(p1, g1, sums[k]);
                sums[k + 1] = V::fma(p0, h0, sums[k + 1]);
                sums[k + 1] = V::fma(p1, h1, sums[k + 1]);
            }
            const F dp0 = even0 + odd0, dp1 = even1 + odd1;
            r.dp[n] = dp0;
            r.dp[n + 1] = dp1;
            if (Weighs) {
                w.add(r, n, p0, dp0);
                if (both) w.add(r, n + 1, p1, dp1);
            }
        }
        if (Values)
            for (int k = 0; k < C; k++) d_value[k] += sums[k];
        weights = w;
    }

    // P and dP of one tile and a block of queries; with Values also dV, with Weighs also the weights' gradients.
    template <bool Values, bool Weighs> static inline void recompute(const hf_attention &a, const BackwardRoom &r, const FloatRows &grad, int64_t i, int64_t count, int64_t t, Weights &weights) {
        const int64_t values = padded_values(a);
        const F *value = r.value + t * values;
        F *d_value = r.d_value + t * values;
        probabilities(a, r, Keys(a, r, t), i, count);
        if (values == C) return products<true, Values, Weighs>(r, grad, i, count, 0, value, d_value, weights);
        products<true, Values, false>(r, grad, i, count, 0, value, d_value, weights);
        int64_t c = C;
        for (; c + C < values; c += C) products<false, Values, false>(r, grad, i, count, c, value + c, d_value + c, weights);
        products<false, Values, Weighs>(r, grad, i, count, c, value + c, d_value + c, weights);
    }

    // Loads the data that a unit of the backward starts with; returns dO.
    static FloatRows load_unit(const Call &call, int64_t head, int64_t first, int64_t last, const BackwardRoom &r, Arena &arena) {
        const hf_attention &a = *call.a;
        const int64_t values = padded_values(a);
        if (arena.call != call.id || arena.head != head) {
            pack_queries(a, head, r);
            FloatRows::of(a, a.grad_output, head, a.queries, values, r.grad);
            with_signs(a, r, [&](auto &signs) { signs.load_queries(call, head); });
            arena.call = call.id, arena.head = head;
        }
        load_chunk(call, head, first, last, r);
        return FloatRows::needs_room(a, a.grad_output, values) ? FloatRows{r.grad, values}
                                                : FloatRows{rows_of<const float>(a.grad_output, a.heads, head), a.grad_output.row_stride};
    }

    // Do the weights need sums of their own? Those of the straight-through gradient say it all.
    static bool weighs(const hf_attention &a) { return (a.grad_query_weight || a.grad_key_weight) && !(a.grad_query && a.straight_through); }

    static void backward(const Call &call, int64_t head, int64_t chunk, Arena &arena) {
        const hf_attention &a = *call.a;
        Carver c{arena.base};
        const BackwardRoom r = carve_backward(call, c);
        const int64_t first = chunk * call.chunk, last = std::min(first + call.chunk, a.keys), tiles = (last - first + L - 1) / L, row = head * a.queries;
        const FloatRows grad = load_unit(call, head, first, last, r, arena);
        with_signs(a, r, [&](auto &signs) { signs.load_chunk(call, head, first, last); });
        for (int64_t i = 0; i < a.queries; i += kQueryBlock) {
            const int64_t count = std::min<int64_t>(kQueryBlock, a.queries - i);
            for (int64_t n = 0; n < count * Planes; n++) r.d_query[n] = V::splat(0);
            with_signs(a, r, [&](auto &signs) { signs.start_queries(call, head, i, count); });
            for (int64_t t = 0; t < tiles; t++) {
                Weights weights{r.delta + i, a.query_weight + (row + i) * Planes, {}, {}};
                for (int p = 0; p < Planes; p++) weights.counted[p] = zero_past_end<V>(first + t * L, last, r.tile_weight[t * Planes + p]);
                if (weighs(a)) {
                    recompute<true, true>(a, r, grad, i, count, t, weights);
                    for (int p = 0; p < Planes; p++) r.d_weight[t * Planes + p] += weights.d_key[p];
                } else {
                    recompute<true, false>(a, r, grad, i, count, t, weights);
                }
                with_signs(a, r, [&](auto &signs) { signs.add_tile(call, head, i, count, first, last, t, r.p, r.dp, r.delta + i, r.tile_weight[t]); });
            }
            write_query_block(call, head, chunk, i, count, r);
            with_signs(a, r, [&](auto &signs) { signs.write_queries(call, head, chunk, i, count); });
        }
        write_chunk(call, head, first, last, r);
        with_signs(a, r, [&](auto &signs) { signs.write_chunk(call, head, first, last); });
    }

    // The chunk's share of dw_q for a block of queries.
    static void write_query_block(const Call &call, int64_t head, int64_t chunk, int64_t i, int64_t count, const BackwardRoom &r) {
        const hf_attention &a = *call.a;
        if (!a.grad_query_weight || !weighs(a)) return;
        float *partial = call.partial + ((head * call.chunks + chunk) * a.queries + i) * Planes;
        for (int64_t n = 0; n < count * Planes; n++) partial[n] = V::sum(r.d_query[n]) * (float)(-2 * a.scale);
    }

    // dV and dw_k of the chunk's keys.
    static void write_chunk(const Call &call, int64_t head, int64_t first, int64_t last, const BackwardRoom &r) {
        const hf_attention &a = *call.a;
        const int64_t values = padded_values(a);
        char *d_value = first_row(a, a.grad_value, head);
        for (int64_t key = first; key < last; key++) {
            const int64_t t = (key - first) / L, l = (key - first) % L;
            if (l == 0)
                for (int64_t c = 0; c < values; c += L) {
                    F x[L];
                    for (int m = 0; m < L; m++) x[m] = r.d_value[t * values + c + m];
                    V::transpose(x);
                    for (int m = 0; m < L; m++) V::store(r.rows + m * values + c, x[m]);
                }
            from_float(r.rows + l * values, a.type, a.value_dim, d_value + key * a.grad_value.row_stride * width_of(a));
            if (a.grad_key_weight && weighs(a))
                for (int p = 0; p < Planes; p++)
                    a.grad_key_weight[(head * a.keys + key) * Planes + p] = ((const float *)&r.d_weight[t * Planes + p])[l] * (float)(-2 * a.scale);
        }
    }
};

} // namespace
} // namespace hf

// Hamming attention for one instruction set V, written once: scores by popcount, softmax, P.V, and the way back.
//
// Forward: a lane is a query, so that a key's value is broadcast and nothing is reduced across lanes. Backward: a lane is
// a key. Scores are in units of log2 in the forward. Nothing of size Nq x Nk is kept; tiles are computed again in the backward.
#pragma once

#include <stdlib.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "convert.h"
#include "saturate.h"
#include "kernels.h"
#include "ternary.h"

namespace hf {
namespace { // one copy for each instruction set: a shared one could be another set's

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kLowest = -126.0f;     // exp2 of less than this would leave the normal numbers
// Rows whose scores are known to be less than this (in log2) need no maximum: their sums stay far from the ends of float32,
// with room for a million keys and values up to 1e8 (2^80 2^20 2^27).
constexpr float kBounded = 80.0f;

// Cuts one block of memory into arrays.
struct Carver {
    char *base;
    size_t used = 0;
    template <class T> T *take(int64_t count) {
        T *here = base ? (T *)(base + used) : nullptr;
        used += ((size_t)count * sizeof(T) + 63) / 64 * 64;
        return here;
    }
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t halves_of(const hf_attention &a) { return (a.head_dim + 31) / 32; }
inline int64_t words_of(const hf_attention &a) { return (a.head_dim + 63) / 64; }

template <class T> inline T *rows_of(const hf_rows &r, int64_t heads, int64_t head) {
    return (T *)r.data + head / heads * r.batch_stride + head % heads * r.head_stride;
}

inline int64_t width_of(const hf_attention &a) { return a.type == HF_FLOAT32 ? 4 : 2; }

// Of an array in the call's own type, whose rows lie row_stride * width_of(a) bytes apart.
inline char *first_row(const hf_attention &a, const hf_rows &r, int64_t head) {
    return (char *)r.data + (head / a.heads * r.batch_stride + head % a.heads * r.head_stride) * width_of(a);
}

// Rows of `channels` numbers of any type as float32, zero-padded to `padded`; the caller's own memory where it fits.
struct FloatRows {
    const float *data;
    int64_t stride;
    static FloatRows of(const hf_attention &a, const hf_rows &r, int64_t head, int64_t rows, int64_t padded, float *room) {
        if (!needs_room(a, r, padded)) return {rows_of<const float>(r, a.heads, head), r.row_stride};
        const char *from = first_row(a, r, head);
        for (int64_t i = 0; i < rows; i++) {
            to_float(from + i * r.row_stride * width_of(a), a.type, a.value_dim, room + i * padded);
            for (int64_t c = a.value_dim; c < padded; c++) room[i * padded + c] = 0;
        }
        return {room, padded};
    }
    // Rows that lie apart are packed too: each is read thousands of times.
    static bool needs_room(const hf_attention &a, const hf_rows &r, int64_t padded) {
        return a.type != HF_FLOAT32 || padded != a.value_dim || r.row_stride != padded;
    }
};

// Halves == 0: as many as the call says. Planes: 1 or 2.
template <class V, int Halves, int Planes> struct Attention {
    using F = typename V::F;
    using I = typename V::I;
    using Exp2 = typename V::Exp2;
    static constexpr int L = V::lanes, C = V::channels;
    static constexpr int kAhead = 6;        // keys that the pipelines of the forward look ahead
    static constexpr int kScoreBlock = 32;  // keys whose scores are held at one time where the maximum is sought
    static constexpr int kValueBlock = 128; // keys whose probabilities are held where d_v > C
    static constexpr int kSumBlock = 256;  // keys summed up in registers elsewhere
    static constexpr int kQueryBlock = kSignBlock; // queries of one tile of the backward

    static int halves(const hf_attention &a) { return Halves ? Halves : (int)halves_of(a); }
    static int64_t padded_values(const hf_attention &a) { return round_up(std::max<int64_t>(a.value_dim, 1), C); }

    static void pack_bits(const hf_attention &a, const uint64_t *bits, int64_t rows, int32_t *to) {
        const int h = halves(a);
        const int64_t w = words_of(a);
        for (int64_t n = 0; n < rows; n++)
            for (int p = 0; p < Planes; p++)
                for (int i = 0; i < h; i++)
                    to[(n * Planes + p) * h + i] = (int32_t)(bits[(n * Planes + p) * w + i / 2] >> (32 * (i % 2)));
    }

    // Tokens of one head as lanes: bits (P, halves, L), weight (P, L). Lanes past the end repeat the last token.
    static void load_lanes(const hf_attention &a, const uint64_t *bits, const float *weight, int64_t first, int64_t end, I *lanes,
                           F *w) {
        const int h = halves(a);
        const int64_t words = words_of(a);
        if (Planes == 1 && words == 1 && first + L <= end) { // the common case, in a form that compilers vectorise
            int32_t part[2][L];
            for (int l = 0; l < L; l++) {
                part[0][l] = (int32_t)bits[first + l];
                part[1][l] = (int32_t)(bits[first + l] >> 32);
            }
            for (int i = 0; i < h; i++) memcpy(&lanes[i], part[i], sizeof(I));
            w[0] = V::load(weight + first);
            return;
        }
        for (int l = 0; l < L; l++) {
            const int64_t n = std::min(first + l, end - 1);
            for (int p = 0; p < Planes; p++) {
                for (int i = 0; i < h; i++)
                    ((int32_t *)&lanes[p * h + i])[l] = (int32_t)(bits[(n * Planes + p) * words + i / 2] >> (32 * (i % 2)));
                ((float *)&w[p])[l] = weight[n * Planes + p];
            }
        }
    }

    // ---------------------------------------------------------------------------------------------------- forward

    struct ForwardRoom {
        int32_t *bits;  // (Nk + kAhead, P, halves)
        float *weight;  // (Nk + kAhead, P): w_k
        float *value;   // (Nk, padded d_v), where the caller's own rows do not do
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
        F slope[Planes]; // -2 scale log2(e) w_q, for counts less d / 2
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

    // Probabilities of `count` keys times the channels from C on.
    static void add_further_values(const F *p, const FloatRows &v, int64_t first, int64_t count, int64_t values, F *sums) {
        for (int64_t c = C; c < values; c += C) {
            F s[C];
            for (int i = 0; i < C; i++) s[i] = V::splat(0);
            const float *row = v.data + first * v.stride + c;
            for (int64_t j = 0; j < count; j++, row += v.stride) add_values(s, p[j], row);
            for (int i = 0; i < C; i++) sums[c + i] += s[i];
        }
    }

    // Scores whose bound is known beforehand: no maximum, three keys in flight. Returns the sum of 2^score, which with
    // |score| < 80 neither vanishes nor overflows, and keeps more digits than scores shifted by their bound would.
    template <bool Wide> static F attend_bounded(const hf_attention &a, const ForwardRoom &r, const FloatRows &v, Queries queries) {
        const Exp2 exp2;
        F total = V::splat(0);
        const F start = V::splat(0);
        F probability = exp2(queries.score(r, 0, start)), next = queries.score(r, 1, start);
        const float *row = v.data;
        const int64_t step = Wide ? kValueBlock : kSumBlock;
        for (int64_t first = 0; first < a.keys; first += step) {
            const int64_t end = std::min<int64_t>(first + step, a.keys);
            F sums[C], block = V::splat(0); // of the block: sums of sums lose fewer digits
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

    // With the running maximum, for rows of large scores. Sets `maximum`.
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
                // NaN stays NaN: max gives its second argument then.
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

    // Lanes of a tile: its queries' bits in r.lanes and their slopes; whether all their scores are bounded.
    static bool load_queries(const hf_attention &a, int64_t head, int64_t i, int64_t last, const ForwardRoom &r, Queries &q) {
        F weight[Planes];
        const int64_t row = head * a.queries;
        load_lanes(a, a.query_bits + row * Planes * words_of(a), a.query_weight + row * Planes, i, last, r.lanes, weight);
        q.lanes = r.lanes;
        q.halves = halves(a);
        q.middle = V::splat(0.5f * (float)a.head_dim);
        F bound = V::splat(0);
        for (int p = 0; p < Planes; p++) {
            // One rounding only: an error here is one of the row's temperature, which no average removes.
            for (int l = 0; l < L; l++) ((float *)&q.slope[p])[l] = (float)(-2 * a.scale * kLog2E * ((const float *)&weight[p])[l]);
            for (int k = 0; k < Planes; k++) bound += V::absolute(q.slope[p]) * (r.largest[k] * 0.5f * (float)a.head_dim);
        }
        bool bounded = true;
        for (int l = 0; l < L; l++) bounded &= ((const float *)&bound)[l] < kBounded; // false for NaN
        return bounded;
    }

    // Sums of a tile's lanes over `total`, as rows of the output, and the log-sum-exp.
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

    // --------------------------------------------------------------------------------------------------- backward

    struct BackwardRoom {
        int32_t *bits;  // (Nq, P, halves)
        float *slope;   // (Nq, P): -2 scale w_q, for counts less d / 2
        float *start;   // (Nq): -log-sum-exp
        float *delta;   // (Nq): dO . O less the gradient of the log-sum-exp
        float *grad;    // (Nq, padded d_v): dO, where the caller's own rows do not do
        I *lanes;       // (P, halves)
        F *value;       // (tiles of the chunk, padded d_v): V with a key a lane
        F *d_value;     // the same shape: dV
        F *d_weight;    // (tiles, P): dw_k
        I *tile_bits;   // (tiles, P, halves)
        F *tile_weight; // (tiles, P)
        F *p;           // (kQueryBlock)
        F *dot;         // (kQueryBlock, P, P): count - d / 2
        F *dp;          // (kQueryBlock)
        F *d_query;     // (kQueryBlock, P): dw_q, not yet summed over lanes
        float *rows;    // (L, padded d_v)
        Signs<V> signs; // of the ternary gradient
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
        if (a.grad_query) r.signs = Signs<V>::carve(call, c);
        return r;
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

    // Channels from c on, 0 past the end.
    static inline F load_channels(const hf_attention &a, const char *row, int64_t c) {
        F x = V::splat(0);
        if (c + L <= a.value_dim) to_float(row + c * width_of(a), a.type, L, (float *)&x); // a constant count becomes one load
        else to_float(row + c * width_of(a), a.type, a.value_dim - c, (float *)&x);
        return x;
    }

    // Values, bits and weights of the chunk's keys, a key a lane; sums at zero.
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

    // Keys of one tile, held in registers where there are few words.
    struct Keys {
        I held[Planes * (Halves ? Halves : 1)];
        const I *lanes;
        F weight[Planes];
        int halves;
        Keys(const hf_attention &a, const BackwardRoom &r, int64_t tile) : lanes(r.tile_bits + tile * Planes * Attention::halves(a)), halves(Attention::halves(a)) {
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
        // Two short loops: one long chain of operations would fill the processor's queues with waiting ones.
        for (int64_t n = 0; n < count; n++) r.p[n] = keys.score(r, i + n, middle, V::splat(r.start[i + n]), r.dot + n * Planes * Planes);
#pragma GCC unroll 4
        for (int64_t n = 0; n < count; n++) r.p[n] = exp2.natural(V::max(lowest, r.p[n]));
        r.p[count] = V::splat(0); // of an even number
    }

    // What the weights' gradients of one tile read and write.
    struct Weights {
        const float *delta, *query_weight; // of the block's first query
        F counted[Planes];                 // w_k, or 0 in lanes past the end: those repeat the last key and must not count twice
        F d_key[Planes];                   // dw_k
        // dS of query n into dw_k and, not yet summed over lanes, dw_q
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

    // dP of one tile, and dV += P dO: two queries at a time, so that a vector of V serves both.
    template <bool First, bool Values, bool Weighs> static inline void products(const BackwardRoom &r, const FloatRows &grad, int64_t i, int64_t count, int64_t c, const F *value, F *d_value, Weights &weights) {
        F sums[C];
        for (int k = 0; k < C; k++) sums[k] = V::splat(0); // of the block: sums of sums lose fewer digits
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

    // What a unit of the backward starts with; returns dO.
    static FloatRows load_unit(const Call &call, int64_t head, int64_t first, int64_t last, const BackwardRoom &r, Arena &arena) {
        const hf_attention &a = *call.a;
        const int64_t values = padded_values(a);
        if (arena.call != call.id || arena.head != head) {
            pack_queries(a, head, r);
            FloatRows::of(a, a.grad_output, head, a.queries, values, r.grad);
            if (a.grad_query) r.signs.load_queries(call, head);
            arena.call = call.id, arena.head = head;
        }
        load_chunk(call, head, first, last, r);
        return FloatRows::needs_room(a, a.grad_output, values) ? FloatRows{r.grad, values}
                                                : FloatRows{rows_of<const float>(a.grad_output, a.heads, head), a.grad_output.row_stride};
    }

    static void backward(const Call &call, int64_t head, int64_t chunk, Arena &arena) {
        const hf_attention &a = *call.a;
        Carver c{arena.base};
        const BackwardRoom r = carve_backward(call, c);
        const int64_t first = chunk * call.chunk, last = std::min(first + call.chunk, a.keys), tiles = (last - first + L - 1) / L, row = head * a.queries;
        const FloatRows grad = load_unit(call, head, first, last, r, arena);
        if (a.grad_query) r.signs.load_chunk(call, head, first, last);
        for (int64_t i = 0; i < a.queries; i += kQueryBlock) {
            const int64_t count = std::min<int64_t>(kQueryBlock, a.queries - i);
            for (int64_t n = 0; n < count * Planes; n++) r.d_query[n] = V::splat(0);
            if (a.grad_query) r.signs.start_queries();
            for (int64_t t = 0; t < tiles; t++) {
                Weights weights{r.delta + i, a.query_weight + (row + i) * Planes, {}, {}};
                for (int p = 0; p < Planes; p++) weights.counted[p] = counted(first + t * L, last, r.tile_weight[t * Planes + p]);
                if (a.grad_query_weight || a.grad_key_weight) {
                    recompute<true, true>(a, r, grad, i, count, t, weights);
                    for (int p = 0; p < Planes; p++) r.d_weight[t * Planes + p] += weights.d_key[p];
                } else {
                    recompute<true, false>(a, r, grad, i, count, t, weights);
                }
                if (a.grad_query) r.signs.add_tile(call, head, i, count, first, last, t, r.p, r.dp, r.delta + i, r.tile_weight[t]);
            }
            write_query_block(call, head, chunk, i, count, r);
            if (a.grad_query) r.signs.write_queries(call, head, chunk, i, count);
        }
        write_chunk(call, head, first, last, r);
        if (a.grad_query) r.signs.write_chunk(call, head, first, last);
    }

    // A tile's key weights, 0 in lanes past the end.
    static F counted(int64_t key, int64_t last, F weight) {
        for (int l = 0; l < L; l++)
            if (key + l >= last) ((float *)&weight)[l] = 0;
        return weight;
    }

    // The chunk's share of dw_q for a block of queries.
    static void write_query_block(const Call &call, int64_t head, int64_t chunk, int64_t i, int64_t count, const BackwardRoom &r) {
        const hf_attention &a = *call.a;
        if (!a.grad_query_weight) return;
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
            if (a.grad_key_weight)
                for (int p = 0; p < Planes; p++)
                    a.grad_key_weight[(head * a.keys + key) * Planes + p] = ((const float *)&r.d_weight[t * Planes + p])[l] * (float)(-2 * a.scale);
        }
    }
};

// The kernel for a call's number of words and planes.
template <class V> struct ByShape {
    template <class Task> static void with_shape(const hf_attention &a, Task task) {
        if (a.planes == 2) task(Attention<V, 0, 2>{});
        else if (a.head_dim <= 32) task(Attention<V, 1, 1>{});
        else if (a.head_dim <= 64) task(Attention<V, 2, 1>{});
        else task(Attention<V, 0, 1>{});
    }
};

// Entry points over a family of kernels: `Select::with_shape(call, task)` hands the task the kernel for a call.
template <class Select> struct Face {
    static size_t forward_bytes(const hf_attention &a) {
        size_t bytes = 0;
        Select::with_shape(a, [&](auto kernel) { bytes = decltype(kernel)::forward_bytes(a); });
        return bytes;
    }
    static void forward(const Call &call, int64_t head, int64_t first, int64_t last, Arena &arena) {
        Select::with_shape(*call.a, [&](auto kernel) { decltype(kernel)::forward(call, head, first, last, arena); });
    }
    static size_t backward_bytes(const Call &call) {
        size_t bytes = 0;
        Select::with_shape(*call.a, [&](auto kernel) { bytes = decltype(kernel)::backward_bytes(call); });
        return bytes;
    }
    static void backward(const Call &call, int64_t head, int64_t chunk, Arena &arena) {
        Select::with_shape(*call.a, [&](auto kernel) { decltype(kernel)::backward(call, head, chunk, arena); });
    }
};

template <class Select> constexpr Kernels make_kernels(const char *name) {
    using f = Face<Select>;
    return {name, f::forward_bytes, f::forward, f::backward_bytes, f::backward, pack_row, saturate_row};
}

} // namespace
} // namespace hf

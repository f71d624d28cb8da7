// What forward and backward of Hamming attention share: how a call's tensors are read into tiles.
#pragma once

#include <stdlib.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "convert.h"
#include "saturate.h"
#include "kernels.h"
#include "straight_through.h"
#include "ternary.h"

namespace hf {
namespace { // one copy for each instruction set: a shared copy could be that of another set

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kLowest = -126.0f;     // exp2 of less than this would not be a normal number
// Rows whose scores are known to be less than this (in log2) need no maximum. Their sums stay far from the limits of
// float32, with room for a million keys and values up to 1e8 (2^80 2^20 2^27).
constexpr float kBounded = 80.0f;

// Divides one block of memory into arrays.
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

// The first row of an array in the call's own type; its rows are row_stride * width_of(a) bytes apart.
inline char *first_row(const hf_attention &a, const hf_rows &r, int64_t head) {
    return (char *)r.data + (head / a.heads * r.batch_stride + head % a.heads * r.head_stride) * width_of(a);
}

// Rows of numbers of any type as float32, zero-padded to `padded`. Uses the caller's own memory if its layout fits.
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
    // Rows that are not adjacent are packed too, because each is read thousands of times.
    static bool needs_room(const hf_attention &a, const hf_rows &r, int64_t padded) {
        return a.type != HF_FLOAT32 || padded != a.value_dim || r.row_stride != padded;
    }
};

// Sizes, and tokens as lanes. Halves: 32-bit words of a token's bits, or 0 for the number in the call. Planes: 1 or 2.
template <class V, int Halves, int Planes> struct Tiles {
    using F = typename V::F;
    using I = typename V::I;
    using Exp2 = typename V::Exp2;
    static constexpr int L = V::lanes, C = V::channels;
    static constexpr int kAhead = 6;        // keys that the pipelines of the forward look ahead
    static constexpr int kScoreBlock = 32;  // keys whose scores are held at once when the maximum is computed
    static constexpr int kValueBlock = 128; // keys whose probabilities are held if d_v > C
    static constexpr int kSumBlock = 256;  // keys summed in registers otherwise
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

    // Loads tokens of one head as lanes: bits (P, halves, L), weight (P, L). Lanes past the end repeat the last token.
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
};

} // namespace
} // namespace hf

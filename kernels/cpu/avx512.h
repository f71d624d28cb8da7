// AVX-512 with VPOPCNTDQ and VBMI: sixteen lanes, thirty-two registers.
#pragma once

#include <immintrin.h>

#include "vectors.h"

namespace hf {
namespace {

struct Avx512 : Vector<float16, int16, uint16> {
    static constexpr int channels = 16; // accumulators that stay in registers

    template <class T> static inline void keep(T &x) { __asm__("" : "+v"(x)); }
    static inline F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
    // One operation if the last term does not change in a loop.
    static inline F line(F x, F middle, F slope) { return fma(x, slope, slope * -middle); }
    // b where either is NaN.
    static inline F max(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
    static inline I popcount(I x) { return (I)_mm512_popcnt_epi32((__m512i)x); }
    static inline void transpose(F *x) {
        __m512 a[16], b[16];
        for (int i = 0; i < 16; i += 2) { // pairs of single numbers
            a[i] = _mm512_unpacklo_ps((__m512)x[i], (__m512)x[i + 1]);
            a[i + 1] = _mm512_unpackhi_ps((__m512)x[i], (__m512)x[i + 1]);
        }
        for (int i = 0; i < 16; i += 4) // fours: b[i + k] holds column 4 m + k of rows i .. i + 3 in quarter m
            for (int k = 0; k < 2; k++) {
                const __m512d low = (__m512d)a[i + k], high = (__m512d)a[i + 2 + k];
                b[i + 2 * k] = (__m512)_mm512_unpacklo_pd(low, high);
                b[i + 2 * k + 1] = (__m512)_mm512_unpackhi_pd(low, high);
            }
        for (int k = 0; k < 4; k++) { // quarters
            const __m512 even0 = _mm512_shuffle_f32x4(b[k], b[4 + k], 0x88), odd0 = _mm512_shuffle_f32x4(b[k], b[4 + k], 0xdd);
            const __m512 even1 = _mm512_shuffle_f32x4(b[8 + k], b[12 + k], 0x88), odd1 = _mm512_shuffle_f32x4(b[8 + k], b[12 + k], 0xdd);
            x[k] = (F)_mm512_shuffle_f32x4(even0, even1, 0x88);
            x[8 + k] = (F)_mm512_shuffle_f32x4(even0, even1, 0xdd);
            x[4 + k] = (F)_mm512_shuffle_f32x4(odd0, odd1, 0x88);
            x[12 + k] = (F)_mm512_shuffle_f32x4(odd0, odd1, 0xdd);
        }
    }
    // x[index] for each lane
    static inline F look_up(F x, I index) { return (F)_mm512_permutexvar_ps((__m512i)index, (__m512)x); }
    static inline float sum(F x) { return _mm512_reduce_add_ps((__m512)x); }
    static inline uint32_t below(F a, F b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ); }

    static inline I mark(I acc, F a, F b, int32_t bit) {
        return (I)_mm512_mask_or_epi32((__m512i)acc, _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ), (__m512i)acc, _mm512_set1_epi32(bit));
    }
    static inline I max_int(I a, I b) { return (I)_mm512_max_epi32((__m512i)a, (__m512i)b); }
    static inline int32_t largest_int(I x) { return _mm512_reduce_max_epi32((__m512i)x); }
    static inline void add_agreement(const uint64_t *nonzero, const uint64_t *positive, int64_t tokens, const uint64_t *columns, int64_t channels, const float *scale, float *sums) {
        const __m512i low_halves = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        for (int64_t first = 0; first < channels; first += 64) { // `channels` is a multiple of 64
            __m512i column[8];
            for (int v = 0; v < 8; v++) column[v] = _mm512_loadu_si512(columns + first + 8 * v);
            for (int64_t n = 0; n < tokens; n++) {
                const __m512i wanted = _mm512_set1_epi64((int64_t)nonzero[n]), sign = _mm512_set1_epi64((int64_t)positive[n]);
                const F twice = splat(2 * scale[n]), all = splat(-scale[n] * (float)__builtin_popcountll(nonzero[n]));
                float *to = sums + n * channels + first;
#pragma GCC unroll 4
                for (int v = 0; v < 8; v += 2, to += lanes) {
                    const __m512i low = _mm512_popcnt_epi64(_mm512_ternarylogic_epi64(wanted, sign, column[v], 0x90));
                    const __m512i high = _mm512_popcnt_epi64(_mm512_ternarylogic_epi64(wanted, sign, column[v + 1], 0x90));
                    store(to, fma(to_float((I)_mm512_permutex2var_epi32(low, low_halves, high)), twice, load(to) + all));
                }
            }
        }
    }

    // Number of differing bits of `halves` 32-bit words.
    template <int Halves> static inline I differing(const I *q, const int32_t *k, int halves) {
        I count = popcount(q[0] ^ k[0]);
        if constexpr (Halves == 0) {
            for (int h = 1; h < halves; h++) count += popcount(q[h] ^ k[h]);
        } else {
            for (int h = 1; h < Halves; h++) count += popcount(q[h] ^ k[h]);
        }
        return count;
    }

    // 2^x for -126 <= x <= 127, relative error 4e-7: a table of sixteenths and a polynomial of degree 2.
    struct Exp2 {
        F magic = splat(786432.0f); // 1.5 * 2^19: the last place is a sixteenth
        // 2^(k/16), minus what shifting k into the mantissa would add
        I table = {0x3f800000 - (0 << 19),  0x3f85aac3 - (1 << 19),  0x3f8b95c2 - (2 << 19),  0x3f91c3d3 - (3 << 19),
                   0x3f9837f0 - (4 << 19),  0x3f9ef532 - (5 << 19),  0x3fa5fed7 - (6 << 19),  0x3fad583f - (7 << 19),
                   0x3fb504f3 - (8 << 19),  0x3fbd08a4 - (9 << 19),  0x3fc5672a - (10 << 19), 0x3fce248c - (11 << 19),
                   0x3fd744fd - (12 << 19), 0x3fe0ccdf - (13 << 19), 0x3feac0c7 - (14 << 19), 0x3ff5257d - (15 << 19)};
        F log2e = splat(1.44269504f);
        // c1 includes three quarters of the cubic term at the ends of the interval.
        F c1 = splat(0.69318783f), c2 = splat(0.24022651f);
        Exp2() {
            keep(magic);
            keep(table);
            keep(c1);
            keep(c2);
            keep(log2e);
        }
        inline F operator()(F x) const {
            const F y = x + magic;
            return finish(y, x - (y - magic));
        }
        // e^x for -87 <= x <= 87
        inline F natural(F x) const {
            const F y = fma(x, log2e, magic);
            return finish(y, fma(x, log2e, magic - y));
        }
        inline F finish(F y, F r) const {
            const I power = (I)_mm512_permutexvar_epi32((__m512i)y, (__m512i)table) + ((I)y << 19);
            return fma((F)power * r, fma(c2, r, c1), (F)power);
        }
    };
};

} // namespace
} // namespace hf

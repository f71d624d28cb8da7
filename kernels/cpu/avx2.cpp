// AVX2 with FMA: eight lanes, sixteen registers. Bits are counted by nibbles; a shuffle looks them up in a table.
#include <immintrin.h>

#include "attention.h"
#include "vectors.h"

namespace hf {

struct Avx2 : Vector<float8, int8, uint8> {
    static constexpr int channels = 8;

    static inline F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
    // One operation if the last term does not change in a loop.
    static inline F line(F x, F middle, F slope) { return fma(x, slope, slope * -middle); }
    static inline F max(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
    static inline float sum(F x) {
        const float4 y = (float4)_mm256_castps256_ps128((__m256)x) + (float4)_mm256_extractf128_ps((__m256)x, 1);
        return (y[0] + y[2]) + (y[1] + y[3]);
    }

    static inline uint32_t below(F a, F b) { return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LT_OQ)); }

    static inline __m256i count_bytes(I x) {
        const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
        const __m256i low = _mm256_set1_epi8(15);
        const __m256i lower = _mm256_and_si256((__m256i)x, low), upper = _mm256_and_si256(_mm256_srli_epi16((__m256i)x, 4), low);
        return _mm256_add_epi8(_mm256_shuffle_epi8(table, lower), _mm256_shuffle_epi8(table, upper));
    }
    static inline I sum_bytes(__m256i bytes) {
        return (I)_mm256_madd_epi16(_mm256_maddubs_epi16(bytes, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
    }
    template <int Halves> static inline I differing(const I *q, const int32_t *k, int halves) {
        if constexpr (Halves == 1) {
            return sum_bytes(count_bytes(q[0] ^ k[0]));
        } else if constexpr (Halves == 2) {
            return sum_bytes(_mm256_add_epi8(count_bytes(q[0] ^ k[0]), count_bytes(q[1] ^ k[1])));
        } else {
            I count = splat_int(0);
            for (int h = 0; h < halves; h++) count += sum_bytes(count_bytes(q[h] ^ k[h]));
            return count;
        }
    }

    // 2^x for -126 <= x <= 127, relative error 2e-7: a table of eighths and a polynomial of degree 3.
    struct Exp2 {
        F magic = splat(1572864.0f); // 1.5 * 2^20: the last place is an eighth
        I table = {0x3f800000 - (0 << 20), 0x3f8b95c2 - (1 << 20), 0x3f9837f0 - (2 << 20), 0x3fa5fed7 - (3 << 20),
                   0x3fb504f3 - (4 << 20), 0x3fc5672a - (5 << 20), 0x3fd744fd - (6 << 20), 0x3feac0c7 - (7 << 20)};
        inline F operator()(F x) const {
            const F y = x + magic;
            return finish(y, x - (y - magic));
        }
        inline F natural(F x) const {
            const F y = fma(x, splat(1.44269504f), magic);
            return finish(y, fma(x, splat(1.44269504f), magic - y));
        }
        inline F finish(F y, F r) const {
            const F power = (F)((I)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)y) + ((I)y << 20));
            const F u = fma(fma(splat(0.0555041087f), r, splat(0.240226507f)), r, splat(0.693147181f));
            return fma(power * r, u, power);
        }
    };
};

const Kernels kAvx2 = make_kernels<ByShape<Avx2>>("avx2");

} // namespace hf

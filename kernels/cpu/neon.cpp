// 64-bit ARM: four lanes, thirty-two registers. The hardware counts the bits of a byte.
#include <arm_neon.h>

#include "attention.h"
#include "polynomial.h"

namespace hf {

struct Neon : Vector<float4, int4, uint4> {
    static constexpr int channels = 16;

    static inline F fma(F a, F b, F c) { return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
    static inline F max(F a, F b) { return a > b ? a : b; } // b where either is NaN
    static inline float sum(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
    static inline uint32_t below(F a, F b) { return mask(a < b); }
    static inline uint32_t mask(I x) { return (uint32_t)((x[0] & 1) | (x[1] & 2) | (x[2] & 4) | (x[3] & 8)); }
    template <int Halves> static inline I differing(const I *q, const int32_t *k, int halves) {
        I count = splat_int(0);
        for (int h = 0; h < (Halves ? Halves : halves); h++)
            count += (I)vpaddlq_u16(vpaddlq_u8(vcntq_u8((uint8x16_t)(q[h] ^ k[h]))));
        return count;
    }
    using Exp2 = PolynomialExp2<Neon, F, I>;
};

const Kernels kNeon = make_kernels<ByShape<Neon>>("neon");

} // namespace hf

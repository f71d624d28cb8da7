// Any processor: four lanes in plain arithmetic.
#include "attention.h"
#include "polynomial.h"

namespace hf {

struct Portable : Vector<float4, int4, uint4> {
    static constexpr int channels = 8;

    static inline F fma(F a, F b, F c) { return a * b + c; }
    static inline F max(F a, F b) { return a > b ? a : b; } // b where either is NaN
    static inline float sum(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
    static inline uint32_t below(F a, F b) { return mask(a < b); }
    static inline uint32_t mask(I x) { return (uint32_t)((x[0] & 1) | (x[1] & 2) | (x[2] & 4) | (x[3] & 8)); }
    template <int Halves> static inline I differing(const I *q, const int32_t *k, int halves) {
        I count = splat_int(0);
        for (int h = 0; h < (Halves ? Halves : halves); h++) {
            U x = (U)(q[h] ^ k[h]);
            x = x - ((x >> 1) & 0x55555555);
            x = (x & 0x33333333) + ((x >> 2) & 0x33333333);
            x = (x + (x >> 4)) & 0x0f0f0f0f;
            count += (I)((x * 0x01010101u) >> 24);
        }
        return count;
    }
    using Exp2 = PolynomialExp2<Portable, F, I>;
};

const Kernels kPortable = make_kernels<ByShape<Portable>>("portable");

} // namespace hf

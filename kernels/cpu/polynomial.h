// 2^x in plain vector arithmetic, for instruction sets without their own table lookup.
#pragma once

#include "vectors.h"

namespace hf {
namespace {

// V supplies fma. A polynomial of degree 6 on (-1/2, 1/2), relative error 2e-7.
template <class V, class F, class I> struct PolynomialExp2 {
    F magic = V::splat(12582912.0f); // 1.5 * 2^23: the last place is 1
    // 2^x for -126 <= x <= 127
    inline F operator()(F x) const {
        const F y = x + magic;
        return finish(y, x - (y - magic));
    }
    // e^x for -87 <= x <= 87
    inline F natural(F x) const {
        const F y = V::fma(x, V::splat(1.44269504f), magic), whole = y - magic;
        // x - whole ln 2 in two parts, for processors that round between product and sum
        const F rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
        return finish(y, rest * 1.44269504f);
    }
    inline F finish(F y, F r) const {
        F p = V::splat(1.54035304e-4f);
        for (float c : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f}) p = V::fma(p, r, V::splat(c));
        return p * (F)(((I)y << 23) + 0x3f800000); // a product, because a sum of bits would turn NaN into a number
    }
};

} // namespace
} // namespace hf

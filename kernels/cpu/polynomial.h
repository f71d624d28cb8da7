// What instruction sets without a table lookup of their own do in plain vector arithmetic.
#pragma once

#include "vectors.h"

namespace hf {
namespace {

// V supplies fma. 2^x for -126 <= x <= 127 by a polynomial of degree 6 on (-1/2, 1/2), relative error 2e-7.
template <class V> struct Polynomial {
    template <class F, class I = typename V::I> static inline F exp2(F x) {
        const F magic = V::splat(12582912.0f); // 1.5 * 2^23: the last place is 1
        F y = x + magic, r = x - (y - magic);
        F p = V::splat(1.54035304e-4f);
        for (float c : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f}) p = V::fma(p, r, V::splat(c));
        return (F)((I)p + ((I)y << 23));
    }
};

} // namespace
} // namespace hf

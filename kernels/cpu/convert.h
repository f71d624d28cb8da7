// Conversions between float32, bfloat16 and float16, and their sign bits. Compiled once for each instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

#include "hamming.h"

namespace hf {
namespace {

inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float half_to_float(uint16_t h) {
    const uint32_t magnitude = h & 0x7fff, sign = (uint32_t)(h & 0x8000) << 16;
    // Shift the exponent into place by a multiplication, which handles subnormal numbers too.
    uint32_t bits = bits_of(float_of(magnitude << 13) * float_of(0x77800000)); // times 2^112
    bits = magnitude >= 0x7c00 ? (magnitude << 13) | 0x7f800000 : bits;
    return float_of(bits | sign);
}

// Rounds to nearest, ties to even.
inline uint16_t float_to_bfloat(float x) {
    const uint32_t bits = bits_of(x);
    return (bits & 0x7fffffff) > 0x7f800000 ? (uint16_t)((bits >> 16) | 0x40) : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline uint16_t float_to_half(float x) {
    const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
    const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x477ff000) return sign | 0x7c00; // 65520 and more becomes infinity
    if (magnitude < 0x38800000) {                      // below 2^-14: adding 1/2 rounds to multiples of 2^-24
        return sign | (uint16_t)(bits_of(float_of(magnitude) + 0.5f) - 0x3f000000);
    }
    return sign | (uint16_t)((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13);
}

inline void to_float(const void *from, int64_t type, int64_t count, float *to) {
    const uint16_t *h = (const uint16_t *)from;
    if (type == HF_FLOAT32) memcpy(to, from, count * sizeof(float));
    else if (type == HF_BFLOAT16)
        for (int64_t i = 0; i < count; i++) to[i] = float_of((uint32_t)h[i] << 16);
    else
        for (int64_t i = 0; i < count; i++) to[i] = half_to_float(h[i]);
}

inline void from_float(const float *from, int64_t type, int64_t count, void *to) {
    uint16_t *h = (uint16_t *)to;
    if (type == HF_FLOAT32) memcpy(to, from, count * sizeof(float));
    else if (type == HF_BFLOAT16)
        for (int64_t i = 0; i < count; i++) h[i] = float_to_bfloat(from[i]);
    else
        for (int64_t i = 0; i < count; i++) h[i] = float_to_half(from[i]);
}

// Bit 1 where x >= 0; -0 counts as 0 and NaN as negative.
inline void pack_row(const void *row, int64_t type, int64_t dim, uint64_t *bits) {
    for (int64_t word = 0; word * 64 < dim; word++) {
        const int64_t count = dim - word * 64 < 64 ? dim - word * 64 : 64;
        uint8_t positive[64];
        if (type == HF_FLOAT32) {
            const float *x = (const float *)row + word * 64;
            for (int64_t i = 0; i < count; i++) positive[i] = x[i] >= 0;
        } else {
            const uint16_t *x = (const uint16_t *)row + word * 64;
            const uint16_t infinity = type == HF_BFLOAT16 ? 0x7f80 : 0x7c00;
            for (int64_t i = 0; i < count; i++) positive[i] = (x[i] <= infinity) | (x[i] == 0x8000);
        }
        for (int64_t i = count; i < 64; i++) positive[i] = 0;
        uint64_t packed = 0;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        for (int64_t i = 0; i < 64; i++) packed |= (uint64_t)positive[i] << i;
#else
        // Eight bytes of 0 or 1 at a time: the product moves byte i to bit 56 + i.
        for (int64_t i = 0; i < 8; i++) {
            uint64_t eight;
            memcpy(&eight, positive + 8 * i, 8);
            packed |= (eight * 0x0102040810204080ull >> 56) << (8 * i);
        }
#endif
        bits[word] = packed;
    }
}

} // namespace
} // namespace hf

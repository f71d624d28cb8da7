// Hamming attention for one instruction set V, written once: scores by popcount, softmax, P.V, and the backward pass.
#pragma once

#include "backward.h"
#include "balance.h"
#include "forward.h"

namespace hf {
namespace {

// Halves: 32-bit words of a token's bits, or 0 for the number in the call. Planes: 1 or 2.
template <class V, int Halves, int Planes> struct Attention : Forward<V, Halves, Planes>, Backward<V, Halves, Planes> {
    // Both bases have these names, so they are named here again.
    using Base = Tiles<V, Halves, Planes>;
    using typename Base::F;
    using typename Base::I;
    using typename Base::Exp2;
    using Base::L, Base::C, Base::kAhead, Base::kScoreBlock, Base::kValueBlock, Base::kSumBlock, Base::kQueryBlock;
    using Base::halves, Base::padded_values, Base::pack_bits, Base::load_lanes;
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

// Entry points of a family of kernels: `Select::with_shape(call, task)` passes the kernel for a call to the task.
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
    return {name, f::forward_bytes, f::forward, f::backward_bytes, f::backward, pack_row, saturate_row, balance_forward, balance_backward};
}

} // namespace
} // namespace hf

// What both gradients of the bits end with: a sum over the other side for each token and channel, times scale and weight.
#pragma once

#include <string.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "kernels.h"

namespace hf {
namespace {

constexpr int kSignBlock = 64;

// The weights of the keys from `key` on, 0 in lanes past the end.
template <class V> typename V::F zero_past_end(int64_t key, int64_t last, typename V::F weight) {
    for (int l = 0; l < V::lanes; l++)
        if (key + l >= last) ((float *)&weight)[l] = 0;
    return weight;
}

template <class V> struct BitSums {
    using F = typename V::F;
    using I = typename V::I;
    static constexpr int L = V::lanes, kParts = kSignBlock / L;

    int64_t channels;  // head_dim, padded
    float *query_sums; // (64, channels): of the current block of queries, over the chunk's keys
    float *key_sums;   // (chunk, channels)

    template <class Carver> void carve_sums(const Call &call, Carver &c) {
        query_sums = c.template take<float>(64 * channels);
        key_sums = c.template take<float>(call.chunk * channels);
    }

    void start_chunk(const Call &call) const { memset(key_sums, 0, call.chunk * channels * sizeof(float)); }

    void start_query_sums() const { memset(query_sums, 0, 64 * channels * sizeof(float)); }

    // Adds the chunk's share of dq for a block of queries, after those of the chunks before it, so that sums always
    // have the same order. Units begin in order, so the unit that this one waits for is already running.
    void write_queries(const Call &call, int64_t head, int64_t chunk, int64_t i, int64_t count) const {
        const hf_attention &a = *call.a;
        std::atomic<int64_t> &turn = call.turn[(head * a.queries + i) / kSignBlock + head];
        while (turn.load(std::memory_order_acquire) != chunk) std::this_thread::yield();
        for (int64_t n = 0; n < count; n++) {
            const float factor = (float)a.scale * a.query_weight[head * a.queries + i + n];
            float *to = a.grad_query + (head * a.queries + i + n) * a.head_dim;
            for (int64_t c = 0; c < a.head_dim; c++) to[c] = (chunk ? to[c] : 0) + factor * query_sums[n * channels + c];
        }
        turn.store(chunk + 1, std::memory_order_release);
    }

    void write_chunk(const Call &call, int64_t head, int64_t first, int64_t last) const {
        const hf_attention &a = *call.a;
        for (int64_t key = first; key < last; key++) {
            const float factor = (float)a.scale * a.key_weight[head * a.keys + key];
            float *to = a.grad_key + (head * a.keys + key) * a.head_dim;
            for (int64_t c = 0; c < a.head_dim; c++) to[c] = factor * key_sums[(key - first) * channels + c];
        }
    }
};

} // namespace
} // namespace hf

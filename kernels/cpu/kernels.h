// What one instruction set offers to the dispatcher. Internal; the public interface is hamming.h.
#pragma once

#include <stddef.h>

#include <atomic>

#include "hamming.h"

namespace hf {

// One call, with the data that all its units of work share.
struct Call {
    const hf_attention *a;
    int64_t id;               // distinguishes calls, so that a thread's packed head is not used for another call
    int64_t chunk;            // keys of one unit of the backward
    int64_t chunks;           // ceil(keys / chunk)
    float *partial;           // (heads, chunks, Nq, P): each chunk's share of grad_query_weight
    std::atomic<int64_t> *turn; // for each block of queries: the chunk that may add to its grad_query
};

// Memory of one thread, kept from call to call.
struct Arena {
    char *base = nullptr;
    size_t size = 0;
    int64_t call = -1, head = -1; // the call and head that are packed at the start of the memory
    bool reserve(size_t bytes);
};

// Query rows of one unit of the forward.
constexpr int64_t kForwardRows = 512;

struct Kernels {
    const char *name;
    size_t (*forward_bytes)(const hf_attention &);
    void (*forward)(const Call &, int64_t head, int64_t first, int64_t last, Arena &);
    size_t (*backward_bytes)(const Call &);
    void (*backward)(const Call &, int64_t head, int64_t chunk, Arena &);
    void (*pack)(const void *row, int64_t type, int64_t head_dim, uint64_t *bits); // one row
    void (*saturate)(const void *row, int64_t type, int64_t dim, float beta, void *tanh, void *sign);
    void (*balance_forward)(const hf_balance &, int64_t head, Arena &);
    void (*balance_backward)(const hf_balance &, int64_t head, Arena &);
};

extern const Kernels kPortable;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kAvx2, kAvx512, kAvx512Bf16;
#endif
#if defined(__aarch64__)
extern const Kernels kNeon;
#endif

} // namespace hf

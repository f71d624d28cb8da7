// Plain C interface of the compiled Hamming attention. No torch, no Python: arrays, sizes and strides.
//
// Formulas: hf_binaryformer/kernels/hamming.py. Letters: B batch, H heads, Nq queries, Nk keys, P planes (1 or 2),
// W = ceil(d / 64) words of sign bits, d_v value channels.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define HF_API __declspec(dllexport)
#else
#define HF_API __attribute__((visibility("default")))
#endif

// Version of the structures below. The Python side refuses a library with another version.
enum { HF_ABI_VERSION = 5 };

enum hf_type { HF_FLOAT32 = 0, HF_BFLOAT16 = 1, HF_FLOAT16 = 2 };

// A (B, H, N, channels) array whose channels are adjacent in memory; strides in elements.
typedef struct {
    void *data;
    int64_t batch_stride, head_stride, row_stride;
} hf_rows;

typedef struct {
    int64_t batch, heads, queries, keys, head_dim, value_dim, planes;
    int64_t threads;            // largest number of threads that work at one call
    int64_t type;               // hf_type of value, output, grad_output and grad_value
    double scale;               // factor of the scores
    const uint64_t *query_bits; // (B, H, Nq, P, W) contiguous; padding bits 0
    const uint64_t *key_bits;   // (B, H, Nk, P, W)
    const float *query_weight;  // (B, H, Nq, P) contiguous
    const float *key_weight;    // (B, H, Nk, P)
    hf_rows value;              // (B, H, Nk, d_v)
    hf_rows output;             // (B, H, Nq, d_v): written by the forward, read by the backward
    float *logsumexp;           // (B, H, Nq) contiguous: written by the forward, read by the backward
    // Backward only.
    hf_rows grad_output;        // (B, H, Nq, d_v)
    const float *grad_logsumexp; // (B, H, Nq) contiguous, or NULL for zeros
    float *grad_query_weight;   // (B, H, Nq, P), or NULL when not wanted
    float *grad_key_weight;     // (B, H, Nk, P), or NULL
    hf_rows grad_value;         // (B, H, Nk, d_v)
    float *grad_query;          // (B, H, Nq, d) gradient of the signs, or NULL
    float *grad_key;            // (B, H, Nk, d), or NULL
    int64_t straight_through;   // gradient of the signs: 0 by ternary draws, else straight-through
    uint64_t seed;              // of the ternary draws
} hf_attention;

// A team of threads: calls body(data) on up to `threads` threads at once and returns when all are done. The signature
// is that of GNU OpenMP's GOMP_parallel, so that the caller can pass the team that it already has.
typedef void (*hf_team)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

// Every function returns 0, or a negative number: -1 unknown instruction set, -2 out of memory, -3 sizes out of range.
HF_API int hf_abi_version(void);
HF_API const char *hf_instruction_sets(void);      // those compiled in, best first, separated by spaces
HF_API int hf_can_run(const char *name);           // 1 if this processor has it
HF_API int hf_select(const char *name);            // choose one; NULL or "" for the best
HF_API const char *hf_selected(void);
HF_API void hf_set_team(hf_team team);             // NULL: the library starts its own threads
HF_API int hf_forward(const hf_attention *call);
HF_API int hf_backward(const hf_attention *call);

// x (outer0, outer1, outer2, d), channels adjacent, strides in elements -> bits (outer0, outer1, outer2, W) contiguous.
HF_API int hf_pack_signs(const void *x, int64_t type, const int64_t outer[3], const int64_t stride[3], int64_t head_dim,
                         int64_t threads, uint64_t *bits);

// x (rows, d), channels adjacent, row_stride in elements -> tanh(beta x) and sgn(x) (1 where x >= 0, else -1), both
// (rows, d) contiguous in the type of x.
HF_API int hf_saturate(const void *x, int64_t type, int64_t rows, int64_t row_stride, int64_t dim, double beta, int64_t threads,
                       void *tanh, void *sign);

// Balanced bits of queries or of keys x (B, H, N, d): y = (x - mean over N) / root mean square over d, and the signs of y.
typedef struct {
    int64_t batch, heads, tokens, dim;
    int64_t threads;
    int64_t type;        // hf_type of x, y, grad and grad_x
    int64_t centering;   // whether to subtract from each channel its mean over the tokens
    int64_t norm;        // whether to divide each token's channels by their root mean square
    double epsilon;      // added to the mean square
    double window;       // backward: gradients pass where abs(y) <= window
    hf_rows x;           // forward: read
    hf_rows y;           // (B, H, N, d): written by the forward, read by the backward
    float *inverse_rms;  // (B, H, N) contiguous: written by the forward, read by the backward
    uint64_t *bits;      // (B, H, N, W) contiguous: forward
    hf_rows grad;        // backward: gradient of y
    hf_rows grad_x;      // backward: written
} hf_balance;

HF_API int hf_balance_forward(const hf_balance *call);
HF_API int hf_balance_backward(const hf_balance *call);

#ifdef __cplusplus
}
#endif

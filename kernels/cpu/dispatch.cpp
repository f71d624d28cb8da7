// The C interface: chooses the instruction set, divides a call into units of work, and runs them on threads.
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <thread>
#include <vector>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace hf {

bool Arena::reserve(size_t bytes) {
    call = -1;
    if (bytes <= size) return true;
    free(base);
    // Whole pages, kept for later calls: page faults cost as much as the kernel.
    size = (bytes + 4095) / 4096 * 4096;
    base = (char *)aligned_alloc(4096, size);
    if (!base) size = 0;
    return base != nullptr;
}

namespace {

// Freed with its thread.
struct ThreadArena : Arena {
    ~ThreadArena() { free(base); }
};
thread_local ThreadArena thread_arena;

std::atomic<int64_t> next_call{0};
std::atomic<const Kernels *> selected{nullptr};
std::atomic<hf_team> team{nullptr};

#if defined(__x86_64__)
struct Features {
    bool avx2 = false, avx512 = false, bf16 = false;
    Features() {
        unsigned a, b, c, d;
        if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return; // the system saves vector registers
        const bool fma = c >> 12 & 1;
        unsigned low, high;
        __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        if ((low & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
        avx2 = fma && (b >> 5 & 1);
        const bool f = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1, vbmi = c >> 1 & 1, popcnt = c >> 14 & 1;
        avx512 = avx2 && (low & 0xe6) == 0xe6 && f && dq && bw && vl && vbmi && popcnt;
        bf16 = avx512 && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
    }
};
const Features &features() {
    static const Features f;
    return f;
}
#endif

struct Entry {
    const Kernels *kernels;
    bool (*can_run)();
};

// Best first.
const Entry kEntries[] = {
#if defined(__x86_64__)
    {&kAvx512Bf16, [] { return features().bf16; }},
    {&kAvx512, [] { return features().avx512; }},
    {&kAvx2, [] { return features().avx2; }},
#endif
#if defined(__aarch64__)
    {&kNeon, [] { return true; }},
#endif
    {&kPortable, [] { return true; }},
};

const Entry *find(const char *name) {
    for (const Entry &e : kEntries)
        if (!strcmp(e.kernels->name, name)) return &e;
    return nullptr;
}

const Kernels &current() {
    if (!selected.load()) hf_select(nullptr);
    return *selected.load();
}

// Units 0 .. units - 1, each done once by one of the threads; the result does not depend on which.
template <class Task> struct Work {
    Task task;
    int64_t units;
    size_t bytes;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};

    static void body(void *data) {
        Work &work = *(Work *)data;
        Arena &arena = thread_arena;
        if (!arena.reserve(work.bytes)) {
            work.failed = true;
            return;
        }
        for (int64_t unit; (unit = work.next.fetch_add(1)) < work.units;) work.task(unit, arena);
    }
};

template <class Task> bool run(int64_t units, int64_t threads, size_t bytes, Task task) {
    Work<Task> work{task, units, bytes};
    threads = std::max<int64_t>(1, std::min({threads, units, (int64_t)1024}));
    if (threads == 1) {
        Work<Task>::body(&work);
    } else if (hf_team given = team.load()) {
        given(Work<Task>::body, &work, (unsigned)threads, 0);
    } else {
        std::vector<std::thread> helpers;
        for (int64_t t = 1; t < threads; t++) {
            try {
                helpers.emplace_back(Work<Task>::body, &work);
            } catch (...) {
                break; // the threads that were started do all units
            }
        }
        Work<Task>::body(&work);
        for (std::thread &h : helpers) h.join();
    }
    // A thread without memory leaves its units to the others. Work is left over only if no thread had memory.
    return !work.failed || work.next.load() >= units + 1;
}

bool in_range(const hf_attention &a) {
    return a.batch >= 0 && a.heads >= 0 && a.queries >= 0 && a.keys >= 0 && a.head_dim >= 1 && a.head_dim < (1 << 24) && a.value_dim >= 0 &&
           (a.planes == 1 || (a.planes == 2 && !a.grad_query)) && !a.grad_query == !a.grad_key && a.type >= HF_FLOAT32 && a.type <= HF_FLOAT16;
}

} // namespace
} // namespace hf

using namespace hf;

int hf_abi_version(void) { return HF_ABI_VERSION; }

const char *hf_instruction_sets(void) {
    static const std::vector<char> names = [] {
        std::vector<char> all;
        for (const Entry &e : kEntries) {
            all.insert(all.end(), e.kernels->name, e.kernels->name + strlen(e.kernels->name));
            all.push_back(' ');
        }
        all.back() = 0;
        return all;
    }();
    return names.data();
}

int hf_can_run(const char *name) {
    const Entry *e = find(name);
    return e && e->can_run();
}

int hf_select(const char *name) {
    const Entry *chosen = nullptr;
    if (name && *name) {
        chosen = find(name);
        if (!chosen || !chosen->can_run()) return -1;
    } else {
        for (const Entry &e : kEntries)
            if (!chosen && e.can_run()) chosen = &e;
    }
    selected = chosen->kernels;
    return 0;
}

const char *hf_selected(void) { return current().name; }

void hf_set_team(hf_team given) { team = given; }

int hf_forward(const hf_attention *call) {
    const hf_attention &a = *call;
    if (!in_range(a)) return -3;
    const int64_t heads = a.batch * a.heads, blocks = (a.queries + kForwardRows - 1) / kForwardRows;
    if (heads * a.queries == 0) return 0;
    if (a.keys == 0) return -3; // the caller fills in zeros
    const Kernels &k = current();
    Call shared{};
    shared.a = call;
    shared.id = next_call++;
    const bool done = run(heads * blocks, a.threads, k.forward_bytes(a), [&](int64_t unit, Arena &arena) {
        const int64_t first = unit % blocks * kForwardRows;
        k.forward(shared, unit / blocks, first, std::min(first + kForwardRows, a.queries), arena);
    });
    return done ? 0 : -2;
}

int hf_backward(const hf_attention *call) {
    const hf_attention &a = *call;
    if (!in_range(a)) return -3;
    const int64_t heads = a.batch * a.heads;
    if (heads * a.queries * a.keys == 0) return -3; // the caller fills in zeros
    const Kernels &k = current();
    Call shared{};
    shared.a = call;
    shared.id = next_call++;
    // At most eight chunks per head, for any number of threads, so that sums always have the same order.
    shared.chunk = std::max<int64_t>(256, ((a.keys + 7) / 8 + 63) / 64 * 64);
    shared.chunks = (a.keys + shared.chunk - 1) / shared.chunk;
    const int64_t rows = a.queries * a.planes, units = heads * shared.chunks;
    std::vector<float> partial;
    std::vector<std::atomic<int64_t>> turn;
    try {
        if (a.grad_query_weight) partial.resize(units * rows);
        if (a.grad_query) {
            turn = std::vector<std::atomic<int64_t>>(heads * (a.queries / 64 + 2));
            for (std::atomic<int64_t> &chunk : turn) chunk = 0;
        }
    } catch (...) {
        return -2;
    }
    shared.partial = partial.data();
    shared.turn = turn.data();
    const size_t bytes = k.backward_bytes(shared);
    if (!run(units, a.threads, bytes, [&](int64_t unit, Arena &arena) { k.backward(shared, unit / shared.chunks, unit % shared.chunks, arena); }))
        return -2;
    for (int64_t head = 0; head < heads && a.grad_query_weight; head++)
        for (int64_t n = 0; n < rows; n++) {
            float sum = 0;
            for (int64_t c = 0; c < shared.chunks; c++) sum += partial[(head * shared.chunks + c) * rows + n];
            a.grad_query_weight[head * rows + n] = sum;
        }
    return 0;
}

int hf_pack_signs(const void *x, int64_t type, const int64_t outer[3], const int64_t stride[3], int64_t head_dim, int64_t threads, uint64_t *bits) {
    if (head_dim < 1 || type < HF_FLOAT32 || type > HF_FLOAT16) return -3;
    const int64_t total = outer[0] * outer[1] * outer[2], words = (head_dim + 63) / 64, width = type == HF_FLOAT32 ? 4 : 2;
    if (total == 0) return 0;
    const Kernels &k = current();
    // If tokens come before heads in the input's memory, follow that order, so that rows are adjacent.
    const bool swapped = stride[1] < stride[2];
    const int64_t block = 256, blocks = (total + block - 1) / block;
    run(blocks, threads, 0, [&](int64_t unit, Arena &) {
        for (int64_t n = unit * block; n < std::min(total, (unit + 1) * block); n++) {
            int64_t i = n % outer[2], j = n / outer[2] % outer[1];
            if (swapped) j = n % outer[1], i = n / outer[1] % outer[2];
            const int64_t b = n / (outer[1] * outer[2]);
            k.pack((const char *)x + (b * stride[0] + j * stride[1] + i * stride[2]) * width, type, head_dim,
                   bits + ((b * outer[1] + j) * outer[2] + i) * words);
        }
    });
    return 0;
}

namespace {

bool in_range(const hf_balance &a) {
    return a.batch >= 0 && a.heads >= 0 && a.tokens >= 0 && a.dim >= 1 && a.dim < (1 << 24) && a.type >= HF_FLOAT32 && a.type <= HF_FLOAT16;
}

// A head is one unit, because the mean over its tokens is needed first.
int balance(const hf_balance &a, void (*work)(const hf_balance &, int64_t, Arena &)) {
    if (!in_range(a)) return -3;
    if (a.batch * a.heads * a.tokens == 0) return 0;
    const size_t bytes = (size_t)a.dim * (sizeof(double) + sizeof(float) * (size_t)(a.tokens + 3)) + 64;
    return run(a.batch * a.heads, a.threads, bytes, [&](int64_t head, Arena &arena) {
        arena.call = -1; // the memory no longer holds the packed head of an attention call
        work(a, head, arena);
    }) ? 0 : -2;
}

} // namespace

int hf_balance_forward(const hf_balance *call) { return balance(*call, current().balance_forward); }

int hf_balance_backward(const hf_balance *call) { return balance(*call, current().balance_backward); }

int hf_saturate(const void *x, int64_t type, int64_t rows, int64_t row_stride, int64_t dim, double beta, int64_t threads, void *tanh, void *sign) {
    if (rows < 0 || dim < 0 || type < HF_FLOAT32 || type > HF_FLOAT16) return -3;
    const int64_t width = type == HF_FLOAT32 ? 4 : 2, block = 64;
    const Kernels &k = current();
    run((rows + block - 1) / block, threads, 0, [&](int64_t unit, Arena &) {
        for (int64_t n = unit * block; n < std::min(rows, (unit + 1) * block); n++)
            k.saturate((const char *)x + n * row_stride * width, type, dim, (float)beta, (char *)tanh + n * dim * width, (char *)sign + n * dim * width);
    });
    return 0;
}

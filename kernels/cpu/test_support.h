// What the tests of the kernel share: numbers and rows in memory with guards around them, calls, and the formulas by brute force.
#pragma once

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "hamming.h"

namespace {

constexpr double kNan = NAN;
constexpr float kSentinel = -12345.0f; // no result is this; as 16-bit halves no result either
constexpr int64_t kBand = 64, kGap = 3;

int failures = 0;
int64_t calls = 0; // of the functions under test, by random cases
std::string context;

template <class... Args> void expect(bool good, const char *format, Args... args) {
    if (good) return;
    fprintf(stderr, "FAILED %s: ", context.c_str());
    fprintf(stderr, format, args...);
    fprintf(stderr, "\n");
    if (++failures > 50) exit(1);
}

// ------------------------------------------------------------------------------------------------------ numbers

uint16_t upper_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)(bits >> 16);
}

double decode(uint16_t x, int64_t type) {
    const int exponent_bits = type == HF_BFLOAT16 ? 8 : 5, mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = x >> mantissa_bits & ((1 << exponent_bits) - 1), mantissa = x & ((1 << mantissa_bits) - 1);
    const double sign = x >> 15 ? -1 : 1;
    if (exponent == (1 << exponent_bits) - 1) return mantissa ? kNan : sign * INFINITY;
    if (exponent == 0) return sign * ldexp(mantissa, 1 - bias - mantissa_bits);
    return sign * ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

// One number in memory, of any of the three types.
struct Number {
    char *at;
    int64_t type;
    double get() const {
        if (type != HF_FLOAT32) return decode(*(uint16_t *)at, type);
        return *(float *)at;
    }
    // For the 16-bit types a random number with few digits: quarters up to 8, which both represent.
    void set(double x) const {
        if (type == HF_FLOAT32) *(float *)at = (float)x;
        else if (type == HF_BFLOAT16) *(uint16_t *)at = isnan(x) ? 0x7fff : upper_half((float)(nearbyint(4 * x) / 4));
        else if (isnan(x)) *(uint16_t *)at = 0x7fff;
        else {
            int exponent;
            const double quarters = nearbyint(4 * x) / 4, fraction = frexp(fabs(quarters), &exponent);
            *(uint16_t *)at = quarters == 0 ? 0 : (uint16_t)((quarters < 0) << 15 | (exponent + 14) << 10 | ((int)(fraction * 2048) & 1023));
        }
    }
};

// ------------------------------------------------------------------------------------------------------- memory

// How rows lie in memory: head by head, or the heads of a token side by side; with a gap after every row but the last, and
// with other elements before the first row and after the last one. Without those the sanitizer sees any access beyond.
struct Layout {
    bool contiguous;
    int64_t gap, before, after;
};

Layout layout(bool contiguous) { return {contiguous, contiguous ? 0 : kGap, kBand, kBand}; }

// (B, H, N, channels).
struct Rows {
    std::vector<char> memory;
    int64_t batch, heads, rows, channels, type, width, stride, before;
    bool contiguous;
    Rows(int64_t b, int64_t h, int64_t n, int64_t c, int64_t type, const Layout &l)
        : batch(b), heads(h), rows(n), channels(c), type(type), width(type == HF_FLOAT32 ? 4 : 2), stride(c + l.gap), before(l.before),
          contiguous(l.contiguous) {
        memory.resize((before + std::max(b * h * n * stride - l.gap, (int64_t)0) + l.after) * width);
    }
    int64_t offset(int64_t head, int64_t row) const {
        const int64_t b = head / heads, h = head % heads;
        return before + (contiguous ? (head * rows + row) * stride : ((b * rows + row) * heads + h) * stride);
    }
    Number at(int64_t head, int64_t row, int64_t c) { return {memory.data() + (offset(head, row) + c) * width, type}; }
    void fill_bytes_of(float x) {
        const uint16_t half = upper_half(x);
        for (size_t i = 0; i < memory.size(); i += width) {
            if (width == 4) memcpy(&memory[i], &x, 4);
            else memcpy(&memory[i], &half, 2);
        }
    }
    hf_rows face() {
        const int64_t row = contiguous ? stride : heads * stride;
        return {memory.data() + before * width, heads * rows * stride, contiguous ? rows * stride : stride, row};
    }
    std::vector<double> values() {
        std::vector<double> all;
        for (int64_t head = 0; head < batch * heads; head++)
            for (int64_t n = 0; n < rows; n++)
                for (int64_t c = 0; c < channels; c++) all.push_back(at(head, n, c).get());
        return all;
    }
    // Whether the sentinel still stands everywhere but in the rows; those then hold it too.
    bool guards_stand() {
        Rows untouched = *this;
        untouched.fill_bytes_of(kSentinel);
        for (int64_t head = 0; head < batch * heads; head++)
            for (int64_t n = 0; n < rows; n++) {
                const size_t from = offset(head, n) * width;
                std::copy_n(memory.begin() + from, channels * width, untouched.memory.begin() + from);
            }
        return memory == untouched.memory;
    }
};

struct Shape {
    int64_t batch, heads, queries, keys, head_dim, value_dim, planes;
    int64_t words() const { return (head_dim + 63) / 64; }
    int64_t groups() const { return batch * heads; }
};

struct Inputs {
    Shape s;
    int64_t type;
    double scale;
    std::vector<uint64_t> query_bits, key_bits;
    std::vector<float> query_weight, key_weight, grad_logsumexp;
    Rows value, grad_output;

    // `largest` is that of abs(w_q) and abs(w_k); some weights are 0.
    Inputs(const Shape &s, int64_t type, bool contiguous, double largest, unsigned seed)
        : Inputs(s, type, layout(contiguous), largest, seed) {}
    Inputs(const Shape &s, int64_t type, const Layout &l, double largest, uint64_t seed)
        : s(s), type(type), scale(1 / sqrt((double)s.head_dim)), value(s.batch, s.heads, s.keys, s.value_dim, type, l),
          grad_output(s.batch, s.heads, s.queries, s.value_dim, type, l) {
        std::mt19937_64 random(seed);
        std::uniform_real_distribution<double> uniform(-1, 1);
        auto bits = [&](int64_t rows) {
            std::vector<uint64_t> b(rows * s.planes * s.words());
            for (size_t i = 0; i < b.size(); i++) {
                const int64_t left = s.head_dim - (int64_t)(i % s.words()) * 64;
                b[i] = random() & (left >= 64 ? ~0ull : (1ull << left) - 1);
            }
            return b;
        };
        auto weights = [&](int64_t rows) {
            std::vector<float> w(rows * s.planes);
            for (float &x : w) x = random() % 8 ? (float)(largest * uniform(random)) : 0;
            return w;
        };
        query_bits = bits(s.groups() * s.queries), key_bits = bits(s.groups() * s.keys);
        query_weight = weights(s.groups() * s.queries), key_weight = weights(s.groups() * s.keys);
        for (Rows *r : {&value, &grad_output}) {
            r->fill_bytes_of((float)kNan);
            for (int64_t head = 0; head < s.groups(); head++)
                for (int64_t n = 0; n < r->rows; n++)
                    for (int64_t c = 0; c < s.value_dim; c++) r->at(head, n, c).set(4 * uniform(random));
        }
    }
};

struct Outputs {
    Shape s;
    Rows output, logsumexp, d_value, d_query_weight, d_key_weight, d_query, d_key;
    Outputs(const Shape &s, int64_t type, bool contiguous) : Outputs(s, type, layout(contiguous)) {}
    Outputs(const Shape &s, int64_t type, const Layout &l)
        : s(s), output(s.batch, s.heads, s.queries, s.value_dim, type, l), logsumexp(row(s.queries, 1)),
          d_value(s.batch, s.heads, s.keys, s.value_dim, type, l), d_query_weight(row(s.queries, s.planes)),
          d_key_weight(row(s.keys, s.planes)), d_query(row(s.queries, s.head_dim)), d_key(row(s.keys, s.head_dim)) {
        for (Rows *r : all()) r->fill_bytes_of(kSentinel);
    }
    Rows row(int64_t n, int64_t c) const { return Rows(s.batch, s.heads, n, c, HF_FLOAT32, layout(true)); }
    std::vector<Rows *> all() { return {&output, &logsumexp, &d_value, &d_query_weight, &d_key_weight, &d_query, &d_key}; }
    static const char *name(size_t i) {
        static const char *names[] = {"output", "logsumexp", "grad_value", "grad_query_weight", "grad_key_weight", "grad_query", "grad_key"};
        return names[i];
    }
};

float *floats(Rows &r) { return (float *)r.face().data; }

hf_attention call_of(Inputs &in, Outputs &out, int64_t threads) {
    const Shape &s = in.s;
    hf_attention a{};
    a.batch = s.batch, a.heads = s.heads, a.queries = s.queries, a.keys = s.keys;
    a.head_dim = s.head_dim, a.value_dim = s.value_dim, a.planes = s.planes;
    a.threads = threads, a.type = in.type, a.scale = in.scale;
    a.query_bits = in.query_bits.data(), a.key_bits = in.key_bits.data();
    a.query_weight = in.query_weight.data(), a.key_weight = in.key_weight.data();
    a.value = in.value.face(), a.output = out.output.face(), a.logsumexp = floats(out.logsumexp);
    a.grad_output = in.grad_output.face(), a.grad_logsumexp = in.grad_logsumexp.empty() ? nullptr : in.grad_logsumexp.data();
    a.grad_query_weight = floats(out.d_query_weight), a.grad_key_weight = floats(out.d_key_weight);
    a.grad_value = out.d_value.face();
    return a;
}

void on_a_new_thread(const std::function<void()> &f) { std::thread(f).join(); }

int forward(const hf_attention &a) {
    int status = 1;
    on_a_new_thread([&] { status = hf_forward(&a); });
    calls++;
    return status;
}

int backward(const hf_attention &a) {
    int status = 1;
    on_a_new_thread([&] { status = hf_backward(&a); });
    calls++;
    return status;
}

// -------------------------------------------------------------------------------------------------- brute force

struct Expected {
    std::vector<double> output, logsumexp, d_value, d_query_weight, d_key_weight, d_scores, score_terms;
    std::vector<double> query_terms, key_terms; // what the gradients of the weights are made of, without signs
    double largest_score = 0;
};

double dot_of_signs(const uint64_t *a, const uint64_t *b, const Shape &s) {
    int64_t sum = 0;
    for (int64_t c = 0; c < s.head_dim; c++) sum += ((a[c / 64] ^ b[c / 64]) >> c % 64 & 1) ? -1 : 1;
    return (double)sum;
}

Expected brute_force(Inputs &in) {
    const Shape &s = in.s;
    const int64_t P = s.planes, W = s.words(), nq = s.queries, nk = s.keys, dv = s.value_dim;
    Expected e;
    e.output.assign(s.groups() * nq * dv, 0), e.d_value.assign(s.groups() * nk * dv, 0);
    e.d_query_weight.assign(s.groups() * nq * P, 0), e.d_key_weight.assign(s.groups() * nk * P, 0);
    e.query_terms = e.d_query_weight, e.key_terms = e.d_key_weight;
    for (int64_t head = 0; head < s.groups(); head++)
        for (int64_t i = 0; i < nq; i++) {
            const int64_t row = head * nq + i;
            std::vector<double> score(nk), dots(nk * P * P), p(nk), dp(nk);
            for (int64_t j = 0; j < nk; j++)
                for (int64_t m = 0; m < P; m++)
                    for (int64_t n = 0; n < P; n++) {
                        const int64_t q = row * P + m, k = (head * nk + j) * P + n;
                        const double dot = in.scale * dot_of_signs(&in.query_bits[q * W], &in.key_bits[k * W], s);
                        dots[(j * P + m) * P + n] = dot;
                        score[j] += dot * in.query_weight[q] * in.key_weight[k];
                    }
            const double largest = *std::max_element(score.begin(), score.end());
            for (double x : score) e.largest_score = std::max(e.largest_score, fabs(x));
            double total = 0, delta = 0;
            for (int64_t j = 0; j < nk; j++) total += p[j] = exp(score[j] - largest);
            e.logsumexp.push_back(largest + log(total));
            for (int64_t j = 0; j < nk; j++) {
                p[j] /= total;
                for (int64_t c = 0; c < dv; c++) {
                    const double v = in.value.at(head, j, c).get(), g = in.grad_output.at(head, i, c).get();
                    e.output[row * dv + c] += p[j] * v;
                    e.d_value[(head * nk + j) * dv + c] += p[j] * g;
                    dp[j] += g * v;
                }
                delta += p[j] * dp[j];
            }
            for (int64_t j = 0; j < nk; j++) {
                const double of_logsumexp = in.grad_logsumexp.empty() ? 0 : in.grad_logsumexp[row];
                const double ds = p[j] * (dp[j] - delta + of_logsumexp), terms = p[j] * (fabs(dp[j]) + fabs(delta) + fabs(of_logsumexp));
                e.d_scores.push_back(ds);
                e.score_terms.push_back(terms);
                for (int64_t m = 0; m < P; m++)
                    for (int64_t n = 0; n < P; n++) {
                        const int64_t q = row * P + m, k = (head * nk + j) * P + n;
                        const double dot = dots[(j * P + m) * P + n];
                        e.d_query_weight[q] += ds * dot * in.key_weight[k];
                        e.d_key_weight[k] += ds * dot * in.query_weight[q];
                        e.query_terms[q] += terms * fabs(dot * in.key_weight[k]);
                        e.key_terms[k] += terms * fabs(dot * in.query_weight[q]);
                    }
            }
        }
    return e;
}

// norm(got - wanted) / norm(terms)
double distance(const std::vector<double> &got, const std::vector<double> &wanted, const std::vector<double> &terms) {
    double error = 0, norm = 0;
    for (size_t i = 0; i < wanted.size(); i++) error += (got[i] - wanted[i]) * (got[i] - wanted[i]), norm += terms[i] * terms[i];
    return norm > 0 ? sqrt(error / norm) : sqrt(error);
}

} // namespace

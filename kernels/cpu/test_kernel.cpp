// Stand-alone test of the plain C interface against the formulas in double precision: `make sanitize` builds and runs it.
//
// Every output lies between guard bands, with a gap after each of its rows; gaps of the inputs hold NaN, so that what is read
// from them shows in the results. Each call runs on a thread of its own, whose scratch memory is new and thus holds whatever
// the allocator was told to fill it with.
#include "test_support.h"

namespace {

// --------------------------------------------------------------------------------------------------- the checks

void check_guards(Outputs &out) {
    for (size_t n = 0; n < out.all().size(); n++) expect(out.all()[n]->guards_stand(), "%s: written outside its rows", Outputs::name(n));
}

// dq_i = scale w_q,i sum_j dS_ij w_k,j sgn(k_j), and dk alike.
void check_straight_through(Inputs &in, const Layout &l, const Expected &e, double allowed) {
    const Shape &s = in.s;
    const int64_t nq = s.queries, nk = s.keys, d = s.head_dim, W = s.words();
    Outputs one(s, in.type, l), three(s, in.type, l);
    for (Outputs *out : {&one, &three}) {
        hf_attention a = call_of(in, *out, out == &three ? 3 : 1);
        expect(forward(a) == 0, "forward refused");
        a.grad_query = floats(out->d_query), a.grad_key = floats(out->d_key), a.straight_through = 1;
        expect(backward(a) == 0, "backward refused");
        check_guards(*out);
    }
    for (size_t n = 0; n < one.all().size(); n++)
        expect(one.all()[n]->memory == three.all()[n]->memory, "straight-through %s: three threads differ from one", Outputs::name(n));
    std::vector<double> d_query(s.groups() * nq * d), d_key(s.groups() * nk * d), query_terms(d_query.size()), key_terms(d_key.size());
    for (int64_t head = 0; head < s.groups(); head++)
        for (int64_t i = 0; i < nq; i++)
            for (int64_t j = 0; j < nk; j++) {
                const int64_t q = head * nq + i, k = head * nk + j;
                const double g = in.scale * in.query_weight[q] * in.key_weight[k], ds = e.d_scores[q * nk + j], terms = fabs(g) * e.score_terms[q * nk + j];
                for (int64_t c = 0; c < d; c++) {
                    d_query[q * d + c] += g * ds * ((in.key_bits[k * W + c / 64] >> c % 64 & 1) ? 1 : -1);
                    d_key[k * d + c] += g * ds * ((in.query_bits[q * W + c / 64] >> c % 64 & 1) ? 1 : -1);
                    query_terms[q * d + c] += terms, key_terms[k * d + c] += terms;
                }
            }
    const double of_queries = distance(one.d_query.values(), d_query, query_terms), of_keys = distance(one.d_key.values(), d_key, key_terms);
    expect(of_queries <= allowed, "straight-through grad_query: error %.3g, allowed %.3g", of_queries, allowed);
    expect(of_keys <= allowed, "straight-through grad_key: error %.3g, allowed %.3g", of_keys, allowed);
}

void check_against_brute_force(Inputs in, const Layout &l) {
    const Shape &s = in.s;
    const int64_t type = in.type;
    Outputs one(s, type, l), three(s, type, l);
    const Expected e = brute_force(in);
    const bool backwards = s.groups() * s.queries > 0; // else the caller fills in zeros
    for (Outputs *out : {&one, &three}) {
        const int64_t threads = out == &one ? 1 : 3;
        expect(forward(call_of(in, *out, threads)) == 0, "forward refused");
        if (backwards) expect(backward(call_of(in, *out, threads)) == 0, "backward refused");
        check_guards(*out);
    }
    for (size_t n = 0; n < one.all().size(); n++)
        expect(one.all()[n]->memory == three.all()[n]->memory, "%s: three threads differ from one", Outputs::name(n));
    // A score's own rounding is an error of its probability.
    const double allowed = (type == HF_FLOAT32 ? 5e-6 : 1e-2) + 3e-7 * e.largest_score;
    auto near = [&](Rows &got, const std::vector<double> &wanted, const std::vector<double> &terms, const char *name) {
        const double error = distance(got.values(), wanted, terms);
        expect(error <= allowed, "%s: error %.3g, allowed %.3g", name, error, allowed); // NaN fails too
    };
    std::vector<double> at_least_one = e.logsumexp;
    for (double &x : at_least_one) x = std::max(fabs(x), 1.0);
    near(one.output, e.output, e.output, "output");
    near(one.logsumexp, e.logsumexp, at_least_one, "logsumexp");
    if (!backwards) return;
    near(one.d_value, e.d_value, e.d_value, "grad_value");
    near(one.d_query_weight, e.d_query_weight, e.query_terms, "grad_query_weight");
    near(one.d_key_weight, e.d_key_weight, e.key_terms, "grad_key_weight");
    if (s.planes == 1) check_straight_through(in, l, e, allowed);
}

// Each gradient of a weight can be left out; what is left is the same.
void check_gradients_left_out(int64_t type) {
    const Shape s{1, 2, 33, 290, 64, 16, 1};
    Inputs in(s, type, true, 1, 3);
    Outputs whole(s, type, true);
    forward(call_of(in, whole, 1));
    backward(call_of(in, whole, 1));
    for (int left_out = 1; left_out < 4; left_out++) {
        Outputs part(s, type, true);
        hf_attention a = call_of(in, part, 1);
        a.output = whole.output.face(), a.logsumexp = floats(whole.logsumexp);
        if (left_out & 1) a.grad_query_weight = nullptr;
        if (left_out & 2) a.grad_key_weight = nullptr;
        expect(backward(a) == 0, "backward refused");
        expect(part.d_value.memory == whole.d_value.memory, "grad_value differs without gradients %d", left_out);
        if (!(left_out & 1)) expect(part.d_query_weight.memory == whole.d_query_weight.memory, "grad_query_weight differs alone");
        if (!(left_out & 2)) expect(part.d_key_weight.memory == whole.d_key_weight.memory, "grad_key_weight differs alone");
    }
}

// The draws of hf_binaryformer/kernels/draws.py.
uint32_t multiply(uint32_t h) {
    h = (h ^ h >> 16) * 0x7FEB352Du;
    return (h ^ h >> 15) * 0x846CA68Bu;
}
uint32_t mix(uint32_t h) { return h = multiply(h), h ^ h >> 16; }
double uniform_draw(uint64_t seed, int64_t head, int64_t i, int64_t j) {
    const uint32_t row = mix(mix(mix(mix((uint32_t)seed) + (uint32_t)(seed >> 32)) + (uint32_t)head) + (uint32_t)i);
    return ((multiply(row + 0x9E3779B9u * (uint32_t)j) >> 10) + 0.5) / 4194304;
}

// How far rows of the ternary gradient are from those of the hash's draws.
struct Deviation {
    double error = 0, norm = 0;     // squares summed up
    int64_t rows = 0, tipped = 0;   // rows; those with another draw somewhere, as rounding may tip one

    // One token's row is scale w times the sum of t sgn over the others: t = s sgn(g) where draw < abs(g) / s, else 0, with s the
    // largest abs(g) of each 64.
    void add(const float *got, double factor, const std::vector<double> &g, const std::vector<double> &draw, const std::vector<const uint64_t *> &bits, int64_t dim) {
        std::vector<double> t;
        double largest = 0;
        for (size_t first = 0; first < g.size(); first += 64) {
            const size_t end = std::min(first + 64, g.size());
            double s = 0;
            for (size_t j = first; j < end; j++) s = std::max(s, fabs(g[j]));
            for (size_t j = first; j < end; j++) t.push_back(draw[j] * s < fabs(g[j]) ? copysign(s, g[j]) : 0);
            largest = std::max(largest, s);
        }
        bool other = false;
        for (int64_t c = 0; c < dim; c++) {
            double sum = 0;
            for (size_t j = 0; j < g.size(); j++) sum += t[j] * ((bits[j][c / 64] >> c % 64 & 1) ? 1 : -1);
            const double difference = got[c] - factor * sum;
            error += difference * difference, norm += factor * sum * factor * sum;
            other |= fabs(difference) > std::max(0.01 * fabs(factor * largest), 1e-7); // rounding, where one key is alone
        }
        rows++, tipped += other;
    }
};

// All rows but few hold the very draws of the hash; nothing else changes.
void check_ternary_gradient(const Shape &s, int64_t type) {
    Inputs in(s, type, false, 1.5, 11);
    Outputs one(s, type, false), three(s, type, false), plain(s, type, false);
    const uint64_t seed = 0x0123456789abcdefull;
    for (Outputs *out : {&one, &three, &plain}) {
        hf_attention a = call_of(in, *out, out == &three ? 3 : 1);
        expect(forward(a) == 0, "forward refused");
        if (out != &plain) a.grad_query = floats(out->d_query), a.grad_key = floats(out->d_key), a.seed = seed;
        expect(backward(a) == 0, "backward refused");
        check_guards(*out);
    }
    for (size_t n = 0; n < one.all().size(); n++) {
        expect(one.all()[n]->memory == three.all()[n]->memory, "ternary %s: three threads differ from one", Outputs::name(n));
        // 16-bit values may take another way where draws are wanted.
        if (n < 5 && type == HF_FLOAT32) expect(one.all()[n]->memory == plain.all()[n]->memory, "draws change %s", Outputs::name(n));
    }
    const Expected e = brute_force(in);
    Deviation deviation;
    const int64_t nq = s.queries, nk = s.keys, W = s.words();
    for (int64_t head = 0; head < s.groups(); head++)
        for (int side = 0; side < 2; side++)
            for (int64_t x = 0; x < (side ? nk : nq); x++) {
                std::vector<double> g, draw;
                std::vector<const uint64_t *> bits;
                for (int64_t y = 0; y < (side ? nq : nk); y++) {
                    const int64_t i = side ? y : x, j = side ? x : y, other = side ? head * nq + i : head * nk + j;
                    g.push_back(e.d_scores[(head * nq + i) * nk + j] * (side ? in.query_weight : in.key_weight)[other]);
                    draw.push_back(uniform_draw(seed, head, i, j));
                    bits.push_back(&(side ? in.query_bits : in.key_bits)[other * W]);
                }
                const int64_t token = head * (side ? nk : nq) + x;
                const double weight = (side ? in.key_weight : in.query_weight)[token];
                deviation.add(floats(side ? one.d_key : one.d_query) + token * s.head_dim, in.scale * weight, g, draw, bits, s.head_dim);
            }
    const double error = sqrt(deviation.error / deviation.norm), allowed = type == HF_FLOAT32 ? 0.05 : 0.5;
    expect(error <= allowed, "ternary: error %.3g, allowed %.3g", error, allowed);
    if (type != HF_FLOAT32) return; // rounding tips too many
    expect(deviation.tipped <= deviation.rows / 50, "ternary: %lld of %lld rows have other draws", (long long)deviation.tipped, (long long)deviation.rows);
}

void check_packing(int64_t type) {
    std::mt19937_64 random(5);
    for (int64_t dim : {1, 31, 64, 65, 100, 129})
        for (int64_t threads : {1, 3}) {
            const int64_t outer[3] = {2, 3, 301}, words = (dim + 63) / 64, width = type == HF_FLOAT32 ? 4 : 2;
            const int64_t row = 3 * (dim + kGap), strides[2][3] = {{301 * row, dim + kGap, row}, {903 * (dim + kGap), 301 * (dim + kGap), dim + kGap}};
            std::vector<uint32_t> memory((2 * 301 * row * width + 3) / 4); // no longer than the last row's gap
            for (uint32_t &x : memory) x = random() % 4 ? (uint32_t)random() : (uint32_t)(random() % 2 ? 0x80000000u : 0x80007fffu);
            for (const int64_t *stride : strides) {
                std::vector<uint64_t> bits(2 * 903 * words + 2 * kBand, 0xa5a5a5a5a5a5a5a5ull);
                std::vector<uint64_t> wanted = bits;
                on_a_new_thread([&] {
                    expect(hf_pack_signs(memory.data(), type, outer, stride, dim, threads, bits.data() + kBand) == 0, "pack refused");
                });
                for (int64_t n = 0; n < 2 * 903; n++) {
                    const int64_t b = n / 903, h = n / 301 % 3, i = n % 301;
                    std::fill_n(&wanted[kBand + n * words], words, 0);
                    for (int64_t c = 0; c < dim; c++) {
                        const Number x{(char *)memory.data() + (b * stride[0] + h * stride[1] + i * stride[2] + c) * width, type};
                        wanted[kBand + n * words + c / 64] |= (uint64_t)(x.get() >= 0) << c % 64;
                    }
                }
                expect(bits == wanted, "pack of %lld channels, %lld threads", (long long)dim, (long long)threads);
            }
        }
}

void check_saturation(std::mt19937_64 &random, int64_t type, int64_t rows, int64_t gap, int64_t dim, int64_t threads) {
    const int64_t width = type == HF_FLOAT32 ? 4 : 2;
    const double allowed = type == HF_FLOAT32 ? 1e-6 : 8e-3;
    std::vector<char> x((rows ? (rows - 1) * (dim + gap) + dim : 0) * width), tanh(rows * dim * width), sign(tanh.size());
    for (int64_t n = 0; n < rows; n++)
        for (int64_t c = 0; c < dim; c++) Number{x.data() + (n * (dim + gap) + c) * width, type}.set((float)((int64_t)(random() % 2001) - 1000) / 100);
    on_a_new_thread([&] { expect(hf_saturate(x.data(), type, rows, dim + gap, dim, 0.5, threads, tanh.data(), sign.data()) == 0, "saturate refused"); });
    for (int64_t n = 0; n < rows * dim; n++) {
        const double value = Number{x.data() + (n / dim * (dim + gap) + n % dim) * width, type}.get();
        const double t = Number{tanh.data() + n * width, type}.get(), s = Number{sign.data() + n * width, type}.get();
        expect(fabs(t - std::tanh(0.5 * value)) <= allowed && s == (value >= 0 ? 1 : -1), "saturate %g: %g, %g", value, t, s);
    }
}

void check_saturation(int64_t type) {
    std::mt19937_64 random(6);
    for (int64_t dim : {1, 64, 100, 384})
        for (int64_t threads : {1, 3}) check_saturation(random, type, 131, 3, dim, threads);
}

// Forward and backward of balanced bits against the formulas in double, on rows that lie apart.
void check_balance(std::mt19937_64 &random, int64_t type, int64_t batch, int64_t heads, int64_t tokens, int64_t dim, int64_t gap, int choice, int64_t threads) {
    const double allowed = type == HF_FLOAT32 ? 2e-5 : 3e-2;
    const int64_t width = type == HF_FLOAT32 ? 4 : 2;
    const int64_t row = heads * dim + gap, words = (dim + 63) / 64, rows = batch * tokens, all = batch * heads * tokens;
    std::vector<char> x(((rows - 1) * row + heads * dim) * width), y(x.size()), grad(x.size()), grad_x(x.size());
    std::vector<float> factors(all);
    std::vector<uint64_t> bits(all * words);
    const auto at = [&](std::vector<char> &of, int64_t b, int64_t h, int64_t n, int64_t c) {
        return Number{of.data() + ((b * tokens + n) * row + h * dim + c) * width, type};
    };
    const auto rows_of = [&](std::vector<char> &of) { return hf_rows{of.data(), tokens * row, dim, row}; };
    for (int64_t b = 0; b < batch; b++)
        for (int64_t n = 0; n < tokens; n++)
            for (int64_t c = 0; c < heads * dim; c++) {
                at(x, b, 0, n, c).set((float)((int64_t)(random() % 2001) - 700) / 500);
                at(grad, b, 0, n, c).set((float)((int64_t)(random() % 2001) - 1000) / 1000);
            }
    hf_balance call{};
    call.batch = batch, call.heads = heads, call.tokens = tokens, call.dim = dim, call.threads = threads, call.type = type;
    call.centering = choice & 1, call.norm = choice >> 1, call.epsilon = 1e-6, call.window = 1;
    call.x = rows_of(x), call.y = rows_of(y), call.grad = rows_of(grad), call.grad_x = rows_of(grad_x);
    call.inverse_rms = factors.data(), call.bits = bits.data();
    on_a_new_thread([&] { expect(hf_balance_forward(&call) == 0 && hf_balance_backward(&call) == 0, "balance refused"); });
    for (int64_t b = 0; b < batch; b++)
        for (int64_t h = 0; h < heads; h++) {
            std::vector<double> mean(dim), share(dim), g(tokens * dim);
            double largest = 1; // factor of the head: errors of 16-bit numbers grow with it
            for (int64_t n = 0; n < tokens && call.centering; n++)
                for (int64_t c = 0; c < dim; c++) mean[c] += at(x, b, h, n, c).get() / (double)tokens;
            for (int64_t n = 0; n < tokens; n++) {
                double square = 0, along = 0;
                for (int64_t c = 0; c < dim; c++) square += pow(at(x, b, h, n, c).get() - mean[c], 2) / (double)dim;
                const double factor = call.norm ? 1 / sqrt(square + 1e-6) : 1;
                largest = std::max(largest, factor);
                for (int64_t c = 0; c < dim; c++) {
                    const double wanted = (at(x, b, h, n, c).get() - mean[c]) * factor, got = at(y, b, h, n, c).get();
                    expect(fabs(got - wanted) <= allowed * std::max({1.0, fabs(wanted), factor * 1e-2}), "balance of %lld tokens: %g, %g", (long long)tokens, got, wanted);
                    expect(((bits[((b * heads + h) * tokens + n) * words + c / 64] >> c % 64) & 1) == (got >= 0), "bit of %g", got);
                    g[n * dim + c] = fabs(got) <= 1 ? at(grad, b, h, n, c).get() : 0;
                    along += g[n * dim + c] * got / (double)dim;
                }
                for (int64_t c = 0; c < dim; c++) {
                    if (call.norm) g[n * dim + c] = (g[n * dim + c] - along * at(y, b, h, n, c).get()) * factor;
                    share[c] += g[n * dim + c] / (double)tokens;
                }
            }
            for (int64_t n = 0; n < tokens; n++)
                for (int64_t c = 0; c < dim; c++) {
                    const double wanted = g[n * dim + c] - (call.centering ? share[c] : 0), got = at(grad_x, b, h, n, c).get();
                    expect(fabs(got - wanted) <= allowed * std::max(largest, fabs(wanted)), "gradient of balance: %g, %g", got, wanted);
                }
        }
}

void check_balance(int64_t type) {
    std::mt19937_64 random(7);
    for (int64_t tokens : {1, 2, 131})
        for (int64_t dim : {1, 24, 100})
            for (int choice = 0; choice < 4; choice++) check_balance(random, type, 2, 3, tokens, dim, 5, choice, 3);
}

// Two calls at once, of other shapes and types, give bit for bit what each gives alone.
void check_two_calls_at_once() {
    const Shape shapes[2] = {{1, 3, 70, 520, 64, 16, 1}, {2, 2, 530, 65, 100, 20, 2}};
    std::thread threads[2];
    bool same[2] = {true, true};
    for (int t = 0; t < 2; t++)
        threads[t] = std::thread([&, t] {
            const int64_t type = t ? HF_BFLOAT16 : HF_FLOAT32;
            Inputs in(shapes[t], type, true, 1, 20 + t);
            Outputs alone(shapes[t], type, true);
            hf_forward(std::vector<hf_attention>{call_of(in, alone, 1)}.data());
            hf_backward(std::vector<hf_attention>{call_of(in, alone, 1)}.data());
            for (int repeat = 0; repeat < 10; repeat++) {
                Outputs again(shapes[t], type, true);
                const hf_attention a = call_of(in, again, 1 + repeat % 3);
                hf_forward(&a), hf_backward(&a);
                for (size_t n = 0; n < again.all().size(); n++) same[t] &= again.all()[n]->memory == alone.all()[n]->memory;
            }
        });
    for (std::thread &t : threads) t.join();
    expect(same[0] && same[1], "calls at once disturb one another");
}

void check_refusals() {
    context = "refusals";
    expect(hf_abi_version() == HF_ABI_VERSION, "version");
    expect(hf_select("abacus") == -1 && !hf_can_run("abacus"), "an unknown instruction set is chosen");
    const Shape s{1, 1, 3, 4, 5, 6, 1};
    Inputs in(s, HF_FLOAT32, true, 1, 1);
    Outputs out(s, HF_FLOAT32, true);
    const std::vector<std::function<void(hf_attention &)>> faults = {
        [](hf_attention &a) { a.head_dim = 0; }, [](hf_attention &a) { a.planes = 3; }, [](hf_attention &a) { a.type = 3; },
        [](hf_attention &a) { a.keys = 0; },     [](hf_attention &a) { a.keys = -1; },  [](hf_attention &a) { a.queries = -1; }};
    for (size_t n = 0; n < faults.size(); n++) {
        hf_attention a = call_of(in, out, 1);
        faults[n](a);
        expect(hf_forward(&a) == -3 && hf_backward(&a) == -3, "fault %zu is not refused", n);
    }
    hf_attention empty = call_of(in, out, 1);
    empty.queries = 0;
    expect(hf_forward(&empty) == 0, "a forward of no queries");
    for (Rows *r : out.all()) expect(r->guards_stand() && r->values()[0] == kSentinel, "a refused call writes");
}

void check_instruction_set(const std::string &name) {
    const Shape shapes[] = {
        {1, 1, 1, 1, 1, 1, 1},      {2, 3, 1, 63, 64, 16, 1},    {2, 2, 63, 1, 31, 16, 1},   {2, 0, 5, 7, 64, 16, 1},   {1, 2, 0, 7, 64, 16, 1},
        {2, 2, 17, 15, 65, 17, 1},  {1, 2, 65, 33, 64, 64, 1},   {1, 2, 33, 129, 100, 5, 1}, {1, 2, 31, 300, 32, 40, 1}, {1, 1, 515, 20, 64, 8, 1},
        {1, 1, 3, 2100, 64, 16, 1}, {1, 1, 5, 2305, 31, 33, 1},  {2, 2, 9, 7, 1, 16, 2},     {1, 2, 16, 17, 64, 16, 2},  {1, 2, 31, 65, 65, 33, 2},
        {1, 2, 66, 270, 100, 1, 2}, {1, 1, 64, 256, 256, 16, 1}, {1, 1, 48, 64, 33, 3, 1},
    };
    const char *types[] = {"float32", "bfloat16", "float16"};
    for (int64_t type : {HF_FLOAT32, HF_BFLOAT16, HF_FLOAT16}) {
        for (const Shape &s : shapes)
            for (bool contiguous : {true, false})
                // Scores far below their bound, near it, and so wide that rows go by the running maximum, some or all in a tile.
                for (double largest : {0.5, 1.2, 3.0, 20.0}) {
                    char text[160];
                    snprintf(text, sizeof text, "%s %s B%lld H%lld Nq%lld Nk%lld d%lld dv%lld P%lld %s w%g", name.c_str(), types[type],
                             (long long)s.batch, (long long)s.heads, (long long)s.queries, (long long)s.keys, (long long)s.head_dim,
                             (long long)s.value_dim, (long long)s.planes, contiguous ? "contiguous" : "strided", largest);
                    context = text;
                    check_against_brute_force(Inputs(s, type, contiguous, largest, 7), layout(contiguous));
                }
        context = name + " " + types[type];
        check_gradients_left_out(type);
        check_packing(type);
        check_saturation(type);
        check_balance(type);
        for (const Shape &s : {Shape{2, 2, 33, 290, 64, 16, 1}, Shape{1, 2, 130, 61, 31, 5, 1}, Shape{1, 1, 70, 520, 100, 17, 1}, Shape{1, 3, 3, 5, 65, 4, 1}})
            check_ternary_gradient(s, type);
    }
    context = name;
    check_two_calls_at_once();
}

#include "test_random.h"

// A team that never has more than two threads, as one inside another parallel region.
void small_team(void (*body)(void *), void *data, unsigned, unsigned) {
    std::thread other(body, data);
    body(data);
    other.join();
}

} // namespace

// test_kernel [random calls] [seed]
int main(int count, char **words) {
    const int64_t random_calls = count > 1 ? atoll(words[1]) : 10000;
    const uint64_t seed = count > 2 ? strtoull(words[2], nullptr, 10) : 0;
    int64_t done = 0, sets = 0;
    check_refusals();
    std::string all = hf_instruction_sets();
    for (size_t from = 0, to; from < all.size(); from = to + 1) {
        to = std::min(all.find(' ', from), all.size());
        const std::string name = all.substr(from, to - from);
        if (!hf_can_run(name.c_str())) {
            printf("%s: not on this processor\n", name.c_str());
            continue;
        }
        expect(hf_select(name.c_str()) == 0 && name == hf_selected(), "%s cannot be selected", name.c_str());
        hf_set_team(nullptr);
        check_instruction_set(name);
        hf_set_team(small_team);
        check_two_calls_at_once();
        sets++;
        hf_set_team(nullptr);
        const int64_t made = check_random_calls(name, random_calls, seed);
        done += made;
        printf("%s: done, %lld random calls\n", name.c_str(), (long long)made);
    }
    printf("random calls: %lld in %lld instruction sets, seed %llu\n", (long long)done, (long long)sets, (unsigned long long)seed);
    if (failures) fprintf(stderr, "%d failures\n", failures);
    return failures != 0;
}

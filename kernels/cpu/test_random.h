// Calls of random functions, types, shapes, strides and offsets, compared with the formulas; part of test_kernel.cpp, whose
// checks it uses. A case is made from its seed alone, which a failure prints: `test_kernel 1 SEED` makes it again.
#pragma once

using Random = std::mt19937_64;

template <class T> T one_of(Random &random, std::initializer_list<T> values) { return values.begin()[random() % values.size()]; }

// Mostly small, often beside the border of a tile or of a word.
int64_t random_size(Random &random, int64_t most) {
    const int64_t border = one_of<int64_t>(random, {1, 2, 4, 8, 16, 16, 32, 32, 48, 64, 64, 128, 256, 512});
    const int64_t size = random() % 3 ? border + (int64_t)(random() % 3) - 1 : 1 + (int64_t)(random() % 40);
    return std::min(std::max(size, (int64_t)1), most);
}

Layout random_layout(Random &random) {
    // What stands before the rows shifts them off any alignment but that of one number.
    return {random() % 2 == 0, one_of<int64_t>(random, {0, 0, 1, 3, 5, 13}), (int64_t)(random() % 9), 0};
}

void random_attention(Random &random, int64_t type) {
    Shape s{1 + (int64_t)(random() % 2), 1 + (int64_t)(random() % 3), random_size(random, 600), random_size(random, 600),
            random_size(random, 256), random_size(random, 65), 1 + (int64_t)(random() % 2)};
    if (random() % 40 == 0) (random() % 2 ? s.queries : s.heads) = 0;
    // The plain loop takes most of the time.
    while (s.groups() * s.queries * s.keys * (s.head_dim * s.planes * s.planes + s.value_dim) > 400000) (s.queries > s.keys ? s.queries : s.keys) /= 2;
    const Layout l = random_layout(random);
    const double largest = one_of(random, {0.5, 1.2, 3.0, 20.0});
    char text[200];
    snprintf(text, sizeof text, " B%lld H%lld Nq%lld Nk%lld d%lld dv%lld P%lld %s gap %lld shift %lld w%g", (long long)s.batch, (long long)s.heads,
             (long long)s.queries, (long long)s.keys, (long long)s.head_dim, (long long)s.value_dim, (long long)s.planes,
             l.contiguous ? "by head" : "by token", (long long)l.gap, (long long)l.before, largest);
    context += text;
    Inputs in(s, type, l, largest, random());
    if (random() % 2) {
        for (int64_t n = 0; n < s.groups() * s.queries; n++) in.grad_logsumexp.push_back((float)((int64_t)(random() % 401) - 200) / 100);
    }
    check_against_brute_force(in, l);
    if (s.groups() * s.queries == 0) return;
    // Any choice of gradients, into rows that lie otherwise; the others stay as they are.
    const Layout other{l.contiguous, l.gap, 1 + (int64_t)(random() % 7), kBand};
    Outputs out(s, type, other);
    hf_attention a = call_of(in, out, 1 + (int64_t)(random() % 3));
    expect(forward(a) == 0, "forward refused");
    const uint64_t choice = random();
    if (choice & 1) a.grad_query_weight = nullptr;
    if (choice & 2) a.grad_key_weight = nullptr;
    if (choice & 4 && s.planes == 1) a.grad_query = floats(out.d_query), a.grad_key = floats(out.d_key), a.seed = random(), a.straight_through = (int64_t)(random() % 2);
    expect(backward(a) == 0, "backward refused");
    check_guards(out);
    for (Rows *r : {&out.d_query_weight, &out.d_key_weight, &out.d_query, &out.d_key}) {
        const bool wanted = r == &out.d_query_weight ? a.grad_query_weight != nullptr : r == &out.d_key_weight ? a.grad_key_weight != nullptr : a.grad_query != nullptr;
        for (double x : r->values()) expect(wanted ? isfinite(x) && x != kSentinel : x == kSentinel, "a gradient that is %swanted is %g", wanted ? "" : "not ", x);
    }
}

void random_packing(Random &random, int64_t type) {
    const int64_t outer[3] = {1 + (int64_t)(random() % 2), 1 + (int64_t)(random() % 3), random_size(random, 300)}, dim = random_size(random, 260);
    const Layout l = random_layout(random);
    Rows x(outer[0], outer[1], outer[2], dim, type, l);
    x.fill_bytes_of((float)kNan);
    const int64_t words = (dim + 63) / 64, rows = outer[0] * outer[1] * outer[2];
    std::vector<uint64_t> bits(rows * words), wanted(bits.size());
    for (int64_t head = 0; head < outer[0] * outer[1]; head++)
        for (int64_t n = 0; n < outer[2]; n++)
            for (int64_t c = 0; c < dim; c++) {
                const double value = ((double)(random() % 9) - 4) / 4;
                x.at(head, n, c).set(value);
                wanted[(head * outer[2] + n) * words + c / 64] |= (uint64_t)(value >= 0) << c % 64;
            }
    const hf_rows face = x.face();
    const int64_t stride[3] = {face.batch_stride, face.head_stride, face.row_stride};
    calls++;
    on_a_new_thread([&] { expect(hf_pack_signs(face.data, type, outer, stride, dim, 1 + (int64_t)(rows % 3), bits.data()) == 0, "pack refused"); });
    expect(bits == wanted, "pack of %lld x %lld x %lld rows of %lld channels", (long long)outer[0], (long long)outer[1], (long long)outer[2], (long long)dim);
}

// At least `wanted` calls with the selected instruction set; returns how many there were.
int64_t check_random_calls(const std::string &name, int64_t wanted, uint64_t seed) {
    const int64_t before = calls;
    for (; calls - before < wanted; seed++) {
        Random random(seed);
        const int64_t type = (int64_t)(random() % 3), threads = 1 + (int64_t)(random() % 3), kind = (int64_t)(random() % 20);
        context = name + " random seed " + std::to_string(seed) + " type " + std::to_string(type);
        if (kind < 12) random_attention(random, type);
        else if (kind < 15) random_packing(random, type);
        else if (kind < 17) {
            const int64_t rows = random_size(random, 300), gap = (int64_t)(random() % 8), dim = random_size(random, 600);
            calls++;
            check_saturation(random, type, rows, gap, dim, threads);
        } else {
            const int64_t batch = 1 + (int64_t)(random() % 2), heads = 1 + (int64_t)(random() % 3), tokens = random_size(random, 200);
            const int64_t dim = random_size(random, 130), gap = (int64_t)(random() % 8);
            calls += 2;
            check_balance(random, type, batch, heads, tokens, dim, gap, (int)(random() % 4), threads);
        }
    }
    return calls - before;
}

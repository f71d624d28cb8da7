"""Device code of the backend "triton": Hamming attention as products of ±1 on matrix units (formulas: ``hamming.py``).

Signs are expanded once to int8, so a tile of S1 is one integer product, which is exact. The head size D and the value size
V are padded to powers of two; padding channels are 0 and add nothing. Scores are held in units of log 2. The letters of the
tiles: M queries, N keys.

The ternary numbers of the bit gradient are +1, 0 or -1 times the scale of their block of 64, so that their product with
signs is a product of small integers, which float16 holds exactly. Each program owns its rows and no sum is atomic:
results are the same on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_binaryformer.kernels.triton_draws import draws, place_of, ternary

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def expand_signs(bits, signs, rows, WORDS: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """Bits (rows, WORDS) int64 to signs (rows, D) int8: +1, -1, and 0 beyond HEAD_DIM."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    channel = tl.arange(0, D)
    inside = (row < rows)[:, None] & (channel < HEAD_DIM)[None, :]
    place = row.to(tl.int64)[:, None] * WORDS + (channel // 64)[None, :]
    word = tl.load(bits + place, mask=inside, other=0)
    bit = (word >> (channel % 64).to(tl.int64)[None, :]) & 1
    sign = tl.where(inside, bit * 2 - 1, 0).to(tl.int8)
    target = signs + row.to(tl.int64)[:, None] * D + channel[None, :]
    tl.store(target, sign, mask=(row < rows)[:, None])


@triton.jit
def pack_signs(x, bits, rows, stride, HEAD_DIM: tl.constexpr, WORDS: tl.constexpr, R: tl.constexpr):
    """Rows of x to words: bit j of word w is 1 where x[64 w + j] >= 0."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    word = tl.program_id(1)
    place = tl.arange(0, 64)
    channel = word * 64 + place
    inside = (row < rows)[:, None] & (channel < HEAD_DIM)[None, :]
    numbers = tl.load(x + row.to(tl.int64)[:, None] * stride + channel[None, :], mask=inside, other=-1.0)
    # Bit 63 is the sign of the word, so that the sum of the others and this bit never carries.
    ones = (numbers.to(tl.float32) >= 0).to(tl.int64) << place.to(tl.int64)[None, :]
    tl.store(bits + row.to(tl.int64) * WORDS + word, tl.sum(ones, 1), mask=row < rows)


@triton.jit
def _signs(base, rows, count, D: tl.constexpr, MASKED: tl.constexpr):
    """Load signs (rows, D) int8 of one plane of one head."""
    place = base + rows[:, None] * D + tl.arange(0, D)[None, :]
    if MASKED:
        return tl.load(place, mask=(rows < count)[:, None], other=0)
    return tl.load(place)


@triton.jit
def _numbers(base, rows, count, stride, V: tl.constexpr, VALUE_DIM: tl.constexpr):
    """Load rows (rows, V) of values or gradients; 0 beyond the last row and channel."""
    channel = tl.arange(0, V)
    place = base + rows.to(tl.int64)[:, None] * stride + channel[None, :]
    return tl.load(place, mask=(rows < count)[:, None] & (channel < VALUE_DIM)[None, :], other=0.0)


@triton.jit
def _two_planes(a0, a1, b0, b1, wb0, wb1):
    """Products of both planes of a (A, D) with the weighted planes of b (B, D): two tiles (A, B) of float32."""
    first = tl.dot(a0, b0.T, out_dtype=tl.int32) * wb0[None, :] + tl.dot(a0, b1.T, out_dtype=tl.int32) * wb1[None, :]
    second = tl.dot(a1, b0.T, out_dtype=tl.int32) * wb0[None, :] + tl.dot(a1, b1.T, out_dtype=tl.int32) * wb1[None, :]
    return first, second


@triton.jit
def _attend(
    accumulated, total, maximum,
    query, query_1, weight, weight_1,
    keys_base, key_weight, plane_keys, plane_weights, value,
    start, keys, value_stride,
    D: tl.constexpr, V: tl.constexpr, VALUE_DIM: tl.constexpr, PLANES: tl.constexpr, N: tl.constexpr,
    ONLINE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One tile of keys of the forward pass; weights of queries hold the factor of the scores."""
    j = start + tl.arange(0, N)
    key = _signs(keys_base, j, keys, D, MASKED)
    wk = tl.load(key_weight + j, mask=j < keys, other=0.0)
    if PLANES == 1:
        scores = tl.dot(query, key.T, out_dtype=tl.int32).to(tl.float32) * wk[None, :] * weight[:, None]
    else:
        key_1 = _signs(keys_base + plane_keys, j, keys, D, MASKED)
        wk_1 = tl.load(key_weight + plane_weights + j, mask=j < keys, other=0.0)
        first, second = _two_planes(query, query_1, key, key_1, wk, wk_1)
        scores = first * weight[:, None] + second * weight_1[:, None]
    if MASKED:
        scores = tl.where((j < keys)[None, :], scores, float("-inf"))
    if ONLINE:
        highest = tl.maximum(maximum, tl.max(scores, 1))
        shrink = tl.exp2(maximum - highest)
        accumulated, total, maximum = accumulated * shrink[:, None], total * shrink, highest
    p = tl.exp2(scores - maximum[:, None])
    total += tl.sum(p, 1)
    v = _numbers(value, j, keys, value_stride, V, VALUE_DIM)
    accumulated = tl.dot(p.to(v.dtype).to(DOT), v.to(DOT), accumulated, input_precision=PRECISION)
    return accumulated, total, maximum


@triton.jit
def _count(lengths, b, keys):
    """Number of keys of a sample that take part: all, unless there are lengths."""
    count = keys if lengths is None else tl.load(lengths + b).to(tl.int32)
    return count


@triton.jit
def attend(
    query_signs, key_signs, query_weight, key_weight, largest, value, output, logsumexp, lengths,
    heads, queries, keys, scale,
    value_b, value_h, value_n, output_b, output_h, output_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, D: tl.constexpr, V: tl.constexpr, PLANES: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, LIMIT: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Forward: M queries of one head a program.

    Where no score of the tile can exceed LIMIT, that bound of each row replaces the running maximum.

    Args:
        query_signs, key_signs: (B·H, PLANES, tokens, D) int8.
        query_weight, key_weight: (B·H, PLANES, tokens) float32.
        largest: (B·H) largest weight of a key (sum over planes of the absolute values).
        value, output: (B, H, tokens, VALUE_DIM), channels adjacent, other strides given.
        logsumexp: (B·H, queries) float32.
        lengths: (B) int64, how many of each sample's keys take part (the first ones); None: all.
    """
    tile, group = place_of(queries, M)
    b, h = group // heads, group % heads
    i = tile * M + tl.arange(0, M)
    inside = i < queries
    factor = scale * LOG2_E
    query_base = query_signs + group * PLANES * queries * D
    weight_base = query_weight + group * PLANES * queries
    query = _signs(query_base, i, queries, D, True)
    weight = tl.load(weight_base + i, mask=inside, other=0.0) * factor
    query_1, weight_1, size = query, weight, tl.abs(weight)
    if PLANES == 2:
        query_1 = _signs(query_base + queries * D, i, queries, D, True)
        weight_1 = tl.load(weight_base + queries + i, mask=inside, other=0.0) * factor
        size += tl.abs(weight_1)
    keys_base = key_signs + group * PLANES * keys * D
    weights_base = key_weight + group * PLANES * keys
    value += b * value_b + h * value_h
    accumulated = tl.zeros((M, V), tl.float32)
    total = tl.zeros((M,), tl.float32)
    bound = HEAD_DIM * size * tl.load(largest + group)
    count = _count(lengths, b, keys)
    whole = count // N * N
    if tl.max(bound, 0) <= LIMIT:
        maximum = bound
        for start in range(0, whole, N):
            accumulated, total, maximum = _attend(
                accumulated, total, maximum, query, query_1, weight, weight_1, keys_base, weights_base, keys * D, keys,
                value, start, count, value_n, D, V, VALUE_DIM, PLANES, N, False, False, PRECISION, DOT,
            )  # fmt: skip
        if whole < count:
            accumulated, total, maximum = _attend(
                accumulated, total, maximum, query, query_1, weight, weight_1, keys_base, weights_base, keys * D, keys,
                value, whole, count, value_n, D, V, VALUE_DIM, PLANES, N, False, True, PRECISION, DOT,
            )  # fmt: skip
    else:
        maximum = tl.full((M,), float("-inf"), tl.float32)
        for start in range(0, count, N):
            accumulated, total, maximum = _attend(
                accumulated, total, maximum, query, query_1, weight, weight_1, keys_base, weights_base, keys * D, keys,
                value, start, count, value_n, D, V, VALUE_DIM, PLANES, N, True, True, PRECISION, DOT,
            )  # fmt: skip
    channel = tl.arange(0, V)
    target = output + b * output_b + h * output_h + i.to(tl.int64)[:, None] * output_n + channel[None, :]
    if lengths is not None:  # without keys the output is 0
        maximum = tl.where(total == 0, float("-inf"), maximum)
        total = tl.where(total == 0, 1.0, total)
    result = (accumulated / total[:, None]).to(output.dtype.element_ty)
    tl.store(target, result, mask=inside[:, None] & (channel < VALUE_DIM)[None, :])
    tl.store(logsumexp + group * queries + i, (maximum + tl.log2(total)) * LN_2, mask=inside)


@triton.jit
def backward_of_keys(
    query_signs, key_signs, query_weight, key_weight, value, grad_output, logsumexp, delta, lengths,
    grad_value, grad_key_weight, grad_key, hashes,
    heads, queries, keys, scale,
    value_b, value_h, value_n, output_b, output_h, output_n, grad_value_b, grad_value_h, grad_value_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, D: tl.constexpr, V: tl.constexpr, PLANES: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr, BIT_GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of values, key weights and key signs: N keys of one head a program, M queries (64: a block of draws) a step.

    Args:
        grad_output: (B, H, queries, VALUE_DIM), channels adjacent.
        delta: (B·H, queries) float32, sum of grad_output times output less the gradient of the log-sum-exp.
        grad_value: (B, H, keys, VALUE_DIM); grad_key_weight: (B·H, PLANES, keys); grad_key: (B·H, keys, HEAD_DIM).
        hashes: (B·H, queries) of :func:`hash_rows`, read for the ternary gradient.
    """
    tile, group = place_of(keys, N)
    b, h = group // heads, group % heads
    j = tile * N + tl.arange(0, N)
    inside = j < keys
    factor = scale * LOG2_E
    keys_base = key_signs + group * PLANES * keys * D
    key = _signs(keys_base, j, keys, D, True)
    wk = tl.load(key_weight + group * PLANES * keys + j, mask=inside, other=0.0)
    key_1, wk_1 = key, wk
    if PLANES == 2:
        key_1 = _signs(keys_base + keys * D, j, keys, D, True)
        wk_1 = tl.load(key_weight + (group * PLANES + 1) * keys + j, mask=inside, other=0.0)
    v = _numbers(value + b * value_b + h * value_h, j, keys, value_n, V, VALUE_DIM).to(DOT)
    grad_output += b * output_b + h * output_h
    query_base = query_signs + group * PLANES * queries * D
    weight_base = query_weight + group * PLANES * queries
    d_value = tl.zeros((N, V), tl.float32)
    d_weight = tl.zeros((N,), tl.float32)
    d_weight_1 = tl.zeros((N,), tl.float32)
    d_key = tl.zeros((N, D), tl.float32)
    count = _count(lengths, b, keys)
    end = queries
    if lengths is not None:
        end = tl.where(tile * N < count, queries, 0)
    for start in range(0, end, M):
        i = start + tl.arange(0, M)
        query = _signs(query_base, i, queries, D, True)
        wq = tl.load(weight_base + i, mask=i < queries, other=0.0)
        # Rows beyond the last have no weights and no gradients, and so add nothing.
        lse = tl.load(logsumexp + group * queries + i, mask=i < queries, other=0.0) * LOG2_E
        dlt = tl.load(delta + group * queries + i, mask=i < queries, other=0.0)
        d_out = _numbers(grad_output, i, queries, output_n, V, VALUE_DIM)
        if PLANES == 1:
            product = tl.dot(key, query.T, out_dtype=tl.int32).to(tl.float32) * wq[None, :]  # (N, M)
            scores = product * (wk * factor)[:, None]
            product_1 = product
        else:
            query_1 = _signs(query_base + queries * D, i, queries, D, True)
            wq_1 = tl.load(weight_base + queries + i, mask=i < queries, other=0.0)
            product, product_1 = _two_planes(key, key_1, query, query_1, wq, wq_1)
            scores = product * (wk * factor)[:, None] + product_1 * (wk_1 * factor)[:, None]
        p = tl.exp2(scores - lse[None, :])
        if lengths is not None:
            p = tl.where((j < count)[:, None], p, 0.0)
        d_value = tl.dot(p.to(d_out.dtype).to(DOT), d_out.to(DOT), d_value, input_precision=PRECISION)
        d_p = tl.dot(v, d_out.to(DOT).T, input_precision=PRECISION)
        d_scores = p * (d_p - dlt[None, :])
        if WEIGHT_GRADIENT and (BIT_GRADIENT != "ste" or tl.float16 == DOT):
            poison = tl.sum(d_scores * product, 1)
            d_weight += poison
            if PLANES == 2:
                d_weight_1 += tl.sum(d_scores * product_1, 1)
        if BIT_GRADIENT == "ste":
            g = d_scores * wq[None, :]
            d_key = tl.dot(g.to(d_out.dtype).to(DOT), query.to(DOT), d_key, input_precision=PRECISION)
        if BIT_GRADIENT == "ternary":
            row = tl.load(hashes + group * queries + i, mask=i < queries, other=0).to(tl.uint32, bitcast=True)
            if not WEIGHT_GRADIENT:
                poison = tl.sum(d_scores, 1)
            t, size = ternary(d_scores * wq[None, :], draws(row[None, :], j[:, None]), poison)
            d_key += size[:, None] * tl.dot(t, query.to(tl.float16))
    if WEIGHT_GRADIENT and BIT_GRADIENT == "ste" and tl.float16 != DOT:
        # The sum over queries is in the signs' gradient already, which saves the registers of a tile. float16 loses small
        # gradients there.
        d_weight = tl.sum(d_key * key.to(tl.float32), 1)
    channel = tl.arange(0, V)
    target = (
        grad_value + b * grad_value_b + h * grad_value_h + j.to(tl.int64)[:, None] * grad_value_n + channel[None, :]
    )
    mask = inside[:, None] & (channel < VALUE_DIM)[None, :]
    tl.store(target, d_value.to(grad_value.dtype.element_ty), mask=mask)
    if WEIGHT_GRADIENT:
        tl.store(grad_key_weight + group * PLANES * keys + j, d_weight * scale, mask=inside)
        if PLANES == 2:
            tl.store(grad_key_weight + (group * PLANES + 1) * keys + j, d_weight_1 * scale, mask=inside)
    if BIT_GRADIENT != "none":
        channel_d = tl.arange(0, D)
        place = grad_key + (group * keys + j)[:, None] * HEAD_DIM + channel_d[None, :]
        tl.store(place, d_key * (wk * scale)[:, None], mask=inside[:, None] & (channel_d < HEAD_DIM)[None, :])


@triton.jit
def _step_of_queries(
    d_weight, d_weight_1, d_query,
    query, query_1, wq, wq_1, lse, dlt, d_out, keys_base, weights_base, value, row,
    start, count, keys, value_n, factor,
    D: tl.constexpr, V: tl.constexpr, VALUE_DIM: tl.constexpr, PLANES: tl.constexpr, N: tl.constexpr,
    MASKED: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr, BIT_GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """One tile of keys of :func:`backward_of_queries`."""
    j = start + tl.arange(0, N)
    key = _signs(keys_base, j, count, D, MASKED)
    wk = tl.load(weights_base + j, mask=j < count, other=0.0)
    v = _numbers(value, j, count, value_n, V, VALUE_DIM)
    if PLANES == 1:
        product = tl.dot(query, key.T, out_dtype=tl.int32).to(tl.float32) * wk[None, :]  # (M, N)
        product_1 = product
        scores = product * (wq * factor)[:, None]
    else:
        key_1 = _signs(keys_base + keys * D, j, count, D, MASKED)
        wk_1 = tl.load(weights_base + keys + j, mask=j < count, other=0.0)
        product, product_1 = _two_planes(query, query_1, key, key_1, wk, wk_1)
        scores = product * (wq * factor)[:, None] + product_1 * (wq_1 * factor)[:, None]
    if MASKED:
        scores = tl.where((j < count)[None, :], scores, float("-inf"))
    p = tl.exp2(scores - lse[:, None])
    d_scores = p * (tl.dot(d_out, v.to(DOT).T, input_precision=PRECISION) - dlt[:, None])
    if WEIGHT_GRADIENT and (BIT_GRADIENT != "ste" or tl.float16 == DOT):
        poison = tl.sum(d_scores * product, 1)
        d_weight += poison
        if PLANES == 2:
            d_weight_1 += tl.sum(d_scores * product_1, 1)
    if BIT_GRADIENT == "ste":
        g = d_scores * wk[None, :]
        d_query = tl.dot(g.to(v.dtype).to(DOT), key.to(DOT), d_query, input_precision=PRECISION)
    if BIT_GRADIENT == "ternary":
        if not WEIGHT_GRADIENT:
            poison = tl.sum(d_scores, 1)
        t, size = ternary(d_scores * wk[None, :], draws(row[:, None], j[None, :]), poison)
        d_query += size[:, None] * tl.dot(t, key.to(tl.float16))
    return d_weight, d_weight_1, d_query


@triton.jit
def backward_of_queries(
    query_signs, key_signs, query_weight, key_weight, value, grad_output, logsumexp, delta, lengths,
    grad_query_weight, grad_query, hashes,
    heads, queries, keys, scale,
    value_b, value_h, value_n, output_b, output_h, output_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, D: tl.constexpr, V: tl.constexpr, PLANES: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr, BIT_GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of query weights and query signs: M queries of one head a program, N keys (64: a block of draws) a step."""
    tile, group = place_of(queries, M)
    b, h = group // heads, group % heads
    i = tile * M + tl.arange(0, M)
    inside = i < queries
    factor = scale * LOG2_E
    query_base = query_signs + group * PLANES * queries * D
    weight_base = query_weight + group * PLANES * queries
    query = _signs(query_base, i, queries, D, True)
    wq = tl.load(weight_base + i, mask=inside, other=0.0)
    query_1, wq_1 = query, wq
    if PLANES == 2:
        query_1 = _signs(query_base + queries * D, i, queries, D, True)
        wq_1 = tl.load(weight_base + queries + i, mask=inside, other=0.0)
    lse = tl.load(logsumexp + group * queries + i, mask=inside, other=0.0) * LOG2_E
    dlt = tl.load(delta + group * queries + i, mask=inside, other=0.0)
    d_out = _numbers(grad_output + b * output_b + h * output_h, i, queries, output_n, V, VALUE_DIM).to(DOT)
    keys_base = key_signs + group * PLANES * keys * D
    weights_base = key_weight + group * PLANES * keys
    value += b * value_b + h * value_h
    d_weight = tl.zeros((M,), tl.float32)
    d_weight_1 = tl.zeros((M,), tl.float32)
    d_query = tl.zeros((M, D), tl.float32)
    row = wq
    if BIT_GRADIENT == "ternary":
        row = tl.load(hashes + group * queries + i, mask=inside, other=0).to(tl.uint32, bitcast=True)
    count = _count(lengths, b, keys)
    whole = count // N * N
    for start in range(0, whole, N):
        d_weight, d_weight_1, d_query = _step_of_queries(
            d_weight, d_weight_1, d_query, query, query_1, wq, wq_1, lse, dlt, d_out, keys_base, weights_base, value, row,
            start, count, keys, value_n, factor, D, V, VALUE_DIM, PLANES, N, False, WEIGHT_GRADIENT, BIT_GRADIENT, PRECISION, DOT,
        )  # fmt: skip
    if whole < count:
        d_weight, d_weight_1, d_query = _step_of_queries(
            d_weight, d_weight_1, d_query, query, query_1, wq, wq_1, lse, dlt, d_out, keys_base, weights_base, value, row,
            whole, count, keys, value_n, factor, D, V, VALUE_DIM, PLANES, N, True, WEIGHT_GRADIENT, BIT_GRADIENT, PRECISION, DOT,
        )  # fmt: skip
    if WEIGHT_GRADIENT and BIT_GRADIENT == "ste" and tl.float16 != DOT:
        d_weight = tl.sum(d_query * query.to(tl.float32), 1)
    if WEIGHT_GRADIENT:
        tl.store(grad_query_weight + group * PLANES * queries + i, d_weight * scale, mask=inside)
        if PLANES == 2:
            tl.store(grad_query_weight + (group * PLANES + 1) * queries + i, d_weight_1 * scale, mask=inside)
    if BIT_GRADIENT != "none":
        channel = tl.arange(0, D)
        place = grad_query + (group * queries + i)[:, None] * HEAD_DIM + channel[None, :]
        tl.store(place, d_query * (wq * scale)[:, None], mask=inside[:, None] & (channel < HEAD_DIM)[None, :])

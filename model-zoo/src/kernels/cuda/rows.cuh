// Kernels that go over rows of activations once.
#pragma once
#include "common.cuh"
#include "ffn.cuh"
#include "place.cuh"
#include "quantized.cuh"

struct EmbedParams {
    const void *table;      // [vocab, width], in `format`
    const uint32_t *tokens; // [tokens]
    float *x;               // [tokens, width]
    uint32_t width;
    float scale;
    uint32_t format, pad;
};

DEVICE void embed_one(const EmbedParams &p, uint32_t token, uint32_t i) {
    const uint32_t row = p.tokens[token];
    float value;
    if (p.format == WEIGHT_BF16) {
        value = to_float(static_cast<const bf16 *>(p.table)[static_cast<size_t>(row) * p.width + i]);
    } else {
        value = quantized_weight({static_cast<const unsigned char *>(p.table), 0, p.format}, p.width, row, i);
    }
    p.x[static_cast<size_t>(token) * p.width + i] = p.scale * value;
}

// x[token] = scale * table[tokens[token]]; one block a token.
KERNEL(embed, EmbedParams, 256, 1) {
    lead();
    follow();
    for (uint32_t i = threadIdx.x; i < p.width; i += blockDim.x) embed_one(p, blockIdx.x, i);
}

struct PutParams {
    const float *rows;      // [rows, width]
    const uint32_t *tokens; // [rows]
    float *x;               // [step tokens, width]
    uint32_t width, pad;
};

// x[tokens[i]] = rows[i]; one block a row.
KERNEL(put_rows, PutParams, 256, 1) {
    lead();
    follow();
    const float *row = p.rows + static_cast<size_t>(blockIdx.x) * p.width;
    float *x = p.x + static_cast<size_t>(p.tokens[blockIdx.x]) * p.width;
    for (uint32_t i = threadIdx.x; i < p.width; i += blockDim.x) x[i] = row[i];
}

struct RotaryParams {
    const float *frequencies;  // [half], radians a position
    const uint32_t *positions; // [tokens]
    float2 *table;             // cos and sin, [tokens, half]
    uint32_t half;
    float magnitude;
};

DEVICE void rotary_one(const RotaryParams &p, uint32_t token, uint32_t i) {
    float s, c;
    sincosf_(static_cast<float>(p.positions[token]) * p.frequencies[i], &s, &c);
    p.table[static_cast<size_t>(token) * p.half + i] = make_float2(c * p.magnitude, s * p.magnitude);
}

// One block a token.
KERNEL(rotary, RotaryParams, 128, 1) {
    lead();
    follow();
    for (uint32_t i = threadIdx.x; i < p.half; i += blockDim.x) rotary_one(p, blockIdx.x, i);
}

struct NormParams {
    const float *x;        // [step tokens, width]
    const uint32_t *index; // [tokens], or null
    const float *weight;   // [width]
    bf16 *out;             // [tokens, width]
    uint32_t width;
    float eps;
};

// out[token] = x[index[token]] / rms * weight; one block a token.
KERNEL(rms_norm, NormParams, 256, 1) {
    lead();
    follow();
    SHARED(float, scratch);
    const uint32_t at = p.index != nullptr ? p.index[blockIdx.x] : blockIdx.x;
    const float *x = p.x + static_cast<size_t>(at) * p.width;
    bf16 *out = p.out + static_cast<size_t>(blockIdx.x) * p.width;
    float squares = 0.0f;
    for (uint32_t i = threadIdx.x * 4; i < p.width; i += blockDim.x * 4) {
        const float4 v = load<float4>(x + i);
        squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    const float scale = rsqrtf(block_sum(squares, scratch) / p.width + p.eps);
    for (uint32_t i = threadIdx.x * 4; i < p.width; i += blockDim.x * 4) {
        const float4 v = load<float4>(x + i), w = load<float4>(p.weight + i);
        *reinterpret_cast<uint2 *>(out + i) =
            make_uint2(pack(v.x * scale * w.x, v.y * scale * w.y), pack(v.z * scale * w.z, v.w * scale * w.w));
    }
}

struct AddParams {
    const float *y;        // [tokens, width], or null for zeros
    const float *bias;     // [width], or null
    const float *norm;     // [width], or null: an RMSNorm of y and bias before they are added
    const uint32_t *index; // [tokens], or null
    float *x;              // [step tokens, width]
    uint32_t width;
    float eps;
};

// x[index[token]] += norm(y[token] + bias); one block a token.
KERNEL(add_rows, AddParams, 256, 1) {
    lead();
    follow();
    SHARED(float, scratch);
    const uint32_t at = p.index != nullptr ? p.index[blockIdx.x] : blockIdx.x;
    float *x = p.x + static_cast<size_t>(at) * p.width;
    const float *y = p.y != nullptr ? p.y + static_cast<size_t>(blockIdx.x) * p.width : nullptr;
    auto value = [&](uint32_t i) { return (y != nullptr ? y[i] : 0.0f) + (p.bias != nullptr ? p.bias[i] : 0.0f); };
    float scale = 1.0f;
    if (p.norm != nullptr) {
        float squares = 0.0f;
        for (uint32_t i = threadIdx.x; i < p.width; i += blockDim.x) squares += value(i) * value(i);
        scale = rsqrtf(block_sum(squares, scratch) / p.width + p.eps);
    }
    for (uint32_t i = threadIdx.x; i < p.width; i += blockDim.x)
        x[i] += value(i) * scale * (p.norm != nullptr ? p.norm[i] : 1.0f);
}

struct ActivateParams {
    const bf16 *gate_up; // [tokens, 2 * width]: of every sixteen, eight gates and eight values
    const float *bias;   // [2 * width], or null
    bf16 *out;           // [tokens, width]
    const uint32_t *index; // [tokens], or null
    uint32_t width, activation;
    Skips skips;
};

// One block a token; width is a multiple of 8.
KERNEL(activate_rows, ActivateParams, 256, 1) {
    lead();
    follow();
    const bf16 *row = p.gate_up + static_cast<size_t>(blockIdx.x) * 2 * p.width;
    bf16 *out = p.out + static_cast<size_t>(blockIdx.x) * p.width;
    // A token that leaves the FFN out adds nothing.
    const bool out_of_it = p.skips.of(p.index != nullptr ? p.index[blockIdx.x] : blockIdx.x);
    for (uint32_t i = threadIdx.x; i < p.width / 8; i += blockDim.x) {
        if (out_of_it) {
            *reinterpret_cast<uint4 *>(out + 8 * i) = make_uint4(0, 0, 0, 0);
            continue;
        }
        const uint4 gates = load<uint4>(row + 16 * i), values = load<uint4>(row + 16 * i + 8);
        const uint32_t g[4] = {gates.x, gates.y, gates.z, gates.w}, v[4] = {values.x, values.y, values.z, values.w};
        uint32_t result[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float a[2] = {low(g[j]), high(g[j])}, b[2] = {low(v[j]), high(v[j])};
            if (p.bias != nullptr)
                for (int e = 0; e < 2; e++) {
                    a[e] += p.bias[16 * i + 2 * j + e];
                    b[e] += p.bias[16 * i + 8 + 2 * j + e];
                }
            result[j] = pack(activate(a[0], p.activation) * b[0], activate(a[1], p.activation) * b[1]);
        }
        *reinterpret_cast<uint4 *>(out + 8 * i) = make_uint4(result[0], result[1], result[2], result[3]);
    }
}

struct PlaceRowsParams {
    const bf16 *qkv;       // [tokens, (heads + 2 * kv_heads) * head_dim]
    const float *bias;     // [(heads + 2 * kv_heads) * head_dim], or null
    const float *q_norm;   // [head_dim] in tile order, or null: RMSNorm of each query head before it turns
    const float *k_norm;   // the same of keys
    const uint32_t *index; // [tokens], or null
    float eps;
    uint32_t pad;
    PlaceParams place;
};

// Sixteen outputs of a token from output `row` on, a tile of one head, turned and written where they belong.
DEVICE void place_tile(const PlaceRowsParams &p, PlaceTarget target, uint32_t token, uint32_t step_token, uint32_t row) {
    const PlaceParams &place = p.place;
    const uint32_t d = place.head_dim, q_width = place.heads * d, kv_width = place.kv_heads * d;
    const bf16 *from = p.qkv + static_cast<size_t>(token) * (q_width + 2 * kv_width) + row;
    const uint4 firsts = load<uint4>(from), seconds = load<uint4>(from + 8);
    const uint32_t x[4] = {firsts.x, firsts.y, firsts.z, firsts.w}, y[4] = {seconds.x, seconds.y, seconds.z, seconds.w};
    float a[8], b[8];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        a[2 * j] = low(x[j]), a[2 * j + 1] = high(x[j]);
        b[2 * j] = low(y[j]), b[2 * j + 1] = high(y[j]);
    }
    if (p.bias != nullptr)
#pragma unroll
        for (int j = 0; j < 8; j++) a[j] += p.bias[row + j], b[j] += p.bias[row + 8 + j];
    if (row < q_width + kv_width) {
        const float2 *turns = place.table + step_token * (d / 2) + row % d / 2;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float2 turn = turns[j];
            const float turned = a[j] * turn.x - b[j] * turn.y;
            b[j] = b[j] * turn.x + a[j] * turn.y;
            a[j] = turned;
        }
    }
    const uint4 first = make_uint4(pack(a[0], a[1]), pack(a[2], a[3]), pack(a[4], a[5]), pack(a[6], a[7]));
    const uint4 second = make_uint4(pack(b[0], b[1]), pack(b[2], b[3]), pack(b[4], b[5]), pack(b[6], b[7]));
    if (row < q_width) {
        bf16 *q = place.q + static_cast<size_t>(token) * q_width + row;
        *reinterpret_cast<uint4 *>(q) = first;
        *reinterpret_cast<uint4 *>(q + 8) = second;
        return;
    }
    if (target.page == nullptr) return;
    row -= q_width;
    if (row < kv_width) {
        bf16 *k = target.page + (row / d * place.block_size + target.slot) * d + row % d;
        *reinterpret_cast<uint4 *>(k) = first;
        *reinterpret_cast<uint4 *>(k + 8) = second;
        return;
    }
    bf16 *v = target.page + static_cast<size_t>(row) * place.block_size + target.slot;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        v[j * place.block_size] = to_bf16(a[j]);
        v[(j + 8) * place.block_size] = to_bf16(b[j]);
    }
}

// Norms and turns heads, and writes them where they belong; one block a token, one warp a head.
KERNEL(place_rows, PlaceRowsParams, 256, 1) {
    lead();
    follow();
    const uint32_t d = p.place.head_dim, heads = p.place.heads, all = heads + 2 * p.place.kv_heads;
    const uint32_t lane = threadIdx.x % 32, token = blockIdx.x;
    const uint32_t step_token = p.index != nullptr ? p.index[token] : token;
    const PlaceTarget target = place_target(p.place, step_token);
    if (p.q_norm == nullptr && p.k_norm == nullptr) {
        for (uint32_t tile = threadIdx.x; tile < all * d / 16; tile += blockDim.x)
            place_tile(p, target, token, step_token, tile * 16);
        return;
    }
    const bf16 *row = p.qkv + static_cast<size_t>(token) * all * d;
    auto value = [&](uint32_t i) { return to_float(row[i]) + (p.bias != nullptr ? p.bias[i] : 0.0f); };
    for (uint32_t head = threadIdx.x / 32; head < all; head += blockDim.x / 32) {
        const float *norm = head < heads ? p.q_norm : head < heads + p.place.kv_heads ? p.k_norm : nullptr;
        float scale = 1.0f;
        if (norm != nullptr) {
            float squares = 0.0f;
            for (uint32_t i = lane; i < d; i += 32) squares += value(head * d + i) * value(head * d + i);
            scale = rsqrtf(lanes_sum<1, 32>(squares) / d + p.eps);
        }
        for (uint32_t i = lane; i < d / 2; i += 32) {
            const uint32_t channel = i / 8 * 16 + i % 8;
            float a = value(head * d + channel), b = value(head * d + channel + 8);
            if (norm != nullptr) a *= scale * norm[channel], b *= scale * norm[channel + 8];
            const uint32_t at = head * d + channel;
            place_pair(p.place, target, place_turn(p.place, step_token, at), token, at, a, b);
        }
    }
}

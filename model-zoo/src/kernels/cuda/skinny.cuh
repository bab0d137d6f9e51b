// Products of a weight matrix with up to eight rows of activations, and what comes before and after them.
//
// A block takes sixteen rows of weights; its warps share their columns. A lane reads sixteen bytes of rows g and g + 8
// at a time: eight neighbouring columns, which the tensor cores take in any order as long as both operands have the
// same. So weights go from memory to the tensor cores through registers alone, and columns of a product never meet:
// a token's result does not depend on what else is in the step.
#pragma once
#include "common.cuh"
#include "ffn.cuh"
#include "place.cuh"

struct SkinnyParams {
    const bf16 *weight;     // [rows, cols]; cols is a multiple of 8
    const void *x;          // bf16 [tokens, cols], or f32 [step tokens, cols] where it is normed first
    const float *norm;      // [cols]: weights of the RMSNorm
    const float *bias;      // [rows], or null
    void *out;
    const uint32_t *index;  // [tokens]: where a token lies among the step's; null when it lies at its own place
    uint32_t rows, cols, tokens, activation;
    float eps;
    uint32_t pad;
    Skips skips;
    PlaceParams place;
};

constexpr unsigned SKINNY_THREADS = 256, SKINNY_TOKENS = 8, SKINNY_STRIDE = 20, SKINNY_UNROLL = 3;

// out[token, row] = y, bf16
struct StoreHalf {
    static DEVICE void pair(const SkinnyParams &p, uint32_t token, uint32_t, uint32_t row, float a, float b) {
        bf16 *out = static_cast<bf16 *>(p.out) + static_cast<size_t>(token) * p.rows + row;
        if (row < p.rows) out[0] = to_bf16(a);
        if (row + 8 < p.rows) out[8] = to_bf16(b);
    }
};
// out[token, row] = y, f32
struct StoreFloat {
    static DEVICE void pair(const SkinnyParams &p, uint32_t token, uint32_t, uint32_t row, float a, float b) {
        float *out = static_cast<float *>(p.out) + static_cast<size_t>(token) * p.rows + row;
        if (row < p.rows) out[0] = a;
        if (row + 8 < p.rows) out[8] = b;
    }
};
// out[step token, row] += y, f32
struct AddFloat {
    static DEVICE void pair(const SkinnyParams &p, uint32_t, uint32_t step_token, uint32_t row, float a, float b) {
        float *out = static_cast<float *>(p.out) + static_cast<size_t>(step_token) * p.rows + row;
        if (row < p.rows) out[0] += a;
        if (row + 8 < p.rows) out[8] += b;
    }
};
// Of every sixteen rows eight are gates and eight the values that they let through.
struct Gate {
    static DEVICE void pair(const SkinnyParams &p, uint32_t token, uint32_t step_token, uint32_t row, float a, float b) {
        bf16 *out = static_cast<bf16 *>(p.out) + static_cast<size_t>(token) * (p.rows / 2);
        // A token that leaves the FFN out adds nothing.
        const bool out_of_it = p.skips.of(step_token);
        if (row + 8 < p.rows) out[row / 16 * 8 + row % 16] = out_of_it ? 0 : to_bf16(activate(a, p.activation) * b);
    }
};
// The joint product of Q, K and V, turned, to where they belong.
struct Place {
    static DEVICE void pair(const SkinnyParams &p, uint32_t token, uint32_t step_token, uint32_t row, float a, float b) {
        const PlaceTarget target = place_target(p.place, step_token);
        place_pair(p.place, target, place_turn(p.place, step_token, row), token, row, a, b);
    }
};

// Eight columns of one token, as bf16; `squares` gathers the squares of what they were before the norm's weights.
template <bool NORM>
DEVICE uint4 skinny_x(const SkinnyParams &p, const void *row, uint32_t column, bool counts, float &squares) {
    if (!NORM) return load<uint4>(static_cast<const bf16 *>(row) + column);
    const float *x = static_cast<const float *>(row) + column, *w = p.norm + column;
    float v[8], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        const float4 a = load<float4>(x + i), b = load<float4>(w + i);
        sum += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w;
        v[i] = a.x * b.x, v[i + 1] = a.y * b.y, v[i + 2] = a.z * b.z, v[i + 3] = a.w * b.w;
    }
    squares += counts ? sum : 0.0f;
    return make_uint4(pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]));
}

template <bool NORM, class Epilogue>
DEVICE void skinny(const SkinnyParams &p) {
    constexpr uint32_t WARPS = SKINNY_THREADS / 32, PART = SKINNY_TOKENS * SKINNY_STRIDE;
    constexpr uint32_t CHUNK = 32, STRIDE = WARPS * CHUNK, ROUND = STRIDE * SKINNY_UNROLL;
    lead();
    SHARED(float, parts);  // [WARPS][SKINNY_TOKENS][SKINNY_STRIDE], then [WARPS][SKINNY_TOKENS]
    float *sums = parts + WARPS * PART;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t row = blockIdx.x * 16 + g;
    const bf16 *weights[2] = {p.weight + static_cast<size_t>(row) * p.cols,
                              p.weight + static_cast<size_t>(row + 8) * p.cols};
    const bool has[2] = {row < p.rows, row + 8 < p.rows};
    // Loads run ahead by a round: what is used is read again for the next one at once.
    uint4 w[SKINNY_UNROLL][2];
    auto fetch = [&](uint4 (&to)[2], uint32_t column) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const bool inside = column < p.cols && has[half];
            to[half] = inside ? load_stream(weights[half] + column) : make_uint4(0, 0, 0, 0);
        }
    };
    const uint32_t begin = warp * CHUNK + 8 * t;
#pragma unroll
    for (uint32_t u = 0; u < SKINNY_UNROLL; u++) fetch(w[u], begin + u * STRIDE);
    follow();
    if (p.skips.all()) return;
    // Where there is no token the last one stands in: nobody looks at its result. What is normed lies among the step's
    // tokens; all else lies densely.
    const uint32_t own = min(g, p.tokens - 1), at = NORM && p.index != nullptr ? p.index[own] : own;
    const void *x = static_cast<const char *>(p.x) + static_cast<size_t>(at) * p.cols * (NORM ? 4 : 2);
    float c[4] = {}, squares = 0.0f;
    // All warps take part in all rounds; past the end weights are zeros, and some column stands in.
    for (uint32_t base = 0; base < p.cols; base += ROUND) {
#pragma unroll
        for (uint32_t u = 0; u < SKINNY_UNROLL; u++) {
            const uint32_t column = base + begin + u * STRIDE;
            const bool inside = column < p.cols;
            const uint4 a = w[u][0], b = w[u][1];
            const uint4 v = skinny_x<NORM>(p, x, inside ? column : 0, inside, squares);
            mma(c, {a.x, b.x, a.y, b.y}, {v.x, v.y});
            mma(c, {a.z, b.z, a.w, b.w}, {v.z, v.w});
            fetch(w[u], column + ROUND);
        }
    }
    float *part = parts + warp * PART + 2 * t * SKINNY_STRIDE + g;
    part[0] = c[0];
    part[SKINNY_STRIDE] = c[1];
    part[8] = c[2];
    part[SKINNY_STRIDE + 8] = c[3];
    if (NORM) {
        const float sum = lanes_sum<1, 4>(squares);
        if (t == 0) sums[warp * SKINNY_TOKENS + g] = sum;
    }
    __syncthreads();
    const uint32_t token = threadIdx.x / 8, j = threadIdx.x % 8, out = blockIdx.x * 16 + j;
    if (token >= p.tokens) return;
    float a = 0.0f, b = 0.0f, sum = 0.0f;
#pragma unroll
    for (uint32_t w = 0; w < WARPS; w++) {
        a += parts[w * PART + token * SKINNY_STRIDE + j];
        b += parts[w * PART + token * SKINNY_STRIDE + j + 8];
        if (NORM) sum += sums[w * SKINNY_TOKENS + token];
    }
    if (NORM) {
        const float scale = rsqrtf(sum / p.cols + p.eps);
        a *= scale, b *= scale;
    }
    if (p.bias != nullptr) {
        if (out < p.rows) a += p.bias[out];
        if (out + 8 < p.rows) b += p.bias[out + 8];
    }
    Epilogue::pair(p, token, p.index != nullptr ? p.index[token] : token, out, a, b);
}

#define SKINNY(name, norm, Epilogue) \
    KERNEL(skinny_##name, SkinnyParams, SKINNY_THREADS, 3) { skinny<norm, Epilogue>(p); }

SKINNY(norm_place, true, Place)
SKINNY(norm_half, true, StoreHalf)
SKINNY(norm_gate, true, Gate)
SKINNY(norm_float, true, StoreFloat)
SKINNY(add, false, AddFloat)
SKINNY(float, false, StoreFloat)

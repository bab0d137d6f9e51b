// Products of quantized weights with up to 32 tokens at a time, and matrices made whole for products with more.
#pragma once
#include "quantized.cuh"
#include "skinny.cuh"

// What comes after a product.
enum AfterProduct : uint32_t { AFTER_FLOAT, AFTER_HALF, AFTER_ADD, AFTER_GATE, AFTER_PLACE };

struct QuantizedParams {
    SkinnyParams skinny;  // of dense bf16 activations
    QuantizedMatrix matrix;
    uint32_t after, pad;
};

constexpr unsigned QUANTIZED_THREADS = 256, QUANTIZED_TOKENS = 32;

DEVICE void quantized_pair(const QuantizedParams &p, uint32_t token, uint32_t row, float a, float b) {
    const SkinnyParams &s = p.skinny;
    const uint32_t step_token = s.index != nullptr ? s.index[token] : token;
    if (p.after == AFTER_FLOAT) StoreFloat::pair(s, token, step_token, row, a, b);
    else if (p.after == AFTER_HALF) StoreHalf::pair(s, token, step_token, row, a, b);
    else if (p.after == AFTER_ADD) AddFloat::pair(s, token, step_token, row, a, b);
    else if (p.after == AFTER_GATE) Gate::pair(s, token, step_token, row, a, b);
    else Place::pair(s, token, step_token, row, a, b);
}

// The warp's units of a tile of rows, in turn with the others; the next one is under way while one is multiplied.
template <uint32_t FORMAT, uint32_t TILES>
DEVICE void quantized_units(float (&sums)[TILES][4], const unsigned char *units, uint32_t cols, const bf16 *const (&x)[TILES]) {
    constexpr uint32_t WARPS = QUANTIZED_THREADS / 32;
    const uint32_t count = units_of(cols);
    auto load16 = [](const unsigned char *at) { return load_stream(at); };
    QuantizedUnit<FORMAT> next;
    uint32_t u = threadIdx.x / 32;
    if (u < count) next.fetch(units + u * unit_bytes(FORMAT), load16);
    follow();
    for (; u < count; u += WARPS) {
        const QuantizedUnit<FORMAT> unit = next;
        if (u + WARPS < count) next.fetch(units + (u + WARPS) * unit_bytes(FORMAT), load16);
        // Past the last column there are no activations; weights are zeros there.
        unit.template multiply<TILES>(sums, [&](uint32_t tile, uint32_t column) {
            const uint32_t at = u * 64 + column;
            return at < cols ? load<uint4>(x[tile] + at) : make_uint4(0, 0, 0, 0);
        });
    }
}

// Sixteen rows (blockIdx.y) times so many tiles of eight tokens (blockIdx.x: blocks that share weights come together).
template <uint32_t TILES>
DEVICE void quantized_few(const QuantizedParams &p) {
    constexpr uint32_t WARPS = QUANTIZED_THREADS / 32, PART = 8 * TILES * SKINNY_STRIDE;
    lead();
    SHARED(float, parts);  // [WARPS][8 TILES][SKINNY_STRIDE]
    const SkinnyParams &s = p.skinny;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t row = blockIdx.y * 16, first = blockIdx.x * 8 * TILES;
    const bf16 *x[TILES];
    // Where there is no token the last one stands in: nobody looks at its result.
#pragma unroll
    for (uint32_t tile = 0; tile < TILES; tile++)
        x[tile] = static_cast<const bf16 *>(s.x) + static_cast<size_t>(min(first + 8 * tile + g, s.tokens - 1)) * s.cols;
    float sums[TILES][4] = {};
    const QuantizedPart part = p.matrix.part(row);
    const unsigned char *units = tile_units(part, row, units_of(s.cols));
    with_format(part.format, [&](auto unit) {
        (void)unit;
        quantized_units<decltype(unit)::OWN, TILES>(sums, units, s.cols, x);
    });
    if (s.skips.all()) return;
#pragma unroll
    for (uint32_t tile = 0; tile < TILES; tile++) {
        float *own = parts + warp * PART + (8 * tile + 2 * t) * SKINNY_STRIDE + g;
        own[0] = sums[tile][0], own[SKINNY_STRIDE] = sums[tile][1];
        own[8] = sums[tile][2], own[SKINNY_STRIDE + 8] = sums[tile][3];
    }
    __syncthreads();
    const uint32_t within = threadIdx.x / 8, j = threadIdx.x % 8, token = first + within, out = row + j;
    if (within >= 8 * TILES || token >= s.tokens) return;
    float a = 0.0f, b = 0.0f;
#pragma unroll
    for (uint32_t w = 0; w < WARPS; w++) {
        a += parts[w * PART + within * SKINNY_STRIDE + j];
        b += parts[w * PART + within * SKINNY_STRIDE + j + 8];
    }
    if (s.bias != nullptr) {
        if (out < s.rows) a += s.bias[out];
        if (out + 8 < s.rows) b += s.bias[out + 8];
    }
    quantized_pair(p, token, out, a, b);
}

KERNEL(quantized_8, QuantizedParams, QUANTIZED_THREADS, 3) { quantized_few<1>(p); }
KERNEL(quantized_32, QuantizedParams, QUANTIZED_THREADS, 2) { quantized_few<4>(p); }

struct QuantizedWholeParams {
    bf16 *out;  // [rows, cols]
    uint32_t rows, cols;
    QuantizedMatrix matrix;
};

// The matrix in bf16: a tile of rows a block (blockIdx.y) and eight units (blockIdx.x), one a warp.
KERNEL(quantized_whole, QuantizedWholeParams, QUANTIZED_THREADS, 4) {
    lead();
    const uint32_t row = blockIdx.y * 16, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const uint32_t u = blockIdx.x * (QUANTIZED_THREADS / 32) + threadIdx.x / 32;
    const bool has = u < units_of(p.cols);
    const QuantizedPart part = p.matrix.part(row);
    const unsigned char *at = tile_units(part, row, units_of(p.cols)) + (has ? u : 0) * unit_bytes(part.format);
    with_format(part.format, [&](auto unit) {
        unit.fetch(at, [](const unsigned char *from) { return load_stream(from); });
        follow();
#pragma unroll
        for (uint32_t block = 0; block < 2; block++) {
            uint32_t w[2][4];
            unit.pairs(w[0], 2 * block), unit.pairs(w[1], 2 * block + 1);
            const uint32_t column = u * 64 + block * 32 + 8 * t;
            if (!has || column >= p.cols) continue;
#pragma unroll
            for (uint32_t half = 0; half < 2; half++) {
                const float2 scale = unit.scale(block, half != 0);
                const float rest = scale.y - unit.BIAS * scale.x;
                auto pair = [&](uint32_t v) { return pack(scale.x * low(v) + rest, scale.x * high(v) + rest); };
                if (row + g + 8 * half < p.rows)
                    *reinterpret_cast<uint4 *>(p.out + static_cast<size_t>(row + g + 8 * half) * p.cols + column) =
                        make_uint4(pair(w[0][half]), pair(w[0][2 + half]), pair(w[1][half]), pair(w[1][2 + half]));
            }
        }
    });
}

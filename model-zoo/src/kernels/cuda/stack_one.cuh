// The product of weights in levels with one token, by sums over signs: A (S (B * x)) for each row of B, where `*` scales its
// columns. Rows of B take the place of tokens, and signs, as plus and minus one, that of weights: two products of the
// tensor cores a tile, where making the tile takes two and its product one more.
#pragma once
#include "stack.cuh"

// Rows of B of a chunk, each times x, as bf16 rows in the block's memory. Neighbouring columns lie in lanes four apart.
template <uint32_t UNITS>
DEVICE void stack_scale(uint32_t *rows, const uint4 *right, const bf16 *x, uint32_t groups) {
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const bool odd = g % 2 != 0;
    for (uint32_t i = threadIdx.x / 32; i < groups * 4 * UNITS; i += STACK_WARPS) {
        const uint4 pairs = right[i * 32 + lane];
        const uint32_t unit = i % UNITS, k = i / UNITS % 4, first = i / UNITS / 4 * 64 + 16 * (g / 2) + 4 * k;
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            // Two rows of column `first + 2 (j / 2) + g % 2`.
            const uint32_t pair = word_of(pairs, j), column = first + j / 2 * 2;
            const float scale = to_float(x[column + g % 2]);
            const uint32_t scaled = pack(half_to_float(pair) * scale, half_to_float(pair >> 16) * scale);
            const uint32_t other = __shfl_xor_sync(FULL, scaled, 4);
            const uint32_t row = 16 * unit + 2 * t + j % 2 * 8 + g % 2;
            rows[row * STACK_ROW * 4 + column / 2] =
                odd ? other >> 16 | (scaled & 0xFFFF0000u) : (scaled & 0xFFFFu) | other << 16;
        }
    }
}

// Adds the signed sums of one chunk: products[i][j] of rows of tile i with rows of B from 8 j on.
template <uint32_t UNITS>
DEVICE void stack_signed(float (&products)[STACK_TILES][2 * UNITS][4], const uint4 *signs, const uint4 *rows,
                         uint32_t groups) {
    constexpr uint32_t ONES = 0x3F803F80u;
    for (uint32_t group = 0; group < groups; group++) {
        const uint4 bits = signs[group * 32];
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            uint4 v[2 * UNITS];
#pragma unroll
            for (uint32_t j = 0; j < 2 * UNITS; j++) v[j] = rows[j * 8 * STACK_ROW + group * 8 + half];
#pragma unroll
            for (uint32_t k = 2 * half; k < 2 * half + 2; k++)
#pragma unroll
                for (uint32_t i = 0; i < STACK_TILES; i++) {
                    const uint32_t word = word_of(bits, i) << 4 * k;
                    uint32_t w[4];
#pragma unroll
                    for (uint32_t j = 0; j < 4; j++) w[j] = and_or(word << j, SIGN_BITS, ONES);
#pragma unroll
                    for (uint32_t j = 0; j < 2 * UNITS; j++)
                        if (k % 2 == 0) mma(products[i][j], w, {v[j].x, v[j].y});
                        else mma(products[i][j], w, {v[j].z, v[j].w});
                }
        }
    }
}

// Ends a level: weighs its products by A, and clears them. sums[i] is of a lane's two rows of tile i, by its rows of B.
template <uint32_t UNITS>
DEVICE void stack_weigh(float (&sums)[STACK_TILES][2], float (&products)[STACK_TILES][2 * UNITS][4], const uint4 *left) {
#pragma unroll
    for (uint32_t i = 0; i < STACK_TILES; i++)
#pragma unroll
        for (uint32_t unit = 0; unit < UNITS; unit++) {
            const uint4 a = left[(i * UNITS + unit) * 32];
#pragma unroll
            for (uint32_t j = 0; j < 4; j++) {
                float (&c)[4] = products[i][2 * unit + j / 2];
                const uint32_t pair = word_of(a, j);
                const float first = half_to_float(pair) * c[j % 2 * 2];
                sums[i][j % 2] += first + half_to_float(pair >> 16) * c[j % 2 * 2 + 1];
                c[j % 2 * 2] = c[j % 2 * 2 + 1] = 0.0f;
            }
        }
}

template <uint32_t UNITS>
DEVICE void stack_one(const StackParams &p) {
    lead();
    SHARED(uint4, memory);
    const StackBlock<1, UNITS> block(p, memory);
    const uint32_t g = block.lane / 4, t = block.lane % 4;
    float products[STACK_TILES][2 * UNITS][4] = {}, sums[STACK_TILES][2] = {};
    uint4 *rows = block.memory.end;  // [16 UNITS][STACK_ROW]
    if (!block.begin_first()) return;
    for (uint32_t u = 0; u < block.units; u++) {
        block.turn(u);
        const bf16 *x = reinterpret_cast<const bf16 *>(block.x(u));
        stack_scale<UNITS>(reinterpret_cast<uint32_t *>(rows), block.right(u) - block.lane, x, block.width(u));
        __syncthreads();
        if (!block.has) continue;
        stack_signed<UNITS>(products, block.signs(u), rows + g * STACK_ROW + t * 2, block.width(u));
        if (u % block.own == block.own - 1) stack_weigh<UNITS>(sums, products, block.left(u));
    }
    if (!block.has) return;
#pragma unroll
    for (uint32_t i = 0; i < STACK_TILES; i++)
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            const float sum = lanes_sum<1, 4>(sums[i][half]);
            if (t == 0) block.sums(0)[i * 16 + g + half * 8] = sum;
        }
}

KERNEL(stack_1, StackParams, STACK_THREADS, 2) { stack_one<1>(p); }
KERNEL(stack_1_deep, StackParams, STACK_THREADS, 1) { stack_one<2>(p); }

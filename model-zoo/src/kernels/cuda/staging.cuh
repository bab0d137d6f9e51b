// Activations of a step of few tokens on their way to a block's memory, normed or as they are.
#pragma once
#include "async.cuh"
#include "linked.cuh"
#include "skinny.cuh"

constexpr unsigned FUSED_WARPS = 8, FUSED_THREADS = FUSED_WARPS * 32 + 32, FUSED_TOKENS = 32, FUSED_SLOTS = 12;
// Values between two rows of activations in the block's memory: half a line of the banks more than a row.
DEVICE uint32_t normed_stride(uint32_t cols) { return (cols + 63) / 64 * 64 + 32; }

// The residual stream where tokens are normed: as it lies in memory, after a meeting, or of one token linked, with the flag of
// the stage that adds to it last.
struct Stream {
    const Linked *links;  // [step tokens, cols], or null
    uint32_t flag;
};

// Norms up to `TOKENS` tokens of the stage from the `first` one on, but for the factor of each: `THREADS` threads, of which
// this is the `own`-th, share their columns, and each gathers the squares of its own in `sums`. Loads of `FOURS` fours of
// columns are under way at once.
template <uint32_t TOKENS, uint32_t FOURS, uint32_t THREADS, bool LINKED>
DEVICE void fused_norm(const SkinnyParams &p, const Stream &stream, uint32_t first, uint32_t own, bf16 *normed,
                       float (&sums)[TOKENS]) {
    constexpr uint32_t STEP = THREADS * 4;
    const uint32_t stride = normed_stride(p.cols);
    size_t rows[TOKENS];
#pragma unroll
    for (uint32_t token = 0; token < TOKENS; token++) {
        const uint32_t some = min(first + token, p.tokens - 1), at = p.index != nullptr ? p.index[some] : some;
        rows[token] = static_cast<size_t>(at) * p.cols;
        sums[token] = 0.0f;
    }
    for (uint32_t base = own * 4; base < p.cols; base += STEP * FOURS) {
        float4 a[FOURS][TOKENS], b[FOURS];
        LinkedFour linked[FOURS][TOKENS];
#pragma unroll
        for (uint32_t four = 0; four < FOURS; four++) {
            // Past the end the first columns stand in, and count for nothing.
            const uint32_t i = base + four * STEP, at = i < p.cols ? i : 0;
            b[four] = load_global<float4>(p.norm + at);
#pragma unroll
            for (uint32_t token = 0; token < TOKENS; token++) {
                if constexpr (LINKED) linked[four][token].load(stream.links + rows[token] + at);
                else a[four][token] = load_global<float4>(static_cast<const float *>(p.x) + rows[token] + at);
            }
        }
        if constexpr (LINKED) {
#pragma unroll
            for (uint32_t four = 0; four < FOURS; four++)
#pragma unroll
                for (uint32_t token = 0; token < TOKENS; token++) {
                    const uint32_t i = base + four * STEP, at = i < p.cols ? i : 0;
                    a[four][token] = linked[four][token].await(stream.links + rows[token] + at, stream.flag);
                }
        }
#pragma unroll
        for (uint32_t four = 0; four < FOURS; four++) {
            const uint32_t i = base + four * STEP;
            if (i >= p.cols) continue;
            const float4 w = b[four];
#pragma unroll
            for (uint32_t token = 0; token < TOKENS; token++) {
                const float4 v = a[four][token];
                sums[token] += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
                if (first + token < p.tokens)
                    *reinterpret_cast<uint2 *>(normed + (first + token) * stride + i) =
                        make_uint2(pack(v.x * w.x, v.y * w.y), pack(v.z * w.z, v.w * w.w));
            }
        }
    }
#pragma unroll
    for (uint32_t token = 0; token < TOKENS; token++) sums[token] = lanes_sum<1, 32>(sums[token]);
}

// Few tokens, by all warps together.
template <uint32_t TOKENS, bool LINKED>
DEVICE void fused_norm_few(const SkinnyParams &p, const Stream &stream, bf16 *normed,
                           float (&squares)[FUSED_WARPS][FUSED_TOKENS]) {
    float sums[TOKENS];
    fused_norm<TOKENS, 4 / TOKENS, FUSED_WARPS * 32, LINKED>(p, stream, 0, threadIdx.x, normed, sums);
#pragma unroll
    for (uint32_t token = 0; token < TOKENS; token++)
        if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32][token] = sums[token];
}

// Many tokens, `TOKENS` of them a warp at a time.
template <uint32_t TOKENS>
DEVICE void fused_norm_rows(const SkinnyParams &p, bf16 *normed, float (&squares)[FUSED_WARPS][FUSED_TOKENS]) {
    const uint32_t lane = threadIdx.x % 32;
    for (uint32_t first = threadIdx.x / 32 * TOKENS; first < p.tokens; first += FUSED_WARPS * TOKENS) {
        float sums[TOKENS];
        fused_norm<TOKENS, 8 / TOKENS, 32, false>(p, {nullptr, 0}, first, lane, normed, sums);
#pragma unroll
        for (uint32_t token = 0; token < TOKENS; token++)
            if (lane < FUSED_WARPS && first + token < p.tokens)
                squares[lane][first + token] = lane == 0 ? sums[token] : 0.0f;
    }
}

// Norms the stage's tokens, but for the factor of each, which the sum over `squares` leads to.
DEVICE void fused_norm(const SkinnyParams &p, const Stream &stream, bf16 *normed, float (&squares)[FUSED_WARPS][FUSED_TOKENS]) {
    if (stream.links != nullptr) fused_norm_few<1, true>(p, stream, normed, squares);
    else if (p.tokens == 1) fused_norm_few<1, false>(p, stream, normed, squares);
    else if (p.tokens == 2) fused_norm_few<2, false>(p, stream, normed, squares);
    else if (p.tokens <= 4) fused_norm_few<4, false>(p, stream, normed, squares);
    else if (p.tokens <= 8) fused_norm_rows<1>(p, normed, squares);
    else fused_norm_rows<2>(p, normed, squares);
    sync_warps<FUSED_WARPS>();
}

// Brings dense activations to the block's memory.
DEVICE void fused_stage(const SkinnyParams &p, bf16 *staged) {
    const uint32_t stride = normed_stride(p.cols), eights = p.cols / 8;
    const uint4 *x = static_cast<const uint4 *>(p.x);
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < p.tokens * eights; i += FUSED_WARPS * 32)
        *reinterpret_cast<uint4 *>(staged + i / eights * stride + i % eights * 8) = load_global<uint4>(x + i);
    sync_warps<FUSED_WARPS>();
}

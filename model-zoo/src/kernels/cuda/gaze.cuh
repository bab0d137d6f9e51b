// How much text tokens look at the slots of images: attention weights, which the softmax keeps nowhere.
//
// First the log of each query's sum of exponentials, `ln sum exp(q k scale)`; with it any weight is exp(score - lse): as many
// scores again as there are queries and slots of images. Scores are in bits, as attention's: `scale` has log2(e) in it.
#pragma once
#include "common.cuh"
#include "decode.cuh"

// Tokens of a row that look at some of its slots.
struct Onlookers {
    uint32_t first;          // the row's first token, among those that run the attention
    uint32_t row;
    uint32_t text, count;    // where the places begin, counted from `first`, of those that look; how many they are
    uint32_t seen, slots;    // the first slot that is looked at, counted from those held before the step; how many
    uint32_t weights, found; // where theirs begin
};

struct GazeParams {
    const bf16 *q;               // [tokens, heads, head_dim]
    const bf16 *pages;           // see place.cuh
    const uint32_t *kv_len;      // [rows], so the next
    const uint32_t *starts;
    const uint32_t *tables;
    const Onlookers *onlookers;  // the launch's
    const uint32_t *places;
    float *lse;                  // [places, heads]
    float *weights;              // of onlookers: [count, slots], sums over the heads
    float *sums, *maxima;        // of onlookers: [slots], over the tokens, of means over the heads
    uint32_t heads, kv_heads, block_size, window;  // a window of 0 sees all
    float scale;                 // times log2(e)
    float share;                 // a head's share of the mean
};

constexpr unsigned GAZE_WARPS = 4;

// Where the keys of sixteen slots of a head lie.
template <int D>
DEVICE const bf16 *gaze_keys(const GazeParams &p, uint32_t row, uint32_t head, uint32_t slot) {
    const size_t page = p.tables[static_cast<uint32_t>(p.starts[row] + slot / p.block_size)];
    const size_t kv_head = head / (p.heads / p.kv_heads);
    return p.pages + ((page * 2 * p.kv_heads + kv_head) * p.block_size + slot % p.block_size) * D;
}

// The queries of sixteen of the tokens that look, from the `base`th on, of a head.
template <int D>
DEVICE void gaze_queries(const GazeParams &p, const Onlookers &own, uint32_t base, uint32_t head, Queries<D> &q) {
    q.load_rows([&](uint32_t row) -> const bf16 * {
        if (base + row >= own.count) return nullptr;
        const size_t token = own.first + p.places[own.text + base + row];
        return p.q + (token * p.heads + head) * D;
    });
}

// A block sixteen tokens and a head, whose warps share the slots out.
template <int D>
DEVICE void gaze_lse(const GazeParams &p) {
    lead();
    follow();
    SHARED(float2, ends);  // [warps][16]: maxima and sums
    const Onlookers own = p.onlookers[blockIdx.z];
    const uint32_t base = blockIdx.x * 16, head = blockIdx.y;
    if (base >= own.count) return;
    const uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const uint32_t held = p.kv_len[own.row];
    Queries<D> q;
    gaze_queries<D>(p, own, base, head, q);
    auto end_of = [&](uint32_t row) { return held + p.places[own.text + min(base + row, own.count - 1)] + 1; };
    auto begin_of = [&](uint32_t end) { return p.window != 0 && end > p.window ? end - p.window : 0; };
    const uint32_t end[2] = {end_of(g), end_of(g + 8)}, begin[2] = {begin_of(end[0]), begin_of(end[1])};
    DecodeWarp<D> state;
    state.clear();
    Unit<D> unit;
    for (uint32_t slot = (begin_of(end_of(0)) / 16 + warp) * 16; slot < end_of(15); slot += 16 * GAZE_WARPS) {
        unit.fetch_keys(gaze_keys<D>(p, own.row, head, slot));
        state.score(q, [&](int n, int step) { return unit.k[n][step]; });
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float scores[4], most = -INFINITY;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t at = slot + 4 * t + i;
                const bool seen = at >= begin[half] && at < end[half];
                scores[i] = seen ? state.s[i / 2][2 * half + i % 2] * p.scale : -INFINITY;
                most = fmaxf(most, scores[i]);
            }
            most = fmaxf(state.top[half], lanes_max<1, 4>(most));
            state.sum[half] *= shrink(state.top[half], most);
            state.top[half] = most;
#pragma unroll
            for (int i = 0; i < 4; i++) state.sum[half] += shrink(scores[i], most);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float sum = lanes_sum<1, 4>(state.sum[half]);
        if (t == 0) ends[warp * 16 + g + 8 * half] = make_float2(state.top[half], sum);
    }
    __syncthreads();
    const uint32_t row = threadIdx.x;
    if (row >= 16 || base + row >= own.count) return;
    float top = -INFINITY, sum = 0.0f;
    for (uint32_t i = 0; i < GAZE_WARPS; i++) top = fmaxf(top, ends[i * 16 + row].x);
    for (uint32_t i = 0; i < GAZE_WARPS; i++) sum += shrink(ends[i * 16 + row].x, top) * ends[i * 16 + row].y;
    p.lse[static_cast<size_t>(own.text + base + row) * p.heads + head] = top + log2f(sum);
}

// A warp sixteen tokens and a unit of sixteen slots, for all heads.
template <int D>
DEVICE void gaze_weights(const GazeParams &p) {
    lead();
    follow();
    const Onlookers own = p.onlookers[blockIdx.z];
    const uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const uint32_t held = p.kv_len[own.row], from = held + own.seen, until = from + own.slots;
    const uint32_t base = (blockIdx.y * GAZE_WARPS + warp) * 16, slot = (from / 16 + blockIdx.x) * 16;
    if (base >= own.count || slot >= until) return;
    const uint32_t group = p.heads / p.kv_heads;
    float weights[2][4] = {};
    Queries<D> q;
    Unit<D> unit;
    DecodeWarp<D> state;
    for (uint32_t head = 0; head < p.heads; head++) {
        if (head % group == 0) unit.fetch_keys(gaze_keys<D>(p, own.row, head, slot));
        gaze_queries<D>(p, own, base, head, q);
        state.score(q, [&](int n, int step) { return unit.k[n][step]; });
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t row = min(base + g + 8 * half, own.count - 1);
            const float lse = p.lse[static_cast<size_t>(own.text + row) * p.heads + head];
#pragma unroll
            for (int i = 0; i < 4; i++)
                weights[half][i] += exp2_fast(state.s[i / 2][2 * half + i % 2] * p.scale - lse);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint32_t row = base + g + 8 * half;
        if (row >= own.count) continue;
        const uint32_t end = held + p.places[own.text + row] + 1;
        float *out = p.weights + own.weights + static_cast<size_t>(row) * own.slots;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t at = slot + 4 * t + i;
            // Slots of the unit that are not looked at may hold anything.
            if (at < from || at >= until) continue;
            out[at - from] = p.window != 0 && at + p.window < end ? 0.0f : weights[half][i];
        }
    }
}

// Sums and maxima over the tokens; a thread a slot.
KERNEL(gaze_find, GazeParams, 128, 1) {
    lead();
    follow();
    const Onlookers own = p.onlookers[blockIdx.z];
    const uint32_t slot = blockIdx.x * blockDim.x + threadIdx.x;
    if (slot >= own.slots) return;
    const float *weights = p.weights + own.weights + slot;
    float sum = 0.0f, most = 0.0f;
    for (uint32_t token = 0; token < own.count; token++) {
        const float weight = weights[static_cast<size_t>(token) * own.slots] * p.share;
        sum += weight;
        most = fmaxf(most, weight);
    }
    p.sums[own.found + slot] = sum;
    p.maxima[own.found + slot] = most;
}

#define GAZE(D)                                                                        \
    KERNEL(gaze_lse_##D, GazeParams, GAZE_WARPS * 32, 1) { gaze_lse<D>(p); }           \
    KERNEL(gaze_weights_##D, GazeParams, GAZE_WARPS * 32, 1) { gaze_weights<D>(p); }

GAZE(16)
GAZE(32)
GAZE(64)
GAZE(96)
GAZE(128)
GAZE(256)

// Attention of single tokens over the pages of their sequences.
//
// A block takes one token and the query heads that share a KV head, up to sixteen, as the rows of tensor-core tiles: K
// and V are read once for all of them, sixteen slots at a time, straight into registers. Units of sixteen slots are
// dealt to the warps of `splits` blocks in turn; the last block to finish joins their parts.
#pragma once
#include "common.cuh"

// Consecutive tokens of one row.
struct Item {
    uint32_t token;  // its first token, among those that run the sublayer
    uint32_t row;    // or NO_ROW
    uint32_t first;  // index of that token among the row's
    uint32_t len;    // tokens
};

struct AttentionParams {
    const bf16 *q;          // [tokens, heads, head_dim]
    bf16 *out;              // [tokens, heads, head_dim]
    const bf16 *pages;      // see place.cuh
    const Item *items;
    const uint32_t *kv_len; // [rows]: slots held before the step, in this layer
    const uint32_t *starts; // [rows]: where its pages begin in `tables`
    const uint32_t *tables;
    float *parts;           // [items, kv heads, 16-head groups, splits, 16, head_dim + 2], where splits > 1
    uint32_t *done;         // [items, kv heads, groups]: blocks that have finished; zero between launches
    uint32_t heads, kv_heads, block_size, window;  // a window of 0 sees all
    float scale;            // times log2(e)
    uint32_t pad;
};

constexpr unsigned DECODE_WARPS = 4;

// exp2(from - to), where nothing has been seen yet: 0.
DEVICE float shrink(float from, float to) { return from == -INFINITY ? 0.0f : exp2f(from - to); }

// Rows of a warp's sixteen queries: operands of the product with K, four channels of a lane at a time.
template <int D>
struct Queries {
    uint32_t a[D / 16][4];

    // `row(i)` is where row `i` of the tile lies, or null.
    template <class Row>
    DEVICE void load_rows(Row row) {
        const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const bf16 *q = row(g + 8 * half);
#pragma unroll
            for (int step = 0; step < D / 16; step++) {
                // Steps of a wide pair share 32 channels, of which a lane has eight neighbours.
                const int at = D % 32 == 0 ? step / 2 * 32 + 8 * t + step % 2 * 4 : step * 16 + 4 * t;
                const uint2 v = q != nullptr ? load<uint2>(q + at) : make_uint2(0, 0);
                a[step][half] = v.x;
                a[step][half + 2] = v.y;
            }
        }
    }
};

template <int D>
struct DecodeWarp {
    float o[D / 8][4], top[2], sum[2];

    DEVICE void clear() {
#pragma unroll
        for (int n = 0; n < D / 8; n++) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.0f;
        top[0] = top[1] = -INFINITY;
        sum[0] = sum[1] = 0.0f;
    }

    // Sixteen slots from `slot` on, of which those in begin..end are seen. `k` is the first one's key, `v` its value
    // in the first channel.
    DEVICE void unit(const Queries<D> &q, const bf16 *k, const bf16 *v, uint32_t slot, uint32_t begin, uint32_t end,
                     uint32_t block_size, float scale) {
        const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        float s[2][4];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
            // Column c of tile n is slot 4 (c / 2) + c % 2 + 2 n, so that a lane's four columns are neighbours.
            const bf16 *key = k + (4 * (g / 2) + g % 2 + 2 * n) * D;
            if constexpr (D % 32 == 0) {
#pragma unroll
                for (int chunk = 0; chunk < D / 32; chunk++) {
                    const uint4 b = load_stream(key + 32 * chunk + 8 * t);
                    mma(s[n], q.a[2 * chunk], {b.x, b.y});
                    mma(s[n], q.a[2 * chunk + 1], {b.z, b.w});
                }
            } else {
#pragma unroll
                for (int chunk = 0; chunk < D / 16; chunk++) {
                    const uint2 b = load_stream8(key + 16 * chunk + 4 * t);
                    mma(s[n], q.a[chunk], {b.x, b.y});
                }
            }
        }
        const bool whole = slot >= begin && slot + 16 <= end;
        bool seen[2][2] = {{true, true}, {true, true}};
        float most[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const uint32_t own = slot + 4 * t + 2 * n + e;
                if (!whole) seen[n][e] = own >= begin && own < end;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float &score = s[n][2 * half + e];
                    score = seen[n][e] ? score * scale : -INFINITY;
                    most[half] = fmaxf(most[half], score);
                }
            }
        float fade[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            most[half] = fmaxf(top[half], lanes_max<1, 4>(most[half]));
            fade[half] = shrink(top[half], most[half]);
            top[half] = most[half];
            sum[half] *= fade[half];
        }
        uint32_t p[4];
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float a = shrink(s[n][2 * half], most[half]), b = shrink(s[n][2 * half + 1], most[half]);
                sum[half] += a + b;
                p[2 * n + half] = pack(a, b);
            }
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            uint2 b = load_stream8(v + (8 * n + g) * block_size + 4 * t);
            if (!whole) {
                // Nobody has written there yet, and 0 times what lies there need not be 0.
                b.x &= (seen[0][0] ? 0x0000FFFFu : 0u) | (seen[0][1] ? 0xFFFF0000u : 0u);
                b.y &= (seen[1][0] ? 0x0000FFFFu : 0u) | (seen[1][1] ? 0xFFFF0000u : 0u);
            }
            o[n][0] *= fade[0], o[n][1] *= fade[0], o[n][2] *= fade[1], o[n][3] *= fade[1];
            mma(o[n], p, {b.x, b.y});
        }
    }
};

// Joins `count` parts [16, D + 2] (values, top, sum) of `heads` heads: calls `done(head, channel, value, top, sum)`.
template <int D, class Done>
DEVICE void join_parts(const float *parts, uint32_t count, uint32_t heads, Done done) {
    for (uint32_t i = threadIdx.x; i < heads * D; i += blockDim.x) {
        const uint32_t head = i / D, channel = i % D;
        float top = -INFINITY, sum = 0.0f, value = 0.0f;
        for (uint32_t part = 0; part < count; part++)
            top = fmaxf(top, parts[(part * 16 + head) * (D + 2) + D]);
        for (uint32_t part = 0; part < count; part++) {
            const float *own = parts + (part * 16 + head) * (D + 2);
            const float share = shrink(own[D], top);
            if (share == 0.0f) continue;
            value += own[channel] * share;
            sum += own[D + 1] * share;
        }
        done(head, channel, value, top, sum);
    }
}

template <int D>
DEVICE void decode(const AttentionParams &p) {
    SHARED(float, shared);  // [DECODE_WARPS][16][D + 2], then the order in which the block finished
    uint32_t *order = reinterpret_cast<uint32_t *>(shared + DECODE_WARPS * 16 * (D + 2));
    const Item item = p.items[blockIdx.z];
    if (item.row == NO_ROW) return;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t group = p.heads / p.kv_heads, tiles = (group + 15) / 16, splits = gridDim.y;
    const uint32_t kv_head = blockIdx.x / tiles, tile = blockIdx.x % tiles;
    const uint32_t head0 = kv_head * group + tile * 16, heads = min(16u, group - tile * 16);
    const uint32_t end = p.kv_len[item.row] + item.first + 1;
    const uint32_t begin = p.window != 0 && end > p.window ? end - p.window : 0;
    const uint32_t *table = p.tables + p.starts[item.row];
    const size_t half_page = static_cast<size_t>(p.kv_heads) * D * p.block_size;

    Queries<D> q;
    const bf16 *own = p.q + (static_cast<size_t>(item.token) * p.heads + head0) * D;
    q.load_rows([&](uint32_t row) { return row < heads ? own + row * D : nullptr; });
    DecodeWarp<D> state;
    state.clear();
    for (uint32_t unit = begin / 16 + blockIdx.y * DECODE_WARPS + warp; unit * 16 < end;
         unit += splits * DECODE_WARPS) {
        const uint32_t slot = unit * 16, place = slot % p.block_size;
        const bf16 *page = p.pages + table[slot / p.block_size] * 2 * half_page;
        const bf16 *k = page + (kv_head * p.block_size + place) * D;
        const bf16 *v = page + half_page + static_cast<size_t>(kv_head) * D * p.block_size + place;
        state.unit(q, k, v, slot, begin, end, p.block_size, p.scale);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint32_t row = g + 8 * half;
        const float sum = lanes_sum<1, 4>(state.sum[half]);
        if (row >= heads) continue;
        float *part = shared + (warp * 16 + row) * (D + 2);
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            part[8 * n + 2 * t] = state.o[n][2 * half];
            part[8 * n + 2 * t + 1] = state.o[n][2 * half + 1];
        }
        if (t == 0) part[D] = state.top[half], part[D + 1] = sum;
    }
    __syncthreads();
    bf16 *out = p.out + (static_cast<size_t>(item.token) * p.heads + head0) * D;
    auto finish = [&](uint32_t head, uint32_t channel, float value, float, float sum) {
        out[head * D + channel] = to_bf16(value / sum);
    };
    if (splits == 1) {
        join_parts<D>(shared, DECODE_WARPS, heads, finish);
        return;
    }
    const uint32_t place = blockIdx.z * gridDim.x + blockIdx.x;
    float *parts = p.parts + static_cast<size_t>(place) * splits * 16 * (D + 2);
    float *mine = parts + blockIdx.y * 16 * (D + 2);
    join_parts<D>(shared, DECODE_WARPS, heads, [&](uint32_t head, uint32_t channel, float value, float top, float sum) {
        mine[head * (D + 2) + channel] = value;
        if (channel == 0) mine[head * (D + 2) + D] = top, mine[head * (D + 2) + D + 1] = sum;
    });
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *order = atomicAdd(p.done + place, 1u);
    __syncthreads();
    if (*order + 1 < splits) return;
    __threadfence();
    join_parts<D>(parts, splits, heads, finish);
    if (threadIdx.x == 0) p.done[place] = 0;
}

#define DECODE(D) \
    KERNEL(decode_##D, AttentionParams, DECODE_WARPS * 32, 2) { decode<D>(p); }

DECODE(16)
DECODE(32)
DECODE(64)
DECODE(96)
DECODE(128)
DECODE(256)

// Attention of single tokens over the pages of their sequences.
//
// A block takes one token and the query heads that share a KV head, up to sixteen, as the rows of tensor-core tiles: K
// and V are read once for all of them, sixteen slots at a time, straight into registers. Units of sixteen slots are
// dealt to the warps of up to `splits` blocks in turn; the last block to finish joins their parts.
#pragma once
#include "async.cuh"
#include "attended.cuh"
#include "common.cuh"

constexpr unsigned DECODE_WARPS = 4;

// exp2(from - to), where nothing has been seen yet: 0.
DEVICE float shrink(float from, float to) { return from == -INFINITY ? 0.0f : exp2_fast(from - to); }

// The first of the four channels that lane `t` of a row has in a step of sixteen. Steps of a wide pair share 32 channels,
// of which a lane has eight neighbours.
template <int D>
DEVICE uint32_t first_channel(int step, uint32_t t) {
    return D % 32 == 0 ? step / 2 * 32 + 8 * t + step % 2 * 4 : step * 16 + 4 * t;
}

// Rows of a warp's sixteen queries: operands of the product with K, four channels of a lane at a time.
template <int D>
struct Queries {
    static constexpr int DIM = D;
    uint32_t a[D / 16][4];
    uint32_t channels[D / 16];  // for packed units: four bytes, each a channel, of each step

    // `row(i)` is where row `i` of the tile lies, or null.
    template <class Row>
    DEVICE void load_rows(Row row) {
        const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const bf16 *q = row(g + 8 * half);
#pragma unroll
            for (int step = 0; step < D / 16; step++) {
                const uint2 v = q != nullptr ? load_global<uint2>(q + first_channel<D>(step, t)) : make_uint2(0, 0);
                a[step][half] = v.x;
                a[step][half + 2] = v.y;
            }
        }
    }
    // Of a row's packed keys: `kept` of them, a multiple of eight.
    DEVICE void load_channels(const unsigned char *from, uint32_t kept) {
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
            const uint32_t at = first_channel<D>(step, threadIdx.x % 4);
            channels[step] = at < kept ? load_global<uint32_t>(from + at) : 0u;
        }
    }
    // The same of these channels; zeros after them.
    template <class Row>
    DEVICE void load_rows(Row row, uint32_t kept) {
        const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const bf16 *q = row(g + 8 * half);
                const bool has = q != nullptr && first_channel<D>(step, t) < kept;
                auto value = [&](int i) -> uint32_t {
                    return has ? load_global<bf16>(q + (channels[step] >> 8 * i & 0xFF)) : 0u;
                };
                a[step][half] = value(0) | value(1) << 16;
                a[step][half + 2] = value(2) | value(3) << 16;
            }
        }
    }
};

// Sixteen slots of one KV head, on the way from memory: their keys' channels as the product's operands, and their values.
template <int D>
struct Unit {
    uint2 k[2][D / 16], v[D / 8];

    // `first` is the first slot's key. Column c of tile n is slot 4 (c / 2) + c % 2 + 2 n, so that a lane's four columns are
    // neighbours.
    DEVICE void fetch_keys(const bf16 *first) {
        const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const bf16 *key = first + (4 * (g / 2) + g % 2 + 2 * n) * D;
#pragma unroll
            for (int step = 0; step < D / 16; step++) {
                if constexpr (D % 32 == 0) {
                    if (step % 2 == 1) continue;
                    const uint4 both = load_once16(key + 16 * step + 8 * t);
                    k[n][step] = make_uint2(both.x, both.y);
                    k[n][step + 1] = make_uint2(both.z, both.w);
                } else {
                    k[n][step] = load_once8(key + 16 * step + 4 * t);
                }
            }
        }
    }

    // The same of packed slots, whose keys have `kept` channels; `at(i)` is where their i-th value lies.
    template <class At>
    DEVICE void fetch_keys(At at, uint32_t kept) {
        const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const uint32_t key = (4 * (g / 2) + g % 2 + 2 * n) * kept;
#pragma unroll
            for (int step = 0; step < D / 16; step++) {
                const uint32_t channel = first_channel<D>(step, t);
                const bool has = channel < kept;
                if constexpr (D % 32 == 0) {
                    if (step % 2 == 1) continue;
                    const uint4 both = has ? load_once16(at(key + channel)) : make_uint4(0, 0, 0, 0);
                    k[n][step] = make_uint2(both.x, both.y);
                    k[n][step + 1] = make_uint2(both.z, both.w);
                } else {
                    k[n][step] = has ? load_once8(at(key + channel)) : make_uint2(0, 0);
                }
            }
        }
    }
    template <class At>
    DEVICE void fetch_values(At at) {
        const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int n = 0; n < D / 8; n++) v[n] = load_once8(at((8 * n + g) * 16 + 4 * t));
    }
    // Most runs do not go on in another page.
    DEVICE void fetch_packed_keys(const Run &run, uint32_t kept) {
        if (run.cut >= 16 * kept) fetch_keys([&](uint32_t i) { return run.first + i; }, kept);
        else fetch_keys([&](uint32_t i) { return run.at(i); }, kept);
    }
    DEVICE void fetch_packed_values(const Run &run) {
        if (run.cut >= 16 * D) fetch_values([&](uint32_t i) { return run.first + i; });
        else fetch_values([&](uint32_t i) { return run.at(i); });
    }

    // `first` is the first slot's value in the first channel.
    DEVICE void fetch_values(const bf16 *first, uint32_t block_size) {
        const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int n = 0; n < D / 8; n++) v[n] = load_once8(first + (8 * n + g) * block_size + 4 * t);
    }
};

template <int D>
struct DecodeWarp {
    float o[D / 8][4], s[2][4], top[2], sum[2];

    DEVICE void clear() {
#pragma unroll
        for (int n = 0; n < D / 8; n++) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.0f;
        top[0] = top[1] = -INFINITY;
        sum[0] = sum[1] = 0.0f;
    }

    // Sixteen slots, whose keys `key(n, step)` gives as operands.
    template <class Key>
    DEVICE void score(const Queries<D> &q, Key key) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#pragma unroll
            for (int step = 0; step < D / 16; step++) {
                const uint2 k = key(n, step);
                mma(s[n], q.a[step], {k.x, k.y});
            }
        }
    }

    // The same, where `key(n, pair)` gives the operands of two steps.
    template <class Key>
    DEVICE void score_pairs(const Queries<D> &q, Key key) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#pragma unroll
            for (int pair = 0; pair < D / 32; pair++) {
                const uint4 k = key(n, pair);
                mma(s[n], q.a[2 * pair], {k.x, k.y});
                mma(s[n], q.a[2 * pair + 1], {k.z, k.w});
            }
        }
    }

    // Adds the values of the scored slots from `slot` on, which `value(n)` gives; those in begin..end are seen.
    template <class Value>
    DEVICE void add(Value value, uint32_t slot, uint32_t begin, uint32_t end, float scale) {
        const uint32_t t = threadIdx.x % 4;
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
            uint2 b = value(n);
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

// Of a part: other blocks' lie in memory, past the first cache, and the block's own in its shared memory.
template <bool OTHERS, class T>
DEVICE T part(const float *at) {
#ifdef __CUDACC__
    if constexpr (OTHERS) return __ldcg(reinterpret_cast<const T *>(at));
#endif
    return *reinterpret_cast<const T *>(at);
}

// Joins `count` parts, at most 32, [heads, D + 2] (values, top, sum): calls `done(head, channel, value)`
// and, once a head, `ends(head, top, sum)`. Values of parts are sums of weighted values, or their means where `MEANS`;
// the results are means. `shares` is [16][32] of the block's memory.
template <int D, uint32_t WARPS, bool MEANS, class Done, class Ends>
DEVICE void join_parts(const float *parts, uint32_t count, uint32_t heads, float *shares, Done done, Ends ends) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (uint32_t head = warp; head < heads; head += WARPS) {
        float2 own = make_float2(-INFINITY, 0.0f);
        if (lane < count) own = part<MEANS, float2>(parts + (lane * heads + head) * (D + 2) + D);
        const float top = lanes_max<1, 32>(own.x), share = shrink(own.x, top);
        const float sum = lanes_sum<1, 32>(share * own.y);
        shares[head * 32 + lane] = (MEANS ? share * own.y : share) / sum;
        if (lane == 0) ends(head, top, sum);
    }
    sync_warps<WARPS>();
    for (uint32_t i = threadIdx.x; i < heads * D; i += WARPS * 32) {
        const uint32_t head = i / D, channel = i % D;
        float value = 0.0f;
#pragma unroll 8
        for (uint32_t i_part = 0; i_part < count; i_part++)
            value += shares[head * 32 + i_part] * part<MEANS, float>(parts + (i_part * heads + head) * (D + 2) + channel);
        done(head, channel, value);
    }
}

// A block's share of it. Steps without packed slots, which are most, have a kernel of their own.
template <int D, bool PACKED>
struct DecodeJob : Attended {
    // Whether keys and values are under way while those before them are computed is a matter of registers.
    static constexpr bool AHEAD = D <= 128;
    static constexpr uint32_t WARPS = DECODE_WARPS;

    uint32_t splits;        // blocks that share the slots
    uint32_t unit, stride;  // of the warp: its first unit, and how far its next one is
    PackedPlace page, next;  // where those two lie; of units that are not packed the page is the first one
    bool idle, fetched;
    Unit<D> slots;
    Queries<D> q;

    DEVICE PackedPlace page_of(const AttentionParams &p, uint32_t unit) const {
        if (PACKED && unit < packed) return packed_place<D>(p, unit);
        return {0, unit * 16 < end ? page_at(unit * 16 / p.block_size) : 0u, 0};
    }
    DEVICE static size_t half_page(const AttentionParams &p) {
        return static_cast<size_t>(p.kv_heads) * D * p.block_size;
    }
    DEVICE void fetch_keys(const AttentionParams &p, uint32_t unit) {
        if (PACKED && unit < packed) return slots.fetch_packed_keys(packed_keys<D>(p, page), kept);
        slots.fetch_keys(p.pages + page.first * 2 * half_page(p) + (kv_head * p.block_size + unit * 16 % p.block_size) * D);
    }
    DEVICE void fetch_values(const AttentionParams &p, uint32_t unit, PackedPlace page) {
        if (PACKED && unit < packed) return slots.fetch_packed_values(packed_values<D>(p, page));
        const bf16 *head = p.pages + (page.first * size_t(2) + 1) * half_page(p) + static_cast<size_t>(kv_head) * D * p.block_size;
        slots.fetch_values(head + unit * 16 % p.block_size, p.block_size);
    }

    // Reads what no kernel of the step writes.
    DEVICE void prepare(const AttentionParams &p, DecodePlace at) {
        fetched = false;
        idle = !read<PACKED>(p, at.item, at.head_group);
        if (idle) return;
        splits = shared_by(at.splits);
        idle = at.split >= splits;
        if (idle) return;
        stride = splits * WARPS;
        unit = begin / 16 + at.split * WARPS + threadIdx.x / 32;
        page = page_of(p, unit), next = page_of(p, unit + stride);
        if (PACKED) load_channels(q);
        fetched = unit * 16 + 16 <= held;
        if (fetched) fetch(p);
    }
    DEVICE void fetch(const AttentionParams &p) {
        fetch_keys(p, unit);
        if (AHEAD) fetch_values(p, unit, page);
    }

    DEVICE void run(const AttentionParams &p, DecodeWarp<D> &state) {
        state.clear();
        bool pruned = PACKED && unit < packed;
        load_queries(q, p, pruned);
        if (!fetched && unit * 16 < end) fetch(p);
        for (; unit * 16 < end; unit += stride) {
            if (PACKED && pruned && unit >= packed) load_queries(q, p, pruned = false);
            state.score(q, [&](int n, int step) { return slots.k[n][step]; });
            const PackedPlace own_page = page;
            const bool more = (unit + stride) * 16 < end;
            page = next;
            next = page_of(p, unit + 2 * stride);
            if (!AHEAD) fetch_values(p, unit, own_page);
            if (AHEAD && more) fetch_keys(p, unit + stride);
            state.add([&](int n) { return slots.v[n]; }, unit * 16, begin, end, p.scale);
            if (!AHEAD && more) fetch_keys(p, unit + stride);
            if (AHEAD && more) fetch_values(p, unit + stride, page);
        }
    }
};

// What the blocks that share a token's slots agree on.
struct DecodeShare {
    uint32_t item, token, head_group, head0, heads;  // the token, and its query heads
    uint32_t split, splits, most;                    // which block it is, of how many, of at most how many
};

// Joins what the warps of a block, and the blocks that share a token's slots, have found.
template <int D, uint32_t WARPS>
DEVICE void decode_join(const AttentionParams &p, const DecodeShare &share, const DecodeWarp<D> &state, float *shared) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, heads = share.heads;
    // [WARPS][heads][D + 2], then shares [16][32], then the order in which the block finished.
    float *shares = shared + WARPS * heads * (D + 2);
    uint32_t *order = reinterpret_cast<uint32_t *>(shares + 16 * 32);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint32_t row = g + 8 * half;
        const float sum = lanes_sum<1, 4>(state.sum[half]);
        if (row >= heads) continue;
        float *part = shared + (warp * heads + row) * (D + 2);
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            *reinterpret_cast<float2 *>(part + 8 * n + 2 * t) = make_float2(state.o[n][2 * half], state.o[n][2 * half + 1]);
        if (t == 0) *reinterpret_cast<float2 *>(part + D) = make_float2(state.top[half], sum);
    }
    sync_warps<WARPS>();
    bf16 *out = p.out + (static_cast<size_t>(share.token) * p.heads + share.head0) * D;
    auto finish = [&](uint32_t head, uint32_t channel, float value) { out[head * D + channel] = to_bf16(value); };
    auto nothing = [](uint32_t, float, float) {};
    if (share.splits == 1) {
        join_parts<D, WARPS, false>(shared, WARPS, heads, shares, finish, nothing);
        return;
    }
    const uint32_t groups = p.kv_heads * ((p.heads / p.kv_heads + 15) / 16), place = share.item * groups + share.head_group;
    // Groups of a KV head differ in their heads, so that each has room for sixteen.
    float *parts = p.parts + static_cast<size_t>(place) * share.most * 16 * (D + 2);
    float *mine = parts + share.split * heads * (D + 2);
    auto keep = [&](uint32_t head, uint32_t channel, float value) { mine[head * (D + 2) + channel] = value; };
    auto keep_end = [&](uint32_t head, float top, float sum) {
        *reinterpret_cast<float2 *>(mine + head * (D + 2) + D) = make_float2(top, sum);
    };
    join_parts<D, WARPS, false>(shared, WARPS, heads, shares, keep, keep_end);
    sync_warps<WARPS>();
    if (threadIdx.x == 0) {
        __threadfence();
        *order = atomicAdd(p.done + place, 1u);
        __threadfence();
    }
    sync_warps<WARPS>();
    if (*order + 1 < share.splits) return;
    join_parts<D, WARPS, true>(parts, share.splits, heads, shares, finish, nothing);
    if (threadIdx.x == 0) p.done[place] = 0;
}

#define DECODE(name, D, packed, blocks)                                                \
    KERNEL(decode_##name, AttentionParams, DECODE_WARPS * 32, blocks) {                \
        lead();                                                                        \
        SHARED(float, shared);                                                         \
        const DecodePlace at = {blockIdx.z, blockIdx.x, blockIdx.y, gridDim.y};        \
        DecodeJob<D, packed> job = {};                                                 \
        job.prepare(p, at);                                                            \
        follow();                                                                      \
        if (job.idle) return;                                                          \
        DecodeWarp<D> state;                                                           \
        job.run(p, state);                                                             \
        const DecodeShare share = {at.item,  job.item.token, at.head_group, job.head0, \
                                   job.heads, at.split,       job.splits,    at.splits}; \
        decode_join<D, DECODE_WARPS>(p, share, state, shared);                         \
    }

DECODE(16, 16, false, 4)
DECODE(32, 32, false, 4)
DECODE(64, 64, false, 4)
DECODE(96, 96, false, 3)
DECODE(128, 128, false, 2)
DECODE(256, 256, false, 2)
DECODE(packed_16, 16, true, 4)
DECODE(packed_32, 32, true, 4)
DECODE(packed_64, 64, true, 4)
DECODE(packed_96, 96, true, 3)
DECODE(packed_128, 128, true, 2)
DECODE(packed_256, 256, true, 2)

// Attention of several tokens of a row over its pages, causal, by tiles.
//
// A block takes 64 or 96 queries of one KV head: tokens and the heads that share it, so that every K and V serves all of
// them. Tiles of 64 slots come from the pages through shared memory, the next one while this one is computed.
#pragma once
#include "common.cuh"
#include "decode.cuh"

constexpr unsigned TILE = 64;
// As many warps as registers allow: they hide each other's latencies.
constexpr uint32_t prefill_warps(int dim) { return dim > 64 && dim <= 128 ? 6 : 4; }

// Words of a row of `width` bf16 in shared memory: 16 more than a multiple of 32, so that two neighbouring rows, which
// eight lanes read together, lie in different banks.
constexpr uint32_t row_words(uint32_t width) { return (width / 2 + 15) / 32 * 32 + 16; }

template <int D>
struct PrefillTile {
    static constexpr uint32_t PREFILL_WARPS = prefill_warps(D);
    static constexpr uint32_t K_ROW = 2 * row_words(D), V_ROW = 2 * row_words(TILE);
    static constexpr uint32_t LEN = TILE * K_ROW + D * V_ROW;  // bf16 of K and V

    // Starts to copy the units of sixteen slots from `slot` on that begin before `end`.
    static DEVICE void fetch(const AttentionParams &p, bf16 *tile, const uint32_t *table, uint32_t kv_head,
                             uint32_t slot, uint32_t end) {
        const size_t half_page = static_cast<size_t>(p.kv_heads) * D * p.block_size;
        const uint32_t units = min(TILE / 16, (end - slot + 15) / 16);
        constexpr uint32_t K_PIECES = 16 * D / 8, V_PIECES = D * 2;
        for (uint32_t i = threadIdx.x; i < units * (K_PIECES + V_PIECES); i += PREFILL_WARPS * 32) {
            const uint32_t unit = i / (K_PIECES + V_PIECES), piece = i % (K_PIECES + V_PIECES);
            const uint32_t at = slot + unit * 16, place = at % p.block_size;
            const bf16 *page = p.pages + table[at / p.block_size] * 2 * half_page;
            if (piece < K_PIECES) {
                const uint32_t row = piece / (D / 8), part = piece % (D / 8);
                copy_async(tile + (unit * 16 + row) * K_ROW + part * 8,
                           page + (kv_head * p.block_size + place + row) * D + part * 8);
            } else {
                const uint32_t row = (piece - K_PIECES) / 2, part = (piece - K_PIECES) % 2;
                copy_async(tile + TILE * K_ROW + row * V_ROW + unit * 16 + part * 8,
                           page + half_page + (kv_head * D + row) * p.block_size + place + part * 8);
            }
        }
    }

    // Zeroes values from slot `held` of the tile on: nobody has written or copied there, and 0 times that need not
    // be 0.
    static DEVICE void blank(bf16 *tile, uint32_t held) {
        const uint32_t rest = TILE - held;
        for (uint32_t i = threadIdx.x; i < D * rest; i += PREFILL_WARPS * 32)
            tile[TILE * K_ROW + i / rest * V_ROW + held + i % rest] = 0;
    }
};

template <int D>
struct PrefillWarp {
    float o[D / 8][4], top[2], sum[2];

    // The slots of a tile, the first of which is `slot`; rows `half` see begin[half]..end[half], all of the tile where it
    // is `whole`. Products that do not wait for each other follow each other.
    DEVICE void tile(const Queries<D> &q, const bf16 *tile, uint32_t slot, const uint32_t (&begin)[2],
                     const uint32_t (&end)[2], bool whole, float scale) {
        using Shape = PrefillTile<D>;
        constexpr int SLOTS = TILE / 8, APART = 4;
        const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        float s[SLOTS][4] = {}, most[2] = {top[0], top[1]};
        // Four tiles share 32 slots; column c of the q-th is slot 8 (c / 2) + 2 q + c % 2.
        auto key = [&](int n) { return tile + (n / 4 * 32 + 8 * (g / 2) + 2 * (n % 4) + g % 2) * Shape::K_ROW; };
#pragma unroll
        for (int chunk = 0; chunk < (D + 31) / 32; chunk++)
#pragma unroll
            for (int first = 0; first < SLOTS; first += APART) {
                uint4 b[APART];
#pragma unroll
                for (int n = 0; n < APART; n++) {
                    if constexpr (D % 32 == 0) {
                        b[n] = load<uint4>(key(first + n) + 32 * chunk + 8 * t);
                    } else {
                        const uint2 own = load<uint2>(key(first + n) + 4 * t);
                        b[n] = make_uint4(own.x, own.y, 0, 0);
                    }
                }
#pragma unroll
                for (int n = 0; n < APART; n++) mma(s[first + n], q.a[D % 32 == 0 ? 2 * chunk : 0], {b[n].x, b[n].y});
                if constexpr (D % 32 == 0) {
#pragma unroll
                    for (int n = 0; n < APART; n++) mma(s[first + n], q.a[2 * chunk + 1], {b[n].z, b[n].w});
                }
            }
#pragma unroll
        for (int n = 0; n < SLOTS; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t own = slot + n / 4 * 32 + 8 * t + 2 * (n % 4) + i % 2;
                if (!whole && (own < begin[i / 2] || own >= end[i / 2])) s[n][i] = -INFINITY;
                most[i / 2] = fmaxf(most[i / 2], s[n][i]);
            }
        float lift[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            most[half] = lanes_max<1, 4>(most[half]);
            // Where nothing was seen yet all weights are 0, whatever is taken off.
            lift[half] = most[half] == -INFINITY ? 0.0f : most[half] * scale;
            const float fade = exp2_fast(top[half] * scale - lift[half]);
            top[half] = most[half];
            sum[half] *= fade;
#pragma unroll
            for (int n = 0; n < D / 8; n++) o[n][2 * half] *= fade, o[n][2 * half + 1] *= fade;
        }
        uint32_t p[TILE / 16][4];
#pragma unroll
        for (int n = 0; n < SLOTS; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float a = exp2_fast(s[n][2 * half] * scale - lift[half]);
                const float b = exp2_fast(s[n][2 * half + 1] * scale - lift[half]);
                sum[half] += a + b;
                p[n / 2][n % 2 * 2 + half] = pack(a, b);
            }
        const bf16 *values = tile + TILE * Shape::K_ROW;
        constexpr int ROWS = D / 8 % APART == 0 ? APART : 2;
#pragma unroll
        for (int first = 0; first < D / 8; first += ROWS)
#pragma unroll
            for (int chunk = 0; chunk < static_cast<int>(TILE / 32); chunk++) {
                uint4 b[ROWS];
#pragma unroll
                for (int n = 0; n < ROWS; n++)
                    b[n] = load<uint4>(values + (8 * (first + n) + g) * Shape::V_ROW + 32 * chunk + 8 * t);
#pragma unroll
                for (int n = 0; n < ROWS; n++) mma(o[first + n], p[2 * chunk], {b[n].x, b[n].y});
#pragma unroll
                for (int n = 0; n < ROWS; n++) mma(o[first + n], p[2 * chunk + 1], {b[n].z, b[n].w});
            }
    }
};

template <int D>
DEVICE void prefill(const AttentionParams &p) {
    lead();
    follow();
    using Shape = PrefillTile<D>;
    constexpr uint32_t PREFILL_WARPS = Shape::PREFILL_WARPS;
    SHARED(bf16, tiles);  // [2][Shape::LEN]
    const Item item = p.items[blockIdx.z];
    const uint32_t group = p.heads / p.kv_heads, kv_head = blockIdx.y;
    // Long tiles of late queries first, so that the last blocks to run are short ones.
    const uint32_t block = gridDim.x - 1 - blockIdx.x, first = block * PREFILL_WARPS * 16;
    if (item.row == NO_ROW || first >= item.len * group) return;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t start = p.kv_len[item.row] + item.first, written = start + item.len;
    const uint32_t *table = p.tables + p.starts[item.row];
    const uint32_t last = min(first + PREFILL_WARPS * 16, item.len * group) - 1;
    const uint32_t stop = start + last / group + 1, sees = start + first / group + 1;
    const uint32_t held = min(written, (stop + 15) / 16 * 16);
    const uint32_t from = (p.window != 0 && sees > p.window ? sees - p.window : 0) / TILE * TILE;

    Queries<D> q;
    auto place = [&](uint32_t query) {
        return (static_cast<size_t>(item.token + query / group) * p.heads + kv_head * group + query % group) * D;
    };
    const uint32_t base = first + warp * 16;
    q.load_rows([&](uint32_t row) -> const bf16 * {
        return base + row < item.len * group ? p.q + place(base + row) : nullptr;
    });
    uint32_t begin[2], end[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        end[half] = start + (base + g + 8 * half) / group + 1;
        begin[half] = p.window != 0 && end[half] > p.window ? end[half] - p.window : 0;
    }
    // What all of the warp's queries see; rows past the last query see more than they need, and nobody looks at them.
    const uint32_t all_end = start + base / group + 1, last_end = start + (base + 15) / group + 1;
    const uint32_t all_begin = p.window != 0 && last_end > p.window ? last_end - p.window : 0;
    PrefillWarp<D> state;
#pragma unroll
    for (int n = 0; n < D / 8; n++) state.o[n][0] = state.o[n][1] = state.o[n][2] = state.o[n][3] = 0.0f;
    state.top[0] = state.top[1] = -INFINITY;
    state.sum[0] = state.sum[1] = 0.0f;

    Shape::fetch(p, tiles, table, kv_head, from, stop);
    commit_copies();
    uint32_t stage = 0;
    for (uint32_t slot = from; slot < stop; slot += TILE, stage ^= 1) {
        bf16 *tile = tiles + stage * Shape::LEN;
        if (slot + TILE < stop) Shape::fetch(p, tiles + (stage ^ 1) * Shape::LEN, table, kv_head, slot + TILE, stop);
        commit_copies();
        wait_copies<1>();
        __syncthreads();
        if (slot + TILE > held) {
            Shape::blank(tile, held - slot);
            __syncthreads();
        }
        state.tile(q, tile, slot, begin, end, slot >= all_begin && slot + TILE <= all_end, p.scale);
        // The next round overwrites the other stage, which was read before this barrier.
        __syncthreads();
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float sum = lanes_sum<1, 4>(state.sum[half]);
        const uint32_t query = base + g + 8 * half;
        if (query >= item.len * group) continue;
        bf16 *out = p.out + place(query);
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            *reinterpret_cast<uint32_t *>(out + 8 * n + 2 * t) =
                pack(state.o[n][2 * half] / sum, state.o[n][2 * half + 1] / sum);
    }
}

#define PREFILL(D, blocks) \
    KERNEL(prefill_##D, AttentionParams, prefill_warps(D) * 32, blocks) { prefill<D>(p); }

PREFILL(16, 2)
PREFILL(32, 2)
PREFILL(64, 3)
PREFILL(96, 2)
PREFILL(128, 2)
PREFILL(256, 1)

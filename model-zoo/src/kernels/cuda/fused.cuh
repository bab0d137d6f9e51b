// A whole decode step of few tokens as one launch.
//
// As many blocks as the device has multiprocessors walk through the step's stages: joint products and attention, layer by
// layer. Between two stages all blocks wait for each other, which takes about a microsecond. Memory does not rest
// meanwhile: a thread of each block brings the weights of all stages, and the keys and values, in their order and as far
// ahead as the block's memory has room. Stages do what the kernels of skinny.cuh and decode.cuh do, from the same parameters.
#pragma once
#include "fused_fill.cuh"

// Where all blocks of the grid meet between two stages.
struct Meeting {
    uint32_t *arrived, count;

    DEVICE void await() const { ::await<FUSED_WARPS>(arrived, count); }
    DEVICE void arrive() const { ::arrive<FUSED_WARPS>(arrived); }
};

// Activations of the lane's token in each tile of eight tokens, in the block's memory or, `FAR`, in the device's.
template <uint32_t TILES, bool FAR>
struct Inputs {
    const bf16 *rows[TILES];

    template <class T>
    DEVICE T at(uint32_t tile, uint32_t column) const {
        if constexpr (FAR) return load_global<T>(rows[tile] + column);
        else return load<T>(rows[tile] + column);
    }
};

// A piece of weights times the activations of tokens from column `first` on; even and odd products gather apart, for they
// wait for each other.
template <uint32_t TILES, bool FAR>
DEVICE void fused_piece(float (&c)[TILES][2][4], const bf16 *piece, uint32_t first, uint32_t cols,
                        const Inputs<TILES, FAR> &x) {
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (uint32_t ahead = 0; ahead < PIECE_COLS; ahead += FUSED_WARPS * 32) {
        const uint32_t base = threadIdx.x / 32 * 32 + ahead;
        if (base >= cols) break;
        const uint4 a = load<uint4>(piece + tile_place(g, base + 8 * t));
        const uint4 b = load<uint4>(piece + tile_place(g + 8, base + 8 * t));
#pragma unroll
        for (uint32_t tile = 0; tile < TILES; tile++) {
            const uint4 v = x.template at<uint4>(tile, first + base + 8 * t);
            mma(c[tile][0], {a.x, b.x, a.y, b.y}, {v.x, v.y});
            mma(c[tile][1], {a.z, b.z, a.w, b.w}, {v.z, v.w});
        }
    }
}

// A thread's pair of outputs of a tile, `row` and `row + 8`, of one token.
struct Pair {
    uint32_t token, step_token, row;
    float2 ahead;  // what it needs from memory: the sums that it adds to, or how it turns
};

// The thread's pair, and what it needs, ahead of the product. Warps have the first tokens in turn, by `turn`: others go on to
// the next tile meanwhile.
DEVICE Pair fused_pair(const Stage &stage, uint32_t row, uint32_t turn) {
    const SkinnyParams &p = stage.skinny;
    const uint32_t own = (threadIdx.x + 32 * (FUSED_WARPS - turn % FUSED_WARPS)) % (32 * FUSED_WARPS);
    Pair pair = {own / 8, 0, row + own % 8, make_float2(0.0f, 0.0f)};
    if (pair.token >= p.tokens) return pair;
    pair.step_token = p.index != nullptr ? p.index[pair.token] : pair.token;
    if (stage.kind == STAGE_PLACE) {
        pair.ahead = place_turn(p.place, pair.step_token, pair.row);
    } else if (stage.kind == STAGE_ADD) {
        const float *out = static_cast<const float *>(p.out) + static_cast<size_t>(pair.step_token) * p.rows + pair.row;
        if (pair.row < p.rows) pair.ahead.x = out[0];
        if (pair.row + 8 < p.rows) pair.ahead.y = out[8];
    }
    return pair;
}

// Joins the warps' parts of a tile, and does what follows the product.
DEVICE void fused_finish(const Stage &stage, const FusedMemory &memory, uint32_t turn, const Pair &pair, uint32_t flag) {
    const SkinnyParams &p = stage.skinny;
    const uint32_t token = pair.token, row = pair.row, j = threadIdx.x % 8;
    if (token >= p.tokens) return;
    float a = 0.0f, b = 0.0f, sum = 0.0f;
#pragma unroll
    for (uint32_t w = 0; w < FUSED_WARPS; w++) {
        a += memory.parts[turn][w][token][j];
        b += memory.parts[turn][w][token][j + 8];
        sum += memory.squares[w][token];
    }
    if (p.norm != nullptr) {
        const float scale = rsqrtf(sum / p.cols + p.eps);
        a *= scale, b *= scale;
    }
    if (p.bias != nullptr) {
        if (row < p.rows) a += p.bias[row];
        if (row + 8 < p.rows) b += p.bias[row + 8];
    }
    if (stage.kind == STAGE_ADD) {
        const size_t at = static_cast<size_t>(pair.step_token) * p.rows + row;
        float *out = static_cast<float *>(p.out) + at;
        a += pair.ahead.x, b += pair.ahead.y;
        if (stage.links != nullptr) {
            if (row < p.rows) store_linked(stage.links + at, a, flag);
            if (row + 8 < p.rows) store_linked(stage.links + at + 8, b, flag);
        }
        if (row < p.rows) out[0] = a;
        if (row + 8 < p.rows) out[8] = b;
    } else if (stage.kind == STAGE_PLACE) {
        place_pair(p.place, memory.targets[token], pair.ahead, token, row, a, b);
    } else if (stage.kind == STAGE_GATE) {
        Gate::pair(p, token, pair.step_token, row, a, b);
    } else {
        StoreFloat::pair(p, token, pair.step_token, row, a, b);
    }
}

// The tile of sixteen rows from `row` on, in bf16.
template <uint32_t TILES, bool FAR>
DEVICE void fused_tile(float (&c)[TILES][2][4], uint32_t cols, Ring &ring, const Inputs<TILES, FAR> &x) {
    for (uint32_t base = 0; base < cols; base += PIECE_COLS, ring.next()) {
        ring.memory.full[ring.slot].wait(ring.phase);
        fused_piece<TILES, FAR>(c, ring.piece(), base, min(PIECE_COLS, cols - base), x);
        __syncwarp();
        if (threadIdx.x % 32 == 0) ring.memory.empty[ring.slot].arrive();
    }
}

// The same of quantized weights: units go to the warps in turn. Two at a time wait less for each other than one would for
// itself.
template <uint32_t TILES, bool FAR>
DEVICE void fused_units(float (&c)[TILES][2][4], uint32_t cols, uint32_t format, Ring &ring, const Inputs<TILES, FAR> &x) {
    const uint32_t units = units_of(cols), warp = threadIdx.x / 32;
    float sums[2][TILES][4] = {};
    with_format(format, [&](auto unit) {
        constexpr uint32_t BYTES = unit_bytes(unit.OWN), UNITS = piece_units(unit.OWN);
        for (uint32_t first = 0; first < units; first += UNITS, ring.next()) {
            ring.memory.full[ring.slot].wait(ring.phase);
            const unsigned char *piece = reinterpret_cast<const unsigned char *>(ring.piece()) + warp * BYTES;
            const uint32_t mine = first + warp;
            auto load16 = [](const unsigned char *at) { return load<uint4>(at); };
            auto near = [&](uint32_t tile, uint32_t column) { return x.template at<uint4>(tile, mine * 64 + column); };
            auto far = [&](uint32_t tile, uint32_t column) {
                return x.template at<uint4>(tile, (mine + FUSED_WARPS) * 64 + column);
            };
            if (UNITS > FUSED_WARPS && mine + FUSED_WARPS < units) {
                decltype(unit) second;
                unit.fetch(piece, load16), second.fetch(piece + FUSED_WARPS * BYTES, load16);
                unit.template multiply<TILES>(sums[0], near), second.template multiply<TILES>(sums[1], far);
            } else if (mine < units) {
                unit.fetch(piece, load16);
                unit.template multiply<TILES>(sums[0], near);
            }
            __syncwarp();
            if (threadIdx.x % 32 == 0) ring.memory.empty[ring.slot].arrive();
        }
    });
#pragma unroll
    for (uint32_t tile = 0; tile < TILES; tile++)
#pragma unroll
        for (uint32_t e = 0; e < 4; e++) c[tile][0][e] = sums[0][tile][e] + sums[1][tile][e];
}

// The block's tiles of a product, and what follows it.
template <bool QUANTIZED, uint32_t TILES, bool FAR>
DEVICE void fused_tiles(const Stage &stage, Ring &ring, const Inputs<TILES, FAR> &x, uint32_t flag) {
    FusedMemory &memory = ring.memory;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t cols = stage.skinny.cols, rows = stage.skinny.rows;
    uint32_t number = 0;
    for (uint32_t row = blockIdx.x * 16; row < rows; row += gridDim.x * 16, number++) {
        const uint32_t turn = number % 2;
        // With weights in bf16, which wait for memory, taking turns was no faster.
        const Pair pair = fused_pair(stage, row, QUANTIZED ? number : 0);
        float c[TILES][2][4] = {};
        if (QUANTIZED && stage.quantized.count != 0) fused_units(c, cols, stage.quantized.part(row).format, ring, x);
        else fused_tile(c, cols, ring, x);
#pragma unroll
        for (uint32_t tile = 0; tile < TILES; tile++) {
            float *part = &memory.parts[turn][warp][8 * tile + 2 * t][g];
            part[0] = c[tile][0][0] + c[tile][1][0];
            part[SKINNY_STRIDE] = c[tile][0][1] + c[tile][1][1];
            part[8] = c[tile][0][2] + c[tile][1][2];
            part[SKINNY_STRIDE + 8] = c[tile][0][3] + c[tile][1][3];
        }
        // The parts of the rows before these are read before this barrier, those of the ones before them were.
        sync_warps<FUSED_WARPS>();
        fused_finish(stage, memory, turn, pair, flag);
    }
}

template <bool QUANTIZED, uint32_t TILES>
DEVICE void fused_product(const Stage &stage, Ring &ring, bf16 *staged, bool close, uint32_t flag) {
    const SkinnyParams &p = stage.skinny;
    const uint32_t g = threadIdx.x % 32 / 4, cols = p.cols, most = p.tokens - 1;
    // Where there is no token the last one stands in: nobody looks at its result.
    if (close) {
        const uint32_t stride = normed_stride(cols);
        Inputs<TILES, false> x;
#pragma unroll
        for (uint32_t tile = 0; tile < TILES; tile++) x.rows[tile] = staged + min(8 * tile + g, most) * stride;
        fused_tiles<QUANTIZED>(stage, ring, x, flag);
    } else {
        Inputs<TILES, true> x;
#pragma unroll
        for (uint32_t tile = 0; tile < TILES; tile++)
            x.rows[tile] = static_cast<const bf16 *>(p.x) + static_cast<size_t>(min(8 * tile + g, most)) * cols;
        fused_tiles<QUANTIZED>(stage, ring, x, flag);
    }
}

// A product and what follows it; `flag` is its own, one more than that of the stage before.
template <bool QUANTIZED>
DEVICE void fused_product(const Stage &stage, Ring &ring, bf16 *staged, uint32_t room, uint32_t flag) {
    const SkinnyParams &p = stage.skinny;
    if (blockIdx.x * 16 >= p.rows) return;
    // Activations that are read often, or that are to be normed, are brought close first.
    const bool norms = p.norm != nullptr, close = norms || (p.cols >= 2048 && 2 * p.tokens * normed_stride(p.cols) <= room);
    if (norms) fused_norm(p, {stage.links, flag - 1}, staged, ring.memory.squares);
    else if (close) fused_stage(p, staged);
    if (p.tokens <= 8) fused_product<QUANTIZED, 1>(stage, ring, staged, close, flag);
    else if (p.tokens <= 16) fused_product<QUANTIZED, 2>(stage, ring, staged, close, flag);
    else fused_product<QUANTIZED, 4>(stage, ring, staged, close, flag);
}

// The units of the block's share: those in the ring, then the others.
template <int D, bool PACKED>
DEVICE void fused_slots(const AttentionParams &p, const FusedJob<D, PACKED> &job, Ring &ring, Queries<D> &q,
                        DecodeWarp<D> &state) {
    using Job = FusedJob<D, PACKED>;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    bool pruned = PACKED && job.first < job.packed;
    job.load_queries(q, p, pruned);
    for (uint32_t unit = job.first; unit < job.whole; unit += Job::UNITS, ring.next()) {
        ring.memory.full[ring.slot].wait(ring.phase);
        const uint32_t end = min(unit + Job::UNITS, job.whole);
        // Units go to the warps in turn.
        for (uint32_t mine = unit + (warp + FUSED_WARPS - (unit - job.first) % FUSED_WARPS) % FUSED_WARPS; mine < end;
             mine += FUSED_WARPS) {
            const bf16 *keys = ring.piece() + (mine - unit) * Job::UNIT, *values = keys + 16 * D;
            if (PACKED && pruned && mine >= job.packed) job.load_queries(q, p, pruned = false);
            const uint32_t row = 4 * (g / 2) + g % 2, width = PACKED && pruned ? job.kept : D;
            if constexpr (D % 32 == 0) {
                state.score_pairs(q, [&](int n, int pair) {
                    const uint32_t at = 32 * pair + 8 * t;
                    return at < width ? load<uint4>(keys + (row + 2 * n) * width + at) : make_uint4(0, 0, 0, 0);
                });
            } else {
                state.score(q, [&](int n, int step) {
                    const uint32_t at = first_channel<D>(step, t);
                    return at < width ? load<uint2>(keys + (row + 2 * n) * width + at) : make_uint2(0, 0);
                });
            }
            state.add([&](int n) { return load<uint2>(values + (8 * n + g) * 16 + 4 * t); }, mine * 16, job.begin,
                      job.end, p.scale);
        }
        __syncwarp();
        if (lane == 0) ring.memory.empty[ring.slot].arrive();
    }
    for (uint32_t unit = job.whole; unit < job.last; unit++) {
        if ((unit - job.first) % FUSED_WARPS != warp) continue;
        if (PACKED && pruned) job.load_queries(q, p, pruned = false);
        Unit<D> slots;
        const bf16 *keys = job.keys(p, unit);
        slots.fetch_keys(keys);
        slots.fetch_values(keys + Job::to_values(p), 16);
        state.score(q, [&](int n, int step) { return slots.k[n][step]; });
        state.add([&](int n) { return slots.v[n]; }, unit * 16, job.begin, job.end, p.scale);
    }
}

// Attention, block by block of the decode kernel's grid.
template <int D, bool PACKED>
DEVICE void fused_attention(const Stage &stage, Ring &ring, float *room, const Meeting &meeting) {
    const AttentionParams &p = stage.attention;
    const uint32_t all = stage.tokens * stage.head_groups * stage.splits;
    uint32_t i = blockIdx.x;
    FusedJob<D, PACKED> job = {};
    Queries<D> q;
    auto read = [&]() {
        job.read(stage, i);
        if (PACKED && !job.idle) job.load_channels(q);
    };
    // Before the stage before this one has ended everywhere: no kernel writes what this reads.
    if (i < all) read();
    meeting.await();
    for (; i < all; i += gridDim.x) {
        if (i != blockIdx.x) read();
        if (job.idle) continue;
        DecodeWarp<D> state;
        state.clear();
        fused_slots(p, job, ring, q, state);
        const DecodeShare share = {i / stage.splits / stage.head_groups, job.item.token, job.head_group, job.head0, job.heads,
                                   job.split, job.splits, stage.splits};
        decode_join<D, FUSED_WARPS>(p, share, state, room);
        sync_warps<FUSED_WARPS>();
    }
}

// Embeddings and angles: an element a thread.
DEVICE void fused_embed(const Stage &stage) {
    const EmbedParams &e = stage.embed;
    const RotaryParams &r = stage.rotary;
    const uint32_t all = gridDim.x * FUSED_WARPS * 32, first = blockIdx.x * FUSED_WARPS * 32 + threadIdx.x;
    for (uint32_t i = first; i < stage.tokens * e.width; i += all) embed_one(e, i / e.width, i % e.width);
    for (uint32_t i = first; i < stage.tokens * r.half; i += all) rotary_one(r, i / r.half, i % r.half);
}

// By the block's last warps: its first one waits for other blocks.
DEVICE void copy_stage(Stage &to, const Stage *from) {
    for (uint32_t i = FUSED_WARPS * 32 - 1 - threadIdx.x; i < sizeof(Stage) / 4; i += FUSED_WARPS * 32)
        reinterpret_cast<uint32_t *>(&to)[i] = reinterpret_cast<const uint32_t *>(from)[i];
}

// Whether what the stage norms comes by links. Nobody overwrites them too early: between two stages that add to the stream
// there is one that needs what all blocks have made of it.
DEVICE bool awaits_links(const Stage &stage) { return stage.links != nullptr && stage.skinny.norm != nullptr; }

template <int D, bool PACKED, bool QUANTIZED>
DEVICE void fused_step(const FusedParams &p) {
    SHARED(unsigned char, bytes);
    FusedMemory &memory = *reinterpret_cast<FusedMemory *>(bytes);
    unsigned char *room = bytes + FUSED_MEMORY;
    Ring ring = {memory, reinterpret_cast<bf16 *>(room + p.room), p.slots, 0, 0};
    if (threadIdx.x < p.slots) {
        memory.full[threadIdx.x].init(1);
        memory.empty[threadIdx.x].init(FUSED_WARPS);
    }
    __syncthreads();
    if (threadIdx.x / 32 == FUSED_WARPS) {
        fused_fill<D, PACKED, QUANTIZED>(p, ring);
        return;
    }
    copy_stage(memory.stages[p.from % 2], p.stages + p.from);
    const uint32_t flags = p.arrived[1];
    sync_warps<FUSED_WARPS>();
    Meeting meeting = {p.arrived, 0};
    for (uint32_t s = p.from; s < p.to; s++) {
        const Stage &stage = memory.stages[s % 2];
        const bool linked = awaits_links(stage), more = s + 1 < p.to, links = more && awaits_links(p.stages[s + 1]);
        // Nobody reads the stage before this one any more: all warps have met since.
        if (more) copy_stage(memory.stages[(s + 1) % 2], p.stages + s + 1);
        if (stage.kind == STAGE_ATTENTION) {
            fused_attention<D, PACKED>(stage, ring, reinterpret_cast<float *>(room), meeting);
        } else {
            const SkinnyParams &product = stage.skinny;
            if (stage.kind == STAGE_PLACE && threadIdx.x < product.tokens)
                memory.targets[threadIdx.x] =
                    place_target(product.place, product.index != nullptr ? product.index[threadIdx.x] : threadIdx.x);
            if (!linked) meeting.await();
            if (stage.kind == STAGE_EMBED) fused_embed(stage);
            else fused_product<QUANTIZED>(stage, ring, reinterpret_cast<bf16 *>(room), p.room, flags + s);
        }
        if (links) sync_warps<FUSED_WARPS>();
        else if (more) meeting.arrive(), meeting.count += gridDim.x;
    }
}

#define FUSED(name, D, packed, quantized) \
    KERNEL(fused_step_##name, FusedParams, FUSED_THREADS, 1) { fused_step<D, packed, quantized>(p); }
// Rows may have packed slots or not, and the model quantized weights or not: who has neither pays for neither.
#define FUSED_OF(D)                                   \
    FUSED(D, D, false, false)                         \
    FUSED(packed_##D, D, true, false)                 \
    FUSED(quantized_##D, D, false, true)              \
    FUSED(packed_quantized_##D, D, true, true)

FUSED_OF(16)
FUSED_OF(32)
FUSED_OF(64)
FUSED_OF(96)
FUSED_OF(128)

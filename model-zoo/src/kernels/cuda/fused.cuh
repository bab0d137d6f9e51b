// A whole decode step of few tokens as one launch.
//
// As many blocks as the device has multiprocessors walk through the step's stages: joint products and attention, layer by
// layer. Between two stages all blocks wait for each other, which takes about a microsecond. Memory does not rest
// meanwhile: a thread of each block brings the weights of all stages, and the keys and values, in their order and as far
// ahead as the block's memory has room. Stages do what the kernels of skinny.cuh and decode.cuh do, from the same parameters.
#pragma once
#include "async.cuh"
#include "decode.cuh"
#include "rows.cuh"
#include "skinny.cuh"
#include "staging.cuh"

enum StageKind : uint32_t { STAGE_EMBED, STAGE_FLOAT, STAGE_ADD, STAGE_GATE, STAGE_PLACE, STAGE_ATTENTION };

// What all blocks do together. Which fields count is the kind's.
struct Stage {
    uint32_t kind;
    uint32_t tokens;       // of the embedding, items of attention
    uint32_t head_groups;  // of attention: KV heads times sixteens of the query heads that share one
    uint32_t splits;       // of attention: blocks that share the slots of one token at most
    SkinnyParams skinny;
    AttentionParams attention;
    EmbedParams embed;
    RotaryParams rotary;
};

struct alignas(64) TensorMap {
    uint64_t words[16];
};

struct FusedParams {
    const Stage *stages;
    const TensorMap *maps;  // of each stage: the device's description of its weights
    uint32_t *arrived;  // zero before the launch: how often blocks came to the end of a stage
    uint32_t from, to;  // stages of this launch; all of them but where blocks cannot wait for each other
    uint32_t room;      // bytes of the block's memory for activations or attention, a multiple of 1,024
    uint32_t slots;     // pieces of weights that it has room for, up to FUSED_SLOTS
    uint32_t ahead;     // up to `slots`: pieces that are under way at once, at most: more would only hold up what else is read
    uint32_t pad;
};

// A piece of weights is a tile of sixteen rows and so many columns.
constexpr uint32_t PIECE_COLS = 64 * TILE_GROUPS, PIECE = TILE_BYTES / 2;
DEVICE bool is_product(uint32_t kind) { return kind >= STAGE_FLOAT && kind <= STAGE_PLACE; }

// What a block's memory begins with; then `room` bytes, then the pieces.
struct FusedMemory {
    Stage stages[2];                                           // this one and the next
    float parts[2][FUSED_WARPS][FUSED_TOKENS][SKINNY_STRIDE];  // of two tiles in turn
    float squares[FUSED_WARPS][FUSED_TOKENS];
    PlaceTarget targets[FUSED_TOKENS];
    Barrier full[FUSED_SLOTS], empty[FUSED_SLOTS];
};
constexpr uint32_t FUSED_MEMORY = 43 * 1024;
static_assert(sizeof(FusedMemory) <= FUSED_MEMORY, "fused.rs counts on it");

// Where all blocks of the grid meet between two stages.
struct Meeting {
    uint32_t *arrived, count;

    DEVICE void await() const { ::await<FUSED_WARPS>(arrived, count); }
    DEVICE void arrive() const { ::arrive<FUSED_WARPS>(arrived); }
};

// The pieces, in the order in which they are filled and used.
struct Ring {
    FusedMemory &memory;
    bf16 *pieces;
    uint32_t slots, slot, phase;

    DEVICE bf16 *piece() const { return pieces + slot * PIECE; }
    DEVICE void next() {
        if (++slot == slots) slot = 0, phase ^= 1;
    }
};

// A block's share of the attention of one token. Slots that lay there before the step come through the ring, in units of
// sixteen; of the others, the last unit's, each warp reads what it needs itself.
template <int D, bool PACKED>
struct FusedJob : Attended {
    static constexpr uint32_t UNIT = 2 * 16 * D, UNITS = PIECE / UNIT;  // values of a unit, and units of a piece

    uint32_t head_group, split, splits;
    uint32_t first, last, whole;  // units; those before `whole` are in the ring
    bool idle;

    DEVICE void read(const Stage &stage, uint32_t index) {
        const AttentionParams &p = stage.attention;
        const uint32_t at = index / stage.splits;
        split = index % stage.splits, head_group = at % stage.head_groups;
        idle = !Attended::read<PACKED>(p, at / stage.head_groups, head_group);
        if (idle) return;
        const uint32_t most = shared_by(stage.splits), share = (units() + most - 1) / most;
        splits = (units() + share - 1) / share;
        idle = split >= splits;
        first = begin / 16 + split * share, last = min(first + share, begin / 16 + units());
        whole = max(first, min(last, held / 16));
    }
    // Of a unit that is not packed, whose page is one of units.
    DEVICE const bf16 *keys(const AttentionParams &p, uint32_t unit) const {
        return p.pages + (static_cast<size_t>(page_at(unit)) * 2 * p.kv_heads + kv_head) * 16 * D;
    }
    DEVICE static size_t to_values(const AttentionParams &p) { return static_cast<size_t>(p.kv_heads) * 16 * D; }
    // Values of units `unit..end` in the ring.
    DEVICE uint32_t size(uint32_t unit, uint32_t end) const {
        const uint32_t pruned = PACKED && unit < packed ? min(end, packed) - unit : 0;
        return (end - unit) * UNIT - pruned * 16 * (D - kept);
    }
};

DEVICE void copy_run(Barrier &full, bf16 *to, const Run &run, uint32_t values) {
    const uint32_t near = min(run.cut, values);
    full.copy(to, run.first, near * 2);
    if (near < values) full.copy(to + near, run.second + near, (values - near) * 2);
}

// The way through the ring of who copies: one lane, or, `WIDE`, a whole warp, all of whose lanes know where it is.
template <bool WIDE>
struct Filling {
    Ring ring, oldest;      // `oldest` is the first piece that may still be under way
    uint32_t asked, ahead;  // pieces that were asked for, and how many may be under way

    DEVICE static bool leads() { return !WIDE || threadIdx.x % 32 == 0; }
    // Waits for room for the next piece, of `bytes` bytes, and has `copy` bring it.
    template <class Copy>
    DEVICE void next(uint32_t bytes, Copy copy) {
        if (++asked > ahead) {
            ring.memory.full[oldest.slot].wait(oldest.phase);
            oldest.next();
        }
        ring.memory.empty[ring.slot].wait(ring.phase ^ 1);
        if (leads()) ring.memory.full[ring.slot].announce(bytes);
        if (WIDE) __syncwarp();
        copy(ring.memory.full[ring.slot], ring.piece());
        ring.next();
    }
};

// Brings the slots of the block's share of attention that lay there before the step.
template <int D, bool PACKED>
DEVICE void fused_fill_slots(const Stage &stage, Filling<PACKED> &filling) {
    using Job = FusedJob<D, PACKED>;
    static_assert(2 * Job::UNITS <= 32, "a lane for each copy");
    const AttentionParams &p = stage.attention;
    for (uint32_t i = blockIdx.x; i < stage.tokens * stage.head_groups * stage.splits; i += gridDim.x) {
        Job job = {};
        job.read(stage, i);
        if (job.idle) continue;
        for (uint32_t unit = job.first; unit < job.whole; unit += Job::UNITS) {
            const uint32_t end = min(unit + Job::UNITS, job.whole);
            if constexpr (PACKED) {
                // Each lane brings a unit's keys or values, and knows from where before there is room for them.
                const uint32_t own = unit + threadIdx.x % 32 / 2, values = threadIdx.x % 2;
                const bool pruned = own < job.packed;
                Run run = {nullptr, nullptr, 0xFFFFFFFFu};
                if (own < end && pruned) {
                    const PackedPlace place = job.template packed_place<D>(p, own);
                    run = values ? job.template packed_values<D>(p, place) : job.template packed_keys<D>(p, place);
                } else if (own < end) {
                    run.first = job.keys(p, own) + (values ? Job::to_values(p) : 0);
                }
                filling.next(job.size(unit, end) * 2, [&](Barrier &full, bf16 *piece) {
                    piece += (own - unit) * Job::UNIT + values * 16 * D;
                    if (own < end) copy_run(full, piece, run, 16 * (pruned && !values ? job.kept : D));
                });
            } else {
                filling.next((end - unit) * Job::UNIT * 2, [&](Barrier &full, bf16 *piece) {
                    for (uint32_t u = 0; u < end - unit; u++) {
                        const bf16 *keys = job.keys(p, unit + u);
                        full.copy(piece + u * Job::UNIT, keys, Job::UNIT);
                        full.copy(piece + u * Job::UNIT + 16 * D, keys + Job::to_values(p), Job::UNIT);
                    }
                });
            }
        }
    }
}

// Brings all weights of the block's tiles and all of its slots, stage by stage, in the order in which they are used: by one
// lane, which is fastest for weights, or where slots are packed by the whole warp.
template <int D, bool PACKED>
DEVICE void fused_fill(const FusedParams &p, Ring ring) {
    Filling<PACKED> filling = {ring, ring, 0, p.ahead};
    if (!PACKED && threadIdx.x % 32 != 0) return;
    for (uint32_t s = p.from; s < p.to; s++) {
        const Stage &stage = p.stages[s];
        if (stage.kind == STAGE_ATTENTION) fused_fill_slots<D, PACKED>(stage, filling);
        if (!is_product(stage.kind)) continue;
        const TiledMatrix matrix = {p.maps + s, stage.skinny.weight, stage.skinny.rows, stage.skinny.cols};
        for (uint32_t row = blockIdx.x * 16; row < matrix.rows; row += gridDim.x * 16)
            for (uint32_t group = 0; group * 64 < matrix.cols; group += TILE_GROUPS)
                filling.next(TILE_BYTES, [&](Barrier &full, bf16 *piece) {
                    if (filling.leads()) full.copy(piece, matrix, row, group);
                });
    }
}

// A piece of weights times the activations of tokens from the piece's first column on, which `x` loads by tile of eight
// tokens and column; even and odd products gather apart, for they wait for each other.
template <uint32_t TILES, class Load>
DEVICE void fused_piece(float (&c)[TILES][2][4], const bf16 *piece, uint32_t cols, Load x) {
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (uint32_t ahead = 0; ahead < PIECE_COLS; ahead += FUSED_WARPS * 32) {
        const uint32_t base = threadIdx.x / 32 * 32 + ahead;
        if (base >= cols) break;
        const uint4 a = load<uint4>(piece + tile_place(g, base + 8 * t));
        const uint4 b = load<uint4>(piece + tile_place(g + 8, base + 8 * t));
#pragma unroll
        for (uint32_t tile = 0; tile < TILES; tile++) {
            const uint4 v = x(tile, base + 8 * t);
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

// The thread's pair, and what it needs, ahead of the product.
DEVICE Pair fused_pair(const Stage &stage, uint32_t row) {
    const SkinnyParams &p = stage.skinny;
    Pair pair = {threadIdx.x / 8, 0, row + threadIdx.x % 8, make_float2(0.0f, 0.0f)};
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
DEVICE void fused_finish(const Stage &stage, const FusedMemory &memory, uint32_t turn, const Pair &pair) {
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
        float *out = static_cast<float *>(p.out) + static_cast<size_t>(pair.step_token) * p.rows + row;
        if (row < p.rows) out[0] = pair.ahead.x + a;
        if (row + 8 < p.rows) out[8] = pair.ahead.y + b;
    } else if (stage.kind == STAGE_PLACE) {
        place_pair(p.place, memory.targets[token], pair.ahead, token, row, a, b);
    } else if (stage.kind == STAGE_GATE) {
        Gate::pair(p, token, pair.step_token, row, a, b);
    } else {
        StoreFloat::pair(p, token, pair.step_token, row, a, b);
    }
}

// The block's tiles of a product, and what follows it. `x` loads eight activations of the lane's token in a tile of eight
// tokens, by their column.
template <uint32_t TILES, class Load>
DEVICE void fused_tiles(const Stage &stage, Ring &ring, Load x) {
    FusedMemory &memory = ring.memory;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t cols = stage.skinny.cols, rows = stage.skinny.rows;
    uint32_t turn = 0;
    for (uint32_t row = blockIdx.x * 16; row < rows; row += gridDim.x * 16, turn ^= 1) {
        const Pair pair = fused_pair(stage, row);
        float c[TILES][2][4] = {};
        for (uint32_t base = 0; base < cols; base += PIECE_COLS, ring.next()) {
            memory.full[ring.slot].wait(ring.phase);
            fused_piece<TILES>(c, ring.piece(), min(PIECE_COLS, cols - base),
                               [&](uint32_t tile, uint32_t column) { return x(tile, base + column); });
            __syncwarp();
            if (lane == 0) memory.empty[ring.slot].arrive();
        }
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
        fused_finish(stage, memory, turn, pair);
    }
}

template <uint32_t TILES>
DEVICE void fused_product(const Stage &stage, Ring &ring, bf16 *staged, bool close) {
    const SkinnyParams &p = stage.skinny;
    const uint32_t g = threadIdx.x % 32 / 4, cols = p.cols, most = p.tokens - 1;
    // Where there is no token the last one stands in: nobody looks at its result.
    if (close) {
        const uint32_t stride = normed_stride(cols);
        const bf16 *x[TILES];
#pragma unroll
        for (uint32_t tile = 0; tile < TILES; tile++) x[tile] = staged + min(8 * tile + g, most) * stride;
        fused_tiles<TILES>(stage, ring, [&](uint32_t tile, uint32_t column) { return load<uint4>(x[tile] + column); });
    } else {
        const bf16 *x[TILES];
#pragma unroll
        for (uint32_t tile = 0; tile < TILES; tile++)
            x[tile] = static_cast<const bf16 *>(p.x) + static_cast<size_t>(min(8 * tile + g, most)) * cols;
        fused_tiles<TILES>(stage, ring, [&](uint32_t tile, uint32_t column) { return load_global<uint4>(x[tile] + column); });
    }
}

// A product and what follows it.
DEVICE void fused_product(const Stage &stage, Ring &ring, bf16 *staged, uint32_t room) {
    const SkinnyParams &p = stage.skinny;
    if (blockIdx.x * 16 >= p.rows) return;
    // Activations that are read often, or that are to be normed, are brought close first.
    const bool norms = p.norm != nullptr, close = norms || (p.cols >= 2048 && 2 * p.tokens * normed_stride(p.cols) <= room);
    if (norms) fused_norm(p, staged, ring.memory.squares);
    else if (close) fused_stage(p, staged);
    if (p.tokens <= 8) fused_product<1>(stage, ring, staged, close);
    else if (p.tokens <= 16) fused_product<2>(stage, ring, staged, close);
    else fused_product<4>(stage, ring, staged, close);
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

template <int D, bool PACKED>
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
        fused_fill<D, PACKED>(p, ring);
        return;
    }
    copy_stage(memory.stages[p.from % 2], p.stages + p.from);
    sync_warps<FUSED_WARPS>();
    for (uint32_t s = p.from; s < p.to; s++) {
        const Stage &stage = memory.stages[s % 2];
        const Meeting meeting = {p.arrived, (s - p.from) * gridDim.x};
        // Nobody reads the stage before this one any more: all warps have met since.
        if (s + 1 < p.to) copy_stage(memory.stages[(s + 1) % 2], p.stages + s + 1);
        if (stage.kind == STAGE_ATTENTION) {
            fused_attention<D, PACKED>(stage, ring, reinterpret_cast<float *>(room), meeting);
        } else {
            const SkinnyParams &product = stage.skinny;
            if (stage.kind == STAGE_PLACE && threadIdx.x < product.tokens)
                memory.targets[threadIdx.x] =
                    place_target(product.place, product.index != nullptr ? product.index[threadIdx.x] : threadIdx.x);
            meeting.await();
            if (stage.kind == STAGE_EMBED) fused_embed(stage);
            else fused_product(stage, ring, reinterpret_cast<bf16 *>(room), p.room);
        }
        if (s + 1 < p.to) meeting.arrive();
    }
}

#define FUSED(name, D, packed) \
    KERNEL(fused_step_##name, FusedParams, FUSED_THREADS, 1) { fused_step<D, packed>(p); }

FUSED(16, 16, false)
FUSED(32, 32, false)
FUSED(64, 64, false)
FUSED(96, 96, false)
FUSED(128, 128, false)
// Where rows may have packed slots.
FUSED(packed_16, 16, true)
FUSED(packed_32, 32, true)
FUSED(packed_64, 64, true)
FUSED(packed_96, 96, true)
FUSED(packed_128, 128, true)

// The stages of a step that is one launch, and how what they read comes to a block's memory: one thread brings the pieces of
// all stages, in the order in which they are used and as far ahead as there is room.
#pragma once
#include "async.cuh"
#include "decode.cuh"
#include "quantized.cuh"
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
    Linked *links;         // of a product, [step tokens, rows or cols] or null: what it adds to is stored there, too, or what
                           // it norms is read from there, and no meeting comes before it
    SkinnyParams skinny;
    QuantizedMatrix quantized;  // of a product, in the place of its weight
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
    uint32_t *arrived;  // zero before the launch: how often blocks came to a meeting; then what flags of links begin with
    uint32_t from, to;  // stages of this launch; all of them but where blocks cannot wait for each other
    uint32_t room;      // bytes of the block's memory for activations or attention, a multiple of 1,024
    uint32_t slots;     // pieces of weights that it has room for, up to FUSED_SLOTS
    uint32_t ahead;     // up to `slots`: pieces that are under way at once, at most: more would only hold up what else is read
    uint32_t pad;
};

// A piece of weights is a tile of sixteen rows and so many columns; of quantized ones one or two units a warp.
constexpr uint32_t PIECE_COLS = 64 * TILE_GROUPS, PIECE = TILE_BYTES / 2;
DEVICE constexpr uint32_t piece_units(uint32_t format) {
    return TILE_BYTES / unit_bytes(format) >= 2 * FUSED_WARPS ? 2 * FUSED_WARPS : FUSED_WARPS;
}
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

// Brings the block's tiles of quantized weights.
template <bool WIDE>
DEVICE void fused_fill_units(const Stage &stage, Filling<WIDE> &filling) {
    const uint32_t units = units_of(stage.skinny.cols);
    for (uint32_t row = blockIdx.x * 16; row < stage.skinny.rows; row += gridDim.x * 16) {
        const QuantizedPart part = stage.quantized.part(row);
        const uint32_t size = unit_bytes(part.format), piece_of = piece_units(part.format);
        const unsigned char *from = tile_units(part, row, units);
        for (uint32_t unit = 0; unit < units; unit += piece_of) {
            const uint32_t bytes = min(piece_of, units - unit) * size;
            filling.next(bytes, [&](Barrier &full, bf16 *piece) {
                if (filling.leads()) full.copy_once(piece, from + unit * size, bytes);
            });
        }
    }
}

// Brings all weights of the block's tiles and all of its slots, stage by stage, in the order in which they are used: by one
// lane, which is fastest for weights, or where slots are packed by the whole warp.
template <int D, bool PACKED, bool QUANTIZED>
DEVICE void fused_fill(const FusedParams &p, Ring ring) {
    Filling<PACKED> filling = {ring, ring, 0, p.ahead};
    if (!PACKED && threadIdx.x % 32 != 0) return;
    for (uint32_t s = p.from; s < p.to; s++) {
        const Stage &stage = p.stages[s];
        if (stage.kind == STAGE_ATTENTION) fused_fill_slots<D, PACKED>(stage, filling);
        if (!is_product(stage.kind)) continue;
        if (QUANTIZED && stage.quantized.count != 0) {
            fused_fill_units(stage, filling);
            continue;
        }
        const TiledMatrix matrix = {p.maps + s, stage.skinny.weight, stage.skinny.rows, stage.skinny.cols};
        for (uint32_t row = blockIdx.x * 16; row < matrix.rows; row += gridDim.x * 16)
            for (uint32_t group = 0; group * 64 < matrix.cols; group += TILE_GROUPS)
                filling.next(TILE_BYTES, [&](Barrier &full, bf16 *piece) {
                    if (filling.leads()) full.copy(piece, matrix, row, group);
                });
    }
}
